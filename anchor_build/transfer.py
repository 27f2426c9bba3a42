"""How far a copy of an image is, seen from outside: skopeo and umoci tell nobody who is not at their own terminal.

What a program reads, its descriptors in /proc tell; what it fetches, the OCI layout that it fills.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anchor_build.console import Progress

COMPLETE = re.compile(r"[0-9a-f]{64}")


def far(done: int, total: int, finished: int, count: int, unit: str) -> Progress:
    """Return bytes and blobs for people and machines; a `total` of 0 is one that nobody knows."""
    if not total:
        return Progress(f"{done / 1e6:.1f} MB", bytes=done)
    done, part = min(done, total), min(finished + 1, count)
    text = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB ({100 * done // total} %), {unit} {part} of {count}"
    return Progress(text, bytes=done, total_bytes=total, parts=min(finished, count), total_parts=count)


@dataclass
class Fetching:
    """A layout that is being filled, with layers of these `sizes` (bytes) where that is known."""

    layout: Path
    sizes: Sequence[int] = ()
    before: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Leave out what is there already."""
        self.before = {path.name for path in self._files()}

    def _files(self) -> list[Path]:
        # skopeo writes beside the blobs' directory, and renames.
        try:
            return [*self.layout.iterdir(), *(self.layout / "blobs/sha256").iterdir()]
        except OSError:
            return []

    def __call__(self) -> str:
        """Return how far it is."""
        done = finished = 0
        for path in self._files():
            try:
                done += path.stat().st_size if path.is_file() and path.name not in self.before else 0
            except OSError:
                continue  # renamed meanwhile
            finished += bool(COMPLETE.fullmatch(path.name)) and path.name not in self.before
        return far(done, sum(self.sizes), finished, len(self.sizes), "layer")


@dataclass
class Reading:
    """A program that reads `files` one after the other, or some at a time, from their beginning to their end."""

    files: Sequence[Path]
    unit: str = "file"
    pid: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def watch(self, pid: int) -> None:
        """Look at this process from now on."""
        self.pid = pid

    def __call__(self) -> str:
        """Return how far it is; nothing before it has begun to read."""
        if not self.sizes:
            self.sizes = {str(path.resolve()): path.stat().st_size for path in self.files if path.exists()}
        at: dict[str, int] = {}
        for descriptor in self._descriptors():
            try:
                name = str(descriptor.readlink())
                if name in self.sizes:
                    text = Path(f"/proc/{self.pid}/fdinfo/{descriptor.name}").read_text("ascii")
                    at[name] = max(at.get(name, 0), int(text.split()[1]))
            except (OSError, ValueError, IndexError):
                continue  # closed meanwhile
        # What was open and is not any more has been read.
        self.seen |= at.keys()
        if not self.seen:
            return ""
        done = sum(at.get(name, self.sizes[name]) for name in self.seen)
        return far(done, sum(self.sizes.values()), len(self.seen - at.keys()), len(self.sizes), self.unit)

    def _descriptors(self) -> list[Path]:
        try:
            return list(Path(f"/proc/{self.pid}/fd").iterdir()) if self.pid else []
        except OSError:
            return []
