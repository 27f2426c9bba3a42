"""`anchor-build boot` with the real QEMU and a distribution's kernel, and a node of one shell script."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anchor_build import qemu
from anchor_build.bootwatch import BootResult, Until, Watcher
from anchor_build.errors import AnchorError
from anchor_build.qemu import Forward, Machine
from anchor_build.run import which
from contrib.site.image import CACHE, build_image, login_key

READY = '{"event":"ready","at_ms":4000,"boot":{"anchor":"0.2","steps":[]}}'
# The kernel hands scene=NAME to its init as a variable. Nothing here needs a module.
INIT = f"""#!/bin/sh
export PATH=/bin
busybox mount -t devtmpfs dev /dev
busybox mount -t proc proc /proc
say() {{ printf '%s\\n' "$1" >/dev/ttyS1; }}
say '{{"event":"boot","version":"0.2","kernel":"6.1"}}'
read -r up rest </proc/uptime
say '{{"event":"begin","step":"auth","stage":"acme","at_ms":1000}}'
echo "init after $up s, clock $(busybox date -u +%Y)"
# The console is slower than the other port: this waits until it has all.
busybox stty sane </dev/console
case $scene in
    failed)
        say '{{"event":"failed","step":"auth","stage":"acme","error":"no account",\
"hint":"make one","on_failure":"shell"}}'
        ;;
    panic) exit 1 ;;
    patched)
        echo "Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"
        busybox stty sane </dev/console
        exit 1
        ;;
    off) busybox poweroff -f ;;
    emergency) printf '\\033[1mEntering emergency mode.\\033[0m Exit the shell to continue.\\n' ;;
    hang) ;;
    garbage)
        busybox dd if=/dev/urandom of=/dev/ttyS1 bs=1000 count=20 2>/dev/null
        printf '\\n\\033[2J{{"event":\\n{{"event":"begin"}}\\n' >/dev/ttyS1
        say '{READY}'
        ;;
    switch) say '{{"event":"switch_root","at_ms":3000}}' ;;
    *)
        say '{{"event":"end","step":"auth","stage":"acme","result":"ok","start_ms":1000,"duration_ms":500,"bytes":12}}'
        say '{{"event":"switch_root","at_ms":3000}}'
        say '{READY}'
        ;;
esac
while :; do busybox sleep 100; done
"""

pytestmark = [
    pytest.mark.boot,
    pytest.mark.skipif(not any(which(program) for program in qemu.PROGRAMS), reason="QEMU is missing"),
]


@pytest.fixture(scope="session")
def kernel() -> Path:
    """Return the kernel of the demo's root image, which is built where the cache has none."""
    key = login_key(CACHE).with_suffix(".pub").read_text(encoding="utf-8")
    return build_image(CACHE, authorized_key=key).kernel


@pytest.fixture(scope="session")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build an initramfs of busybox, the libraries it is linked to, and INIT."""
    busybox = shutil.which("busybox")
    if busybox is None or shutil.which("cpio") is None:
        pytest.skip("busybox or cpio is missing")
    root = tmp_path_factory.mktemp("initramfs")
    for name in ("bin", "dev", "proc"):
        (root / name).mkdir()
    shutil.copy(busybox, root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    linked = subprocess.run(["ldd", busybox], capture_output=True, text=True, check=False)
    for library in re.findall(r"(/\S+) \(0x", linked.stdout):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), capture_output=True, cwd=root, check=True
    )
    image = tmp_path_factory.mktemp("boot") / "initrd.img"
    image.write_bytes(gzip.compress(archive.stdout, 1))
    return image


def boot(
    kernel: Path, initrd: Path, scene: str, console: Path, *, until: Until = "multi-user", timeout: float = 60
) -> BootResult:
    machine = Machine(kernel, initrd, f"quiet scene={scene}", memory="256M", rtc="1999-12-31")
    return qemu.boot(machine, until=until, timeout=timeout, console=console)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "anchor_build", "boot", *map(str, words)]


def qemus_using(path: Path) -> list[str]:
    """Return the processes whose command line names a path."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes()
        except OSError:
            continue
        if str(path).encode() in words and b"qemu" in words.split(b"\0")[0]:
            found.append(process.parent.name)
    return found


@pytest.mark.parametrize(
    ("scene", "outcome", "reason"),
    [
        ("panic", "panic", "Attempted to kill init"),
        ("off", "ended", "the node powered off or rebooted before it reported success"),
        ("emergency", "emergency", "emergency shell: Entering emergency mode. Exit"),
    ],
)
def test_a_node_that_fails_is_told_apart(
    kernel: Path, initrd: Path, tmp_path: Path, scene: str, outcome: str, reason: str
) -> None:
    result = boot(kernel, initrd, scene, tmp_path / "console")
    assert (result.outcome, reason in result.reason) == (outcome, True), result
    assert qemus_using(tmp_path) == []


