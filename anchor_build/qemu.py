"""Boots a node in QEMU: the machine as data, whether KVM really works, and watching until the node has reported.

The node has two serial ports. ttyS0 is its console and ttyS1 is where it reports events (see events.py); QEMU
writes both to files, so nothing is lost or blocked when nobody reads. Its network is QEMU's user mode network:
10.0.2.2 is this host, and ports of the node appear on this host's loopback only.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from anchor_build.bootwatch import BootInterruptedError, BootResult, Until, Watcher, failure_text, observe
from anchor_build.cmdline import COMMAND_LINE_MAX
from anchor_build.errors import AnchorError, UsageError
from anchor_build.events import printable
from anchor_build.run import start, stop, which

Accel = Literal["auto", "kvm", "tcg"]

# Enterprise Linux has one QEMU, outside of PATH.
PROGRAMS = ("qemu-system-x86_64", "/usr/libexec/qemu-kvm")
EVENTS_PORT = "ttyS1"
# What ends QEMU for a fault of its own.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
# How a guest's kernel ends by such a fault: it puts a breakpoint where it changes its own code while others run
# (arch/x86/kernel/alternative.c), and QEMU's emulation of several processors may run into it after it has gone.
PATCHED = re.compile(r"int3: 0000 \[#1\]")
PROBE_LIMIT_S = 2.0  # where KVM works, the probe takes 0.2 s


@dataclass(frozen=True)
class Forward:
    """A TCP port of the node, seen on 127.0.0.1; host port 0 becomes a free one when the node starts."""

    node_port: int
    host_port: int = 0


@dataclass(frozen=True)
class Disk:
    """A disk of the node: a raw file that it may write to, and the serial number that it shows."""

    file: Path
    serial: str = ""


@dataclass(frozen=True)
class Machine:
    """A node to boot. `memory` is a number with M or G; `rtc` the clock's start, such as 1970-01-01.

    The texts of `oem_files` become SMBIOS OEM strings (type 11), which may be secret: arguments are not.
    `firmware` is UEFI's code and its variables, such as OVMF's two files, of which the second one is written;
    without it, the machine has QEMU's own BIOS.
    """

    kernel: Path
    initrd: Path
    append: str = ""
    memory: str = "2G"
    cpus: int = 2
    accel: Accel = "auto"
    forwards: tuple[Forward, ...] = ()
    hostname: str = ""
    mac: str = ""
    rtc: str = ""
    oem_files: tuple[Path, ...] = ()
    firmware: tuple[Path, Path] | None = None
    disks: tuple[Disk, ...] = ()


# --- The machine as arguments -----------------------------------------------------------------------------


def parse_forward(text: str) -> Forward:
    """Parse tcp:127.0.0.1:HOSTPORT-:NODEPORT; raises UsageError for all else, other addresses included."""
    match = re.fullmatch(r"tcp:127\.0\.0\.1:([0-9]{1,5})-:([0-9]{1,5})", text)
    if match is None or int(match[1]) > 65535 or not 0 < int(match[2]) <= 65535:
        raise UsageError(
            f"--hostfwd {printable(text)}: is not a port forward",
            "write tcp:127.0.0.1:HOSTPORT-:NODEPORT; only the loopback address may be used, port 0 picks a free one",
        )
    return Forward(int(match[2]), int(match[1]))


def check_machine(machine: Machine) -> None:
    """Raise UsageError that names everything QEMU or the kernel would misunderstand."""
    files = (machine.kernel, machine.initrd, *machine.oem_files, *(machine.firmware or ()))
    files += tuple(disk.file for disk in machine.disks)
    problems = [f"{path}: no such file" for path in files if not path.is_file()]
    shapes = (
        ("--memory", machine.memory, r"[1-9][0-9]{0,5}[MG]", "is not a size such as 512M or 2G"),
        ("--hostname", machine.hostname, r"([A-Za-z0-9][A-Za-z0-9.-]{0,252})?", "is not a host name"),
        ("--mac", machine.mac, r"([0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5})?", "is not like 52:54:00:12:34:56"),
        ("--rtc", machine.rtc, r"([0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:]{8})?)?", "is not like 1970-01-01T00:00:00"),
    )
    serials = [("serial", disk.serial, r"[A-Za-z0-9._-]{0,20}", "is not a serial number") for disk in machine.disks]
    problems += [
        f"{name} {text!r}: {what}" for name, text, shape, what in (*shapes, *serials) if not re.fullmatch(shape, text)
    ]
    if machine.cpus < 1:
        problems.append(f"{machine.cpus} is not a number of processors")
    if any(word.startswith("rd.anchor.events=") for word in machine.append.split()):
        problems.append("rd.anchor.events= is set by the boot itself")
    if "\0" in machine.append or len(command_line(machine).encode()) > COMMAND_LINE_MAX:
        problems.append(f"the kernel command line has a NUL or more than {COMMAND_LINE_MAX} bytes")
    if problems:
        raise UsageError("\n".join(problems))


def command_line(machine: Machine) -> str:
    """Return the kernel command line; ours comes first, because a bare `--` ends the kernel's own words."""
    words = machine.append.split()
    console = not any(word == "console=ttyS0" or word.startswith("console=ttyS0,") for word in words)
    ours = ["console=ttyS0"] * console + [f"rd.anchor.events={EVENTS_PORT}"]
    return " ".join([*ours, machine.append]).strip()


