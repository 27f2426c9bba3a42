"""What an erofs image says about itself: its superblock, and the list of its files, read without other programs.

The layout is that of linux/fs/erofs/erofs_fs.h; all numbers are little-endian.
"""

from __future__ import annotations

import mmap
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from anchor_build.console import printable
from anchor_build.errors import AnchorError
from anchor_build.files import disk_errors, file_digest, work_directory
from anchor_build.inspect.artifact import Artifact, Entry, file_facts, utc
from anchor_build.run import run, which

SUPER_OFFSET = 1024
SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHH")
COMPACT = struct.Struct("<HHHHIIIIHHI")
EXTENDED = struct.Struct("<HHHHQIIIIQII16s")
DIRENT = struct.Struct("<QHBB")
XATTR_HEAD = struct.Struct("<IB7x")  # erofs_xattr_ibody_header: a filter, and how many attributes are shared
XATTR = struct.Struct("<BBH")  # erofs_xattr_entry: length of the name, what the name begins with, size of the value
XATTR_PREFIXES = {
    1: "user.",
    2: "system.posix_acl_access",
    3: "system.posix_acl_default",
    4: "trusted.",
    6: "security.",
}
SLOT = 32  # bytes; an inode's number counts these from the start of the metadata
COMPRESSIONS = {0: "lz4", 1: "lzma", 2: "deflate", 3: "zstd"}
LZ4_PADDED, ALGORITHMS = 1 << 0, 1 << 1  # of feature_incompat: LZ4 is used; the next field names the algorithms
COMPATIBLE = {1 << 0: "superblock checksum", 1 << 1: "mtime", 1 << 2: "xattr filter"}
PLAIN, INLINE = 0, 2  # the layouts of data that is not compressed: in blocks; with its end behind the inode
BLOCK_BITS = range(9, 17)
TARGET_MAX = 4096  # PATH_MAX
PATHS_MAX = 5_000_000
READ_LIMIT_S = 3600
TAIL_LINES = 5


@dataclass(frozen=True)
class _Image:
    file: Path
    data: mmap.mmap
    block: int
    metadata: int
    shared: int  # where attributes lie that several inodes have
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
    attributes: int  # where its own extended attributes begin
    length: int  # with these
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
        (_, _, compatible, bits, _, root, inodes, made, _, blocks, metadata, shared, uuid, name, features, *more) = (
            SUPER.unpack_from(data, SUPER_OFFSET)
        )
        if bits not in BLOCK_BITS:
            raise AnchorError(f"{file}: its superblock is damaged: blocks of 2 to the power of {bits} bytes")
        used = blocks << bits
        if facts["bytes"] < used:
            raise AnchorError(f"{file}: is cut off: it has {facts['bytes']} of {used} bytes", "fetch or build it again")
        facts |= {
            "format": "erofs",
            "compression": _compressions(features, more[0]),
            "block_size": 1 << bits,
            "build_time": utc(made),
            "inodes": inodes,
            "used_bytes": used,
            "uuid": f"{uuid.hex()[:8]}-{uuid.hex()[8:12]}-{uuid.hex()[12:16]}-{uuid.hex()[16:20]}-{uuid.hex()[20:]}",
            "volume": name.rstrip(b"\0").decode("utf-8", "surrogateescape"),
            "features": ", ".join(text for bit, text in COMPATIBLE.items() if compatible & bit),
        }
        image = _Image(file, data, 1 << bits, metadata << bits, shared << bits, made)
        entries = {entry.path: entry for entry in sorted(_walk(image, root), key=lambda entry: entry.path)}
    return Artifact("image", {key: fact for key, fact in facts.items() if fact != ""}, entries)


