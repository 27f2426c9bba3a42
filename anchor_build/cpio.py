"""Reads what is inside a finished initramfs, and other cpio archives such as the payload of a package."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import re
import signal
import stat
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.run import run

# The second one has the sum of each content's bytes in its header.
CRC_MAGIC = b"070702"
NEWC_MAGICS = (b"070701", CRC_MAGIC)
HEADER = re.compile(rb"07070[12]([0-9A-Fa-f]{104})")
HEADER_SIZE = 110
# Above the numbers that a header has room for.
NUMBER_END = 1 << 32
TRAILER = b"TRAILER!!!"
# More than any node could unpack into its memory; a few kilobytes can be made to unpack to terabytes.
UNPACKED_MAX = 2 << 30
# First bytes of each compression that the kernel unpacks: lib/decompress.c.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x5d\x00\x00": "lzma",
    b"\x89LZO": "lzo",
}


@dataclass(frozen=True)
class Member:
    """One entry: its path without a leading slash, permission and type bits, size in bytes, content.

    Of hard links only one has a size: the bytes are there once. `mtime` is in seconds since the epoch, `links` how many
    names the file has, `inode` (where it was asked for) is the same for all of these.
    """

    path: str
    mode: int
    size: int
    content: bytes
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    links: int = 1
    inode: int = 0

    @property
    def is_file(self) -> bool:
        """Whether it is a plain file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link; its content is the target."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True)
class Initramfs:
    """All members by path, and the compression of the main archive (`none` if it is not compressed).

    `archives` is the compression and the number of members of each archive in the file: the early one, the main one.
    """

    members: Mapping[str, Member]
    compression: str
    archives: tuple[tuple[str, int], ...] = ()

    def resolve(self, path: str) -> Member | None:
        """Follow symbolic links inside the archive, in any component; None when the path leads nowhere.

        /proc/self/root, which the kernel makes a link to the root directory (proc(5)), is followed too.
        """
        todo = [part for part in path.split("/") if part]
        done: list[str] = []
        for _ in range(1000):
            if not todo:
                return self.members.get("/".join(done))
            part = todo.pop(0)
            if part in (".", ".."):
                if part == ".." and done:
                    done.pop()
                continue
            member = self.members.get("/".join([*done, part]))
            if member is not None and member.is_link:
                target = member.content.decode("utf-8", "surrogateescape")
                if target.startswith("/"):
                    done = []
                todo = [piece for piece in target.split("/") if piece] + todo
            else:
                done.append(part)
                if done == ["proc", "self", "root"]:
                    done = []
        return None


def read_initramfs(file: Path) -> Initramfs:
    """Read an initramfs: an uncompressed early archive, if there is one, and the main one.

    Raises AnchorError when the file is not readable as what the kernel would accept.
    """
    return parse_initramfs(file, file.read_bytes())


def parse_initramfs(file: Path, data: bytes) -> Initramfs:
    """Read an initramfs that is the content of a file, which is named for messages. Raises as read_initramfs does."""
    if not data:
        raise AnchorError(f"{file}: is not an initramfs: it is empty")
    members: dict[str, Member] = {}
    archives = []
    compression = "none"
    while data:
        kind = compression_of(data)
        if kind:
            compression, data = kind, decompress(file, data, kind)
        if not data.startswith(NEWC_MAGICS):
            raise AnchorError(f"{file}: is not an initramfs: neither cpio nor a known compression")
        inside: dict[str, Member] = {}
        data = read_archive(file, data, inside)
        archives.append((kind or "none", len(inside)))
        members |= inside
    return Initramfs(members, compression, tuple(archives))


def read_archive(file: Path, data: bytes, members: dict[str, Member]) -> bytes:
    """Read one newc archive into `members`; return what follows it, padding removed. `file` is for messages.

    The format is that of Documentation/driver-api/early-userspace/buffer-format.rst: a header of 110 characters,
    six of magic and thirteen numbers of eight hexadecimal digits; name and content are padded to four bytes.
    """
    links: dict[tuple[int, ...], list[str]] = {}
    for entry in _entries(file, data):
        if entry.name == TRAILER:
            _share_content(members, links.values())
            return data[entry.end :].lstrip(b"\0")
        fields, path = entry.fields, entry.path
        content = data[entry.start : entry.start + fields[6]]
        members[path] = Member(path, fields[1], fields[6], content, fields[2], fields[3], fields[5], fields[4])
        if fields[4] > 1 and members[path].is_file:
            links.setdefault((fields[0], *fields[7:9]), []).append(path)
    raise AssertionError("an archive ends with its trailer")


