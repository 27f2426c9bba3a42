"""`anchor-build inspect` on images that mksquashfs and mkfs.erofs make, whole or not, and on what is none."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest

from anchor_build.cpio import UNPACKED_MAX
from anchor_build.errors import AnchorError
from anchor_build.files import file_digest
from anchor_build.inspect.artifact import add_contents, read_artifact
from tests.integration.inspect_files import LATER, VALUE, cut, image, inspect, make_tree, refuse


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path)


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_an_image_is_listed_as_it_was_made(tree: Path, kind: str) -> None:
    found = read_artifact(image(tree, kind))
    assert found.kind == "image"
    expected = {str(path.relative_to(tree)): path.lstat() for path in tree.rglob("*")}
    assert set(found.entries) == set(expected)
    for path, entry in found.entries.items():
        there = expected[path]
        assert entry.mode == there.st_mode, path
        assert entry.owner == f"{there.st_uid}:{there.st_gid}", path
        if entry.values["type"] in ("file", "link"):
            assert entry.size == there.st_size, path
        if entry.values["type"] == "link":
            assert entry.target == str((tree / path).readlink()), path
        assert abs(entry.time - LATER) < 60, path


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_the_contents_of_an_image(tree: Path, kind: str) -> None:
    """Digests and extended attributes are those of the tree, by our own reading of erofs as by sqfs2tar."""
    file = image(tree, kind)
    found = add_contents(file, read_artifact(file))
    assert found.notes == ()
    for path, entry in found.entries.items():
        there = tree / path
        is_file = there.is_file() and not there.is_symlink()
        assert entry.digest == (file_digest(there) if is_file else ""), path
        names = sorted(os.listxattr(there, follow_symlinks=False))
        expected = {name: os.getxattr(there, name, follow_symlinks=False).hex() for name in names}
        assert dict(entry.xattrs) == expected, path
    assert dict(found.entries["etc/b"].xattrs)["user.note"] == VALUE.hex()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to set a capability")
@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_what_differs_in_content_or_capabilities_alone(tree: Path, kind: str) -> None:
    """The same size and time: only reading the files tells."""
    file = tree / "usr" / "umläut"
    for number, name in enumerate(("first", "second")):
        file.write_bytes(bytes([number]) * 5000)
        os.utime(file, (LATER, LATER))
        # struct vfs_cap_data, version 2: cap_net_bind_service (10), cap_net_raw (13)
        value = struct.pack("<5I", 0x02000001, 1 << (10, 13)[number], 0, 0, 0)
        os.setxattr(tree / "etc" / "n\nl", "security.capability", value)
        image(tree, kind, name)
    said = inspect(*(tree.parent / f"{name}.{kind}.bin" for name in ("first", "second")))
    assert said.status == 1
    assert "~ usr/umläut: content\n" in said.out
    bits = ["0100000200040000" + "0" * 24, "0100000200200000" + "0" * 24]
    assert rf"~ etc/n\nl: xattrs -security.capability=0x{bits[0]} +security.capability=0x{bits[1]}" in said.out
    assert "entries: 0 added, 0 removed, 2 changed" in said.out
    assert "read the contents of" in said.err


def test_the_same_tree_in_two_formats(tree: Path) -> None:
    """Every file, attribute and owner is the same; only the images' own facts differ."""
    data = inspect(image(tree, "squashfs"), image(tree, "erofs"), "--json").data
    assert data["facts"]["format"] == ["squashfs 4.0", "erofs"]
    assert (data["added"], data["removed"]) == ([], [])
    # erofs keeps the time of a hard link's inode, squashfs too: nothing is left
    assert data["changed"] == {}


