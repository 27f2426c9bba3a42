"""The download loop: attempts, waits, limits and digests, with transports that are a few lines of shell."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shell.conftest import LIB, SHELLS, Shell
from tests.shell.downloads import Downloader, limits, loop, processes_of

# A transport of which each test gives the body.
PROLOGUE = (
    loop("fake", {"https": False, "http": True})
    + r"""
count() {
    printf '%s %s\n' "$anchor_fetch_left" "$3" >>"$ANCHOR_ROOT/calls"
    calls=$((${calls:-0} + 1))
}
"""
)
DEFAULTS = {"timeout": 30, "connect_timeout": 5, "stall": 5, "attempts": 4, "reserve": 1000}
URL = "https://store.example/images/node.squashfs"


@dataclass(frozen=True)
class Node(Downloader):
    """A node with a fake transport."""

    def script(self, transport: str, setup: str = "") -> str:
        """Return shell text that downloads with this body of anchor_fake_run."""
        run = f'anchor_fake_run() {{\ncount "$@"\n{transport}\n}}'
        return "\n".join([PROLOGUE, setup, run, 'anchor_fetch "$@"'])

    def environment(self, parameters: Mapping[str, int]) -> dict[str, str]:
        """Return the parameters as the variables that the node's parser sets."""
        return limits({**DEFAULTS, **parameters})

    def fetch(
        self,
        transport: str,
        *,
        url: str = URL,
        sha256: str = "",
        size: int | str = "",
        image: Path | None = None,
        setup: str = "",
        env: Mapping[str, str] | None = None,
        memory: bool = False,
        **parameters: int,
    ) -> subprocess.CompletedProcess[str]:
        """Download, and make sure that nothing is left running or lying about."""
        environment = {**self.environment(parameters), **(env or {})}
        arguments = (url, str(image or self.image), sha256, str(size), *(["memory"] if memory else []))
        done = self.shell.run(self.script(transport, setup), *arguments, env=environment)
        assert processes_of(self.shell.root) == []
        assert not list(self.image.parent.glob("*.fetch"))
        return done

    def calls(self) -> list[tuple[int, int]]:
        """Return the seconds left and the size limit of each attempt."""
        log = self.shell.root / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    def notes(self) -> dict[str, str]:
        """Return what the step's record got."""
        step = self.shell.root / "run/anchor/steps/10"
        return {path.name: path.read_text().rstrip("\n") for path in step.iterdir()}


@pytest.fixture
def node(shell: Shell) -> Node:
    return prepared(shell)


@pytest.fixture
def dash(tmp_path: Path) -> Node:
    """One shell only, for what takes its time and is the same in all."""
    return prepared(Shell("dash", tmp_path))


def prepared(shell: Shell) -> Node:
    node = Node(shell)
    node.make_directories()
    memory(shell.root, 100_000)
    return node


def memory(root: Path, kib: int, initramfs: int = 0, graphics: int = 0) -> None:
    """Write what the kernel says of memory, in its order.

    Of what it cannot evict, `initramfs` and `graphics` (buffers of a graphics driver) are not locked, and 300 kB are.
    """
    (root / "proc/meminfo").write_text(
        f"MemTotal: {kib * 2} kB\nMemFree: 1 kB\nMemAvailable: {kib} kB\nCached: {initramfs + graphics + 800} kB\n"
        f"Unevictable: {initramfs + graphics + 300} kB\nMlocked: 300 kB\nShmem: {graphics + 800} kB\n"
    )


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_whole_file_arrives_with_its_digest(node: Node) -> None:
    done = node.fetch('printf hello >>"$2"', url="https://u:pw@store.example/a/b.img?key=s3cret#x")
    assert done.returncode == 0, done.stderr
    assert node.image.read_bytes() == b"hello"
    assert node.image.stat().st_mode & 0o777 == 0o600
    assert node.notes() == {
        "note-url": "https://store.example/a/b.img",
        "note-sha256": digest(b"hello"),
        "number-bytes": "5",
        "number-attempts": "1",
    }
    assert "fetched b.img: 5 bytes in 0." in done.stderr
    assert "s3cret" not in done.stderr
    assert "pw" not in done.stderr


