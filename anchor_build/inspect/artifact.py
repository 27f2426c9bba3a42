"""What is inside an artifact - a package, an initramfs or an image - as plain data, and how two of them differ."""

from __future__ import annotations

import stat
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from anchor_build.cpio import COMPRESSIONS, NEWC_MAGICS
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import file_digest

# Facts of the file itself: two builds of the same may differ in these alone.
FILE_FACTS = ("bytes", "sha256")
TIME_MAX = 253402300799  # the end of the year 9999


@dataclass(frozen=True)
class Entry:
    """One file, directory, link or device inside: `mode` has type and permission bits, `size` is in bytes.

    `digest` is the SHA-256 of a file's content, empty where it is not known (see add_contents); `target` is where a
    symbolic link leads; `owner` is user and group, by name or number; `time` is in seconds since the epoch. `xattrs`
    are extended attributes, capabilities among them, by name with their values as hexadecimal text.
    """

    path: str
    mode: int
    size: int
    owner: str
    time: int
    digest: str = ""
    target: str = ""
    xattrs: tuple[tuple[str, str], ...] = ()

    @property
    def values(self) -> dict[str, str]:
        """What can differ, as text."""
        return {
            "type": file_type(self.mode),
            "mode": f"{stat.S_IMODE(self.mode):04o}",
            "owner": self.owner,
            "size": str(self.size),
            "sha256": self.digest,
            "target": self.target,
            "xattrs": ", ".join(f"{name}=0x{value}" for name, value in self.xattrs),
            "time": str(self.time),
        }


@dataclass(frozen=True)
class Artifact:
    """An artifact of a kind (rpm, initramfs, image): its facts in the order in which to show them, and its entries.

    A fact is a number, a text, a list of texts or a mapping of such. `notes` say what could not be told.
    """

    kind: str
    facts: Mapping[str, Any]
    entries: Mapping[str, Entry]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Difference:
    """How a second artifact differs from a first: facts and entries as (first, second), None where there is none."""

    facts: Mapping[str, tuple[Any, Any]]
    added: tuple[Entry, ...]
    removed: tuple[Entry, ...]
    changed: Mapping[str, Mapping[str, tuple[str, str]]]

    @property
    def same(self) -> bool:
        """Whether there is no difference at all, not even in the file's own bytes."""
        return not (self.facts or self.added or self.removed or self.changed)

    @property
    def changed_in_time_only(self) -> tuple[str, ...]:
        """The paths whose time is all that changed."""
        return tuple(path for path, values in self.changed.items() if set(values) == {"time"})


def file_type(mode: int) -> str:
    """Name the type of a file by its mode."""
    names = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "link",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "fifo",
        stat.S_IFSOCK: "socket",
    }
    return names.get(stat.S_IFMT(mode), f"type {stat.S_IFMT(mode):o}")


def check_kinds(first: Artifact, second: Artifact) -> None:
    """Raise UsageError when two artifacts are of different kinds."""
    if first.kind != second.kind:
        raise UsageError(f"an {first.kind} and an {second.kind} cannot be compared".replace("an rpm", "a package"))


def compare(first: Artifact, second: Artifact) -> Difference:
    """Compare two artifacts; raises UsageError when they are of different kinds."""
    check_kinds(first, second)
    names = [*first.facts, *(name for name in second.facts if name not in first.facts)]
    facts = {name: (first.facts.get(name), second.facts.get(name)) for name in names}
    changed = {}
    for path in sorted(first.entries.keys() & second.entries.keys()):
        old, new = first.entries[path].values, second.entries[path].values
        values = {name: (old[name], new[name]) for name in old if old[name] != new[name]}
        if values:
            changed[path] = values
    return Difference(
        facts={name: pair for name, pair in facts.items() if pair[0] != pair[1]},
        added=tuple(second.entries[path] for path in sorted(second.entries.keys() - first.entries.keys())),
        removed=tuple(first.entries[path] for path in sorted(first.entries.keys() - second.entries.keys())),
        changed=changed,
    )


def add_contents(file: Path, artifact: Artifact) -> Artifact:
    """Return an image's artifact with digests and extended attributes; another artifact has what it has.

    An image is only listed by read_artifact: reading all of it takes its time. Where the programs for it are missing, a
    note says so. Raises AnchorError for an image that is damaged.
    """
    if artifact.kind != "image" or not artifact.entries:
        return artifact
    if artifact.facts["format"] == "erofs":
        from anchor_build.inspect.erofs import read_contents
    else:
        from anchor_build.inspect.squashfs import read_contents
    entries, notes = read_contents(file, artifact.entries)
    return replace(artifact, entries=entries, notes=(*artifact.notes, *notes))


