"""What a squashfs image says about itself: its superblock, and the list of its files."""

from __future__ import annotations

import calendar
import hashlib
import os
import re
import secrets
import stat
import struct
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from anchor_build.console import printable
from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import Artifact, Entry, file_facts, utc
from anchor_build.run import run, which

LIST_LIMIT_S = 300
READ_LIMIT_S = 3600
TAIL_LINES = 5
XATTR = "SCHILY.xattr."  # how tar archives name extended attributes (star(5))

# The superblock: linux/fs/squashfs/squashfs_fs.h, struct squashfs_super_block, little-endian.
SQUASHFS = struct.Struct("<4sIIIIHHHHHHQQQQQQQQ")
SQUASHFS_COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
SQUASHFS_FLAGS = {
    0: "inodes not compressed",
    1: "data not compressed",
    3: "fragments not compressed",
    4: "no fragments",
    5: "tail ends in fragments",
    6: "duplicates removed",
    7: "exportable",
    9: "no xattrs",
}
LISTED = re.compile(
    r"([-dlcbps])([-rwxsStT]{9}) ([0-9]+)/([0-9]+) +([0-9]+(?:, *[0-9]+)?) "
    r"([0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}) "
)
TYPES = {
    "-": stat.S_IFREG,
    "d": stat.S_IFDIR,
    "l": stat.S_IFLNK,
    "c": stat.S_IFCHR,
    "b": stat.S_IFBLK,
    "p": stat.S_IFIFO,
    "s": stat.S_IFSOCK,
}


def inspect_squashfs(file: Path) -> Artifact:
    """Read a squashfs image: its superblock, and its files by unsquashfs where that is installed.

    Raises AnchorError when it is cut off or of another version than 4.
    """
    with file.open("rb") as stream:
        block = stream.read(SQUASHFS.size)
    if len(block) < SQUASHFS.size:
        raise AnchorError(f"{file}: is cut off: its superblock is not whole")
    (_, inodes, made, block_size, fragments, compression, block_log, flags, _, major, minor, _, used, *_) = (
        SQUASHFS.unpack(block)
    )
    if major != 4:
        raise AnchorError(f"{file}: is squashfs {major}.{minor}: kernels of today mount version 4 only")
    if block_log > 20 or block_size != 1 << block_log:
        raise AnchorError(
            f"{file}: its superblock is damaged: a block size of {block_size}, 2 to the power of {block_log}"
        )
    facts = file_facts(file)
    if facts["bytes"] < used:
        raise AnchorError(f"{file}: is cut off: it has {facts['bytes']} of {used} bytes", "fetch or build it again")
    facts |= {
        "format": f"squashfs {major}.{minor}",
        "compression": SQUASHFS_COMPRESSIONS.get(compression, f"unknown ({compression})"),
        "block_size": block_size,
        "build_time": utc(made),
        "inodes": inodes,
        "fragments": fragments,
        "used_bytes": used,
        "features": ", ".join(text for bit, text in SQUASHFS_FLAGS.items() if flags >> bit & 1),
    }
    if which("unsquashfs") is None:
        return Artifact("image", facts, {}, ("its files are not listed: unsquashfs (squashfs-tools) is not installed",))
    return Artifact("image", facts, {entry.path: entry for entry in _list_squashfs(file)})


def read_contents(file: Path, entries: Mapping[str, Entry]) -> tuple[Mapping[str, Entry], list[str]]:
    """Return an image's entries with digests, extended attributes and whole seconds, and what could not be told.

    sqfs2tar streams the image, so that nothing of it goes to the disk. Raises AnchorError when that fails.
    """
    if which("sqfs2tar") is None:
        return entries, [
            "contents and extended attributes are not compared: sqfs2tar (squashfs-tools-ng) is not installed"
        ]
    read, write = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(_read_tar, os.fdopen(read, "rb"))
        with os.fdopen(write, "wb") as sink:
            done = run(["sqfs2tar", str(file.absolute())], timeout=READ_LIMIT_S, check=False, stdout=sink)
    try:
        members = found.result()
    except (tarfile.TarError, ValueError, OSError) as error:
        members, broken = {}, str(error)
    else:
        broken = f"status {done.status}" if done.status != 0 else ""
    if broken:
        # What sqfs2tar says is the cause; that the archive is not whole only follows from it.
        reason = "\n".join(printable(line) for line in done.stderr.splitlines()[-TAIL_LINES:]) or printable(broken)
        raise AnchorError(f"{file}: sqfs2tar cannot read it:\n{reason}", "it is damaged: fetch or build it again")
    notes = [] if entries.keys() <= members.keys() else ["what no tar archive can hold, such as sockets, has no xattrs"]
    filled = {}
    for path, entry in entries.items():
        time, digest, xattrs = members.get(path, (entry.time, "", ()))
        filled[path] = replace(entry, time=time, digest=digest, xattrs=xattrs)
    return filled, notes


