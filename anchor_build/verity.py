"""The hash tree (dm-verity) behind the file system of an image, by which a node checks what it reads in place.

One file: the file system, padded with zeros to whole blocks; the superblock of the tree; the tree, its top first. It is
what `veritysetup format` makes with --hash-offset: linux/Documentation/admin-guide/device-mapper/verity.rst,
cryptsetup's lib/verity/verity.c. A node finds the superblock by what the file system says that it uses.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anchor_build.console import Progress, Step
from anchor_build.errors import AnchorError
from anchor_build.inspect.erofs import BLOCK_BITS, SUPER, SUPER_OFFSET
from anchor_build.inspect.squashfs import SQUASHFS
from anchor_build.run import run

PROGRAM = "veritysetup"
PACKAGES = "cryptsetup-bin (deb) or veritysetup (rpm)"
BLOCK = 4096
DIGEST = 32
MAGIC = b"verity\0\0"
# Magic, version, type of hash (1: the salt comes first), UUID, algorithm, sizes of data and hash blocks, data blocks,
# size of the salt, salt; little-endian (struct verity_sb).
SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s")
WANTED = (1, 1, b"sha256", BLOCK, BLOCK)
NO_UUID = "00000000-0000-0000-0000-000000000000"
CHUNK = 1 << 20
FORMAT_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Tree:
    """A hash tree: its root hash, the bytes of data that it vouches for, and its own with its superblock."""

    root_hash: str
    data_bytes: int
    tree_bytes: int


@dataclass
class _Far:
    """How much of `total` bytes is done; `pid` is of a process that reads them, where one does."""

    total: int
    done: int = 0
    pid: int = 0

    def watch(self, pid: int) -> None:
        """Look at this process from now on."""
        self.pid = pid

    def __call__(self) -> str:
        done = self.done
        if self.pid:
            try:
                # Its libraries are in it, too.
                done = int(Path(f"/proc/{self.pid}/io").read_text(encoding="ascii").split()[1])
            except (OSError, ValueError, IndexError):
                return ""
        done = min(done, self.total)
        return Progress(f"{100 * done // self.total} %", bytes=done, total_bytes=self.total) if done else ""


def data_bytes(image: Path) -> int:
    """Return what an image's file system takes, in bytes, to a whole block: there its tree begins.

    Raises AnchorError when the image is cut off or damaged.
    """
    with image.open("rb") as file:
        head = file.read(SUPER_OFFSET + SUPER.size)
    is_squashfs = head.startswith(b"hsqs")
    if len(head) < (SQUASHFS.size if is_squashfs else SUPER_OFFSET + SUPER.size):
        raise AnchorError(f"{image}: is cut off: its superblock is not whole")
    if is_squashfs:
        used = int(SQUASHFS.unpack_from(head)[12])
    else:
        facts = SUPER.unpack_from(head, SUPER_OFFSET)
        if facts[3] not in BLOCK_BITS:
            raise AnchorError(f"{image}: its superblock is damaged: blocks of 2 to the power of {facts[3]} bytes")
        used = int(facts[9]) << int(facts[3])
    if used == 0:
        raise AnchorError(f"{image}: its superblock is damaged: it says that nothing is used")
    size = image.stat().st_size
    if size < used:
        raise AnchorError(f"{image}: is cut off: it has {size} of {used} bytes", "fetch or build it again")
    return -(-used // BLOCK) * BLOCK


def has_tree(image: Path) -> bool:
    """Whether a hash tree begins where an image's file system ends, be it right or not."""
    with image.open("rb") as file:
        file.seek(data_bytes(image))
        return file.read(len(MAGIC)) == MAGIC


