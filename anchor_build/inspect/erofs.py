"""What an erofs image says about itself: its superblock, and the list of its files, read without other programs.

The layout is that of linux/fs/erofs/erofs_fs.h; all numbers are little-endian.
"""

from __future__ import annotations

import mmap
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchor_build.console import printable
from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import IMAGE_NOTE, Artifact, Entry, file_facts, utc

SUPER_OFFSET = 1024
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHH")
COMPACT = struct.Struct("<HHHHIIIIHHI")
EXTENDED = struct.Struct("<HHHHQIIIIQII16s")
DIRENT = struct.Struct("<QHBB")
SLOT = 32  # bytes; an inode's number counts these from the start of the metadata
COMPRESSIONS = {0: "lz4", 1: "lzma", 2: "deflate", 3: "zstd"}
LZ4_PADDED, ALGORITHMS = 1 << 0, 1 << 1  # of feature_incompat: LZ4 is used; the next field names the algorithms
COMPATIBLE = {1 << 0: "superblock checksum", 1 << 1: "mtime", 1 << 2: "xattr filter"}
PLAIN, INLINE = 0, 2  # the layouts of data that is not compressed: in blocks; with its end behind the inode
BLOCK_BITS = range(9, 17)
TARGET_MAX = 4096  # PATH_MAX
PATHS_MAX = 5_000_000


@dataclass(frozen=True)
class _Image:
    file: Path
    data: mmap.mmap
    block: int
    metadata: int
    build_time: int

    def damaged(self, what: str) -> AnchorError:
        return AnchorError(f"{self.file}: is cut off or damaged: {printable(what)}", "fetch or build it again")

    def at(self, offset: int, size: int) -> bytes:
        if size == 0:
            return b""  # wherever that may be
        if offset + size > len(self.data):
            raise self.damaged(f"{size} bytes at {offset} lie beyond its end")
        return self.data[offset : offset + size]


@dataclass(frozen=True)
class _Inode:
    offset: int
    length: int  # with its attributes
    layout: int
    mode: int
    size: int
    start: int  # of its data, in blocks
    owner: str
    time: int


def inspect_erofs(file: Path) -> Artifact:
    """Read an erofs image; raises AnchorError when it is cut off or damaged."""
    facts = file_facts(file)
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if len(data) < SUPER_OFFSET + SUPER.size:
            raise AnchorError(f"{file}: is cut off: its superblock is not whole")
        (_, _, compatible, bits, _, root, inodes, made, _, blocks, metadata, _, uuid, name, features, algorithms, _) = (
            SUPER.unpack_from(data, SUPER_OFFSET)
        )
        if bits not in BLOCK_BITS:
            raise AnchorError(f"{file}: its superblock is damaged: blocks of 2 to the power of {bits} bytes")
        used = blocks << bits
        if facts["bytes"] < used:
            raise AnchorError(f"{file}: is cut off: it has {facts['bytes']} of {used} bytes", "fetch or build it again")
        facts |= {
            "format": "erofs",
            "compression": _compressions(features, algorithms),
            "block_size": 1 << bits,
            "build_time": utc(made),
            "inodes": inodes,
            "used_bytes": used,
            "uuid": f"{uuid.hex()[:8]}-{uuid.hex()[8:12]}-{uuid.hex()[12:16]}-{uuid.hex()[16:20]}-{uuid.hex()[20:]}",
            "volume": name.rstrip(b"\0").decode("utf-8", "surrogateescape"),
            "features": ", ".join(text for bit, text in COMPATIBLE.items() if compatible & bit),
        }
        image = _Image(file, data, 1 << bits, metadata << bits, made)
        entries = {entry.path: entry for entry in sorted(_walk(image, root), key=lambda entry: entry.path)}
    return Artifact("image", {key: fact for key, fact in facts.items() if fact != ""}, entries, (IMAGE_NOTE,))


