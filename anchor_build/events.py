"""What a booting node reports on its events port, parsed from bytes that nobody vouches for.

The node writes one JSON object per line. Anything else on the port is counted and put aside, every length
is bounded, and every string that leaves this module is safe to show on a terminal.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

MAX_LINE = 1 << 20  # bytes; the `ready` line carries the whole boot.json
MAX_EVENTS = 10_000
MAX_TEXT = 4096  # characters of one string
MAX_REJECTED = 20  # how many refused lines are kept as evidence
EXCERPT = 120

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# ECMA-48: control sequences, the strings that ESC ] P X ^ _ open, and the two-character escapes.
_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]?|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b[ -/]*[0-~]?")


@dataclass(frozen=True)
class Boot:
    """Anchor started on the node: its version and the kernel's release; either may be empty."""

    version: str
    kernel: str


@dataclass(frozen=True)
class Begin:
    """A step started, `at_ms` milliseconds after the kernel; `stage` is empty for the core's own steps."""

    step: str
    stage: str
    at_ms: int


@dataclass(frozen=True)
class End:
    """A step ended; `notes` is what it measured, such as bytes and sha256."""

    step: str
    stage: str
    ok: bool
    start_ms: int
    duration_ms: int
    notes: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The boot failed: where, why, what to do, and what the node does next (shell, reboot or poweroff)."""

    step: str
    stage: str
    error: str
    hint: str
    on_failure: str


@dataclass(frozen=True)
class SwitchRoot:
    """The initramfs is done and hands over to the image."""

    at_ms: int


@dataclass(frozen=True)
class Finished:
    """The node has done what it was booted for without a root; `action` is what follows: reboot, poweroff or kexec."""

    at_ms: int
    action: str


@dataclass(frozen=True)
class Ready:
    """The image reached multi-user; `boot` is the node's own boot.json."""

    at_ms: int
    boot: Mapping[str, Any]


Event = Boot | Begin | End | Failed | SwitchRoot | Finished | Ready


class InvalidLineError(ValueError):
    """A line is not an event; the text says why."""


def printable(text: str, limit: int = MAX_TEXT) -> str:
    """Return `text`, cut at `limit` characters, fit for a terminal.

    Escape sequences are taken out; other control, format, surrogate and line separators become `?`.
    """
    text = _ESCAPE.sub("", text[: 4 * limit])[:limit].replace("\t", " ")
    return "".join("?" if unicodedata.category(char) in _UNSAFE else char for char in text)


@dataclass
class LineSplitter:
    """Cuts a byte stream into lines; a line of more than `limit` bytes becomes None and is never held whole."""

    limit: int = MAX_LINE
    rest: bytes = b""
    _overlong: bool = False

    def feed(self, data: bytes) -> list[bytes | None]:
        """Return the lines that `data` completes, without their line ends."""
        *complete, tail = data.split(b"\n")
        lines: list[bytes | None] = []
        for part in complete:
            self._append(part)
            lines.append(None if self._overlong else self.rest.rstrip(b"\r"))
            self.rest, self._overlong = b"", False
        self._append(tail)
        return lines

    def _append(self, part: bytes) -> None:
        if len(self.rest) + len(part) > self.limit:
            self.rest, self._overlong = b"", True
        elif not self._overlong:
            self.rest += part


