"""Keeps finished initramfs images by what they were made from, so that a build with nothing changed takes no time.

An entry's name is the digest of everything that is said to a build: options, settings, profile, kernel, CA, versions.
In it stands what the build may have read, as a list of files with their fingerprints: type, mode, owner, size, inode,
times of change. A file is the same while its fingerprint is; where that differs, and the entry has the file's digest,
its content decides.

Why a result is never stale: whatever changes a file or its attributes sets its ctime to the time of the change, and no
program can set it to another one. The fingerprints are taken before dracut starts and again when the initramfs has been
read back, and a build is kept only if they are equal and every ctime in them lies more than RACY_NS before the first
time. So each later change has a later ctime, even where clocks or file systems count in whole seconds. New and missing
files are found since directories are listed; inputs.py says which, and a test that traces dracut holds that it looks
nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build.errors import UsageError
from anchor_build.files import cache_directory
from anchor_build.paramtypes import InvalidValueError, check_value

# Changes with the form of entries, and with what decides a build beside its inputs.
FORMAT = 1
# Twice the coarsest step in which file systems keep times (vfat: 2 s for mtime, 1 s for most old ones).
RACY_NS = 4_000_000_000
# Larger files have a digest only if they went into the initramfs.
SMALL = 64 << 10
DEFAULT_SIZE = 2 << 30
SIZE_VARIABLE = "ANCHOR_BUILD_CACHE_SIZE"
ABSENT = "-"
UNFINISHED = ".unfinished-"
UNFINISHED_AGE_S = 86400


@dataclass(frozen=True)
class Inputs:
    """Where a build may look: whole trees, directories with what is directly in them, single files."""

    trees: frozenset[str]
    lists: frozenset[str]
    files: frozenset[str]

    def as_json(self) -> dict[str, list[str]]:
        """Return it for an entry."""
        return {"trees": sorted(self.trees), "lists": sorted(self.lists), "files": sorted(self.files)}

    def covers(self, path: str) -> bool:
        """Whether a change of `path`, or its appearance, would be seen."""
        if path in self.files or path in self.trees or path in self.lists or os.path.dirname(path) in self.lists:  # noqa: PTH120
            return True
        return any(path.startswith(f"{tree}/") for tree in self.trees)


def snapshot(inputs: Inputs) -> dict[str, str]:
    """Return the fingerprint of everything in `inputs`, by path."""
    found: dict[str, str] = {}
    for path in inputs.files:
        found[path] = _fingerprint(path)
    for top in (*inputs.lists, *inputs.trees):
        found.setdefault(top, _fingerprint(top))
    for top in inputs.lists:
        for entry in _entries(top):
            found.setdefault(entry.path, _of_entry(entry))
    pending = list(inputs.trees)
    while pending:
        for entry in _entries(pending.pop()):
            if entry.is_dir(follow_symlinks=False):
                if entry.name == "__pycache__":
                    continue
                pending.append(entry.path)
            found.setdefault(entry.path, _of_entry(entry))
    return found


def _entries(directory: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except OSError:
        return  # it is not there, or no directory: its own fingerprint says so


def _of_entry(entry: os.DirEntry[str]) -> str:
    try:
        return _text(entry.stat(follow_symlinks=False))
    except OSError:
        return ABSENT


def _fingerprint(path: str) -> str:
    try:
        return _text(os.lstat(path))
    except OSError:
        return ABSENT


def _text(facts: os.stat_result) -> str:
    if stat.S_ISDIR(facts.st_mode):
        # What is in it is listed where it matters; its times change with files that come and go beside.
        return f"{facts.st_mode:o} {facts.st_uid} {facts.st_gid}"
    return (
        f"{facts.st_mode:o} {facts.st_uid} {facts.st_gid} {facts.st_size} {facts.st_ino} {facts.st_mtime_ns}"
        f" {facts.st_ctime_ns}"
    )


def is_settled(found: Mapping[str, str], began_ns: int, directories: Iterable[str] = ()) -> bool:
    """Whether the next change of a file would have another time: none of these was changed shortly before `began_ns`.

    In the same way nothing may have come or gone in `directories`.
    """
    limit = began_ns - RACY_NS
    for path in directories:
        with suppress(OSError):
            if os.stat(path).st_ctime_ns >= limit:  # noqa: PTH116 - as in the rest of this module
                return False
    return all(int(text.rpartition(" ")[2]) < limit for text in found.values() if text.count(" ") == 6)


def digests(found: Mapping[str, str], wanted: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the files in a snapshot that are small or in `wanted`; of links, where they lead."""
    names = set(wanted)
    result = {}
    for path, text in found.items():
        words = text.split(" ")
        if len(words) < 7 or not (path in names or int(words[3]) <= SMALL):
            continue
        with suppress(OSError):
            result[path] = _digest(path, words[0])
    return result