def read_tree(image: Path, step: Step) -> Tree:
    """Check the hash tree of an image, which has one, block by block; return it.

    Raises AnchorError when nodes would not open it, or it is not that of the data before it.
    """
    size = data_bytes(image)
    remedy = f"cut it off and make it anew: truncate -s {size} FILE, then anchor-build image FILE --verity"
    with image.open("rb") as file:
        file.seek(size)
        head = file.read(SUPERBLOCK.size)
        if len(head) < SUPERBLOCK.size:
            raise AnchorError(f"{image}: its hash tree is cut off", remedy)
        _, version, kind, _, algorithm, data_block, hash_block, blocks, salt_size, salt = SUPERBLOCK.unpack(head)
        if (version, kind, algorithm.rstrip(b"\0"), data_block, hash_block) != WANTED or salt_size > len(salt):
            raise AnchorError(
                f"{image}: its hash tree is of a kind that nodes do not open: they want version 1, SHA-256 and blocks"
                f" of {BLOCK} bytes",
                remedy,
            )
        if blocks != size // BLOCK:
            raise AnchorError(
                f"{image}: its hash tree is for {blocks} blocks, and its file system has {size // BLOCK}", remedy
            )
        progress = _Far(size)
        with step(f"check the hash tree of {image.name}, {size / 1e6:.0f} MB", progress):
            tree, root_hash = _make_tree(_chunks(image, size, progress), hashlib.sha256(salt[:salt_size]))
            file.seek(size + BLOCK)
            found = file.read(len(tree))
            if len(found) < len(tree):
                raise AnchorError(f"{image}: its hash tree is cut off", remedy)
            if found != tree:
                raise AnchorError(
                    f"{image}: its hash tree is not that of its data: one of them was changed",
                    f"fetch or build the image again; only where its data are known to be right, {remedy}",
                )
    return Tree(root_hash.hex(), size, BLOCK + len(tree))


def add_tree(image: Path, name: str, step: Step) -> Tree:
    """Append a hash tree to an image, which is called `name` in messages; the same image gets the same tree.

    Raises AnchorError when something else follows its file system, or veritysetup fails.
    """
    size = data_bytes(image)
    with image.open("rb") as file:
        file.seek(size)
        if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(CHUNK), b"")):
            raise AnchorError(
                f"{name}: something follows its file system, where the hash tree belongs",
                f"cut off what is no part of it: truncate -s {size} FILE",
            )
    os.truncate(image, size)
    progress = _Far(size)
    with step(f"take the digest of {size / 1e6:.0f} MB, the salt of the hash tree", progress):
        salt = hashlib.sha256()
        for chunk in _chunks(image, size, progress):
            salt.update(chunk)
    argv = [PROGRAM, "format", "--format=1", "--hash=sha256", f"--salt={salt.hexdigest()}", f"--uuid={NO_UUID}"]
    argv += [f"--data-block-size={BLOCK}", f"--hash-block-size={BLOCK}", f"--data-blocks={size // BLOCK}"]
    argv += [f"--hash-offset={size}", str(image), str(image)]
    progress = _Far(size)
    with step(f"make the hash tree of {size / 1e6:.0f} MB", progress):
        # It does not say why it could not write.
        done = run(argv, timeout=FORMAT_TIMEOUT, watch=progress.watch, hint="is the disk full where the output goes?")
    found = re.search(r"^Root hash:\s*([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    if found is None:
        raise AnchorError(f"{PROGRAM} made a hash tree and did not say what its root hash is")
    return Tree(found[1], size, image.stat().st_size - size)


def _chunks(image: Path, size: int, progress: _Far) -> Iterator[bytes]:
    """Yield the first `size` bytes of a file, whole blocks at a time."""
    with image.open("rb") as file:
        while progress.done < size:
            chunk = file.read(min(CHUNK, size - progress.done))
            if not chunk:
                raise AnchorError(f"{image}: became shorter while it was read")
            progress.done += len(chunk)
            yield chunk


def _make_tree(chunks: Iterator[bytes], salted: hashlib._Hash) -> tuple[bytes, bytes]:
    """Return the tree over data, its top first, and the root hash; `salted` is a hash that has taken the salt."""

    def hashes(data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        for start in range(0, len(data), BLOCK):
            one = salted.copy()
            one.update(view[start : start + BLOCK])
            yield one.digest()

    level = b"".join(digest for chunk in chunks for digest in hashes(chunk))
    tree = b""
    while len(level) > DIGEST:
        level += bytes(-len(level) % BLOCK)
        tree = level + tree
        level = b"".join(hashes(level))
    return tree, level
