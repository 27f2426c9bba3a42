"""Watches a booting node through the two files its serial ports write, until its fate is known.

A node got there when it says so on its events port. It failed when it says that, when its console shows a kernel
panic or an emergency shell, when its machine ends, floods a port, or when the time is up.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from anchor_build.events import (
    Begin,
    Boot,
    End,
    Event,
    EventReader,
    Failed,
    Finished,
    LineSplitter,
    Ready,
    SwitchRoot,
    printable,
)

Until = Literal["switch-root", "multi-user"]
Outcome = Literal["reached", "failed", "panic", "emergency", "ended", "timeout", "flood", "interrupted"]

POLL_S = 0.05
SETTLE_S = 1.0  # how long a dying node may go on explaining itself
AT_ONCE_S = 5.0
CHUNK = 1 << 20  # bytes
FLOOD_BYTES = 64 << 20
CONSOLE_LINE = 4096  # bytes
CONSOLE_TAIL = 15  # lines

# What to do about the last words of a kernel (init/do_mounts.c, mm/oom_kill.c), or of QEMU (hw/i386/x86.c).
HINTS = {
    "Unable to mount root fs": "is --initrd a whole initramfs, which this kernel can unpack?",
    "System is deadlocked on memory": "give the node more memory: --memory SIZE",
    "Out of memory": "give the node more memory: --memory SIZE",
    "too old to load a ram disk": "is --kernel a Linux kernel for x86, such as vmlinuz-RELEASE?",
}
PANIC = re.compile(r"Kernel panic - not syncing.*")
# dracut with and without systemd, then systemd's own, in the initramfs and in the booted root.
EMERGENCY = re.compile(
    r"Entering emergency mode|Dropping to debug shell|You are in emergency mode"
    r"|Press Enter for (?:emergency mode|(?:system )?maintenance)|Cannot open access to console"
)


@dataclass(frozen=True)
class BootResult:
    """What came of a boot.

    `reason` and `hint` say what went wrong. `rejected` shows the first lines on the events port that were no
    events. `forwards` maps ports of the node to ports of 127.0.0.1. `pid_file` is set for a node left running.
    """

    outcome: Outcome
    seconds: float
    events: tuple[Event, ...]
    rejected: tuple[str, ...]
    console_tail: tuple[str, ...]
    reason: str = ""
    hint: str = ""
    accel: str = ""
    console: Path | None = None
    forwards: Mapping[int, int] = field(default_factory=dict)
    pid_file: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether the node got as far as it was asked to."""
        return self.outcome == "reached"

    @property
    def boot_json(self) -> Mapping[str, Any] | None:
        """The node's own boot.json, once it is ready."""
        return next((event.boot for event in reversed(self.events) if isinstance(event, Ready)), None)


class Watcher:
    """Is told what happens during a boot; this one keeps it to itself."""

    def event(self, event: Event) -> None:
        """Take note of what the node reported."""

    def console_line(self, line: str) -> None:
        """Take note of a line on the console, here without escape sequences."""

    def tick(self) -> None:
        """Take note that a moment has passed."""


class BootInterruptedError(KeyboardInterrupt):
    """The wait was ended by Ctrl-C or a signal; `result` is what was seen until then."""

    def __init__(self, result: BootResult) -> None:
        super().__init__("interrupted")
        self.result = result