def test_the_right_digest_is_accepted(node: Node) -> None:
    done = node.fetch('printf hello >>"$2"', url="http://store.example/x", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert node.image.read_bytes() == b"hello"


def test_a_wrong_digest_removes_the_file_and_names_both(node: Node) -> None:
    done = node.fetch('printf hellO >>"$2"', sha256=digest(b"hello"))
    assert done.returncode == 1
    assert not node.image.exists()
    assert f"its SHA-256 digest is {digest(b'hellO')}, expected {digest(b'hello')}" in done.stderr
    assert len(node.calls()) == 1
    assert node.notes()["note-sha256"] == digest(b"hellO")


def test_the_digest_covers_what_several_attempts_brought(node: Node) -> None:
    transport = """
        printf "part$calls" >>"$2"; sleep 0.3; printf . >>"$2"
        [ "$calls" = 3 ] || { anchor_fetch_error="broke off"; return 2; }
    """
    done = node.fetch(transport, sha256=digest(b"part1.part2.part3."))
    assert done.returncode == 0, done.stderr
    assert node.notes()["number-attempts"] == "3"
    assert "node.squashfs: attempt 1 of 4: broke off; next in 0.0 s" in done.stderr


def test_starting_from_zero_forgets_the_bytes_and_their_digest(node: Node) -> None:
    transport = '[ "$calls" = 2 ] || { printf old >>"$2"; sleep 0.3; return 3; }; printf new >>"$2"'
    done = node.fetch(transport, sha256=digest(b"new"))
    assert done.returncode == 0, done.stderr
    assert node.image.read_bytes() == b"new"


def test_a_large_file_is_digested_while_it_grows(node: Node) -> None:
    done = node.fetch('for i in 1 2 3 4 5; do head -c 2000000 /dev/zero >>"$2"; sleep 0.1; done')
    assert done.returncode == 0, done.stderr
    assert node.notes()["note-sha256"] == digest(bytes(10_000_000))


def test_the_end_is_seen_at_once(node: Node) -> None:
    # Between two looks at the file the digest sleeps, in a process of its own; here for 20 s.
    begun = time.monotonic()
    done = node.fetch('printf x >>"$2"; command sleep 0.5', setup="sleep() { exec sleep 20; }")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 10


def test_a_permanent_failure_is_final(node: Node) -> None:
    done = node.fetch('printf x >>"$2"; anchor_fail "no such file" "look elsewhere"; return 1')
    assert done.returncode == 1
    assert len(node.calls()) == 1
    assert done.stderr.splitlines() == ["anchor: error: no such file", "anchor: hint: look elsewhere"]
    assert not node.image.exists()


def test_the_attempts_are_counted_and_the_last_error_told(node: Node) -> None:
    done = node.fetch('anchor_fetch_error="error $calls" anchor_fetch_hint="do this"; return 2', attempts=3)
    assert done.returncode == 1
    assert len(node.calls()) == 3
    assert re.search(f"gave up on {re.escape(URL)} after attempt 3 of 3 and [0-9]+ s of 30 s: error 3", done.stderr)
    assert "hint: do this" in done.stderr
    assert not node.image.exists()


def test_the_deadline_ends_the_attempts(dash: Node) -> None:
    begun = time.monotonic()
    done = dash.fetch("sleep 0.3; anchor_fetch_error=slow; return 2", attempts=1000, timeout=3)
    assert done.returncode == 1
    assert time.monotonic() - begun < 10
    assert 2 <= len(dash.calls()) <= 11
    assert "of 1000 and 3 s of 3 s: slow" in done.stderr


@pytest.mark.parametrize(("asked", "least", "most"), [("1", 1, 9), ("99999", 1.5, 10)])
def test_the_servers_wish_is_a_wait_within_limits(dash: Node, asked: str, least: float, most: float) -> None:
    # With 4 s in all, no wait is longer than half of what is left.
    transport = f'[ "$calls" = 2 ] || {{ anchor_fetch_error=busy anchor_fetch_retry_after={asked}; return 2; }}'
    begun = time.monotonic()
    done = dash.fetch(transport, timeout=4)
    assert done.returncode == 0, done.stderr
    assert least <= time.monotonic() - begun < most


def test_the_wait_is_a_random_part_of_a_window_that_doubles(node: Node) -> None:
    setup = "sleep() { command sleep 0.01; }"
    transport = "anchor_fetch_error=busy; return 2"
    done = node.fetch(transport, setup=setup, attempts=9, timeout=3600, env={"RANDOM_NUMBER": "59999"})
    waits = [line.rpartition("next in ")[2] for line in done.stderr.splitlines() if "next in" in line]
    numbers = [59999 % (1000 * window + 1) for window in (1, 2, 4, 8, 16, 32, 60, 60)]
    assert waits == [f"{number // 1000}.{number % 1000 // 100} s" for number in numbers]


def test_a_part_that_came_makes_the_next_wait_short_again(dash: Node) -> None:
    setup = "sleep() { command sleep 0.01; }"
    transport = 'case $calls in 3 | 4) printf x >>"$2" ;; esac; anchor_fetch_error=busy; return 2'
    done = dash.fetch(transport, setup=setup, attempts=6, timeout=3600, env={"RANDOM_NUMBER": "59999"})
    waits = [line.rpartition("next in ")[2] for line in done.stderr.splitlines() if "next in" in line]
    numbers = [59999 % (1000 * window + 1) for window in (1, 2, 1, 1, 2)]
    assert waits == [f"{number // 1000}.{number % 1000 // 100} s" for number in numbers]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://store.example/x?key=s3cret", "refused to fetch http://store.example/x without a digest"),
        ("gopher://store.example/x", "can fetch gopher:// URLs"),
        ("/etc/passwd", "does not start with a scheme"),
        ("https://store.example/\nurl=file:///etc/passwd", "a character that no URL has"),
        ('https://store.example/"x', "a character that no URL has"),
        ("https://store.example/\\x", "a character that no URL has"),
        ("https://store.example/ü", "a character that no URL has"),
    ],
)
def test_what_may_not_be_fetched_is_refused_before_any_connection(node: Node, url: str, message: str) -> None:
    done = node.fetch('printf x >>"$2"', url=url)
    assert done.returncode == 1
    assert message in done.stderr
    assert "s3cret" not in done.stderr
    assert node.calls() == []


