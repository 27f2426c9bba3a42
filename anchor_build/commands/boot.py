"""`anchor-build boot`: run a kernel and an initramfs in QEMU, and exit by what the node reports."""

from __future__ import annotations

import json
import math
import shlex
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from anchor_build.bootwatch import (
    BootInterruptedError,
    BootResult,
    Until,
    Watcher,
    describe,
    failure_text,
    step_name,
)
from anchor_build.console import ERASE_LINE, Console
from anchor_build.errors import AnchorError, UsageError
from anchor_build.events import Begin, Boot, End, Event, Failed, Finished, Ready, SwitchRoot
from anchor_build.files import refuse_overwriting
from anchor_build.qemu import Accel, Machine, boot, check_machine, choose_accel, parse_forward

# A pause shorter than this between two steps is not worth a line.
PAUSE_S = 1.0

FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


class LiveSteps(Watcher):
    """Shows what the node is doing as steps of the console; `close` ends the one that is open."""

    def __init__(self, console: Console, accel: str) -> None:
        self.console = console
        self._open: AbstractContextManager[None] | None = None
        self._pause, self._pause_at = "", 0.0
        self._begin(f"start the kernel and the initramfs ({accel})")

    def event(self, event: Event) -> None:
        """Turn an event into the begin or end of a step."""
        match event:
            case Begin():
                self.close()
                self._begin(step_name(event))
            case End():
                self.close(failed=not event.ok)
                for key, value in event.notes.items():
                    self.console.detail(f"        {key}: {value}")
            case Failed():
                self.close(failed=True)
            case Boot() | SwitchRoot() | Finished() | Ready():
                self.close()
                self.console.detail(f"        {describe(event)}")
        if isinstance(event, Boot | End):
            self._pause, self._pause_at = "wait for the next step", time.monotonic() + PAUSE_S
        elif isinstance(event, SwitchRoot):
            self._begin("start the system")

    def console_line(self, line: str) -> None:
        """Show the console with -v."""
        self.console.detail(f"{ERASE_LINE if self.console.live else ''}| {line}")

    def tick(self) -> None:
        """Say so when the node is between two steps for long."""
        if self._pause and time.monotonic() >= self._pause_at:
            self._begin(self._pause)

    def close(self, *, failed: bool = False) -> None:
        """End the step that is open, if any."""
        self._pause = ""
        step, self._open = self._open, None
        if step is not None:
            error = AnchorError("failed") if failed else None
            step.__exit__(type(error) if error else None, error, None)

    def _begin(self, title: str) -> None:
        self._pause = ""
        self._open = self.console.step(title)
        self._open.__enter__()


