"""transport nfs: attempts and downloads. tests/stages/nfs_node.py says what stands in for the kernel's mount."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from anchor_build.check import check_command_line
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from tests.shell.conftest import SHELLS
from tests.shell.downloads import processes_of
from tests.stages.nfs_node import Node, make_node, root_only

pytestmark = root_only

DATA = hashlib.shake_256(b"image").digest(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
URL = "nfs://nfs.example/export/images/node.squashfs"
DEFAULTS: dict[str, str | int] = {
    "fetch_timeout": 20,
    "fetch_connect_timeout": 3,
    "fetch_stall": 3,
    "fetch_attempts": 3,
    "fetch_reserve": 1 << 20,
}
# One attempt: its status is the script's, and what it would say at last goes to stdout.
ATTEMPT = """
anchor_fetch_left=$anchor_fetch_timeout anchor_fetch_room='a test' anchor_fetch_error='' anchor_fetch_hint=''
anchor_fetch_max=${2:-99999999}
anchor_nfs_run "$1" "$ANCHOR_ROOT/run/anchor/image/data" "$anchor_fetch_max"
status=$?
[ "$status" -lt 2 ] || printf '%s\\n' "$anchor_fetch_error"
(exit "$status")
"""
PLACE = """
anchor_fetch_left=$anchor_fetch_timeout anchor_fetch_error='' anchor_fetch_hint='' anchor_fetch_sized=''
anchor_nfs_place "$1"
status=$?
[ "$status" -ne 0 ] || printf '%s\\n' "$anchor_fetch_placed $anchor_fetch_size $anchor_fetch_sized"
[ "$status" -lt 2 ] || printf '%s\\n' "$anchor_fetch_error"
[ "$status" -ne 0 ] || cmp "$anchor_fetch_placed" "$EXPORT/node.squashfs"
[ "$status" -ne 0 ] || anchor_mounted "$ANCHOR_ROOT/run/anchor/nfs-image" || echo 'not there'
[ -z "${2:-}" ] || anchor_nfs_leave
(exit "$status")
"""
FETCH = """
anchor_stage_for_scheme() {
    [ "$1" = nfs ] || return 1
    anchor_transport=nfs anchor_transport_needs_digest=1
}
anchor_fetch "$1" "$ANCHOR_ROOT/run/anchor/image/image" "$2"
"""


def prepared(name: str, top: Path) -> Node:
    node = make_node(name, top, "transport-nfs")
    (node.export / "node.squashfs").write_bytes(DATA)
    return node


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Node:
    return prepared(request.param, tmp_path)


@pytest.fixture
def dash(tmp_path: Path) -> Node:
    return prepared("dash", tmp_path)


def data(node: Node) -> Path:
    return node.shell.root / "run/anchor/image/data"


def attempt(node: Node, url: str = URL, limit: int | str = "", **parameters: str | int) -> tuple[int, str, str]:
    done = node.run(ATTEMPT, url, str(limit), **{**DEFAULTS, **parameters})
    return done.returncode, done.stdout.strip(), done.stderr


def fetch(node: Node, sha256: str = DIGEST) -> subprocess.CompletedProcess[str]:
    return node.run(FETCH, URL, sha256, **DEFAULTS)


def test_a_function_reads_the_file_as_it_comes(node: Node) -> None:
    whole = 'anchor_fetch "$1" "$ANCHOR_ROOT/run/anchor/image/image" "$2"'
    stream = 'anchor_fetch_stream "$1" "$ANCHOR_ROOT/run/anchor/image/image" "$2" "" reader'
    reader = '. "$LIB/anchor-stream.sh"; reader() { cat >"$ANCHOR_ROOT/read"; }\n'
    done = node.run(reader + FETCH.replace(whole, stream), URL, DIGEST, **DEFAULTS)
    assert done.returncode == 0, done.stderr
    assert (node.shell.root / "read").read_bytes() == DATA
    assert "left mounted" not in done.stdout


def test_a_download_with_its_digest(node: Node) -> None:
    done = fetch(node)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (node.shell.root / "run/anchor/image/image").read_bytes() == DATA
    (mount,) = node.mounts()
    # The directory of the file is what is mounted; an RPC waits for as long as a stall may take.
    assert mount.split()[-2:] == ["nfs.example:/export/images", str(node.shell.root / "run/anchor/nfs")]
    assert ",timeo=5,vers=4.2 " in mount


def test_no_download_without_a_digest(dash: Node) -> None:
    done = fetch(dash, "")
    assert done.returncode == 1
    assert "without a digest: nothing protects nfs://" in done.stderr
    assert dash.mounts() == []
    plan = make_plan(load_registry(), transport=["nfs"], image=["squashfs"])
    (error,) = check_command_line(plan, f"root=anchor rd.anchor.squashfs.url={URL}").errors
    assert "nfs:// is not protected: add rd.anchor.squashfs.sha256=" in error


def test_another_file_than_the_digest_names_is_refused(dash: Node) -> None:
    done = fetch(dash, "0" * 64)
    assert done.returncode == 1
    assert "is not what it should be" in done.stderr


@pytest.mark.parametrize("verified", ["", "1"])
def test_a_later_attempt_goes_on(node: Node, verified: str) -> None:
    assert attempt(node)[0] == 0
    data(node).write_bytes(DATA[:1_000_001])
    assert attempt(node, fetch_verified=verified) == (0, "", "")
    assert data(node).read_bytes() == DATA
    assert attempt(node, fetch_verified=verified)[0] == 0
    assert data(node).read_bytes() == DATA


def test_what_another_transport_began_is_continued_only_by_its_digest(dash: Node) -> None:
    data(dash).write_bytes(DATA[:5000])
    assert attempt(dash)[:2] == (3, "the file on the server is not the one that was begun")
    assert attempt(dash, fetch_verified="1")[0] == 0
    assert data(dash).read_bytes() == DATA
    data(dash).write_bytes(DATA + b"more")
    assert attempt(dash, fetch_verified="1")[0] == 3


def test_another_version_or_another_url_is_not_continued(dash: Node) -> None:
    assert attempt(dash)[0] == 0
    data(dash).write_bytes(DATA[:5000])
    assert attempt(dash, URL.replace("images", "other"))[0] == 3
    assert attempt(dash)[0] == 0
    data(dash).write_bytes(DATA[:5000])
    (dash.export / "node.squashfs").write_bytes(DATA[::-1])
    assert attempt(dash)[0] == 3


def test_a_file_that_changes_while_it_is_read_starts_anew(dash: Node) -> None:
    script = f"anchor_nfs_copy() {{ printf x >>\"$1\"; touch -d @1 '{dash.export}/node.squashfs'; }}\n{ATTEMPT}"
    done = dash.run(script, URL, **DEFAULTS)
    assert (done.returncode, done.stdout) == (3, "the file changed on the server while it was read\n")


def test_a_file_that_is_too_large(dash: Node) -> None:
    status, _, said = attempt(dash, limit=1_000_000)
    assert status == 1
    assert f"{URL} is too large: it needs 2.8 MiB, and 1000000 bytes fit (a test)" in said
    assert not data(dash).exists()


@pytest.mark.parametrize(
    "url",
    [
        "nfs://nfs.example",
        "nfs://nfs.example/",
        "nfs:///x/y",
        "nfs://user@nfs.example/x/y",
        "nfs://nfs.example/x/",
        "nfs://nfs.example/x/%2e%2e/y",
        "nfs://nfs.example/x/../y",
        "nfs://nfs.example/./y",
        "nfs://nfs.example/x?y",
    ],
)
def test_what_is_no_nfs_url(dash: Node, url: str) -> None:
    status, _, said = attempt(dash, url)
    assert status == 1
    assert "write nfs://SERVER/EXPORT/PATH" in said or "nfs:// URLs may not have" in said
    assert dash.mounts() == []


@pytest.mark.parametrize(
    ("url", "mounted", "port"),
    [
        ("nfs://nfs.example:2050/a/node.squashfs", "nfs.example:/a", ",port=2050,"),
        ("nfs://nfs.example/node.squashfs", "nfs.example:/", ",timeo=5,vers"),
        ("nfs://nfs.example//a//node.squashfs", "nfs.example:/a/", ",timeo=5,vers"),
        ("nfs://[fd00::1]:2050/a/b,c/node.squashfs", "[fd00::1]:/a/b,c", ",port=2050,"),
        ("NFS://[fd00::1]/a/node.squashfs", "[fd00::1]:/a", ",timeo=5,vers"),
    ],
)
def test_which_directory_is_mounted(dash: Node, url: str, mounted: str, port: str) -> None:
    assert attempt(dash, url)[0] == 0
    assert dash.mounts()[0].split()[-2] == mounted
    assert port in dash.mounts()[0]


def test_options_of_images_are_checked_too(dash: Node) -> None:
    assert attempt(dash, nfs_options="vers=3,mountport=20048")[0] == 0
    assert ",mountport=20048,vers=3,proto=tcp,mountproto=tcp " in dash.mounts()[0]
    status, _, said = attempt(dash, nfs_options="suid")
    assert status == 1
    assert "the NFS option suid is not allowed" in said


def serve_no_files(node: Node) -> dict[str, str]:
    """Put into the export what is no file; return what is said of each, and of one that is not there."""
    os.mkfifo(node.export / "pipe")
    (node.export / "out").symlink_to("/etc/passwd")
    return {
        "pipe": "is not a regular file",
        "out": "is a link that leads out of the export",
        "nothing": "is not there",
    }


def test_only_files_are_read(node: Node) -> None:
    for name, reason in serve_no_files(node).items():
        status, _, said = attempt(node, URL.replace("node.squashfs", name))
        assert status == 1
        assert f"nfs.example:/export/images/{name} {reason}" in said


def test_a_server_that_may_come_back_is_tried_again(dash: Node) -> None:
    dash.mount_says("any|mount.nfs4: Connection refused\n")
    status, said, _ = attempt(dash)
    assert (status, said) == (2, "cannot mount nfs.example:/export/images: Connection refused")
    dash.mount_says("any|mount.nfs4: access denied by server while mounting x\n")
    assert attempt(dash)[0] == 1


def test_a_copy_that_stalls_is_broken_off(node: Node) -> None:
    # A reader that gets nothing: dd on a pipe whose other end is open and silent.
    slow = node.shell.root / "bin/dd"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    status, said, _ = attempt(node, fetch_stall=1)
    assert (status, said) == (2, "nfs.example is too slow or silent: less than 1 KiB/s for 1 s")


def test_an_attempt_ends_with_its_time(dash: Node) -> None:
    slow = dash.shell.root / "bin/dd"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    status, said, _ = attempt(dash, fetch_timeout=1)
    assert (status, said) == (2, "nfs.example is too slow: not done after 1 s")


def test_nothing_is_left_running(node: Node) -> None:
    """The guard over a copy waits in a sleep of its own, which no other program on this host is likely to have."""
    assert attempt(node, fetch_stall=86399)[0] == 0
    assert [process for process in processes_of(node.shell.root) if "86399" in process] == []


def test_a_slow_copy_is_not_a_silent_one(dash: Node) -> None:
    """10 KiB/s: in blocks of dd's that take longer to fill than the guard looks back, nothing would be seen to come."""
    slow = dash.shell.root / "bin/dd"
    feed = (
        f"for n in 0 1 2 3 4 5 6 7; do tail -c +$((n * 10240 + 1)) '{dash.export}/slow' | head -c 10240; sleep 1; done"
    )
    slow.write_text(
        '#!/bin/sh\nfor word; do\n    shift\n    case $word in if=* | skip=*) ;; iflag=*) set -- "$@" '
        'iflag=fullblock,count_bytes ;; *) set -- "$@" "$word" ;; esac\ndone\n'
        f'({feed}) | exec /bin/dd "$@"\n'
    )
    slow.chmod(0o755)
    (dash.export / "slow").write_bytes(DATA[:81920])
    status, said, _ = attempt(dash, URL.replace("node.squashfs", "slow"), fetch_stall=3)
    assert (status, said) == (0, "")
    assert data(dash).read_bytes() == DATA[:81920]