@dataclass
class EventReader:
    """Turns the bytes of an events port into events; what is not one is counted in `rejected_count`.

    `rejected` keeps the reason and the start of the first few refused lines.
    """

    rejected: list[str] = field(default_factory=list)
    rejected_count: int = 0
    event_count: int = 0
    _lines: LineSplitter = field(default_factory=LineSplitter)

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that `data` completes."""
        events: list[Event] = []
        for line in self._lines.feed(data):
            if line is None:
                self._reject(f"a line of more than {MAX_LINE} bytes", "")
            elif line.strip():
                try:
                    event = parse_line(line)
                except InvalidLineError as error:
                    self._reject(str(error), printable(line.decode("utf-8", "replace"), EXCERPT))
                    continue
                if self.event_count >= MAX_EVENTS:
                    self._reject(f"more than {MAX_EVENTS} events", "")
                    continue
                self.event_count += 1
                events.append(event)
        return events

    def _reject(self, reason: str, excerpt: str) -> None:
        self.rejected_count += 1
        if len(self.rejected) < MAX_REJECTED:
            self.rejected.append(f"{reason}: {excerpt}" if excerpt else reason)


def parse_line(line: bytes) -> Event:
    """Parse one line; noise before the first brace (a getty's prompt, a boot loader's) is passed over.

    Raises InvalidLineError for everything that is not exactly one well-formed event.
    """
    start = line.find(b"{")
    if start < 0:
        raise InvalidLineError("not a JSON object")
    try:
        value = json.loads(line[start:].decode("utf-8", "replace"), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        raise InvalidLineError("not a JSON object") from None
    kind = value.get("event")
    parser = _PARSERS.get(kind) if isinstance(kind, str) else None
    if parser is None:
        raise InvalidLineError("no known event")
    return parser(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(digits)
    return number


def _text(value: Mapping[str, Any], key: str, default: str | None = None) -> str:
    found = value.get(key, default)
    if not isinstance(found, str):
        raise InvalidLineError(f"{key} is not a string")
    return printable(found)


def _step(value: Mapping[str, Any]) -> str:
    found = _text(value, "step")
    if not _NAME.fullmatch(found):
        raise InvalidLineError("step is not a name")
    return found


def _stage(value: Mapping[str, Any]) -> str:
    found = _text(value, "stage", "")
    if found and not _NAME.fullmatch(found):
        raise InvalidLineError("stage is not a name")
    return found


def _milliseconds(value: Mapping[str, Any], key: str) -> int:
    found = value.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 53:
        raise InvalidLineError(f"{key} is not a number of milliseconds")
    return found


def _choice(value: Mapping[str, Any], key: str, choices: tuple[str, ...]) -> str:
    found = value.get(key)
    if found not in choices:
        raise InvalidLineError(f"{key} is none of {', '.join(choices)}")
    return str(found)


def _clean(value: Any) -> Any:
    """Return JSON data with every string in it made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return value


def _boot(value: Mapping[str, Any]) -> Boot:
    return Boot(_text(value, "version"), _text(value, "kernel", ""))


def _begin(value: Mapping[str, Any]) -> Begin:
    return Begin(_step(value), _stage(value), _milliseconds(value, "at_ms"))


def _end(value: Mapping[str, Any]) -> End:
    known = {"event", "step", "stage", "result", "start_ms", "duration_ms"}
    notes = {printable(key): item for key, item in value.items() if key not in known}
    if not all(isinstance(item, str | int) for item in notes.values()):
        raise InvalidLineError("a note is neither a string nor a whole number")
    return End(
        _step(value),
        _stage(value),
        _choice(value, "result", ("ok", "failed")) == "ok",
        _milliseconds(value, "start_ms"),
        _milliseconds(value, "duration_ms"),
        _clean(notes),
    )


def _failed(value: Mapping[str, Any]) -> Failed:
    after = _choice(value, "on_failure", ("shell", "reboot", "poweroff"))
    return Failed(_step(value), _stage(value), _text(value, "error"), _text(value, "hint", ""), after)


def _switch_root(value: Mapping[str, Any]) -> SwitchRoot:
    return SwitchRoot(_milliseconds(value, "at_ms"))


def _finished(value: Mapping[str, Any]) -> Finished:
    return Finished(_milliseconds(value, "at_ms"), _choice(value, "action", ("reboot", "poweroff", "kexec")))


def _ready(value: Mapping[str, Any]) -> Ready:
    boot = value.get("boot")
    if not isinstance(boot, dict):
        raise InvalidLineError("boot is not an object")
    try:
        return Ready(_milliseconds(value, "at_ms"), _clean(boot))
    except RecursionError:
        raise InvalidLineError("boot is nested too deeply") from None


_PARSERS: Mapping[str, Callable[[Mapping[str, Any]], Event]] = {
    "boot": _boot,
    "begin": _begin,
    "end": _end,
    "failed": _failed,
    "switch_root": _switch_root,
    "finished": _finished,
    "ready": _ready,
}
