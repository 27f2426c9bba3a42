"""The machine as arguments, the choice of the accelerator, and that QEMU never outlives the wait by accident.

A program on PATH stands in for QEMU: it finds its two serial ports in its arguments and writes to them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from anchor_build import qemu
from anchor_build.bootwatch import BootInterruptedError, Watcher
from anchor_build.cli import cli
from anchor_build.errors import AnchorError, UsageError
from anchor_build.qemu import Forward, Machine

READY = '{"event":"ready","at_ms":4000,"boot":{"anchor":"0.2"}}'
FAKE = """#!/bin/sh
for word do
    case $word in
        file,id=console,path=*) console=${word##*path=} ;;
        file,id=events,path=*) events=${word##*path=} ;;
    esac
done
echo $$ >"$(dirname "$0")/pid"
"""
Fake = Callable[[str], Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two files that need not be a kernel and an initramfs, and no probing for KVM."""
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.touch()
    initrd.touch()
    return Machine(kernel, initrd, accel="tcg")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a stand-in for QEMU on PATH; returns the file with its process id, and sends temporary files here."""
    programs, temporary = tmp_path / "bin", tmp_path / "tmp"
    programs.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def install(body: str) -> Path:
        program = programs / "qemu-system-x86_64"
        program.write_text(FAKE + body)
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return programs / "pid"

    return install


class Signaller(Watcher):
    """Sends this process a signal once the console shows something."""

    def __init__(self, number: int) -> None:
        self.number = number

    def console_line(self, line: str) -> None:
        """Send it."""
        os.kill(os.getpid(), self.number)


def alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


# --- Arguments --------------------------------------------------------------------------------------------


def test_arguments_of_a_whole_machine() -> None:
    machine = Machine(
        kernel=Path("/b/vmlinuz"),
        initrd=Path("/b/initrd"),
        append="root=anchor",
        memory="384M",
        cpus=4,
        accel="tcg",
        forwards=(Forward(22, 2222), Forward(80, 8080)),
        hostname="node1.example",
        mac="52:54:00:12:34:56",
        rtc="1970-01-01",
        oem_files=(Path("/a,b/token"),),
        disks=(qemu.Disk(Path("/a,b/disk"), "S-1"), qemu.Disk(Path("/other"))),
    )
    assert qemu.arguments(machine, Path("/w,1"), Path("/c,d/log")) == [
        *("-machine", "q35", "-cpu", "max,erms=off,fsrm=off", "-accel", "tcg,thread=multi"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-m", "384M", "-smp", "4"),
        *("-kernel", "/b/vmlinuz", "-initrd", "/b/initrd"),
        *("-append", "console=ttyS0 rd.anchor.events=ttyS1 root=anchor"),
        *("-chardev", "file,id=console,path=/c,,d/log", "-serial", "chardev:console"),
        *("-chardev", "file,id=events,path=/w,,1/events", "-serial", "chardev:events"),
        *("-device", "virtio-rng-pci"),
        "-netdev",
        "user,id=net0,hostname=node1.example,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp:127.0.0.1:8080-:80",
        *("-device", "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:12:34:56"),
        *("-rtc", "base=1970-01-01"),
        *("-drive", "if=none,id=disk0,format=raw,cache=writeback,file=/a,,b/disk"),
        *("-device", "virtio-blk-pci,drive=disk0,serial=S-1"),
        *("-drive", "if=none,id=disk1,format=raw,cache=writeback,file=/other"),
        *("-device", "virtio-blk-pci,drive=disk1"),
        *("-smbios", "type=11,path=/a,,b/token"),
        *("-pidfile", "/w,1/qemu.pid"),
    ]


def test_a_plain_machine_says_nothing_about_what_it_does_not_set(machine: Machine) -> None:
    words = qemu.arguments(machine, Path("/w"), Path("/c"))
    assert words[words.index("-netdev") + 1] == "user,id=net0"
    assert "virtio-net-pci,netdev=net0,romfile=" in words
    assert "-rtc" not in words
    assert qemu.arguments(replace(machine, accel="kvm"), Path("/w"), Path("/c"))[5] == "kvm"


@pytest.mark.parametrize(
    ("append", "whole"),
    [
        ("", "console=ttyS0 rd.anchor.events=ttyS1"),
        ("console=ttyS0,115200 quiet", "rd.anchor.events=ttyS1 console=ttyS0,115200 quiet"),
        ("console=ttyS0", "rd.anchor.events=ttyS1 console=ttyS0"),
        ("console=ttyS01", "console=ttyS0 rd.anchor.events=ttyS1 console=ttyS01"),
        ("quiet -- init words", "console=ttyS0 rd.anchor.events=ttyS1 quiet -- init words"),
    ],
)
def test_command_line_gets_what_the_watch_needs(machine: Machine, append: str, whole: str) -> None:
    assert qemu.command_line(replace(machine, append=append)) == whole


@pytest.mark.parametrize(
    ("text", "forward"),
    [("tcp:127.0.0.1:2222-:22", Forward(22, 2222)), ("tcp:127.0.0.1:0-:65535", Forward(65535, 0))],
)
def test_forwards_are_parsed(text: str, forward: Forward) -> None:
    assert qemu.parse_forward(text) == forward


@pytest.mark.parametrize(
    "text",
    [
        "tcp::2222-:22",
        "tcp:0.0.0.0:2222-:22",
        "tcp:127.0.0.1:2222-:0",
        "tcp:127.0.0.1:65536-:22",
        "tcp:127.0.0.1:1-:65536",
        "udp:127.0.0.1:2222-:22",
        "tcp:127.0.0.1:2222-:22,restrict=on",
        "tcp:127.0.0.1:2222-:22\n",
        "",
    ],
)
def test_a_forward_that_is_not_on_the_loopback_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a port forward"):
        qemu.parse_forward(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": Path("/nowhere")}, "/nowhere: no such file"),
        ({"oem_files": (Path("/nowhere/token"),)}, "/nowhere/token: no such file"),
        ({"disks": (qemu.Disk(Path("/nowhere/disk")),)}, "/nowhere/disk: no such file"),
        ({"disks": (qemu.Disk(Path("/dev/null"), "A,readonly=on"),)}, "is not a serial number"),
        ({"memory": "2048"}, "--memory '2048': is not a size"),
        ({"memory": "2G,slots=2"}, "is not a size"),
        ({"cpus": 0}, "0 is not a number of processors"),
        ({"hostname": "a,hostfwd=tcp::1-:1"}, "is not a host name"),
        ({"mac": "52:54:00:12:34"}, "is not like 52:54:00:12:34:56"),
        ({"rtc": "utc,clock=vm"}, "is not like 1970-01-01"),
        ({"append": "rd.anchor.events=ttyS0"}, "rd.anchor.events= is set by the boot itself"),
        ({"append": "x" * 2048}, "more than 2047 bytes"),
        ({"append": "a\0b"}, "has a NUL"),
    ],
)
def test_what_qemu_would_misunderstand_is_refused(machine: Machine, change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        qemu.check_machine(replace(machine, **change))  # type: ignore[arg-type]  # values by field name
    assert message in str(refused.value)


def test_all_problems_are_told_at_once(machine: Machine) -> None:
    with pytest.raises(UsageError) as refused:
        qemu.check_machine(replace(machine, memory="", cpus=0, mac="x"))
    assert len(str(refused.value).splitlines()) == 3


# --- The host ---------------------------------------------------------------------------------------------


def test_missing_qemu_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "PROGRAMS", ("qemu-of-nowhere",))
    with pytest.raises(AnchorError) as missing:
        qemu.find_qemu()
    assert "qemu-system-x86" in missing.value.hint


def test_probe_sector_is_bootable_and_short() -> None:
    assert len(qemu.probe_sector()) == 512
    assert qemu.probe_sector()[-2:] == b"\x55\xaa"


def test_accelerator_follows_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "kvm_problem", lambda: "")
    assert [qemu.choose_accel("auto"), qemu.choose_accel("kvm")] == ["kvm", "kvm"]
    monkeypatch.setattr(qemu, "kvm_problem", lambda: "it hangs")
    assert [qemu.choose_accel("auto"), qemu.choose_accel("tcg")] == ["tcg", "tcg"]
    with pytest.raises(AnchorError, match="KVM cannot be used: it hangs"):
        qemu.choose_accel("kvm")


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened here")
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("exit 85", ""),
        ("echo no such cpu >&2; exit 1", "a test guest ended QEMU with status 1: no such cpu"),
        ("exec sleep 60", "a test guest did not finish within 0.3 s"),
        ("trap '' TERM; while :; do sleep 0.1; done", "a test guest did not finish within 0.3 s"),
    ],
)
def test_probe_believes_only_the_exit_status_of_the_guest(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, body: str, problem: str
) -> None:
    monkeypatch.setattr(qemu, "PROBE_LIMIT_S", 0.3)
    pid_file = fake(body)
    assert qemu.kvm_problem.__wrapped__() == problem
    assert not alive(pid_file)


# --- Booting ----------------------------------------------------------------------------------------------


def test_qemu_is_ended_after_success_and_leaves_no_files(fake: Fake, machine: Machine, tmp_path: Path) -> None:
    pid_file = fake(f"""echo hello >"$console"; echo '{READY}' >"$events"; exec sleep 60""")
    result = qemu.boot(replace(machine, forwards=(Forward(22),)), timeout=20)
    assert result.ok
    assert result.accel == "tcg"
    assert result.boot_json == {"anchor": "0.2"}
    assert result.console is None
    assert 0 < result.forwards[22] < 65536
    assert not alive(pid_file)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_time_limit_ends_even_a_qemu_that_ignores_polite_requests(fake: Fake, machine: Machine) -> None:
    pid_file = fake("""trap '' TERM; echo started >"$console"; while :; do sleep 0.1; done""")
    started = time.monotonic()
    result = qemu.boot(machine, timeout=0.5)
    assert time.monotonic() - started < 10
    assert result.outcome == "timeout"
    assert "did not report multi-user within 0.5 s" in result.reason
    assert result.console is not None
    assert result.console.read_text() == "started\n"
    assert not alive(pid_file)


def test_an_early_end_shows_what_qemu_said(fake: Fake, machine: Machine) -> None:
    fake("""echo 'could not set up host forwarding rule' >&2; exit 1""")
    result = qemu.boot(machine, timeout=20)
    assert result.outcome == "ended"
    assert result.reason == "QEMU ended with status 1: could not set up host forwarding rule"


def test_console_log_of_an_earlier_boot_is_not_believed(fake: Fake, machine: Machine, tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("Kernel panic - not syncing: long ago\n")
    fake(f"""sleep 0.3; echo '{READY}' >"$events"; exec sleep 60""")
    result = qemu.boot(machine, timeout=20, console=log)
    assert result.ok
    assert result.console == log


def test_a_console_log_that_cannot_be_written_is_an_error(fake: Fake, machine: Machine, tmp_path: Path) -> None:
    fake("exit 0")
    with pytest.raises(AnchorError, match="No such file or directory"):
        qemu.boot(machine, console=tmp_path / "missing" / "log")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_qemu_and_tells_what_was_seen(fake: Fake, machine: Machine, number: signal.Signals) -> None:
    pid_file = fake("""echo '{"event":"boot","version":"1"}' >"$events"; echo up >"$console"; exec sleep 60""")
    # Under nohup(1) the tests inherit an ignored SIGHUP, which boot() leaves ignored.
    inherited = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    before = signal.getsignal(number)
    try:
        with pytest.raises(BootInterruptedError) as interrupted:
            qemu.boot(machine, timeout=20, watcher=Signaller(number))
        after = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert interrupted.value.result.outcome == "interrupted"
    assert interrupted.value.result.console_tail == ("up",)
    assert len(interrupted.value.result.events) == 1
    assert after is before
    assert not alive(pid_file)


def test_running_has_the_node_for_the_block_only(fake: Fake, machine: Machine) -> None:
    pid_file = fake(f"""echo '{READY}' >"$events"; exec sleep 60""")
    with qemu.running(machine, timeout=20) as result:
        assert result.ok
        assert alive(pid_file)
    assert not alive(pid_file)


def test_running_ends_the_node_when_the_block_raises(fake: Fake, machine: Machine) -> None:
    pid_file = fake(f"""echo '{READY}' >"$events"; exec sleep 60""")
    with pytest.raises(OSError, match="of the test"), qemu.running(machine, timeout=20):
        raise OSError("of the test")
    assert not alive(pid_file)


def test_running_refuses_a_node_that_does_not_get_there(fake: Fake, machine: Machine) -> None:
    fake("""printf 'last words' >"$console"; exit 0""")
    with pytest.raises(AnchorError) as failed, qemu.running(machine, timeout=20):
        pytest.fail("the block must not run")
    assert "the node powered off or rebooted before it reported success" in failed.value.message
    assert "  | last words" in failed.value.message


def test_boot_works_outside_of_the_main_thread(fake: Fake, machine: Machine) -> None:
    fake(f"""echo '{READY}' >"$events"; exec sleep 60""")
    outcomes: list[str] = []
    thread = threading.Thread(target=lambda: outcomes.append(qemu.boot(machine, timeout=20).outcome))
    thread.start()
    thread.join(30)
    assert outcomes == ["reached"]


# --- The command ------------------------------------------------------------------------------------------


def invoke(machine: Machine, *words: str) -> Result:
    base = ("boot", "--kernel", str(machine.kernel), "--initrd", str(machine.initrd), "--accel", "tcg")
    return CliRunner().invoke(cli, [*(["-v"] if "-v" in words else []), *base, *(w for w in words if w != "-v")])


def test_the_log_takes_the_place_of_no_input(fake: Fake, machine: Machine) -> None:
    pid_file = fake("exit 1")
    before = machine.initrd.read_bytes()
    done = invoke(machine, "--console", str(machine.initrd))
    assert isinstance(done.exception, UsageError)
    assert done.exception.message.startswith(f"--console {machine.initrd}: would take the place of {machine.initrd}")
    assert (machine.initrd.read_bytes(), pid_file.exists()) == (before, False)


def test_a_command_line_without_anchor_is_warned_of(fake: Fake, machine: Machine) -> None:
    fake("exit 1")
    assert "warning: --append has no root=anchor: " in invoke(machine, "--append", "quiet").stderr
    assert "no root=anchor" not in invoke(machine, "--append", "quiet root=anchor").stderr


def test_verbose_command_shows_the_console_and_the_notes(fake: Fake, machine: Machine) -> None:
    end = '{"event":"end","step":"image","stage":"squashfs","result":"ok","start_ms":1,"duration_ms":2,"bytes":12}'
    fake(f"""printf 'one \\033[31mred\\033[0m\\n' >"$console"; sleep 0.3
printf '%s\\n' '{end}' '{READY}' >"$events"; exec sleep 60""")
    done = invoke(machine, "-v", "--timeout", "20")
    assert done.exit_code == 0, done.output
    assert "| one red\n" in done.stderr
    assert "bytes: 12" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--boot-json", "b.json", "--until", "switch-root"), "--boot-json needs --until multi-user"),
        (("--boot-json", "/nowhere/b.json"), "--boot-json /nowhere/b.json: /nowhere is not a directory"),
        (("--hostfwd", "tcp::1-:1"), "is not a port forward"),
        (("--memory", "lots"), "is not a size"),
        (("--timeout", "nan"), "--timeout nan: is not a number of seconds"),
    ],
)
def test_wrong_usage_is_refused_before_anything_starts(
    fake: Fake, machine: Machine, words: tuple[str, ...], message: str
) -> None:
    pid_file = fake("exit 1")
    done = invoke(machine, *words)
    assert isinstance(done.exception, UsageError)
    assert message in done.exception.message
    assert not pid_file.exists()