def _compressions(features: int, algorithms: int) -> str:
    if features & ALGORITHMS:
        names = [COMPRESSIONS.get(bit, f"unknown ({bit})") for bit in range(16) if algorithms >> bit & 1]
        return ", ".join(names) or "none"
    return "lz4" if features & LZ4_PADDED else "none"


def _walk(image: _Image, root: int) -> Iterator[Entry]:
    """List all paths, without recursion: a hostile image nests as it likes, or holds itself."""
    todo = [("", root)]
    directories = {root}
    paths = 0
    while todo:
        path, number = todo.pop()
        inode = _inode(image, number)
        if not stat.S_ISDIR(inode.mode):
            raise image.damaged(f"/{path} is no directory")
        for name, child in _names(image, inode):
            paths += 1
            if paths > PATHS_MAX:
                raise image.damaged(f"it holds more than {PATHS_MAX} paths")
            below = f"{path}/{name}" if path else name
            entry, is_directory = _entry(image, below, child)
            if is_directory:
                if child in directories:
                    raise image.damaged(f"/{below} is a directory that is there twice")
                directories.add(child)
                todo.append((below, child))
            yield entry


def _entry(image: _Image, path: str, number: int) -> tuple[Entry, bool]:
    inode = _inode(image, number)
    target = ""
    if stat.S_ISLNK(inode.mode) and inode.size <= TARGET_MAX and inode.layout in (PLAIN, INLINE):
        target = _content(image, inode).decode("utf-8", "surrogateescape")
    # A directory's size is what its names take, which is not what it holds.
    size = inode.size if stat.S_ISREG(inode.mode) or stat.S_ISLNK(inode.mode) else 0
    return Entry(path, inode.mode, size, inode.owner, inode.time, "", target), stat.S_ISDIR(inode.mode)


def _inode(image: _Image, number: int) -> _Inode:
    offset = image.metadata + number * SLOT
    (form,) = struct.unpack("<H", image.at(offset, 2))
    kind = EXTENDED if form & 1 else COMPACT
    fields = kind.unpack(image.at(offset, kind.size))
    attributes = 12 + 4 * (fields[1] - 1) if fields[1] else 0
    if form & 1:
        _, _, mode, _, size, start, _, user, group, when, *_ = fields
    else:
        _, _, mode, _, size, _, start, _, user, group, _ = fields
        when = image.build_time
    return _Inode(offset, kind.size + attributes, form >> 1 & 7, mode, size, start, f"{user}:{group}", when)


def _content(image: _Image, inode: _Inode) -> bytes:
    """Return data that is not compressed: directories never are, nor are links."""
    if inode.layout not in (PLAIN, INLINE):
        raise image.damaged(
            f"the directory at byte {inode.offset} has the layout {inode.layout}, which is not known here"
        )
    if inode.layout == PLAIN or inode.size == 0:
        return image.at(inode.start * image.block, inode.size)
    whole = (inode.size - 1) // image.block * image.block
    return image.at(inode.start * image.block, whole) + image.at(inode.offset + inode.length, inode.size - whole)


def _names(image: _Image, inode: _Inode) -> Iterator[tuple[str, int]]:
    """Yield the names of a directory and their inodes; each of its blocks has its own list of both."""
    content = _content(image, inode)
    for start in range(0, len(content), image.block):
        block = content[start : start + image.block]
        if len(block) < DIRENT.size:
            raise image.damaged("a directory ends within an entry")
        _, first, _, _ = DIRENT.unpack_from(block)
        if first % DIRENT.size or not DIRENT.size <= first <= len(block):
            raise image.damaged(f"a directory names {first} as the start of its names")
        records = list(DIRENT.iter_unpack(block[:first]))
        ends = [record[1] for record in records[1:]] + [len(block)]
        for (number, begin, _, _), end in zip(records, ends, strict=True):
            name = block[begin:end].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            if not name or "/" in name:
                raise image.damaged("a directory holds a name that is none")
            if name not in (".", ".."):
                yield name, number