def utc(seconds: int) -> str:
    """Write a time in seconds since the epoch as people and machines read it (ISO 8601, UTC).

    What is beyond the year 9999 is damaged, and stays a number.
    """
    if seconds > TIME_MAX:
        return f"{seconds} s"
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def file_facts(file: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


# --- Which kind -------------------------------------------------------------------------------------------

# (offset, magic, what it is), the surest first: the beginning of a file says more than something inside of it, which
# may be chance. Those below erofs are said to be what they are, and refused.
MAGICS = (
    (0, b"\xed\xab\xee\xdb", "rpm"),
    (0, b"hsqs", "squashfs"),
    *((0, magic, "initramfs") for magic in (*NEWC_MAGICS, *COMPRESSIONS)),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
    (0, b"sqsh", "a squashfs of the big-endian version 3, which no kernel of today mounts"),
    (0x202, b"HdrS", "a Linux kernel"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"MZ", "an EFI program"),
    (512, b"EFI PART", "a disk image with a partition table"),
    (0, b"QFI\xfb", "a QCOW disk image"),
    (0, b"!<arch>\ndebian", "a Debian package"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (257, b"ustar", "a tar archive"),
    (0x438, b"\x53\xef", "an ext file system"),
)
KNOWN = "an RPM, an initramfs, or a squashfs or erofs image"


def read_artifact(file: Path, stage_dirs: tuple[Path, ...] = ()) -> Artifact:
    """Read an artifact; what it is, its bytes say.

    `stage_dirs` holds stages of one's own, by which the parameters of an initramfs are understood. Raises
    AnchorError when the file cannot be read, is none of these, is cut off, or is not what it claims to be.
    """
    try:
        if not file.is_file():
            raise AnchorError(f"{file}: is {'not a plain file' if file.exists() else 'not there'}")
        with file.open("rb") as stream:
            kind = _detect(stream)
        if file.stat().st_size == 0:
            raise AnchorError(f"{file}: is empty")
        return _read(file, kind, stage_dirs)
    except OSError as error:
        raise AnchorError(f"{file}: cannot be read: {error.strerror or error}") from None


def _detect(stream: BinaryIO) -> str:
    for offset, magic, kind in MAGICS:
        stream.seek(offset)
        if stream.read(len(magic)) == magic:
            return kind
    return ""


def _with_tree(file: Path, image: Artifact) -> Artifact:
    """Return an image with the root hash of its hash tree, if it has a right one, and what its manifest says of it."""
    from anchor_build.manifest import SUFFIX, read_manifest
    from anchor_build.verity import has_tree, read_tree

    facts, notes, named = dict(image.facts), list(image.notes), ""
    manifest = file.with_name(file.name + SUFFIX)
    if manifest.is_file():
        try:
            named = read_manifest(manifest)[0].verity
        except AnchorError as error:
            notes.append(error.message)
    if not has_tree(file):
        notes += [f"{manifest} names a root hash, and the image has no hash tree"] if named else []
        return replace(image, notes=tuple(notes))
    try:
        tree = read_tree(file, lambda title, progress=None: nullcontext())
    except AnchorError as error:
        return replace(image, notes=(*notes, f"{error.message}: no node would read it by its tree"))
    facts |= {"root_hash": tree.root_hash, "hash_tree_bytes": tree.tree_bytes}
    if named:
        notes.append(f"{manifest} names {'this' if named == tree.root_hash else 'another'} root hash")
    elif manifest.is_file():
        notes.append(f"{manifest} names no root hash, so that nodes copy the image")
    return replace(image, facts=facts, notes=tuple(notes))


def _read(file: Path, kind: str, stage_dirs: tuple[Path, ...]) -> Artifact:
    if kind == "rpm":
        from anchor_build.inspect.rpm import inspect_rpm

        return inspect_rpm(file)
    if kind == "initramfs":
        from anchor_build.inspect.initramfs import inspect_initramfs

        return inspect_initramfs(file, stage_dirs)
    if kind == "squashfs":
        from anchor_build.inspect.squashfs import inspect_squashfs

        return _with_tree(file, inspect_squashfs(file))
    if kind == "erofs":
        from anchor_build.inspect.erofs import inspect_erofs

        return _with_tree(file, inspect_erofs(file))
    raise AnchorError(f"{file}: is {kind or 'nothing that can be inspected'}", f"inspect knows {KNOWN}")
