"""Processes that outlive the command that started them: recorded, recognised, and ended by process id."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from anchor_build.errors import AnchorError

FILE = "running.json"
GRACE = 5.0


@dataclass(frozen=True)
class Kept:
    """A process: its id, and its start in clock ticks after the kernel's, by which a reused id shows."""

    pid: int
    started: int


def write_kept(directory: Path, pids: Sequence[int]) -> None:
    """Record running processes in `directory`."""
    kept = [asdict(Kept(pid, _started(pid))) for pid in pids]
    (directory / FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def read_kept(directory: Path) -> list[Kept]:
    """Return the processes recorded in `directory`, running or not."""
    file = directory / FILE
    return [Kept(**entry) for entry in json.loads(file.read_text("utf-8"))] if file.exists() else []


def is_running(kept: Kept) -> bool:
    """Say whether the process still runs, and is still the same."""
    return kept.started != 0 and _started(kept.pid) == kept.started


def stop_kept(directory: Path) -> int:
    """End the processes recorded in `directory`, and no others; return how many were still running.

    Raises AnchorError for one that does not end.
    """
    running = [kept for kept in read_kept(directory) if is_running(kept)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for kept in filter(is_running, running):
            with suppress(ProcessLookupError):
                os.kill(kept.pid, number)
        deadline = time.monotonic() + GRACE
        while any(map(is_running, running)) and time.monotonic() < deadline:
            time.sleep(0.05)
    if left := [kept.pid for kept in running if is_running(kept)]:
        raise AnchorError(f"these processes do not end: {left}")
    (directory / FILE).unlink(missing_ok=True)
    return len(running)


def _started(pid: int) -> int:
    """Return when a process started (field 22 of proc(5)'s stat), or 0 if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