def test_a_malformed_digest_is_refused(node: Node) -> None:
    done = node.fetch('printf x >>"$2"', sha256="12ab")
    assert done.returncode == 1
    assert "is not SHA-256" in done.stderr
    assert node.calls() == []


def test_the_limit_is_what_memory_leaves(node: Node) -> None:
    memory(node.shell.root, 10_000)
    transport = 'head -c 1000 /dev/zero >>"$2"; anchor_fetch_error=again; [ "$calls" = 2 ] || return 2'
    assert node.fetch(transport, reserve=1_000_000).returncode == 0
    # What is already in the file counts as available again.
    assert [limit for _, limit in node.calls()] == [9_240_000, 9_241_000]


def test_without_room_nothing_is_asked_for(node: Node) -> None:
    memory(node.shell.root, 50 * 1024)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20)
    assert done.returncode == 1
    assert node.calls() == []
    assert "50.0 MiB of memory available, of which 64.0 MiB stay free" in done.stderr


def test_what_switch_root_gives_back_counts(node: Node) -> None:
    memory(node.shell.root, 100 * 1024, initramfs=40 * 1024)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20, size=80 << 20)
    assert done.returncode == 1
    assert (
        "it needs 80.0 MiB, and 76.0 MiB fit (100.0 MiB of memory available and 40.0 MiB more after switch_root, "
        "of which 64.0 MiB stay free)"
    ) in done.stderr
    # A framebuffer stays, though it cannot be evicted either.
    memory(node.shell.root, 100 * 1024, initramfs=40 * 1024, graphics=32 * 1024)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20, size=80 << 20)
    assert "and 76.0 MiB fit (100.0 MiB of memory available and 40.0 MiB more after switch_root" in done.stderr
    # The container images of the initramfs are still there afterwards.
    images = node.shell.root / "etc/anchor/images.squashfs"
    with images.open("wb") as file:
        file.truncate(30 << 20)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20, size=80 << 20)
    assert "and 46.0 MiB fit (100.0 MiB of memory available and 10.0 MiB more" in done.stderr


def test_the_rest_of_the_initramfs_needs_memory_too(node: Node) -> None:
    memory(node.shell.root, 50 * 1024, initramfs=80 * 1024)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20, size=40 << 20)
    assert done.returncode == 1
    assert "and 35.8 MiB fit (50.0 MiB of memory available, of which the initramfs needs 14.1 MiB)" in done.stderr
    # Whoever lowers the reserve to nothing gets all that there is.
    assert node.fetch('printf hello >>"$2"', reserve=0, size=5, sha256=digest(b"hello")).returncode == 0


# An initramfs with drivers and firmware, of which 20 MiB become free.
TIGHT = """
. "$LIB/anchor-memory.sh"
deep=$ANCHOR_ROOT/usr/lib/modules/6.1/kernel/drivers/net/ethernet/mellanox/mlx5/core
mkdir -p "$deep" "$ANCHOR_ROOT/usr/lib/firmware" "$ANCHOR_ROOT/etc"
ln -sfn usr/lib "$ANCHOR_ROOT/lib"
truncate -s 20M "$deep/mlx5_core.ko"
: >"$ANCHOR_ROOT/etc/initrd-release"
anchor_stages='core_anchor auth_acme transport_fake transport_nfs image_squashfs image_oci' anchor_image=squashfs
anchor_core_anchor_drivers() { anchor_drivers=overlay; }
anchor_transport_fake_drivers() { anchor_drivers='fake one'; }
anchor_transport_nfs_drivers() { anchor_drivers='nfs nfsv4'; }
anchor_image_squashfs_drivers() { anchor_drivers=squashfs; }
modprobe() { [ -d "$ANCHOR_ROOT/usr/lib/modules/6.1" ] && printf '%s\n' "$*" >>"$ANCHOR_ROOT/loaded"; }
rm() {
    command rm "$@" || return 1
    case $* in
        *modules*)
            printf '%s kB\n' 'MemAvailable: 71680' 'Cached: 61440' 'Unevictable: 61440' >"$ANCHOR_ROOT/proc/meminfo"
            ;;
    esac
}
"""


