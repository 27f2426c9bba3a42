"""anchor-clock.sh: the clock is raised to the build time, then set by a real chronyd from a real NTP server.

Nothing here sets this machine's clock: `date -s` is recorded, and chronyd runs with -Q (ask and print) in place of -q.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shell.conftest import Shell

BUILT = 1_750_000_000
PRIVATE = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

LOAD = """
for lib in report types net clock; do . "$LIB/anchor-$lib.sh"; done
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
mkdir -p "$anchor_step_dir"
"""

# A server 90 s ahead on port 123, and what an initramfs does not have is not there: chrony's directories and its user.
SERVER = """
ip link set lo up
for dir in /dev/shm /run /var/lib/chrony /etc/chrony; do
    mount -t tmpfs none "$dir" || exit 9
done
faketime -f +90 /usr/sbin/chronyd -x -d -u root 'bindaddress 127.0.0.1' 'local stratum 8' 'allow 127.0.0.0/8' \\
    'cmdport 0' 'bindcmdaddress /' "pidfile $ANCHOR_ROOT/server.pid" >"$ANCHOR_ROOT/server.log" 2>&1 &
for try in 1 2 3 4 5 6 7 8 9; do
    [ -s "$ANCHOR_ROOT/server.pid" ] && break
    sleep 0.1
done
printf 'root:x:0:0::/:/bin/sh\\n' >"$ANCHOR_ROOT/passwd"
mount --bind "$ANCHOR_ROOT/passwd" /etc/passwd || exit 9
"""

# Reads and sets the time in a file; anything else goes to the real date.
DATE = """#!/bin/sh
case "$*" in
    '-u +%s') cat "$ANCHOR_ROOT/now" ;;
    '-u -s @'*)
        printf '%s\\n' "$*" >>"$ANCHOR_ROOT/set"
        [ ! -e "$ANCHOR_ROOT/locked" ] || exit 1
        printf '%s\\n' "${3#@}" >"$ANCHOR_ROOT/now"
        ;;
    *) exec /bin/date "$@" ;;
esac
"""

CHRONYD = """#!/bin/sh
printf '%s|' "$@" >>"$ANCHOR_ROOT/chronyd"
printf '\\n' >>"$ANCHOR_ROOT/chronyd"
for word; do
    shift
    [ "$word" != -q ] || word=-Q
    set -- "$@" "$word"
done
exec /usr/sbin/chronyd "$@"
"""


@dataclass(frozen=True)
class Node:
    """A node root whose `date` and `chronyd` cannot touch this machine's clock."""

    shell: Shell

    @property
    def root(self) -> Path:
        """What ANCHOR_ROOT points to."""
        return self.shell.root

    def program(self, name: str, text: str) -> None:
        """Put a program in front of the real one."""
        file = self.root / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def clock(self, now: int) -> None:
        """Say what time it is."""
        (self.root / "now").write_text(f"{now}\n")

    def set_times(self) -> list[str]:
        """Return how `date` was asked to set the clock."""
        file = self.root / "set"
        return file.read_text().splitlines() if file.exists() else []

    def note(self, name: str) -> str | None:
        """Return what the step noted."""
        file = self.root / "run/anchor/steps/10" / name
        return file.read_text().rstrip("\n") if file.exists() else None

    def run(self, script: str, *, unshare: tuple[str, ...] = (), **parameters: str) -> subprocess.CompletedProcess[str]:
        """Run `script` with the clock's parameters set."""
        env = {"PATH": f"{self.root}/bin:/usr/sbin:{os.environ['PATH']}"}
        env |= {f"anchor_clock_{name}": value for name, value in parameters.items()}
        return self.shell.run(LOAD + script, env=env, unshare=unshare)


@pytest.fixture
def node(shell: Shell) -> Node:
    node = Node(shell)
    (node.root / "etc/anchor").mkdir(parents=True)
    (node.root / "etc/anchor/build-time").write_text(f"{BUILT}\n")
    node.program("date", DATE)
    node.program("chronyd", CHRONYD)
    node.clock(BUILT + 1000)
    return node