def platform(accel: Accel) -> list[str]:
    """Return the arguments that the KVM probe and a boot have in common."""
    accelerator = "kvm" if accel == "kvm" else "tcg,thread=multi"
    quiet = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    # Without erms and fsrm the guest's kernel does not clear and copy memory byte by byte, as TCG runs rep stosb.
    cpu = "max" if accel == "kvm" else "max,erms=off,fsrm=off"
    return ["-machine", "q35", "-cpu", cpu, "-accel", accelerator, *quiet]


def arguments(machine: Machine, directory: Path, console: Path) -> list[str]:
    """Return QEMU's arguments for a machine whose accelerator and ports are settled."""
    network = ["user", "id=net0"]
    network += [f"hostname={machine.hostname}"] if machine.hostname else []
    network += [f"hostfwd=tcp:127.0.0.1:{fwd.host_port}-:{fwd.node_port}" for fwd in machine.forwards]
    # Without romfile= QEMU loads iPXE, which costs time and a package.
    card = "virtio-net-pci,netdev=net0,romfile=" + (f",mac={machine.mac}" if machine.mac else "")
    argv = platform(machine.accel)
    argv += ["-m", machine.memory, "-smp", str(machine.cpus)]
    argv += ["-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", command_line(machine)]
    for name, path in (("console", console), ("events", directory / "events")):
        argv += ["-chardev", f"file,id={name},path={_value(path)}", "-serial", f"chardev:{name}"]
    argv += ["-device", "virtio-rng-pci", "-netdev", ",".join(network), "-device", card]
    argv += ["-rtc", f"base={machine.rtc}"] if machine.rtc else []
    for path, access in zip(machine.firmware or (), ("on", "off"), strict=False):
        argv += ["-drive", f"if=pflash,format=raw,readonly={access},file={_value(path)}"]
    for number, disk in enumerate(machine.disks):
        # What a node that is switched off has flushed is in the file; discarding would only cost time.
        argv += ["-drive", f"if=none,id=disk{number},format=raw,cache=writeback,file={_value(disk.file)}"]
        argv += ["-device", f"virtio-blk-pci,drive=disk{number}" + (f",serial={disk.serial}" if disk.serial else "")]
    for file in machine.oem_files:
        argv += ["-smbios", f"type=11,path={_value(file)}"]
    return [*argv, "-pidfile", str(directory / "qemu.pid")]


def _value(path: Path) -> str:
    """Return a path as the value of a QEMU option, where a comma is written twice."""
    return str(path).replace(",", ",,")


# --- What this host can do --------------------------------------------------------------------------------


def find_qemu() -> Path:
    """Return QEMU for x86; raises AnchorError that says which package has it."""
    for program in PROGRAMS:
        if found := which(program):
            return found
    raise AnchorError(
        f"{PROGRAMS[0]}: program not found",
        "apt-get install qemu-system-x86, dnf install qemu-system-x86-core, or qemu-kvm on Enterprise Linux",
    )


def choose_accel(wanted: Accel) -> Accel:
    """Return "kvm" or "tcg"; raises AnchorError where KVM is demanded and does not work."""
    if wanted == "tcg":
        return wanted
    problem = kvm_problem()
    if problem and wanted == "kvm":
        raise AnchorError(f"KVM cannot be used: {problem}", "use --accel tcg: slower, and works everywhere")
    return "tcg" if problem else "kvm"


def probe_sector() -> bytes:
    """Return a boot sector that reports 42 to QEMU's debug-exit port: mov al,42; out 0xf4,al; hlt."""
    return bytes([0xB0, 42, 0xE6, 0xF4, 0xF4]).ljust(510, b"\0") + b"\x55\xaa"