def test_a_node_that_hangs_meets_the_time_limit(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    result = boot(kernel, initrd, "hang", tmp_path / "console", timeout=8)
    assert result.outcome == "timeout"
    assert 8 <= time.monotonic() - started < 40
    assert qemus_using(tmp_path) == []


@pytest.mark.flaky(reruns=0)
def test_a_crash_of_qemu_is_no_fault_of_the_node(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    console = tmp_path / "console"

    class Crash(Watcher):
        def tick(self) -> None:
            for process in qemus_using(console):
                os.kill(int(process), signal.SIGSEGV)

    machine = Machine(kernel, initrd, "quiet scene=hang", memory="256M")
    with pytest.raises(AnchorError, match=r"^QEMU crashed \(SIGSEGV\)"):
        qemu.boot(machine, timeout=60, console=console, watcher=Crash())


@pytest.mark.flaky(reruns=0)
def test_a_guest_that_the_emulation_ends_is_none_of_the_nodes_faults(
    kernel: Path, initrd: Path, tmp_path: Path
) -> None:
    """The kernel's words are made up here: nobody can make QEMU do that when it should."""
    machine = Machine(kernel, initrd, "quiet scene=patched", memory="256M", accel="tcg")
    with pytest.raises(AnchorError, match=r"^QEMU crashed its guest: "):
        qemu.boot(machine, timeout=60, console=tmp_path / "console")


def test_garbage_does_not_hide_the_report(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    result = boot(kernel, initrd, "garbage", tmp_path / "console")
    assert result.ok, result
    assert 1 < len(result.rejected) <= 21
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(result.rejected))


def test_until_switch_root_is_enough_when_it_was_asked_for(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    result = boot(kernel, initrd, "switch", tmp_path / "console", until="switch-root")
    assert result.ok
    assert result.boot_json is None
    assert "clock 1999" in (tmp_path / "console").read_text()


def test_command_shows_the_steps_and_leaves_what_was_asked_for(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    log, report = tmp_path / "console.log", tmp_path / "boot.json"
    words = ("--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--memory", "256M", "--timeout", "60")
    done = subprocess.run(
        command(*words, "--console", log, "--boot-json", report),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text()) == {"anchor": "0.2", "steps": []}
    assert "init after" in log.read_text()
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["auth", "switch_root", "ready"]
    assert re.search(r"done  auth \(acme\)  [0-9.]+ s", done.stderr)


def test_command_fails_by_what_the_node_reports(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    words = ("--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--append", "scene=failed")
    done = subprocess.run(
        command(*words, "--memory", "256M", "--timeout", "60", "--json", "--console", tmp_path / "log"),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["ok"], result["outcome"], result["hint"]) == (False, "failed", "make one")
    assert "failed  auth (acme)" in done.stderr
    assert f"console log: {tmp_path / 'log'}" in done.stderr


def test_kept_node_outlives_the_command(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    words = ("--kernel", kernel, "--initrd", initrd, "--append", "quiet", "--memory", "256M", "--keep", "--json")
    done = subprocess.run(
        command(*words, "--timeout", "60"),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    pid_file = Path(json.loads(done.stdout)["pid_file"])
    pid = int(pid_file.read_text())
    try:
        assert qemus_using(tmp_path) == [str(pid)]
        assert f"end it with: kill $(cat {pid_file})" in done.stderr
    finally:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while qemus_using(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert qemus_using(tmp_path) == []


def test_ctrl_c_ends_the_command_and_qemu(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--kernel", kernel, "--initrd", initrd, "--append", "quiet scene=hang", "--memory", "256M")
    child = subprocess.Popen(command(*words, "--console", log), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (log.exists() and "init after" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 130
    assert "last report: step auth (acme) began at 1.0 s" in said
    assert qemus_using(tmp_path) == []


def test_a_killed_command_takes_qemu_along(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ("--kernel", kernel, "--initrd", initrd, "--append", "quiet scene=hang", "--memory", "256M")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    argv = command(*words, "--accel", "tcg", "--console", log)
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=environment) as child:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert qemus_using(tmp_path)
        child.kill()
    while qemus_using(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert qemus_using(tmp_path) == []


def test_probe_returns_in_time_and_auto_picks_what_works(kernel: Path, initrd: Path, tmp_path: Path) -> None:
    qemu.kvm_problem.cache_clear()
    started = time.monotonic()
    accel = qemu.choose_accel("auto")
    assert time.monotonic() - started < qemu.PROBE_LIMIT_S + 20
    started = time.monotonic()
    assert qemu.choose_accel("auto") == accel
    assert time.monotonic() - started < 0.5
    machine = Machine(kernel, initrd, "quiet", memory="256M", forwards=(Forward(22), Forward(80)))
    with qemu.running(machine, timeout=60, console=tmp_path / "console") as result:
        assert result.accel == accel
        assert len(set(result.forwards.values())) == 2
        listening = Path("/proc/net/tcp").read_text()
        for port in result.forwards.values():
            assert f" 0100007F:{port:04X} 00000000:0000 0A " in listening
    assert qemus_using(tmp_path) == []