# For what takes its time: one shell is enough.
dash_only = pytest.mark.parametrize("shell", ["dash"], indirect=True)
needs_chronyd = pytest.mark.skipif(
    not Path("/usr/sbin/chronyd").exists() or shutil.which("faketime") is None or os.geteuid() != 0,
    reason="needs chronyd, faketime and root",
)


def test_clock_of_1970_is_raised_to_the_build_time(node: Node) -> None:
    node.clock(42)
    done = node.run("anchor_clock_run")
    assert done.returncode == 0, done.stderr
    assert node.set_times() == [f"-u -s @{BUILT}"]
    assert node.note("note-source") == "build-time"
    assert node.note("number-step_seconds") == str(BUILT - 42)
    assert f"{BUILT - 42} s before the build" in done.stderr


@pytest.mark.parametrize("ahead", [0, 1, 10**9])
def test_clock_is_never_lowered(node: Node, ahead: int) -> None:
    node.clock(BUILT + ahead)
    done = node.run("anchor_clock_run")
    assert done.returncode == 0, done.stderr
    assert node.set_times() == []
    assert node.note("note-source") == "rtc"
    assert node.note("number-step_seconds") == "0"


@pytest.mark.parametrize("ahead", [-100, 0, 10**9])
def test_the_clock_is_read_without_a_program(node: Node, ahead: int) -> None:
    """As the kernel says when it started by it, and for how long it runs; only what is too early is asked for again."""
    node.clock(BUILT - 5)
    (node.root / "proc").mkdir()
    since = int(float(Path("/proc/uptime").read_text().split()[0]))
    (node.root / "proc/stat").write_text(f"cpu 1 2\nbtime {BUILT + ahead - since}\nprocesses 1\n")
    done = node.run("anchor_clock_run")
    assert done.returncode == 0, done.stderr
    assert node.set_times() == ([f"-u -s @{BUILT}"] if ahead < 0 else [])


@pytest.mark.parametrize("text", ["", "cpu 1 2\n", "btime\n", "btime soon\n", "btime 1 2\n"])
def test_a_kernel_that_does_not_say_the_time_is_no_failure(node: Node, text: str) -> None:
    node.clock(42)
    (node.root / "proc").mkdir()
    (node.root / "proc/stat").write_text(text)
    assert node.run("anchor_clock_run").returncode == 0
    assert node.set_times() == [f"-u -s @{BUILT}"]


@pytest.mark.parametrize("text", ["", "soon\n", "$(touch pwned)\n", "1e9\n", "-5\n"])
def test_build_time_that_is_no_number_is_a_warning(node: Node, text: str) -> None:
    node.clock(42)
    (node.root / "etc/anchor/build-time").write_text(text)
    done = node.run('cd "$ANCHOR_ROOT" && anchor_clock_run')
    assert done.returncode == 0
    assert "build-time does not hold a time" in done.stderr
    assert node.set_times() == []
    assert not (node.root / "pwned").exists()


def test_clock_that_cannot_be_set_is_a_warning(node: Node) -> None:
    node.clock(42)
    (node.root / "locked").touch()
    done = node.run("anchor_clock_run")
    assert done.returncode == 0
    assert "cannot set the clock" in done.stderr
    assert node.note("note-source") == "rtc"