@pytest.mark.parametrize("known", [True, False])
def test_where_memory_is_tight_the_initramfs_gives_up_its_drivers(node: Node, known: bool) -> None:
    memory(node.shell.root, 50 * 1024, initramfs=80 * 1024)
    transport = (
        '[ "$3" -ge 41943040 ] || { anchor_fetch_too_large 41943040; return; }; head -c 41943040 /dev/zero >>"$2"'
    )
    size = 40 << 20 if known else ""
    done = node.fetch(transport, setup=TIGHT, size=size, memory=True, attempts=1, reserve=64 << 20)
    assert done.returncode == 0, done.stderr
    assert node.image.stat().st_size == 40 << 20
    assert "memory is tight: the initramfs gave up drivers that are not in use, and firmware (20.0 MiB)" in done.stderr
    assert "too large" not in done.stderr
    assert len(node.calls()) == (1 if known else 2)
    assert (node.shell.root / "loaded").read_text() == "-q -a overlay fake one squashfs\n"
    assert not (node.shell.root / "usr/lib/modules").exists()
    assert not (node.shell.root / "usr/lib/firmware").exists()


@pytest.mark.parametrize(
    ("mebibytes", "setup", "in_memory"),
    [
        (1, TIGHT, True),  # fits as it is
        (67, TIGHT, True),  # does not fit without the initramfs either
        (57, TIGHT, True),  # does not fit without the drivers either
        (40, TIGHT, False),  # no image in memory
        (40, TIGHT + "anchor_memory__bare() { return 1; }", True),  # something is mounted there
        (40, TIGHT + 'command rm "$ANCHOR_ROOT/etc/initrd-release"', True),  # an installed system
    ],
)
def test_drivers_stay_where_giving_them_up_is_of_no_use(
    dash: Node, mebibytes: int, setup: str, in_memory: bool
) -> None:
    memory(dash.shell.root, 50 * 1024, initramfs=80 * 1024)
    transport = 'head -c 1048576 /dev/zero >>"$2"'
    done = dash.fetch(transport, setup=setup, size=mebibytes << 20, memory=in_memory, reserve=64 << 20)
    assert done.returncode == (0 if mebibytes == 1 else 1)
    assert ("is too large" in done.stderr) == (mebibytes != 1)
    assert (dash.shell.root / "usr/lib/modules/6.1").is_dir()
    assert not (dash.shell.root / "loaded").exists()


def test_an_image_that_does_not_fit_all_the_same_is_refused(dash: Node) -> None:
    memory(dash.shell.root, 50 * 1024, initramfs=80 * 1024)
    done = dash.fetch('anchor_fetch_too_large "$((60 << 20))"', setup=TIGHT, memory=True, reserve=64 << 20)
    assert done.returncode == 1
    assert "it needs 60.0 MiB, and 35.8 MiB fit (50.0 MiB of memory available, of which the initramfs" in done.stderr
    assert len(dash.calls()) == 1
    assert (dash.shell.root / "usr/lib/modules/6.1").is_dir()


@pytest.mark.parametrize(
    ("at", "bare"), [("", 1), ("usr", 0), ("usr/lib/modules", 0), ("usr/lib/modules/6.1", 0), ("usr/lib/mod", 1)]
)
def test_what_is_mounted_is_not_given_up(node: Node, at: str, bare: int) -> None:
    script = """
        . "$LIB/anchor-memory.sh"
        mkdir -p "$ANCHOR_ROOT/usr/lib/modules/6.1" "$ANCHOR_ROOT/usr/lib/mod"
        [ -z "$AT" ] || mount -t tmpfs tmpfs "$ANCHOR_ROOT/$AT" || exit 9
        anchor_memory__bare "$ANCHOR_ROOT/usr/lib/modules"
    """
    done = node.shell.run(script, env={"AT": at}, unshare=("--mount",))
    assert done.returncode == 1 - bare, done.stderr


# Three mirrors; their transport is asked for $1.
A, B, C = (f"https://{name}.example/node.squashfs" for name in "abc")