def _digest(path: str, mode: str) -> str:
    kind = stat.S_IFMT(int(mode, 8))
    if kind == stat.S_IFLNK:
        return "link " + os.readlink(path)  # noqa: PTH115 - called for thousands
    if kind != stat.S_IFREG:
        return "special"
    with open(path, "rb") as file:  # noqa: PTH123 - called for thousands
        return hashlib.file_digest(file, "sha256").hexdigest()


def unchanged(inputs: Inputs, kept: Mapping[str, str], known: Mapping[str, str]) -> bool:
    """Whether everything is as it was: by fingerprint, and where that differs by mode, owner and digest."""
    now = snapshot(inputs)
    if now.keys() != kept.keys():
        return False
    for path, text in now.items():
        before = kept[path]
        if text == before:
            continue
        if text.split(" ")[:4] != before.split(" ")[:4] or path not in known:
            return False
        try:
            if _digest(path, text.partition(" ")[0]) != known[path]:
                return False
        except OSError:
            return False
    return True


# --- Entries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A finished build: its report, and the bytes of the initramfs."""

    report: dict[str, Any]
    image: bytes


def directory() -> Path:
    """Return where entries are."""
    return cache_directory() / "initramfs"


def key_of(facts: Mapping[str, Any]) -> str:
    """Return the name of the entry for everything that is said to a build."""
    return hashlib.sha256(json.dumps([FORMAT, facts], sort_keys=True).encode()).hexdigest()


def find(key: str) -> Kept | None:
    """Return the build that is kept under a key if none of its inputs has changed; a damaged entry is removed.

    Raises UsageError for a size limit that is none, which must not show only after the build.
    """
    size_limit()
    path = directory() / key
    try:
        with path.open("rb") as file:
            digest = file.readline(128)
            head, image = file.readline(), file.read()
    except OSError:
        return None
    if _digest_of(head, image) != digest:
        path.unlink(missing_ok=True)
        return None
    entry = json.loads(head)
    inputs = Inputs(*(frozenset(entry["inputs"][name]) for name in ("trees", "lists", "files")))
    if not unchanged(inputs, entry["fingerprints"], entry["digests"]):
        return None
    with suppress(OSError):
        os.utime(path)  # the least recently used go first
    return Kept(entry["report"], image)


def keep(
    key: str,
    inputs: Inputs,
    found: Mapping[str, str],
    known: Mapping[str, str],
    report: Mapping[str, Any],
    image: bytes,
) -> None:
    """Keep a build, if there is room: readable for its owner only, whole or not at all; then remove what is too much.

    Raises UsageError for a size that is none.
    """
    limit = size_limit()
    head = {"inputs": inputs.as_json(), "fingerprints": found, "digests": known, "report": report}
    line = json.dumps(head).encode() + b"\n"
    if len(line) + len(image) > limit:
        return
    top = directory()
    with suppress(OSError):  # a full disk must not fail a build that is done
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=UNFINISHED, dir=top)  # 0600
        partial = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines((_digest_of(line, image), line, image))
            partial.replace(top / key)
        finally:
            partial.unlink(missing_ok=True)
        prune(top, limit)


def _digest_of(head: bytes, image: bytes) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(image)
    return digest.hexdigest().encode() + b"\n"


def size_limit() -> int:
    """Return how many bytes all entries may have; raises UsageError."""
    text = os.environ.get(SIZE_VARIABLE, "")
    if not text:
        return DEFAULT_SIZE
    try:
        return int(check_value("size", text, {}))
    except InvalidValueError as error:
        raise UsageError(f"{SIZE_VARIABLE}={text}: {error}", "write it as 500M or 4G; 0 keeps nothing") from None


def prune(top: Path, limit: int) -> None:
    """Remove the entries that were not used for longest until all are within `limit` bytes, and old leftovers."""
    entries = []
    for path in top.iterdir():
        with suppress(FileNotFoundError):  # another build prunes, too
            facts = path.stat()
            if not path.name.startswith(UNFINISHED):
                entries.append((facts.st_mtime_ns, facts.st_size, path))
            elif facts.st_mtime < time.time() - UNFINISHED_AGE_S:
                path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries, key=lambda entry: entry[:2]):
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size