def _read_tar(source: BinaryIO) -> dict[str, tuple[int, str, tuple[tuple[str, str], ...]]]:
    """Return time (seconds since the epoch), digest and extended attributes of each path of a tar stream."""
    found: dict[str, tuple[int, str, tuple[tuple[str, str], ...]]] = {}
    with source, tarfile.open(fileobj=source, mode="r|", encoding="utf-8", errors="surrogateescape") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined] # else all are kept; typeshed does not know it
            path = member.name.removeprefix("./").strip("/")
            xattrs = tuple(
                (name.removeprefix(XATTR), value.encode("utf-8", "surrogateescape").hex())
                for name, value in sorted(member.pax_headers.items())
                if name.startswith(XATTR)
            )
            digest = ""
            if member.islnk():
                # A hard link: what it is called first has the content, and the attributes.
                _, digest, xattrs = found.get(member.linkname.removeprefix("./").strip("/"), (0, "", ()))
            elif (content := tar.extractfile(member) if member.isfile() else None) is not None:
                digest = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type] # reads as a file
            found[path] = int(member.mtime), digest, xattrs
        # What follows the end of the archive is read, or its writer would never end.
        while source.read(1 << 20):
            pass
    return found


def _list_squashfs(file: Path) -> Iterator[Entry]:
    # Each line ends with a path below the directory that -dest names. The target of a link may hold a newline and
    # what looks like another line, but no image can know the name of the directory.
    top = f"inspect-{secrets.token_hex(16)}"
    argv = ["unsquashfs", "-no-progress", "-UTC", "-lln", "-dest", top, str(file.absolute())]
    with tempfile.TemporaryFile() as output:
        done = run(argv, timeout=LIST_LIMIT_S, check=False, stdout=output)
        output.seek(0)
        text = output.read().decode("utf-8", "surrogateescape")
    if done.status != 0:
        reason = "\n".join(printable(line) for line in (done.stderr or text).splitlines()[-TAIL_LINES:])
        raise AnchorError(f"{file}: unsquashfs cannot list it:\n{reason}", "it is damaged: fetch or build it again")
    start = re.compile(rf"^{LISTED.pattern}{top}(?=/|$)", re.MULTILINE)
    found = list(start.finditer(text))
    for n, match in enumerate(found):
        end = found[n + 1].start() if n + 1 < len(found) else len(text)
        path = text[match.end() : end].removesuffix("\n").removeprefix("/")
        mode = TYPES[match[1]] | _permissions(match[2])
        # A device has two numbers there; a directory's size is what its names take.
        size, target = (0 if "," in match[5] or stat.S_ISDIR(mode) else int(match[5])), ""
        if stat.S_ISLNK(mode):
            # The size of a link is that of its target in bytes: a name may hold the arrow, too.
            raw = path.encode("utf-8", "surrogateescape")
            path, target = (part.decode("utf-8", "surrogateescape") for part in (raw[: -size - 4], raw[-size:]))
        when = _seconds(match[6])
        if path:
            yield Entry(path, mode, size, f"{match[3]}:{match[4]}", when, "", target)


def _seconds(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%d %H:%M"))


def _permissions(text: str) -> int:
    """Turn rwxr-xr-x into bits; s and t stand where x would, in capitals without it."""
    mode = 0
    for n, letter in enumerate(text):
        if letter not in "-ST":
            mode |= 0o400 >> n
        if letter in "sStT":
            mode |= (stat.S_ISUID, stat.S_ISGID, stat.S_ISVTX)[n // 3]
    return mode
