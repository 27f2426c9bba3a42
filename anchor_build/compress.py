"""How an initramfs is compressed: which commands there are, and running one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchor_build.cpio import compression_of
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import disk_hint
from anchor_build.kernel import Kernel
from anchor_build.root import ENVIRONMENT, HOST, Root, enter
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


def choose(kernel: Kernel, root: Root = HOST) -> str:
    """Return the compression command: zstd, or gzip where the kernel cannot unpack zstd or the system has none."""
    if kernel.unpacks("zstd") and (root.is_host or root.find_program("zstd")):
        return "zstd -6 -T0 -q"
    return "pigz -n -6" if root.find_program("pigz") else "gzip -n -6"


@contextmanager
def compressed(command: str, source: Path, output: Path, kernel: Kernel, work: Path) -> Iterator[None]:
    """Compress an archive while the caller goes on; `output` is complete when the context ends.

    `command`, or what a name stands for, is of the system that the kernel is of, reads standard input and writes
    standard output. `work` holds `source`. Raises AnchorError when it fails or writes what the kernel cannot unpack.
    """
    option = f"--compress {command!r}"
    try:
        words = shlex.split(COMMANDS.get(command, command))
    except ValueError as error:
        raise AnchorError(f"{option}: {error}") from None
    if not words:
        raise AnchorError(f"{option}: names no program")
    argv = enter(kernel.root, work, words)
    with source.open("rb") as archive, output.open("wb") as sink:
        child = start(argv, env=ENVIRONMENT, only_env=True, cwd=work, stdin=archive, stdout=sink)
        try:
            yield
            _, said = child.communicate()
        except BaseException:
            stop(child)
            raise
    if child.returncode != 0:
        raise ProcessError(words, child.returncode, said.strip(), disk_hint(said) or f"that is {option}")
    _check(option, output, kernel)


def _check(option: str, output: Path, kernel: Kernel) -> None:
    with output.open("rb") as file:
        head = file.read(16)
    kind = compression_of(head)
    if kind is None and not head.startswith(CPIO):
        raise AnchorError(f"{option} wrote nothing that a kernel could unpack", f"use one of {', '.join(COMMANDS)}")
    if kind and not kernel.unpacks(kind):
        raise AnchorError(f"{option}: the kernel {kernel.release} cannot unpack {kind}", "leave out --compress")
    if head.startswith(XZ) and head[7] > 1:
        # Its flags: 0 is no check, 1 is CRC32 (xz-file-format.txt); lib/decompress_unxz.c knows no other.
        raise AnchorError(f"{option}: the kernel cannot unpack xz with this check", "add --check=crc32")