@pytest.mark.parametrize(("kind", "program"), [("squashfs", "sqfs2tar"), ("erofs", "fsck.erofs")])
def test_without_the_program_for_contents_a_note_says_so(
    tree: Path, kind: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = image(tree, kind)
    found = read_artifact(file)
    monkeypatch.setattr(f"anchor_build.inspect.{kind}.which", lambda name: None)
    [note] = add_contents(file, found).notes
    assert program in note
    assert "is not installed" in note


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
def test_damaged_contents_are_refused(tree: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of a file that was changed in the image: an error of one message, and nothing left in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tree / "large").write_bytes(b"".join(struct.pack("<I", n * 2654435761 % 2**32) for n in range(2000)) * 20)
    file = image(tree, kind)
    found = read_artifact(file)
    good = file.read_bytes()
    whole, refused = add_contents(file, found), 0
    for start in range(4096 if kind == "erofs" else 96, len(good) - 4096, len(good) // 8):
        file.write_bytes(good[:start] + bytes(64) + good[start + 64 :])
        try:
            other = add_contents(file, found)
        except AnchorError as error:
            refused += 1
            assert str(file) in error.message
            assert all(c == "\n" or c.isprintable() for c in error.message)
        else:
            assert other.entries.keys() == whole.entries.keys()
    assert refused > 0
    cache = tmp_path / "cache" / "anchor-build"
    assert not cache.exists() or list(cache.iterdir()) == []


def test_the_superblock_of_squashfs(tree: Path) -> None:
    facts = read_artifact(image(tree, "squashfs")).facts
    assert (facts["format"], facts["compression"], facts["block_size"]) == ("squashfs 4.0", "zstd", 65536)
    assert facts["build_time"] == "2023-11-14T22:13:20Z"


def test_the_superblock_of_erofs(tree: Path) -> None:
    facts = read_artifact(image(tree, "erofs")).facts
    assert (facts["format"], facts["compression"], facts["block_size"]) == ("erofs", "lz4", 4096)
    assert facts["build_time"] == "2023-11-14T22:13:20Z"
    inodes = {(path.lstat().st_dev, path.lstat().st_ino) for path in [tree, *tree.rglob("*")]}
    assert facts["inodes"] == len(inodes)


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
@pytest.mark.parametrize("size", [40, 1030, 1100, -6000])
def test_an_image_that_is_cut_off(tree: Path, kind: str, size: int) -> None:
    refuse(cut(image(tree, kind), size))


def test_a_hostile_erofs_neither_loops_nor_escapes(tree: Path) -> None:
    """Every byte of the metadata changed, one after another: read or refused, never a traceback, never for long."""
    file = image(tree, "erofs")
    good = file.read_bytes()
    refused = 0
    for position in [*range(1024, 1160), *range(4096 if len(good) > 8192 else 1160, min(len(good), 9000), 17)]:
        for value in (0, 0x7F, 0xFF):
            file.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                read_artifact(file)
            except AnchorError as error:
                assert all(c == "\n" or c.isprintable() for c in error.message)
                refused += 1
    assert refused > 10


def test_without_unsquashfs_the_rest_is_shown(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = image(tree, "squashfs")
    monkeypatch.setattr("anchor_build.inspect.squashfs.which", lambda program: None)
    found = read_artifact(file)
    assert found.facts["compression"] == "zstd"
    assert "squashfs-tools" in found.notes[0]


def test_how_two_images_differ(tree: Path) -> None:
    first = image(tree, "squashfs", "first")
    (tree / "usr" / "new").write_bytes(b"new")
    (tree / "etc" / "n\nl").unlink()
    (tree / "etc" / "a").chmod(0o600)
    second = image(tree, "squashfs", "second")
    said = inspect(first, second)
    assert said.status == 1
    assert r"- etc/n\nl (-rw-r--r-- 0:0, 1 bytes)" in said.out
    assert "+ usr/new (-rw-r--r-- 0:0, 3 bytes)" in said.out
    assert "~ etc/a: mode 4755 -> 0600" in said.out
    assert "\x1b" not in said.out
    data = inspect(first, second, "--json").data
    assert [entry["path"] for entry in data["added"]] == ["usr/new"]
    assert data["changed"]["etc/b"]["mode"] == ["4755", "0600"]
    same = inspect(first, first)
    assert (same.status, same.out) == (0, "no difference: the same bytes\n")


# --- What is something else ---


def test_what_is_something_else(tree: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "-C", tree, "-cf", tmp_path / "a.rpm", "many"], check=True)
    assert "is a tar archive" in refuse(tmp_path / "a.rpm").message
    (tmp_path / "text").write_text("a text\n")
    assert "nothing that can be inspected" in refuse(tmp_path / "text").message
    (tmp_path / "empty").touch()
    assert "is empty" in refuse(tmp_path / "empty").message
    assert "is not there" in refuse(tmp_path / "gone").message
    assert "not a plain file" in refuse(tmp_path).message
    assert "is an ELF program" in refuse(Path("/bin/true").resolve()).message


def test_a_small_file_that_unpacks_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert UNPACKED_MAX < 4 << 30
    monkeypatch.setattr("anchor_build.cpio.UNPACKED_MAX", 1 << 20)
    for program, words in (("gzip", ["-9"]), ("zstd", ["-q"]), ("xz", ["-0"])):
        bomb = tmp_path / f"bomb.{program}"
        with bomb.open("wb") as sink:
            subprocess.run([program, *words, "-c"], input=bytes(8 << 20), stdout=sink, check=True)
        refuse(bomb)