def read_contents(file: Path, entries: Mapping[str, Entry]) -> tuple[Mapping[str, Entry], list[str]]:
    """Return an image's entries with digests, and what could not be told.

    fsck.erofs unpacks the image into the cache, below a directory of its own that goes away: every path of the list is
    there once, so that no link can lead out of it. Raises AnchorError when it fails.
    """
    if which("fsck.erofs") is None:
        return entries, ["contents are not compared: fsck.erofs (erofs-utils) is not installed"]
    with disk_errors(), work_directory() as work:
        needed, free = sum(entry.size for entry in entries.values()), shutil.disk_usage(work).free
        if needed > free:
            return entries, [
                f"contents are not compared: unpacked they take {needed >> 20} MiB, and there are {free >> 20} MiB in "
                f"{work.parent}: name another cache directory with XDG_CACHE_HOME"
            ]
        top = work / "unpacked"
        argv = ["fsck.erofs", f"--extract={top}", "--no-preserve", str(file.absolute())]
        done = run(argv, timeout=READ_LIMIT_S, check=False, umask=0o077)
        if done.status != 0:
            reason = "\n".join(printable(line) for line in (done.stderr or done.stdout).splitlines()[-TAIL_LINES:])
            raise AnchorError(f"{file}: fsck.erofs cannot read it:\n{reason}", "it is damaged: fetch or build it again")
        filled = {}
        for path, entry in entries.items():
            unpacked = top / path
            if stat.S_ISREG(entry.mode) and (unpacked.is_symlink() or not unpacked.is_file()):
                raise AnchorError(f"{file}: fsck.erofs did not unpack {printable(path)}", "is it damaged?")
            filled[path] = replace(entry, digest=file_digest(unpacked)) if stat.S_ISREG(entry.mode) else entry
    return filled, []


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
        seen = set()
        for name, child in _names(image, inode):
            paths += 1
            if name in seen:
                raise image.damaged(f"/{path} holds a name twice")
            seen.add(name)
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
    xattrs = tuple(sorted(_attributes(image, inode)))
    return Entry(path, inode.mode, size, inode.owner, inode.time, "", target, xattrs), stat.S_ISDIR(inode.mode)


def _inode(image: _Image, number: int) -> _Inode:
    offset = image.metadata + number * SLOT
    (form,) = struct.unpack("<H", image.at(offset, 2))
    kind = EXTENDED if form & 1 else COMPACT
    fields = kind.unpack(image.at(offset, kind.size))
    attributes = XATTR_HEAD.size + 4 * (fields[1] - 1) if fields[1] else 0
    if form & 1:
        _, _, mode, _, size, start, _, user, group, when, *_ = fields
    else:
        _, _, mode, _, size, _, start, _, user, group, _ = fields
        when = image.build_time
    return _Inode(
        offset, offset + kind.size, kind.size + attributes, form >> 1 & 7, mode, size, start, f"{user}:{group}", when
    )


def _attributes(image: _Image, inode: _Inode) -> Iterator[tuple[str, str]]:
    """Yield names and values (hexadecimal) of an inode's extended attributes, its own and those that it shares."""
    end = inode.offset + inode.length
    if inode.attributes == end:
        return
    _, count = XATTR_HEAD.unpack(image.at(inode.attributes, XATTR_HEAD.size))
    position = inode.attributes + XATTR_HEAD.size
    if position + 4 * count > end:
        raise image.damaged(f"the inode at byte {inode.offset} shares more attributes than it has room for")
    for (number,) in struct.iter_unpack("<I", image.at(position, 4 * count)):
        name, value, _ = _attribute(image, image.shared + 4 * number)
        yield name, value
    position += 4 * count
    while position + XATTR.size <= end:
        name, value, size = _attribute(image, position)
        if not name:
            break  # the rest is padding
        yield name, value
        position += size


def _attribute(image: _Image, position: int) -> tuple[str, str, int]:
    """Read an attribute: its name, its value, and how many bytes it takes; no name where there is none."""
    length, index, size = XATTR.unpack(image.at(position, XATTR.size))
    if (length, index, size) == (0, 0, 0):
        return "", "", 0
    text = image.at(position + XATTR.size, length + size)
    prefix = XATTR_PREFIXES.get(index, f"(prefix {index})")
    name = prefix + text[:length].decode("utf-8", "surrogateescape")
    return name, text[length:].hex(), XATTR.size + (length + size + 3) // 4 * 4


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