def test_a_mirror_that_fails_for_good_is_dropped(node: Node) -> None:
    transport = """
        case $1 in
            *//a*) anchor_fail "a is gone" "publish it"; return 1 ;;
            *) printf hello >>"$2" ;;
        esac
    """
    done = node.fetch(transport, url=f" {A}\t{B}  {C} ", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert f"warning: not from this mirror: {A}: a is gone" in done.stderr
    assert "error: " not in done.stderr
    assert node.notes() == {
        "note-url": B,
        "note-sha256": digest(b"hello"),
        "number-bytes": "5",
        "number-attempts": "2",
    }


def test_when_all_are_dropped_each_is_named_with_its_reason(node: Node) -> None:
    transport = 'anchor_fetch_plain "$1"; anchor_fail "no file at $anchor_fetch_url" "look there"; return 1'
    done = node.fetch(transport, url=f"gopher://x/y {A}?key=s3cret {B} {A}?key=s3cret", sha256=digest(b"hello"))
    assert done.returncode == 1
    (error,) = (line for line in done.stderr.splitlines() if "error: " in line)
    assert error == (
        "anchor: error: none of the 3 mirrors has the file: gopher://x/y: nothing in this initramfs can fetch "
        f"gopher:// URLs; no file at {A}; no file at {B}"
    )
    assert len(node.calls()) == 2
    assert not node.image.exists()


def test_with_a_digest_a_change_of_mirror_goes_on_with_what_is_there(node: Node) -> None:
    transport = """
        printf '%s' "${anchor_fetch_verified:-0}" >>"$ANCHOR_ROOT/verified"
        case $1 in
            *//a*) printf hel >>"$2"; anchor_fetch_error="a broke off"; return 2 ;;
            *) printf lo >>"$2" ;;
        esac
    """
    done = node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert f"{A}: a broke off; trying another mirror" in done.stderr
    assert (node.shell.root / "verified").read_text() == "11"
    assert node.notes()["note-url"] == B


def test_without_a_digest_a_mirror_goes_on_alone_while_it_brings_something(node: Node) -> None:
    # a brings two parts and then nothing more; b begins from zero.
    transport = """
        printf '%s' "${anchor_fetch_verified:-0}" >>"$ANCHOR_ROOT/verified"
        anchor_fetch_error=broken
        case $1 in
            *//a*) [ "$calls" -gt 2 ] || printf hel >>"$2"; return 2 ;;
            *) printf hello >>"$2" ;;
        esac
    """
    done = node.fetch(transport, url=f"{A} {B}")
    assert done.returncode == 0, done.stderr
    assert node.image.read_bytes() == b"hello"
    assert node.notes()["note-sha256"] == digest(b"hello")
    assert (node.shell.root / "verified").read_text() == "0000"


def test_a_mirror_that_cannot_resume_leaves_it_to_others(node: Node) -> None:
    # b answers "start from zero"; a, asked again, goes on.
    transport = """
        anchor_fetch_error=broken
        case $calls$1 in
            1*//a*) printf hel >>"$2"; return 2 ;;
            ?*//b*) return 3 ;;
            *) printf lo >>"$2" ;;
        esac
    """
    done = node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "next in" in line] != []


def test_when_nobody_can_resume_it_starts_from_zero(node: Node) -> None:
    transport = """
        anchor_fetch_error=broken
        [ "$calls" -ne 1 ] || { printf hel >>"$2"; return 2; }
        [ ! -s "$2" ] || return 3
        printf hello >>"$2"
    """
    done = node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr


def test_parts_that_do_not_fit_together_are_fetched_once_more_from_one_mirror(node: Node) -> None:
    # b is hostile: what it adds is wrong. Who sent which part cannot be told, so a brings all of it.
    transport = """
        printf '%s%s ' "${1%%.*}" "${anchor_fetch_verified:-0}" >>"$ANCHOR_ROOT/asked"
        anchor_fetch_error=broken
        case $calls$1 in
            1*//a*) printf hel >>"$2"; return 2 ;;
            *//b*) printf XX >>"$2" ;;
            *) printf hello >>"$2" ;;
        esac
    """
    done = node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert f"the 2 parts that came from {A} and {B} are not the file: its SHA-256 digest is" in done.stderr
    # Whichever is asked alone: b is dropped for what it sends, and a has the file.
    assert node.image.read_bytes() == b"hello"
    assert "https://a0 " in (node.shell.root / "asked").read_text()


def test_wrong_parts_of_one_mirror_end_after_one_more_time(node: Node) -> None:
    transport = """
        anchor_fetch_error=broken
        [ $((calls % 2)) -eq 0 ] || { printf hel >>"$2"; return 2; }
        printf XX >>"$2"
    """
    done = node.fetch(transport, sha256=digest(b"hello"), attempts=8)
    assert done.returncode == 1
    assert len(node.calls()) == 4
    assert f"error: {URL} is not what it should be: its SHA-256 digest is {digest(b'helXX')}" in done.stderr
    assert not node.image.exists()