@click.command("boot", short_help="Boot a kernel and an initramfs in QEMU and watch the node's steps.")
@click.option("--kernel", type=FILE, required=True, help="The kernel to boot.")
@click.option("--initrd", type=FILE, required=True, help="The initramfs to boot.")
@click.option("--append", multiple=True, metavar="WORDS", help="Kernel command line; may be repeated.")
@click.option("--memory", default="2G", show_default=True, metavar="SIZE", help="Memory, such as 384M.")
@click.option("--cpus", type=click.IntRange(1, 255), default=2, show_default=True, help="Processors.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="End a node that reports neither success nor failure by then.",
)
@click.option(
    "--until",
    type=click.Choice(["switch-root", "multi-user"]),
    default="multi-user",
    show_default=True,
    help="What counts as success.",
)
@click.option(
    "--accel",
    type=click.Choice(["auto", "kvm", "tcg"]),
    default="auto",
    show_default=True,
    help="auto takes KVM only where a test guest proves that it works.",
)
@click.option(
    "--hostfwd",
    multiple=True,
    metavar="tcp:127.0.0.1:PORT-:NODEPORT",
    help="Show a port of the node on this host's loopback; PORT 0 picks a free one. May be repeated.",
)
@click.option("--hostname", default="", metavar="NAME", help="The host name that DHCP gives the node.")
@click.option("--mac", default="", metavar="ADDRESS", help="The address of the node's network card.")
@click.option("--rtc", default="", metavar="BASE", help="What the node's clock starts at, such as 1970-01-01.")
@click.option(
    "--oem-file",
    "oem_files",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Give the node the text of FILE as an SMBIOS OEM string, such as anchor-token=... May be repeated.",
)
@click.option(
    "--console",
    "log",
    type=OUTPUT,
    metavar="FILE",
    help="Where to leave the log of the console. Default: a temporary file, which stays after a failure.",
)
@click.option("--boot-json", type=OUTPUT, metavar="FILE", help="Where to leave the node's own boot.json.")
@click.option("--keep", is_flag=True, help="Leave the node running once it got there.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def command(
    console: Console,
    *,
    kernel: Path,
    initrd: Path,
    append: tuple[str, ...],
    memory: str,
    cpus: int,
    timeout: float,
    until: Until,
    accel: Accel,
    hostfwd: tuple[str, ...],
    hostname: str,
    mac: str,
    rtc: str,
    oem_files: tuple[Path, ...],
    log: Path | None,
    boot_json: Path | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Boot a kernel and an initramfs in QEMU and watch the node's steps.

    Exits 0 if the node reports that it got there. The node reaches this host as 10.0.2.2, and nobody but this
    host reaches the node. The kernel command line gets rd.anchor.events=ttyS1, and console=ttyS0 unless it is
    there. With -v (before the command) the console is shown as it goes.

    \b
    Examples:
      anchor-build boot --kernel vmlinuz --initrd node.img --append "root=anchor rd.anchor.squashfs.url=..."
      anchor-build boot --kernel vmlinuz --initrd node.img --memory 384M --keep --hostfwd tcp:127.0.0.1:2222-:22
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    if boot_json is not None and until != "multi-user":
        raise UsageError("--boot-json needs --until multi-user", "the node sends its boot.json when it is ready")
    if not math.isfinite(timeout):
        raise UsageError(f"--timeout {timeout}: is not a number of seconds")
    if boot_json is not None and not boot_json.parent.is_dir():
        raise UsageError(f"--boot-json {boot_json}: {boot_json.parent} is not a directory")
    forwards = tuple(parse_forward(text) for text in hostfwd)
    machine = Machine(kernel, initrd, " ".join(append), memory, cpus, accel, forwards, hostname, mac, rtc, oem_files)
    check_machine(machine)
    for option, output in (("--console", log), ("--boot-json", boot_json)):
        refuse_overwriting(option, filter(None, [output]), (kernel, initrd, *oem_files))
    if "root=anchor" not in machine.append.split():
        console.warn(
            "--append has no root=anchor: unless it is baked in, the node does not use anchor and reports nothing"
        )
    machine = replace(machine, accel=choose_accel(accel))
    steps = LiveSteps(console, machine.accel)
    got_there = False
    try:
        result = boot(machine, until=until, timeout=timeout, console=log, keep=keep, watcher=steps)
        got_there = result.ok
    except BootInterruptedError as error:
        console.error(failure_text(error.result))
        raise
    finally:
        steps.close(failed=not got_there)
    if as_json:
        console.json(as_data(result))
    if not result.ok:
        raise AnchorError(failure_text(result), result.hint)
    if boot_json is not None:
        _write(boot_json, json.dumps(result.boot_json, indent=2) + "\n")
    if not as_json:
        console.table(["step", "stage", "start s", "duration s"], rows(result))
    _say_how_to_go_on(console, result)


def _write(target: Path, text: str) -> None:
    """Write a file whole or not at all."""
    fresh = target.with_name(f".{target.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)
    except OSError as error:
        raise AnchorError(f"{target}: {error.strerror}") from None


def rows(result: BootResult) -> list[list[object]]:
    """Return the node's steps and milestones with their times, in seconds since the kernel started."""
    table: list[list[object]] = []
    for event in result.events:
        match event:
            case End():
                table.append([event.step, event.stage, event.start_ms / 1000, event.duration_ms / 1000])
            case SwitchRoot():
                table.append(["switch_root", "", event.at_ms / 1000, ""])
            case Finished():
                table.append([event.action, "", event.at_ms / 1000, ""])
            case Ready():
                table.append(["ready", "", event.at_ms / 1000, ""])
    return table


def as_data(result: BootResult) -> dict[str, Any]:
    """Return the result as JSON data; times are in milliseconds since the kernel started, unless named otherwise."""
    ends = [event for event in result.events if isinstance(event, End)]
    return {
        "ok": result.ok,
        "outcome": result.outcome,
        "reason": result.reason,
        "hint": result.hint,
        "last_report": describe(result.events[-1]) if result.events else "",
        "accel": result.accel,
        "seconds": result.seconds,
        "steps": [
            {
                "step": end.step,
                "stage": end.stage,
                "ok": end.ok,
                "start_ms": end.start_ms,
                "duration_ms": end.duration_ms,
                "notes": dict(end.notes),
            }
            for end in ends
        ],
        "switch_root_ms": next((e.at_ms for e in result.events if isinstance(e, SwitchRoot)), None),
        "ready_ms": next((e.at_ms for e in result.events if isinstance(e, Ready)), None),
        "boot": result.boot_json,
        "rejected": list(result.rejected),
        "console": str(result.console) if result.console else None,
        "console_tail": [] if result.ok else list(result.console_tail),
        "forwards": {str(node): host for node, host in result.forwards.items()},
        "pid_file": str(result.pid_file) if result.pid_file else None,
    }


def _say_how_to_go_on(console: Console, result: BootResult) -> None:
    """Say where the log is, and how to reach and end a node that was left running."""
    if result.console is not None:
        console.info(f"console log: {result.console}")
    if result.pid_file is None:
        return
    for node, host in result.forwards.items():
        console.info(f"port {node} of the node: 127.0.0.1:{host}")
    console.info(f"the node goes on running; end it with: kill $(cat {shlex.quote(str(result.pid_file))})")