def place(node: Node, url: str = URL, leave: str = "1", **parameters: str | int) -> tuple[int, str, str]:
    done = node.run(PLACE, url, leave, **{**DEFAULTS, **parameters})
    return done.returncode, done.stdout.strip(), done.stderr


def test_a_file_in_place_stays_until_it_is_left(node: Node) -> None:
    stays = f"{node.shell.root}/run/anchor/nfs-image"
    found = f"{stays}/node.squashfs {len(DATA)} 1"
    assert place(node) == (0, found, "")
    assert place(node, leave="") == (0, f"{found}\nleft mounted: {stays}", "")
    mount, _ = node.mounts()
    options = set(mount.split()[3].split(","))
    # It waits for its server as a root does; nothing but the options of the site limits a request.
    assert {"ro", "nosuid", "nodev", "noexec", "hard", "nolock", "vers=4.2"} <= options
    assert not [option for option in options if option.startswith(("timeo", "retrans", "soft"))]
    assert mount.split()[-2:] == ["nfs.example:/export/images", stays]


def test_what_cannot_be_in_place_is_unmounted_again(node: Node) -> None:
    for name, reason in serve_no_files(node).items():
        status, left, said = place(node, URL.replace("node.squashfs", name), leave="")
        assert (status, left) == (1, "")
        assert f"nfs.example:/export/images/{name} {reason}" in said
    assert place(node, "nfs://nfs.example/x/../y", leave="")[0] == 1