def test_a_mirror_with_another_file_is_dropped_and_named(node: Node) -> None:
    done = node.fetch('printf "${1%%.*}" >>"$2"', url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 1
    assert len(node.calls()) == 2
    for url, sent in ((A, b"https://a"), (B, b"https://b")):
        assert f"{url} is not what it should be: its SHA-256 digest is {digest(sent)}" in done.stderr
    assert "none of the 2 mirrors has the file" in done.stderr


def test_giving_up_names_what_each_mirror_said_last(node: Node) -> None:
    transport = 'anchor_fetch_error="${1%%.*} is silent"; return 2'
    done = node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"), attempts=3)
    assert done.returncode == 1
    assert len(node.calls()) == 6
    message = f"gave up on all 2 mirrors after attempt 3 of 3 and 0 s of 30 s: {A}: https://a is silent; {B}: https://b"
    assert message in done.stderr


def test_a_mirror_that_asked_for_time_is_left_alone_for_it(dash: Node) -> None:
    transport = """
        printf '%s ' "${1%%.*}" >>"$ANCHOR_ROOT/asked"
        anchor_fetch_error=busy
        case $1 in
            *//a*) anchor_fetch_retry_after=20; return 2 ;;
            *) [ "$calls" -gt 3 ] || return 2; printf hello >>"$2" ;;
        esac
    """
    done = dash.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert (dash.shell.root / "asked").read_text() == "https://a https://b https://b https://b "


def test_all_nodes_that_were_asked_for_the_same_time_come_back_spread_over_as_much(dash: Node) -> None:
    transport = '[ "$calls" = 2 ] || { anchor_fetch_error=busy anchor_fetch_retry_after=30; return 2; }'
    setup = "sleep() { command sleep 0.01; }"
    done = dash.fetch(transport, setup=setup, timeout=3600, env={"RANDOM_NUMBER": "29000"})
    assert "next in 59.0 s" in done.stderr


def test_the_deadline_ends_a_round_too(dash: Node) -> None:
    begun = time.monotonic()
    urls = " ".join(f"https://{number}.example/x" for number in range(20))
    done = dash.fetch("sleep 0.4; anchor_fetch_error=slow; return 2", url=urls, sha256=digest(b"hello"), timeout=1)
    assert done.returncode == 1
    assert time.monotonic() - begun < 10
    assert len(dash.calls()) <= 3
    assert "gave up on all 20 mirrors after attempt 1 of 4 and 1 s of 1 s" in done.stderr


def test_a_slow_mirror_leaves_time_for_another(node: Node) -> None:
    transport = 'anchor_fetch_error=slow; [ "$calls" = 3 ] || return 2; printf hello >>"$2"'
    assert node.fetch(transport, url=f"{A} {B}", sha256=digest(b"hello"), timeout=100).returncode == 0
    assert all(45 <= left <= 50 for left, _ in node.calls())
    # Without a digest what it brought would be lost.
    assert node.fetch("printf hello >>$2", url=f"{A} {B}", timeout=100).returncode == 0
    assert node.calls()[-1][0] > 95


def test_a_transport_that_fails_without_a_word_is_named(node: Node) -> None:
    done = node.fetch("return 1")
    assert done.returncode == 1
    assert f"error: {URL} failed without saying why" in done.stderr


@pytest.mark.parametrize("name", ["dash", "busybox"])
def test_the_order_of_mirrors_is_random(name: str, tmp_path: Path) -> None:
    node = prepared(Shell(name, tmp_path))
    setup = 'od() { command od "$@"; }'
    transport = 'printf "%s" "${1%%.*}" >>"$ANCHOR_ROOT/asked"; anchor_fail no; return 1'
    orders = set()
    for _ in range(12):
        node.fetch(transport, url=f"{A} {B} {C}", setup=setup)
        orders.add((tmp_path / "asked").read_text())
        (tmp_path / "asked").unlink()
    # All twelve alike: once in 6 to the power of 11 runs.
    assert len(orders) > 1
    assert {len(order) for order in orders} == {27}


def test_a_known_size_is_compared_with_memory_before_anything_is_asked_for(node: Node) -> None:
    memory(node.shell.root, 100 * 1024)
    done = node.fetch('printf x >>"$2"', reserve=64 << 20, size=50 << 20, url=f"{A} {B}")
    assert done.returncode == 1
    assert node.calls() == []
    assert (
        "too large: it needs 50.0 MiB, and 36.0 MiB fit (100.0 MiB of memory available, of which 64.0 MiB stay free)"
        in done.stderr
    )


def test_a_known_size_is_the_limit(node: Node) -> None:
    transport = 'printf hello >>"$2"; [ "$calls" = 2 ] || { anchor_fetch_error=again; return 2; }'
    done = node.fetch(transport, size=10, sha256=digest(b"hellohello"))
    assert done.returncode == 0, done.stderr
    assert [limit for _, limit in node.calls()] == [10, 10]


def test_a_file_that_has_its_size_is_not_asked_for_again(node: Node) -> None:
    # Only the sign of the end was missing.
    done = node.fetch('printf hello >>"$2"; anchor_fetch_error="no end"; return 2', size=5, sha256=digest(b"hello"))
    assert done.returncode == 0, done.stderr
    assert len(node.calls()) == 1


@pytest.mark.parametrize("sent", ["hell", "hello!"])
def test_another_size_is_refused(node: Node, sent: str) -> None:
    done = node.fetch(f'printf {sent} >>"$2"', size=5)
    assert done.returncode == 1
    assert f"is not what it should be: it has {len(sent)} bytes, expected 5" in done.stderr
    assert not node.image.exists()


def test_a_file_that_outgrows_its_size_is_no_question_of_memory(node: Node) -> None:
    done = node.fetch('printf hellohello >>"$2"; anchor_fetch_too_large 10', size=5, url=f"{A} {B}")
    assert done.returncode == 1
    assert f"{A} is another file: it has 10 bytes, and should have 5" in done.stderr
    assert "give the node more memory" not in done.stderr


@pytest.mark.parametrize("size", ["0", "-5", "1k", "010", "$(id)", "9" * 16])
def test_a_malformed_size_is_refused(node: Node, size: str) -> None:
    done = node.fetch('printf x >>"$2"', size=size)
    assert done.returncode == 1
    assert "is not a size" in done.stderr
    assert node.calls() == []


def place(node: Node, body: str, *arguments: str, **parameters: int) -> subprocess.CompletedProcess[str]:
    """Find a file in place, with this body of anchor_fake_place; the path goes to standard output."""
    function = f'anchor_fake_place() {{\ncount "$@" 0 0\n{body}\n}}' if body else ""
    script = f'{PROLOGUE}\n{function}\nanchor_fetch_place "$@" && printf "%s\\n" "$anchor_fetch_placed"'
    return node.shell.run(script, *arguments, env=node.environment(parameters))


def test_a_file_in_place_is_not_copied(node: Node) -> None:
    there = node.shell.root / "there"
    there.write_bytes(b"hello")
    done = place(node, f"anchor_fetch_placed={there}", URL, digest(b"hello"))
    assert (done.returncode, done.stdout) == (0, f"{there}\n"), done.stderr
    assert node.notes() == {
        "note-url": URL,
        "note-sha256": digest(b"hello"),
        "number-bytes": "5",
        "number-attempts": "1",
    }


def test_a_file_in_place_has_to_be_the_right_one(node: Node) -> None:
    there = node.shell.root / "there"
    there.write_bytes(b"hellO")
    done = place(node, f"anchor_fetch_placed={there}", URL, digest(b"hello"))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"its SHA-256 digest is {digest(b'hellO')}, expected {digest(b'hello')}" in done.stderr


def test_what_is_placed_must_be_a_readable_file(node: Node) -> None:
    done = place(node, "anchor_fetch_placed=$ANCHOR_ROOT/nothing", URL)
    assert done.returncode == 1
    assert "is not a file that can be read" in done.stderr


def test_a_place_is_tried_for_again_and_given_up(node: Node) -> None:
    there = node.shell.root / "there"
    there.write_bytes(b"hello")
    again = '[ "$calls" = 2 ] || { anchor_fetch_error="no answer"; return 2; }'
    assert place(node, f"{again}\nanchor_fetch_placed={there}", URL).returncode == 0
    done = place(node, 'anchor_fetch_error="no answer"; return 2', URL, attempts=3)
    assert done.returncode == 1
    assert f"gave up on {URL} after attempt 3 of 3 and 0 s of 30 s: no answer" in done.stderr


@pytest.mark.parametrize("url", [URL, "gopher://x/y"])
def test_a_transport_that_only_downloads_says_so(node: Node, url: str) -> None:
    done = place(node, "", url)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_names_stay_names(node: Node) -> None:
    image = node.image.with_name("-a b'\"$(touch pwned)*;.img")
    done = node.fetch('printf hello >>"$2"', image=image, url="https://s/$(touch${IFS}pwned)`x`;&*[a]{b,c}'")
    assert done.returncode == 0, done.stderr
    assert image.read_bytes() == b"hello"
    assert [path.name for path in image.parent.iterdir()] == [image.name]
    assert not Path("pwned").exists()


def test_a_digest_is_the_same_without_openssl(node: Node) -> None:
    without = node.shell.root / "bin"
    without.mkdir()
    for name in ("cat", "chmod", "head", "mkdir", "mv", "rm", "sha256sum", "sleep", "stat"):
        (without / name).symlink_to(shutil.which(name) or "")
    setup = f"PATH={without}\n! command -v openssl >/dev/null || exit 9\n"
    done = node.fetch('printf hello >>"$2"', sha256=digest(b"hello"), setup=setup)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("processor", "program"),
    [
        ("flags\t\t: fpu sse2 sha_ni avx2\n", "openssl"),
        ("flags\t\t: fpu sse2 sha_ni\n", "openssl"),
        ("flags\t\t: fpu sse2 avx2\n", "sha256sum"),
        ("Features\t: fp asimd sha1 sha2 crc32\n", "openssl"),
        ("Features\t: fp asimd\n", "sha256sum"),
        ("isa\t: rv64imafdc\n", "openssl"),
    ],
)
def test_the_processors_instructions_choose_the_digests_program(node: Node, processor: str, program: str) -> None:
    (node.shell.root / "proc/cpuinfo").write_text(f"processor\t: 0\n{processor}\nprocessor\t: 1\n")
    used = node.shell.root / "used"
    setup = "".join(
        f'{each}() {{ echo {each} >>"{used}"; command {each} "$@"; }}\n' for each in ("openssl", "sha256sum")
    )
    done = node.fetch('printf hello >>"$2"', sha256=digest(b"hello"), setup=setup)
    assert done.returncode == 0, done.stderr
    assert used.read_text().split() == [program]