class _Follower:
    """Reads what is added to a file, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(CHUNK)
        except FileNotFoundError:
            return b""
        self.offset += len(data)
        return data


class _Observation:
    """Everything seen of one boot so far."""

    def __init__(self, console: Path, events: Path, until: Until, watcher: Watcher) -> None:
        self.until = until
        self.watcher = watcher
        self.events: list[Event] = []
        self.reader = EventReader()
        self.tail: deque[str] = deque(maxlen=CONSOLE_TAIL)
        self.panic = self.emergency = ""
        self.started = time.monotonic()
        self._console, self._events = _Follower(console), _Follower(events)
        self._lines = LineSplitter(CONSOLE_LINE)

    def read(self) -> bool:
        """Take in what both ports have written; return whether that was anything."""
        reported = self._events.read()
        for event in self.reader.feed(reported):
            self.events.append(event)
            self.watcher.event(event)
        shown = self._console.read()
        for line in self._lines.feed(shown.replace(b"\r", b"\n")):
            self._console_line(line)
        return bool(reported or shown)

    def _console_line(self, raw: bytes | None) -> None:
        line = "(an overlong line)" if raw is None else printable(raw.decode("utf-8", "replace")).rstrip()
        if not line.strip():
            return
        self.tail.append(line)
        self.watcher.console_line(line)
        if found := PANIC.search(line):
            self.panic = self.panic or found[0]
        elif EMERGENCY.search(line):
            self.emergency = self.emergency or line

    def verdict(self) -> Outcome | None:
        """Return how the boot ended as far as the node told; what it reports outweighs what its console shows."""
        goal = (Ready, Finished) if self.until == "multi-user" else (Ready, Finished, SwitchRoot)
        for event in self.events:
            if isinstance(event, goal):
                return "reached"
            if isinstance(event, Failed):
                return "failed"
        if max(self._console.offset, self._events.offset) > FLOOD_BYTES:
            return "flood"
        return "panic" if self.panic else "emergency" if self.emergency else None

    def result(self, outcome: Outcome, reason: str = "", hint: str = "") -> BootResult:
        """Sum up."""
        unfinished = printable(self._lines.rest.decode("utf-8", "replace")).rstrip()
        tail = [*self.tail, *([unfinished] if unfinished else [])][-CONSOLE_TAIL:]
        rejected = list(self.reader.rejected)
        if more := self.reader.rejected_count - len(rejected):
            rejected.append(f"and {more} more")
        seconds = round(time.monotonic() - self.started, 3)
        return BootResult(outcome, seconds, tuple(self.events), tuple(rejected), tuple(tail), reason=reason, hint=hint)


def observe(
    poll: Callable[[], int | None],
    console: Path,
    events: Path,
    machine_log: Path,
    *,
    until: Until,
    timeout: float,
    watcher: Watcher | None = None,
) -> BootResult:
    """Watch until the node's fate is known or `timeout` seconds are over.

    `poll` returns the exit status of the machine, or None while it runs; `machine_log` is what that program itself
    had to say. Raises BootInterruptedError when KeyboardInterrupt arrives meanwhile.
    """
    seen = _Observation(console, events, until, watcher or Watcher())
    deadline = seen.started + timeout
    try:
        while True:
            status = poll()  # before reading: what a machine wrote before it ended is complete
            while seen.read() and seen.verdict() is None:
                pass
            outcome = seen.verdict()
            if outcome in ("panic", "emergency") and status is None:
                outcome = _settle(seen, outcome)
            if outcome is not None:
                return seen.result(outcome, *_explain(seen, outcome))
            if status is not None:
                return seen.result("ended", *_explain_end(seen, status, machine_log))
            if time.monotonic() >= deadline:
                hint = "--timeout SECONDS allows more time; without KVM a boot takes several times as long"
                return seen.result("timeout", f"the node did not report {until} within {timeout:g} s", hint)
            seen.watcher.tick()
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        seen.read()
        raise BootInterruptedError(seen.result("interrupted", "the boot was interrupted")) from None


def _settle(seen: _Observation, outcome: Outcome) -> Outcome:
    """Give a node that shows trouble a moment to report it itself, and its console to finish."""
    until = time.monotonic() + SETTLE_S
    while time.monotonic() < until:
        time.sleep(POLL_S)
        seen.read()
    return seen.verdict() or outcome


def _explain(seen: _Observation, outcome: Outcome) -> tuple[str, str]:
    """Return the reason and the hint for an outcome that the node itself made known."""
    if outcome == "failed":
        event = next(event for event in seen.events if isinstance(event, Failed))
        return f"the node reported that step {step_name(event)} failed: {event.error}", event.hint
    return {
        "panic": (f"the kernel stopped: {seen.panic}", _hint(seen.panic)),
        "emergency": (f"the node fell into an emergency shell: {seen.emergency}", ""),
        "flood": (f"the node wrote more than {FLOOD_BYTES >> 20} MB to a serial port", ""),
    }.get(outcome, ("", ""))


def _explain_end(seen: _Observation, status: int, machine_log: Path) -> tuple[str, str]:
    said = printable(machine_log.read_text("utf-8", "replace").strip().rpartition("\n")[2], 300)
    if status == 0:
        # A kernel that does not fit into the memory resets the machine without a word.
        when = "at once" if time.monotonic() - seen.started < AT_ONCE_S else "without a word"
        hint = "" if seen.events or seen.tail else f"it did so {when}: is --memory enough for kernel and initramfs?"
        return "the node powered off or rebooted before it reported success", hint
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return f"QEMU {how}" + (f": {said}" if said else ""), _hint(said)


def _hint(said: str) -> str:
    """Return what to do about what a kernel or QEMU said last, or nothing."""
    return next((hint for words, hint in HINTS.items() if words in said), "")


def describe(event: Event) -> str:
    """Return one line that says what an event reports."""
    match event:
        case Boot():
            return f"anchor {event.version} started" + (f" on kernel {event.kernel}" if event.kernel else "")
        case Begin():
            return f"step {step_name(event)} began at {event.at_ms / 1000:.1f} s"
        case End():
            how = "done" if event.ok else "failed"
            return f"step {step_name(event)} {how} after {event.duration_ms / 1000:.1f} s"
        case Failed():
            return f"step {step_name(event)} failed; next: {event.on_failure}"
        case SwitchRoot():
            return f"switch_root at {event.at_ms / 1000:.1f} s"
        case Finished():
            return f"done at {event.at_ms / 1000:.1f} s; next: {event.action}"
        case Ready():
            return f"ready at {event.at_ms / 1000:.1f} s"


def step_name(event: Begin | End | Failed) -> str:
    """Return a step's name with its stage's, if it belongs to one."""
    return event.step + (f" ({event.stage})" if event.stage else "")


def failure_text(result: BootResult) -> str:
    """Return everything that helps with a boot that failed, as the lines of one message."""
    last = describe(result.events[-1]) if result.events else "nothing"
    lines = [result.reason, f"last report: {last} (given up after {result.seconds:.1f} s)"]
    if result.rejected:
        lines += ["lines on the events port that are no events:"]
        lines += [f"  | {line}" for line in result.rejected[:5]]
    lines += ["end of the console:"] if result.console_tail else ["the console stayed empty"]
    lines += [f"  | {line}" for line in result.console_tail]
    if result.console is not None:
        lines.append(f"console log: {result.console}")
    return "\n".join(lines)
