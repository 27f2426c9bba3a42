"""What a squashfs image says about itself: its superblock, and the list of its files."""

from __future__ import annotations

import calendar
import re
import secrets
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from anchor_build.console import printable
from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import IMAGE_NOTE, Artifact, Entry, file_facts, utc
from anchor_build.run import run, which

LIST_LIMIT_S = 300

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
    return Artifact("image", facts, {entry.path: entry for entry in _list_squashfs(file)}, (IMAGE_NOTE,))


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
        reason = "\n".join(printable(line) for line in (done.stderr or text).splitlines()[-5:])
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