def test_without_sha256sum_nothing_is_accepted(node: Node) -> None:
    done = node.fetch('printf hello >>"$2"', setup="openssl() { return 127; }\nsha256sum() { return 127; }")
    assert done.returncode == 1
    assert "could not take the digest" in done.stderr
    assert not node.image.exists()


def test_a_second_download_replaces_the_first_and_what_a_crash_left(node: Node) -> None:
    node.image.write_bytes(b"older and longer")
    crashed = node.image.with_name(node.image.name + ".fetch")
    crashed.mkdir()
    (crashed / "data").write_bytes(b"half")
    (crashed / "end").touch()
    assert node.fetch('printf hello >>"$2"').returncode == 0
    assert node.image.read_bytes() == b"hello"


def test_a_directory_is_not_replaced(node: Node) -> None:
    node.image.mkdir()
    done = node.fetch('printf hello >>"$2"')
    assert done.returncode == 1
    assert "cannot write beside" in done.stderr
    assert node.image.is_dir()


def test_progress_is_told_about_every_two_seconds(dash: Node) -> None:
    transport = """
        for i in 1 2 3 4 5; do head -c 1048576 /dev/zero >>"$2"; sleep 0.5; done
    }
    anchor_fake__total() { anchor_fetch_total=10485760"""
    done = dash.fetch(transport)
    lines = [line for line in done.stderr.splitlines() if "fetching" in line]
    assert len(lines) == 1
    assert "fetching node.squashfs: " in lines[0]
    assert " MiB of 10.0 MiB (" in lines[0]
    assert lines[0].endswith("/s")


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_an_end_from_outside_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    node = prepared(Shell(name, tmp_path))
    script = node.script('printf x >>"$2"; sleep 20; return 2')
    argv = [*SHELLS[name], "-c", script, name, URL, str(node.image)]
    environment = {"PATH": os.environ["PATH"], "LIB": str(LIB), "ANCHOR_ROOT": str(tmp_path)}
    child = subprocess.Popen(argv, env={**environment, **node.environment({})}, start_new_session=True)
    until = time.monotonic() + 5
    while not node.calls() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGTERM)
    child.wait(timeout=5)
    until = time.monotonic() + 3
    while processes_of(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_of(tmp_path) == []
    assert list(node.image.parent.iterdir()) == []


def test_a_transport_that_ends_its_shell_leaves_nothing_behind(node: Node) -> None:
    """An error of arithmetic does that, in dash; a file that somebody has open would take memory for ever."""
    script = node.script("exit 2")
    done = node.shell.run(script, "https://h/x", str(node.image), "", "", env=node.environment({}), timeout=20)
    assert done.returncode == 1
    assert "was cut off" in done.stderr
    until = time.monotonic() + 10
    while processes_of(node.shell.root) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_of(node.shell.root) == []
    assert list(node.image.parent.iterdir()) == []