def test_a_place_whose_server_may_come_back_is_tried_again(dash: Node) -> None:
    dash.mount_says("any|mount.nfs4: Connection refused\n")
    assert place(dash)[:2] == (2, "cannot mount nfs.example:/export/images: Connection refused")
    dash.mount_says("4.2|mount.nfs4: Protocol not supported\n")
    assert place(dash)[0] == 0
    assert [mount.split()[3].split("vers=")[1] for mount in dash.mounts()[-2:]] == ["4.2", "4.1"]


def test_options_that_contradict_a_place(dash: Node) -> None:
    assert place(dash, nfs_options="hard,timeo=100,rsize=65536")[2] == ""
    assert ",hard,retry=0,sec=sys,nolock,timeo=100,rsize=65536,vers=4.2 " in dash.mounts()[0]
    assert "the NFS option soft has no effect" in place(dash, nfs_options="soft")[2]


def test_a_slow_mount_of_a_place_is_given_up(dash: Node) -> None:
    dash.mount_does("exec sleep 60")
    assert place(dash, fetch_connect_timeout=1)[:2] == (
        2,
        "cannot mount nfs.example:/export/images: no answer within 1 s",
    )


@pytest.mark.parametrize("given", ["", "chosen-on-the-command-line"])
def test_each_node_is_a_client_of_its_own(node: Node, given: str) -> None:
    """Without an id, NFS 4 servers know nodes by their names, and in an initramfs all have the same."""
    identity = node.shell.root / "sys/module/nfs/parameters/nfs4_unique_id"
    identity.parent.mkdir(parents=True)
    identity.write_text(f"{given}\n")
    assert place(node)[0] == 0
    assert identity.read_text().strip() == (given or Path("/proc/sys/kernel/random/boot_id").read_text().strip())