@functools.cache
def kvm_problem() -> str:
    """Return why KVM is of no use here, or nothing; a guest has to run, because /dev/kvm may open and still hang.

    Takes PROBE_LIMIT_S at most, and a moment more to end a guest that hangs. Asked once per process.
    """
    device = Path("/dev/kvm")
    if not device.exists():
        return f"{device} does not exist"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"this user may not open {device}; the group kvm may"
    program = find_qemu()
    with tempfile.TemporaryDirectory(prefix="anchor-kvm-") as temporary:
        sector, log = Path(temporary, "sector"), Path(temporary, "log")
        sector.write_bytes(probe_sector())
        drive = f"if=virtio,format=raw,readonly=on,file={_value(sector)}"
        debug_exit = "isa-debug-exit,iobase=0xf4,iosize=1"
        argv = [*platform("kvm"), "-m", "16M", "-drive", drive, "-device", debug_exit]
        child = start([program, *argv], log=log)
        try:
            status = child.wait(PROBE_LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"a test guest did not finish within {PROBE_LIMIT_S:g} s"
        finally:
            _end(child)
        said = printable(log.read_text(errors="replace").strip().rpartition("\n")[2], 200)
    # The debug-exit device ends QEMU with twice the value plus one.
    return "" if status == 42 * 2 + 1 else f"a test guest ended QEMU with status {status}: {said}"


# --- Booting ----------------------------------------------------------------------------------------------


def boot(
    machine: Machine,
    *,
    until: Until = "multi-user",
    timeout: float = 300.0,
    console: Path | None = None,
    keep: bool = False,
    watcher: Watcher | None = None,
) -> BootResult:
    """Boot a node and return once it reports that it got there, fails, or `timeout` seconds are over.

    QEMU is ended before this returns or raises, unless `keep` is set and the node got there; then `pid_file`
    of the result names it. Without `keep` it ends even when this process is killed. `console` is where the
    console's log goes; without it, only a boot that fails or is kept leaves one, in a temporary directory.

    Raises UsageError for a machine that cannot be, AnchorError where QEMU is missing or crashes, or KVM is demanded
    and does not work, and BootInterruptedError on Ctrl-C, SIGTERM and SIGHUP.
    """
    with _signals_interrupt(), _started(machine, console, tied=not keep) as node:
        result = _watch(node, until, timeout, watcher)
        node.keep = keep and result.ok
        if node.keep:
            return replace(result, pid_file=node.directory / "qemu.pid")
        return replace(result, console=None) if result.ok and console is None else result


@contextmanager
def running(
    machine: Machine,
    *,
    until: Until = "multi-user",
    timeout: float = 300.0,
    console: Path | None = None,
    watcher: Watcher | None = None,
) -> Iterator[BootResult]:
    """Boot a node as `boot` does and have it until the block ends; raises AnchorError if it does not get there."""
    with _signals_interrupt(), _started(machine, console) as node:
        result = _watch(node, until, timeout, watcher)
        if not result.ok:
            raise AnchorError(failure_text(result), result.hint)
        yield result


@dataclass
class _Node:
    """A started QEMU with its settled machine and its files; `keep` lets it outlive us."""

    child: subprocess.Popen[str]
    machine: Machine
    directory: Path
    console: Path
    keep: bool = False
    wants_log: bool = False


@contextmanager
def _started(machine: Machine, console: Path | None, *, tied: bool = True) -> Iterator[_Node]:
    """Start QEMU, and end it afterwards; remove its files unless somebody will want them.

    It is `tied` to this process unless it may have to outlive it.
    """
    check_machine(machine)
    program = find_qemu()
    forwards = tuple(replace(fwd, host_port=fwd.host_port or _free_port()) for fwd in machine.forwards)
    machine = replace(machine, accel=choose_accel(machine.accel), forwards=forwards)
    directory = Path(tempfile.mkdtemp(prefix="anchor-boot-"))
    log = console or directory / "console.log"
    node = None
    try:
        _clear(log)
        child = start([program, *arguments(machine, directory, log)], log=directory / "qemu.log", tied=tied)
        node = _Node(child, machine, directory, log)
        yield node
    finally:
        if node is not None and not node.keep:
            _end(node.child)
        if node is None or not (node.keep or (node.wants_log and console is None)):
            shutil.rmtree(directory, ignore_errors=True)


def _clear(log: Path) -> None:
    """Empty the console's log: what an earlier boot left must not be taken for this one's."""
    try:
        log.write_bytes(b"")
    except OSError as error:
        raise AnchorError(f"{log}: {error.strerror}", "name a console log that can be written") from None


def _watch(node: _Node, until: Until, timeout: float, watcher: Watcher | None) -> BootResult:
    """Observe the node to its verdict, and add to the result what only this module knows."""

    def complete(result: BootResult) -> BootResult:
        node.wants_log = not result.ok
        forwards = {fwd.node_port: fwd.host_port for fwd in node.machine.forwards}
        return replace(result, accel=node.machine.accel, console=node.console, forwards=forwards)

    files = (node.console, node.directory / "events", node.directory / "qemu.log")
    try:
        result = complete(observe(node.child.poll, *files, until=until, timeout=timeout, watcher=watcher))
    except BootInterruptedError as error:
        raise BootInterruptedError(complete(error.result)) from None
    status = node.child.poll() or 0
    if not result.ok and -status in CRASHES:
        name = signal.Signals(-status).name
        raise AnchorError(
            f"QEMU crashed ({name})", f"this is no fault of the node's: boot it again; see {node.console}"
        )
    if (
        node.machine.accel == "tcg"
        and result.outcome == "panic"
        and PATCHED.search(node.console.read_text("utf-8", "replace"))
    ):
        raise AnchorError(
            "QEMU crashed its guest: without KVM, a processor ran into code that another was changing (int3)",
            f"this is no fault of the node's: boot it again; see {node.console}",
        )
    return result


def _end(child: subprocess.Popen[str]) -> None:
    """End QEMU, even if the one who waits for it has no patience left."""
    try:
        stop(child, grace=2.0)
    except subprocess.TimeoutExpired:
        pass  # killed, but held inside the kernel by a KVM that hangs: nobody can do more
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        raise


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does, or they would leave QEMU behind; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
