"""How an initramfs is compressed: which commands there are, and running one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anchor_build.cpio import compression_of
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import disk_hint
from anchor_build.kernel import Kernel
from anchor_build.root import ENVIRONMENT, Root, enter
from anchor_build.run import start, stop

# What a name alone stands for, as dracut has it: the kernel reads no other check of xz, and no other frames of lz4.
COMMANDS = {
    "bzip2": "bzip2 -9",
    "cat": "cat",
    "gzip": "gzip -n -9",
    "lz4": "lz4 -l -9",
    "lzma": "lzma -9 -T0",
    "lzo": "lzop -9",
    "xz": "xz --check=crc32 --lzma2=dict=1MiB -T0",
    "zstd": "zstd -15 -q -T0",
}
CPIO = b"07070"
XZ = b"\xfd7zXZ\0"


@dataclass(frozen=True)
class Compression:
    """A command that reads an archive and writes it compressed; `option` names what asked for it, if anything did."""

    command: str
    words: tuple[str, ...]
    option: str = ""

    @property
    def named(self) -> str:
        """Return what a message calls it."""
        return self.option or f"compression with {self.words[0]}"


def choose(given: str | None, kernel: Kernel) -> Compression:
    """Return the compression that a user gave, by dracut's name or as a command; else the best that the kernel unpacks.

    That is zstd, or gzip where the kernel cannot unpack zstd or its system has none. Raises AnchorError for a command
    that could not be run.
    """
    root = kernel.root
    if given is None:
        command = "pigz -n -6" if root.find_program("pigz") else "gzip -n -6"
        if kernel.unpacks("zstd") and (root.is_host or root.find_program("zstd")):
            command = "zstd -6 -T0 -q"
        return Compression(command, tuple(command.split()))
    option = f"--compress {given!r}"
    try:
        words = shlex.split(COMMANDS.get(given, given))
    except ValueError as error:
        raise AnchorError(f"{option}: {error}", "close the quotation") from None
    if not words or not words[0]:
        raise AnchorError(f"{option}: names no program", f"use one of {', '.join(COMMANDS)}, or a command")
    if not _is_there(words[0], root):
        where = "" if root.is_host else f" in {root.name}"
        raise AnchorError(f"{option}: {words[0]}: program not found{where}", "install it, or leave out --compress")
    return Compression(given, tuple(words), option)


def _is_there(program: str, root: Root) -> bool:
    if "/" not in program:
        return root.find_program(program) is not None
    return program.startswith("/") and os.access(root.at(program), os.X_OK) and root.at(program).is_file()


@contextmanager
def compressed(compression: Compression, source: Path, output: Path, kernel: Kernel, work: Path) -> Iterator[None]:
    """Compress an archive while the caller goes on; `output` is complete when the context ends.

    The command is of the system that the kernel is of, reads standard input and writes standard output. `work` holds
    `source`. Raises AnchorError when it fails or writes what the kernel cannot unpack.
    """
    argv = enter(kernel.root, work, compression.words)
    with source.open("rb") as archive, output.open("wb") as sink:
        child = start(argv, env=ENVIRONMENT, only_env=True, cwd=work, stdin=archive, stdout=sink)
        try:
            yield
            _, said = child.communicate()
        except BaseException:
            stop(child)
            raise
    if child.returncode != 0:
        hint = disk_hint(said) or (f"that is {compression.option}" if compression.option else "")
        raise ProcessError(compression.words, child.returncode, said.strip(), hint)
    _check(compression.named, output, kernel)


def _check(what: str, output: Path, kernel: Kernel) -> None:
    with output.open("rb") as file:
        head = file.read(16)
    kind = compression_of(head)
    if kind is None and not head.startswith(CPIO):
        raise AnchorError(f"{what} wrote nothing that a kernel could unpack", f"use one of {', '.join(COMMANDS)}")
    if kind and not kernel.unpacks(kind):
        raise AnchorError(f"{what}: the kernel {kernel.release} cannot unpack {kind}", "leave out --compress")
    if head.startswith(XZ) and head[7] > 1:
        # Its flags: 0 is no check, 1 is CRC32 (xz-file-format.txt); lib/decompress_unxz.c knows no other.
        raise AnchorError(f"{what}: the kernel cannot unpack xz with this check", "add --check=crc32")