def rewrite_archives(file: Path, data: bytes, left_out: Collection[str], contents: Mapping[str, bytes]) -> bytes:
    """Return newc archives that follow each other without the paths to be left out, and with new contents for others.

    All else is as it was. None of these may be hard links. `file` is for messages.
    """
    pieces: list[bytes | bytearray | memoryview] = []
    whole, copied, place = memoryview(data), 0, 0
    while data.startswith(NEWC_MAGICS, place):
        for entry in _entries(file, data, place):
            place = entry.end
            replaced = contents.get(entry.path)
            if replaced is None and entry.path not in left_out:
                continue
            pieces.append(whole[copied : entry.place])
            copied = entry.end
            if replaced is not None:
                header = bytearray(whole[entry.place : entry.start])
                header[54:62] = b"%08X" % len(replaced)
                if header.startswith(CRC_MAGIC):
                    header[102:110] = b"%08X" % (sum(replaced) & 0xFFFFFFFF)
                pieces += [header, replaced, bytes(-len(replaced) % 4)]
        while data.startswith(b"\0", place):
            place += 1
    return b"".join([*pieces, whole[copied:]])


def read_tree(directory: Path, names: Iterable[str]) -> Initramfs:
    """Read the files of a directory that are named, in this order, as an archive of them that is not compressed.

    Each name comes after that of its directory; the directory itself is `.`. Hard links follow each other, the last
    with the size. Nothing depends on where the files were, such as the numbers of their inodes: `cpio --reproducible`
    (cpio(1)). Raises ValueError for what is neither a file nor a directory nor a symbolic link, or is not in there, or
    has a time, size or owner that no header has room for, such as a time before 1970.
    """
    members: dict[str, Member] = {}
    numbers: dict[tuple[int, int], int] = {}
    linked: dict[int, list[Member]] = {}
    for name in names:
        path = name.removeprefix("./")
        above = members.get(path.rpartition("/")[0] or ".")
        if path != "." and (above is None or not stat.S_ISDIR(above.mode) or path.endswith("/..")):
            raise ValueError(path)
        place = os.path.join(directory, path)  # noqa: PTH118 - called for hundreds
        facts = os.lstat(place)
        number = numbers.setdefault((facts.st_dev, facts.st_ino), len(numbers))
        content, links = b"", facts.st_nlink
        if stat.S_ISREG(facts.st_mode):
            if number not in linked:
                with open(place, "rb") as file:  # noqa: PTH123
                    content = file.read()
        elif stat.S_ISLNK(facts.st_mode):
            content = os.fsencode(os.readlink(place))  # noqa: PTH115
        elif stat.S_ISDIR(facts.st_mode):
            links = 2  # how many directories are in it, or something else: that depends on the file system
        else:
            raise ValueError(place)
        size, seconds = len(content), facts.st_mtime_ns // 1_000_000_000
        if not all(0 <= value < NUMBER_END for value in (size, seconds, facts.st_uid, facts.st_gid)):
            raise ValueError(place)
        member = Member(path, facts.st_mode, size, content, facts.st_uid, facts.st_gid, seconds, links, number)
        if links == 1 or not member.is_file:
            members[path] = member
            continue
        group = linked.setdefault(number, [])
        group.append(member)
        if len(group) == links:
            members |= _hard_links(group)
    for group in linked.values():
        members |= _hard_links(group)
    return Initramfs(members, "none", (("none", len(members)),))


def _hard_links(group: Sequence[Member]) -> dict[str, Member]:
    """Return the names of one file, the first of which has its content, in the order in which cpio writes them."""
    content = group[0].content
    *others, last = group
    members = [*(replace(member, size=0) for member in reversed(others)), replace(last, size=len(content))]
    return {member.path: replace(member, content=content) for member in members}


def write_archive(file: BinaryIO, members: Iterable[Member]) -> None:
    """Write members that have come from `read_tree` as a newc archive, as cpio(1) does."""
    for member in members:
        name = os.fsencode(member.path)
        file.write(_header(member, len(name)) + name + bytes(1 + -(HEADER_SIZE + len(name) + 1) % 4))
        if member.size or member.is_link:
            file.write(member.content)
            file.write(bytes(-len(member.content) % 4))
    end = Member(TRAILER.decode(), 0, 0, b"")
    file.write(_header(end, len(TRAILER)) + TRAILER + bytes(1 + -(HEADER_SIZE + len(TRAILER) + 1) % 4))
    file.write(bytes(-file.tell() % 512))


