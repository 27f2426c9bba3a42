"""Compressing an archive, with the real programs."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build import compress
from anchor_build.cpio import compression_of, read_initramfs
from anchor_build.errors import AnchorError
from anchor_build.kernel import Kernel

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "hello").write_text("hello\n" * 1000)
    argv = ["cpio", "-o", "-H", "newc", "--quiet"]
    done = subprocess.run(argv, input=b"hello\n", cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "archive").write_bytes(done.stdout)
    return tmp_path / "archive"


def run(command: str, archive: Path, release: str = "6.1.0") -> bytes:
    """Compress; return what was written."""
    work = archive.parent
    kernel = Kernel(release, work)
    with compress.compressed(compress.choose(command, kernel), archive, work / "out", kernel, work):
        pass
    return (work / "out").read_bytes()


@pytest.mark.parametrize("command", ["gzip -1", "xz --check=crc32 -0", "zstd -q -T0", "cat", *compress.COMMANDS])
def test_what_a_command_or_a_name_writes_can_be_read(archive: Path, command: str) -> None:
    program = compress.COMMANDS.get(command, command).split()[0]
    if program == "lzop" and shutil.which(program) is None:
        with pytest.raises(AnchorError, match="lzop: program not found"):
            run(command, archive)
        return
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing")
    data = run(command, archive)
    kinds = {"cat": None, "lzop": "lzo"}
    assert compression_of(data) == (command if command == "lzma" else kinds.get(program, program))
    if program != "lzop":
        assert read_initramfs(archive.parent / "out").members["hello"].content == b"hello\n" * 1000


@pytest.mark.parametrize(
    ("command", "release", "said"),
    [
        ("false", "6.1.0", "false exited with status 1"),
        ("no-such-program -9", "6.1.0", "--compress 'no-such-program -9': no-such-program: program not found"),
        ("zstd 'a", "6.1.0", '--compress "zstd \'a": No closing quotation'),
        (" ", "6.1.0", "--compress ' ': names no program"),
        ("echo nothing", "6.1.0", "--compress 'echo nothing' wrote nothing that a kernel could unpack"),
        ("true", "6.1.0", "--compress 'true' wrote nothing that a kernel could unpack"),
        ("zstd -q", "4.18.0-80.el8", "--compress 'zstd -q': the kernel 4.18.0-80.el8 cannot unpack zstd"),
        ("xz -0", "6.1.0", "--compress 'xz -0': the kernel cannot unpack xz with this check"),
        ("lz4 -q", "6.1.0", "--compress 'lz4 -q' wrote nothing that a kernel could unpack"),
    ],
)
def test_what_a_kernel_could_not_unpack_is_refused(archive: Path, command: str, release: str, said: str) -> None:
    if command.startswith("lz4") and shutil.which("lz4") is None:
        pytest.skip("lz4 is missing")
    with pytest.raises(AnchorError) as raised:
        run(command, archive, release)
    assert said in str(raised.value)


def test_a_failure_beside_it_ends_it(archive: Path) -> None:
    kernel = Kernel("6.1.0", archive)
    slow = compress.choose("sleep 60", kernel)
    with (
        pytest.raises(KeyboardInterrupt),
        compress.compressed(slow, archive, archive.parent / "out", kernel, archive.parent),
    ):
        raise KeyboardInterrupt


def test_gzip_where_the_kernel_cannot_unpack_zstd(tmp_path: Path) -> None:
    assert compress.choose(None, Kernel("6.1.0", tmp_path)).command.startswith("zstd ")
    assert compress.choose(None, Kernel("4.18.0-80.el8", tmp_path)).words[0] in ("gzip", "pigz")


def test_a_program_by_its_path(archive: Path) -> None:
    zstd = shutil.which("zstd")
    assert zstd is not None
    assert compression_of(run(f"{zstd} -q", archive)) == "zstd"
    for path in ("bin/zstd", str(archive), "/"):
        with pytest.raises(AnchorError, match="program not found"):
            run(path, archive)


def test_nobody_is_told_of_an_option_that_nobody_gave(archive: Path) -> None:
    kernel = Kernel("6.1.0", archive.parent)
    for command, said in (("cat", "zstd wrote nothing"), ("false", "false exited")):
        chosen = replace(compress.choose(None, kernel), words=(command,))
        (archive.parent / "empty").touch()
        with (
            pytest.raises(AnchorError) as raised,
            compress.compressed(chosen, archive.parent / "empty", archive.parent / "out", kernel, archive.parent),
        ):
            pass
        assert said.partition(" ")[2] in raised.value.message
        assert "--compress" not in raised.value.message + raised.value.hint