@needs_chronyd
def test_ntp_sets_the_clock_quickly_without_anything_of_chronys(node: Node) -> None:
    script = f"{SERVER} anchor_uptime_ms; start=$anchor_uptime_ms; anchor_clock_run; status=$?; anchor_uptime_ms\n"
    script += 'printf "%s\\n" "$status" "$((anchor_uptime_ms - start))"; ls -A /run /var/lib/chrony /etc/chrony'
    done = node.run(script, unshare=PRIVATE, ntp="127.0.0.1", timeout="5")
    status, elapsed, *left = done.stdout.split()
    assert status == "0", done.stderr
    assert node.note("note-source") == "ntp", done.stderr
    assert node.note("number-step_seconds") in {"89", "90"}
    assert int(elapsed) < 1500
    assert [name for name in left if not name.startswith("/")] == ["mount"], "libmount's own, and nothing of chronyd's"
    assert not (node.root / "run/anchor/chronyd.pid").exists()
    assert "-q|" in (node.root / "chronyd").read_text()


@needs_chronyd
def test_ntp_servers_come_from_dhcp_and_a_dead_one_costs_no_time(node: Node) -> None:
    leases = node.root / "run/systemd/netif/leases"
    leases.mkdir(parents=True)
    (leases / "2").write_text("NTP=127.0.0.7 127.0.0.1 not;a;host\n")
    started = time.monotonic()
    done = node.run(SERVER + "anchor_clock_run", unshare=PRIVATE, ntp="", timeout="30")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10
    assert node.note("note-source") == "ntp", done.stderr
    arguments = (node.root / "chronyd").read_text()
    assert "server 127.0.0.7 iburst" in arguments and "server 127.0.0.1 iburst" in arguments
    assert "not;a;host" not in arguments


@needs_chronyd
@dash_only
@pytest.mark.parametrize("servers", ["127.0.0.7", "127.0.0.7,fd00::7", "ntp.invalid"])
def test_ntp_servers_that_do_not_answer_are_a_warning_within_the_time_limit(node: Node, servers: str) -> None:
    started = time.monotonic()
    done = node.run("ip link set lo up; anchor_clock_run", unshare=PRIVATE, ntp=servers, timeout="1")
    assert done.returncode == 0
    assert 0.9 < time.monotonic() - started < 10
    assert f"warning: time servers {servers.replace(',', ' ')}: " in done.stderr
    assert node.note("note-ntp_error") == "no usable answer within 1 s"
    assert node.note("note-source") == "rtc"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("echo 'Z chronyd version 4.3 starting'; echo 'Z Fatal error : no socket'; exit 1", "no socket"),
        ("echo 'System clock wrong by 5.0 s'; echo 'Could not step'", "the kernel refused the new time"),
        ("echo 'System clock wrong by $(reboot) seconds'", "System clock wrong by $(reboot) seconds"),
        ("exit 1", "no usable answer within 8 s"),
    ],
)
def test_chronyd_that_fails_is_a_warning(node: Node, program: str, error: str) -> None:
    node.program("chronyd", f"#!/bin/sh\n{program}\n")
    done = node.run("anchor_clock_run", ntp="10.0.0.1")
    assert done.returncode == 0
    assert node.note("note-ntp_error") == error
    assert node.note("note-source") == "rtc"


@dash_only
@pytest.mark.slow
def test_chronyd_that_hangs_is_ended(node: Node) -> None:
    node.program("chronyd", "#!/bin/sh\ntrap '' TERM\nexec sleep 30\n")
    started = time.monotonic()
    done = node.run("anchor_clock_run", ntp="10.0.0.1", timeout="1")
    assert done.returncode == 0
    assert time.monotonic() - started < 10
    assert node.note("note-ntp_error") == "no usable answer within 1 s"


def test_ntp_that_lowers_the_clock_below_the_build_time_is_corrected(node: Node) -> None:
    node.program(
        "chronyd",
        '#!/bin/sh\necho 1000 >"$ANCHOR_ROOT/now"\necho "System clock wrong by -1749999000.25 seconds (step)"\n',
    )
    node.clock(BUILT)
    done = node.run("anchor_clock_run", ntp="10.0.0.1")
    assert done.returncode == 0
    assert node.set_times() == [f"-u -s @{BUILT}"]
    assert node.note("note-source") == "build-time"
    assert node.note("number-step_seconds") == "0"
