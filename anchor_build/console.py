"""What a person sees: steps with a live elapsed time on stderr, results on stdout, colour only on a terminal."""

from __future__ import annotations

import errno
import json
import os
import select
import shutil
import stat
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import click

from anchor_build.errors import UsageError

TICK_S = 0.2
# Where no line can be rewritten, as in a pipeline's log, there is a new one so often: some end what is silent.
LINE_S = 15.0
# Between two events of progress, and how long one waits for a reader whose pipe is full.
EVENT_S = 1.0
READER_S = 10.0
# What each line of events begins with.
EVENT_START = b'{"event": "'
# The least width, in characters, to which a column of a table is wrapped.
PROSE = 30
ELLIPSIS = "\u2026"
ERASE_LINE = "\r\033[K"


class Progress(str):
    """How far a step is: a text for people, and `numbers` for machines, such as bytes and total_bytes."""

    __slots__ = ("numbers",)
    numbers: Mapping[str, int]

    def __new__(cls, text: str, **numbers: int) -> Progress:
        """Make a text that has these numbers."""
        made = super().__new__(cls, text)
        made.numbers = numbers
        return made


class Events:
    """What a command does as JSON lines for a machine, in the words of a node's events (events.py).

    Each line has `event` and `at_ms` (milliseconds since the command began), and may have `step`, its title:
    `begin`, `progress` (`text`, and `bytes`, `total_bytes`, `parts` and `total_parts` where they are known), `end`
    (`result`, ok or failed, and `duration_ms`), `warning` (`text`), and last `failed` (`error` and `hint`) or `done`.
    """

    def __init__(self, file: RawIOBase | BytesIO) -> None:
        """Take a file without a buffer: what cannot be written must not be tried once more at the end.

        One that does not block (O_NONBLOCK) is waited for at most READER_S.
        """
        self._file: RawIOBase | BytesIO | None = file
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def write(self, event: str, **fields: object) -> str:
        """Write an event; return why that failed, once: whoever reads may go, and the work goes on without."""
        at_ms = int((time.monotonic() - self._started) * 1000)
        with self._lock:
            try:
                if self._file is not None:
                    line = json.dumps({"event": event, "at_ms": at_ms, **fields}) + "\n"
                    self._put(self._file, line.encode("ascii"))
            except OSError as error:
                self._file = None
                return str(error.strerror)
        return ""

    def is_in(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path leads to the plain file that events go to, which nothing else may read or replace."""
        try:
            there, ours = Path(path).stat(), os.fstat(self._file.fileno() if self._file is not None else -1)
        except OSError:
            return False
        return stat.S_ISREG(ours.st_mode) and os.path.samestat(there, ours)

    @staticmethod
    def _put(file: RawIOBase | BytesIO, data: bytes) -> None:
        until = time.monotonic() + READER_S
        while data:
            sent = file.write(data)
            if sent is None and not select.select([], [file], [], max(until - time.monotonic(), 0))[1]:
                raise TimeoutError(errno.ETIMEDOUT, "nobody reads them")
            data = data[sent or 0 :]


class Step(Protocol):
    """Shows that something is being done, and how far it is."""

    def __call__(self, title: str, progress: Callable[[], str] | None = None) -> AbstractContextManager[None]:
        """Enter the step called `title`."""


@dataclass(frozen=True)
class Console:
    """How much to say: `verbosity` is -1 (errors and warnings only), 0, or 1 and more (what children print).

    `events` gets the same for a machine, whatever is said.
    """

    verbosity: int = 0
    events: Events | None = None

    @property
    def live(self) -> bool:
        """Whether a line on stderr may be rewritten."""
        return self.verbosity >= 0 and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def refuse_events(self, outputs: Iterable[Path | None]) -> None:
        """Raise UsageError where events go to one of the files that the command is going to write."""
        for output in outputs:
            if output is not None and self.events is not None and self.events.is_in(output):
                raise UsageError(f"--events: {output} is what this command makes", "name another file for the events")

    @contextmanager
    def step(self, title: str, progress: Callable[[], str] | None = None) -> Iterator[None]:
        """Show `title`, its elapsed time and `progress` while it runs, and how it ended."""
        started = time.monotonic()
        done = threading.Event()
        threads = []
        if self.live or (progress and self.verbosity >= 0):
            threads.append(threading.Thread(target=self._tick, args=(title, started, done, progress), daemon=True))
        if self.events and progress:
            threads.append(threading.Thread(target=self._tell, args=(title, done, progress), daemon=True))
        self.event("begin", step=title)
        for thread in threads:
            thread.start()
        mark, colour = "failed", "red"
        try:
            yield
            mark, colour = "done", "green"
        finally:
            done.set()
            for thread in threads:
                thread.join()
            seconds = time.monotonic() - started
            result = "ok" if mark == "done" else "failed"
            self.event("end", step=title, result=result, duration_ms=int(seconds * 1000))
            elapsed = f"{seconds:.1f} s"
            if self.verbosity >= 0 or mark == "failed":
                start = ERASE_LINE if self.live else ""
                self._say(f"{start}{self.paint(f'{mark:>6}', colour)}  {title}  {self.paint(elapsed, 'bright_black')}")

    def _tick(self, title: str, started: float, done: threading.Event, progress: Callable[[], str] | None) -> None:
        live = self.live
        while not done.wait(TICK_S if live else LINE_S):
            far = f"  {progress()}" if progress else ""
            rest = f"  {time.monotonic() - started:.0f} s{far}"
            # A line that is longer than the terminal is wide cannot be rewritten.
            room = shutil.get_terminal_size().columns - len(rest) - 9 if live else len(title)
            line = f"   ...  {title if len(title) <= room else title[: max(room - 1, 0)] + ELLIPSIS}{rest}"
            click.echo(f"{ERASE_LINE}{line}" if live else line, nl=not live, err=True)

    def _tell(self, title: str, done: threading.Event, progress: Callable[[], str]) -> None:
        before = ""
        while not done.wait(EVENT_S):
            far = progress()
            if far and far != before:
                self.event("progress", step=title, text=far, **(far.numbers if isinstance(far, Progress) else {}))
            before = far

    def event(self, event: str, **fields: object) -> None:
        """Tell a machine, where one is to be told; see Events."""
        if self.events is not None and (why := self.events.write(event, **fields)):
            self._say(f"{self.paint('warning:', 'yellow')} no further events (--events): {why}")

    def info(self, text: str) -> None:
        """Say something that only matters to a person watching."""
        if self.verbosity >= 0:
            self._say(text)

    def detail(self, text: str) -> None:
        """Say something that is wanted with -v only."""
        if self.verbosity >= 1:
            self._say(text)

    def warn(self, text: str) -> None:
        """Say something that did not stop the work but should be looked at."""
        self.event("warning", text=text)
        self._say(f"{self.paint('warning:', 'yellow')} {text}")

    def error(self, message: str, hint: str = "") -> None:
        """Say why the command failed and what to do."""
        self._say(f"{self.paint('error:', 'red')} {message}")
        if hint:
            self._say(f"{self.paint('hint:', 'cyan')} {hint}")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], prose: int | None = None) -> None:
        """Print a result as aligned columns on stdout; columns that hold only numbers are right-aligned.

        On a terminal the column `prose` is wrapped, so that the others stay below each other.
        """
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        click.echo(format_table(headers, rows, prose, width))

    def json(self, value: Any) -> None:
        """Print a result for machines on stdout: ASCII, so that bytes that are not UTF-8 survive (PEP 383)."""
        click.echo(json.dumps(value, indent=2))

    def paint(self, text: str, colour: str) -> str:
        """Colour `text` where stderr is a terminal and NO_COLOR (no-color.org) is not set."""
        if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
            return text
        return click.style(text, fg=colour)

    def _say(self, text: str) -> None:
        click.echo(text, err=True, color=None if not os.environ.get("NO_COLOR") else False)


def printable(text: str) -> str:
    """Escape what could drive a terminal or hide in it, in text that is not ours: names in archives, a command line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def format_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], prose: int | None = None, width: int | None = None
) -> str:
    """Lay out rows in columns two spaces apart; floats get two decimals.

    With `width`, in characters, the column `prose` is wrapped to what the others leave, and to no less than PROSE.
    """
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or row[i] == "" for row in rows) for i in range(len(headers))
    ]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    lines = [[[value] for value in row] for row in cells]
    if prose is not None and width is not None:
        room = max(width - sum(widths) + widths[prose] - 2 * (len(widths) - 1), PROSE)
        for row in lines:
            # What is longer than the room, such as a path, is left whole: it is there to be copied.
            row[prose] = textwrap.wrap(row[prose][0], room, break_long_words=False, break_on_hyphens=False)
        widths[prose] = max(len(part) for part in [headers[prose], *(part for row in lines for part in row[prose])])

    def line(values: Sequence[str]) -> str:
        pairs = zip(values, widths, numeric, strict=True)
        return "  ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in pairs).rstrip()

    body = (line(parts) for row in lines for parts in zip_longest(*row, fillvalue=""))
    return "\n".join([line(list(headers)), line(["-" * w for w in widths]), *body])
