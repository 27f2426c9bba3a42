"""The superblock of a hash tree, as real veritysetup writes it and as somebody hostile might."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import Shell
from tests.stages.verity_image import BLOCK, VerityImage, add_tree

LOAD = """
for lib in report verity; do . "$LIB/anchor-$lib.sh" || exit 9; done
anchor_step_dir=$ANCHOR_ROOT
file=$1 size=$2 blocks=$3
anchor_verity__superblock && printf '%s\\n' "$salt"
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> VerityImage:
    """Make 200 blocks of data, so that the tree has two levels: of two blocks and of one."""
    top = tmp_path_factory.mktemp("verity")
    (top / "data").write_bytes(os.urandom(200 * BLOCK - 100))
    return add_tree(top / "data", top / "image")


def look(shell: Shell, file: Path, blocks: int, size: int | None = None) -> subprocess.CompletedProcess[str]:
    return shell.run(LOAD, str(file), str(file.stat().st_size if size is None else size), str(blocks))


def refusal(shell: Shell, done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    assert "rithmetic" not in done.stderr and "not found" not in done.stderr and "number" not in done.stderr
    assert (shell.root / "hint").read_text()
    return (shell.root / "error").read_text()


def changed(image: VerityImage, top: Path, offset: int, content: bytes) -> Path:
    file = top / "changed"
    whole = bytearray(image.file.read_bytes())
    whole[image.data_size + offset : image.data_size + offset + len(content)] = content
    file.write_bytes(whole)
    return file


def test_what_veritysetup_writes_is_read(shell: Shell, image: VerityImage) -> None:
    done = look(shell, image.file, 200)
    dump = subprocess.run(
        ["veritysetup", "dump", str(image.file), f"--hash-offset={image.data_size}"],
        capture_output=True,
        text=True,
        check=True,
    )
    (salt,) = (line.split()[-1] for line in dump.stdout.splitlines() if line.startswith("Salt:"))
    assert (done.returncode, done.stdout) == (0, f"{salt}\n"), done.stderr
    assert image.file.stat().st_size == (200 + 1 + 2 + 1) * BLOCK


@pytest.mark.parametrize(("blocks", "tree"), [(1, 0), (2, 1), (128, 1), (129, 3), (16384, 129), (16385, 132)])
def test_the_size_of_the_tree_is_veritysetups(shell: Shell, tmp_path: Path, blocks: int, tree: int) -> None:
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", blocks * BLOCK)
    image = add_tree(tmp_path / "data", tmp_path / "image", "--salt=-")
    assert image.file.stat().st_size == (blocks + 1 + tree) * BLOCK
    done = look(shell, image.file, blocks)
    assert (done.returncode, done.stdout) == (0, "-\n"), done.stderr
    done = look(shell, image.file, blocks, image.file.stat().st_size - 1)
    assert "it is cut off: the file has" in refusal(shell, done)


def test_the_longest_salt(shell: Shell, image: VerityImage, tmp_path: Path) -> None:
    salted = add_tree(image.file, tmp_path / "image", f"--salt={'a5' * 256}")
    done = look(shell, salted.file, salted.data_size // BLOCK)
    assert done.stdout == "a5" * 256 + "\n", done.stderr


@pytest.mark.parametrize(
    ("offset", "content", "why"),
    [
        (0, b"verity\0x", "has no hash tree"),
        (0, bytes(512), "has no hash tree"),
        (8, b"\2", "not of version 1"),
        (11, b"\x80", "not of version 1"),
        (12, b"\0", "not of version 1 and hash type 1"),
        (32, b"sha512\0", "not SHA-256"),
        (32, b"sha256x", "not SHA-256"),
        (32, b"\xff" * 32, "not SHA-256"),
        (64, (512).to_bytes(4, "little"), "not of 4096 bytes"),
        (67, b"\xff", "not of 4096 bytes"),
        (68, (1 << 31).to_bytes(4, "little"), "not of 4096 bytes"),
        (72, (199).to_bytes(8, "little"), "not of the 200 blocks"),
        (72, (201).to_bytes(8, "little"), "not of the 200 blocks"),
        (72, (200 + (1 << 63)).to_bytes(8, "little"), "not of the 200 blocks"),
        (72, b"\xff" * 8, "not of the 200 blocks"),
        (80, (257).to_bytes(2, "little"), "longer than 256"),
        (80, b"\xff\xff", "longer than 256"),
    ],
)
def test_another_superblock_is_refused(
    shell: Shell, image: VerityImage, tmp_path: Path, offset: int, content: bytes, why: str
) -> None:
    assert why in refusal(shell, look(shell, changed(image, tmp_path, offset, content), 200))


@pytest.mark.parametrize("left", [200 * BLOCK - 1, 200 * BLOCK, 200 * BLOCK + 511, 201 * BLOCK, 203 * BLOCK])
def test_a_file_that_is_cut_off(shell: Shell, image: VerityImage, tmp_path: Path, left: int) -> None:
    file = tmp_path / "short"
    file.write_bytes(image.file.read_bytes()[:left])
    why = refusal(shell, look(shell, file, 200))
    assert ("has no hash tree" if left < 200 * BLOCK + 512 else "it is cut off") in why


def test_the_largest_file_system_that_can_be_named(shell: Shell, image: VerityImage) -> None:
    """A squashfs says its size in six bytes here: no sum may overflow, and nothing is beyond the end of the file."""
    assert "has no hash tree" in refusal(shell, look(shell, image.file, 1 << 36))