def _header(member: Member, length: int) -> bytes:
    fields = (member.inode, member.mode, member.uid, member.gid, member.links, member.mtime, member.size)
    # The numbers of devices, and a check that this format does not have.
    return NEWC_MAGICS[0] + b"".join(b"%08X" % number for number in (*fields, 0, 0, 0, 0, length + 1, 0))


@dataclass(frozen=True)
class _Entry:
    """Where an entry of an archive is: its header, its content and the next one; and the header's numbers."""

    name: bytes
    fields: tuple[int, ...]
    place: int
    start: int
    end: int

    @property
    def path(self) -> str:
        return self.name.decode("utf-8", "surrogateescape").removeprefix("./").strip("/")


def _entries(file: Path, data: bytes, position: int = 0) -> Iterator[_Entry]:
    """Yield the entries of the newc archive that begins at `position`, the trailer as the last one."""
    while header := HEADER.match(data, position):
        fields = tuple(int(header[1][8 * n : 8 * n + 8], 16) for n in range(13))
        start = (position + HEADER_SIZE + fields[11] + 3) & ~3
        name = data[position + HEADER_SIZE : position + HEADER_SIZE + fields[11] - 1]
        entry = _Entry(name, fields, position, start, start if name == TRAILER else (start + fields[6] + 3) & ~3)
        yield entry
        if name == TRAILER:
            return
        position = entry.end
    raise AnchorError(f"{file}: the archive is cut off or damaged at byte {position}", "build it again")


def _share_content(members: dict[str, Member], groups: Iterable[list[str]]) -> None:
    """Give all hard links of a file its content, which the archive holds with one of them; sizes stay as they are."""
    for paths in groups:
        content = max((members[path].content for path in paths), key=len)
        for path in paths:
            members[path] = replace(members[path], content=content)


def compression_of(data: bytes) -> str | None:
    """Name the compression by its first bytes; None when it is none of those that the kernel unpacks."""
    return next((name for magic, name in COMPRESSIONS.items() if data.startswith(magic)), None)


def decompress(file: Path, data: bytes, kind: str, directory: Path | None = None) -> bytes:
    """Unpack data of a compression; `directory` is for temporary files, `file` for messages.

    Raises AnchorError when the data is broken, or unpacks to more than UNPACKED_MAX.
    """
    try:
        if kind == "gzip":
            return _unpack(file, gzip.GzipFile(fileobj=io.BytesIO(data)))
        if kind in ("xz", "lzma"):
            return _unpack(file, lzma.LZMAFile(io.BytesIO(data)))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _broken(file, kind, str(error)) from None
    if kind not in ("zstd", "lz4", "bzip2"):
        raise AnchorError(f"{file}: cannot read {kind} compression")
    with tempfile.TemporaryDirectory(prefix="anchor-build-", dir=directory) as work:
        packed, plain = Path(work, "packed"), Path(work, "plain")
        packed.write_bytes(data)
        try:
            with plain.open("wb") as sink:
                run([kind, "-d", "-q", "-c", packed], stdout=sink, file_limit=UNPACKED_MAX)
        except ProcessError as error:
            if error.status == -signal.SIGXFSZ or plain.stat().st_size >= UNPACKED_MAX:
                raise _too_large(file) from None
            # Before its words the program names the temporary file, of which zstd shows the end of the path.
            why = re.sub(rf"^.*\b{packed.name} *: *", "", error.tail, flags=re.MULTILINE)
            raise _broken(file, kind, why.strip()) from None
        return plain.read_bytes()


def _unpack(file: Path, stream: BinaryIO | gzip.GzipFile | lzma.LZMAFile) -> bytes:
    data = stream.read(UNPACKED_MAX + 1)
    if len(data) > UNPACKED_MAX:
        raise _too_large(file)
    return data


def _broken(file: Path, kind: str, why: str) -> AnchorError:
    reason = f": {why}" if why else ""
    return AnchorError(f"{file}: its {kind} data is cut off or damaged{reason}", "build it again")


def _too_large(file: Path) -> AnchorError:
    return AnchorError(f"{file}: unpacks to more than {UNPACKED_MAX >> 20} MiB: it is damaged or made to do harm")
