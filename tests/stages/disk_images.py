"""Images of whole disks, made byte by byte, and the devices that stand for disks: what tests of image disk share."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECTOR = 512
MIB = 1 << 20
# Discoverable Partitions Specification: the root of x86-64.
ROOT_TYPE = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
RECORD_AT = MIB - SECTOR


def noise(seed: str, size: int) -> bytes:
    """Return bytes that compress to about a half: random ones and zeros in turn."""
    block = 64 << 10
    parts = [
        hashlib.shake_256(f"{seed}{n}".encode()).digest(block // 2) + bytes(block // 2)
        for n in range(-(-size // block))
    ]
    return b"".join(parts)[:size]


def gpt(size: int, start: int = 2048, name: str = "root") -> tuple[bytes, bytes]:
    """Return the first 34 and the last 33 sectors of a disk of `size` bytes with one partition from sector `start` on.

    As in the UEFI specification, 5.2.3 and 5.3.
    """
    last = size // SECTOR - 1
    entry = ROOT_TYPE.bytes_le + uuid.UUID(int=start).bytes_le
    entry += struct.pack("<QQQ72s", start, last - 33, 0, name.encode("utf-16-le"))
    entries = entry.ljust(128 * 128, b"\0")

    def header(mine: int, other: int, table: int) -> bytes:
        def pack(crc: int) -> bytes:
            return struct.pack(
                "<8sIIIIQQQQ16sQIII",
                *(b"EFI PART", 0x10000, 92, crc, 0, mine, other, 34, last - 33),
                *(uuid.UUID(int=size).bytes_le, table, 128, 128, zlib.crc32(entries)),
            )

        return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")

    protective = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, min(last, 0xFFFFFFFF))
    first = (bytes(446) + protective).ljust(510, b"\0") + b"\x55\xaa" + header(1, last, 2) + entries
    return first, entries + header(last, 1, last - 32)


def disk_image(size: int, seed: str = "", start: int = 2048) -> bytes:
    """Return the image of a disk with a GPT and one partition full of noise."""
    first, last = gpt(size, start)
    body = noise(seed, size - start * SECTOR - len(last))
    return first.ljust(start * SECTOR, b"\0") + body + last


def without_record(data: bytes, at: int = RECORD_AT) -> bytes:
    """Return what a disk holds with zeros where the record lies."""
    return data[:at] + bytes(SECTOR) + data[at + SECTOR :]


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    """Attach a file as a block device."""
    argv = ["losetup", "--find", "--show", *options, str(file)]
    device = Path(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip())
    # A test that was killed leaves its partitions behind.
    subprocess.run(["partx", "--delete", str(device)], capture_output=True, check=False)
    try:
        yield device
    finally:
        # A loop device keeps its partitions, and that it is read-only, for whoever gets it next.
        subprocess.run(["partx", "--delete", str(device)], capture_output=True, check=False)
        subprocess.run(["blockdev", "--setrw", str(device)], check=True)
        subprocess.run(["losetup", "--detach", str(device)], check=True)
