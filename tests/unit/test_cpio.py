"""What is inside an initramfs: real archives of the real cpio, compressed by the real programs, whole and damaged."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build.cpio import (
    Initramfs,
    Member,
    parse_initramfs,
    read_initramfs,
    read_tree,
    rewrite_archives,
    write_archive,
)
from anchor_build.errors import AnchorError

pytestmark = pytest.mark.usefixtures("processes")

Read = Callable[[bytes], Initramfs]

PACKERS = {
    "gzip": ["gzip", "-9"],
    "xz": ["xz", "--check=crc32"],
    "lzma": ["xz", "--format=lzma"],
    "zstd": ["zstd", "-q", "-3", "-T0"],
    "bzip2": ["bzip2"],
    "lz4": ["lz4", "-l", "-q"],
}


def pack(tree: Path, form: str = "newc") -> bytes:
    """Archive a tree as dracut does."""
    names = "\0".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
    argv = ["cpio", "-o", "-0", "-H", form, "--quiet", "-R", "0:0"]
    return subprocess.run(argv, input=names.encode(), cwd=tree, capture_output=True, check=True).stdout


def compress(data: bytes, kind: str) -> bytes:
    if shutil.which(PACKERS[kind][0]) is None:
        pytest.skip(f"{PACKERS[kind][0]} is missing")
    return subprocess.run([*PACKERS[kind], "-c"], input=data, capture_output=True, check=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a tree of files whose sizes need every padding, and links of every sort."""
    top = tmp_path / "tree"
    (top / "usr" / "bin").mkdir(parents=True)
    (top / "bin").symlink_to("usr/bin")
    for size in range(6):
        (top / "usr" / "bin" / f"tool{size}").write_bytes(b"x" * size)
    (top / "usr" / "bin" / "tool5").chmod(0o755)
    (top / "etc").mkdir()
    (top / "etc" / "secret").write_bytes(b"s")
    (top / "etc" / "secret").chmod(0o600)
    (top / "etc" / "absolute").symlink_to("/usr/bin/tool5")
    (top / "etc" / "up").symlink_to("../bin/tool5")
    (top / "etc" / "chain").symlink_to("up")
    (top / "etc" / "loop1").symlink_to("loop2")
    (top / "etc" / "loop2").symlink_to("/etc/loop1")
    (top / "etc" / "self").symlink_to("self/x")
    (top / "etc" / "nowhere").symlink_to("/gone")
    (top / "etc" / "out").symlink_to("../../../../usr/bin/tool1")
    (top / "run").mkdir()
    (top / "usr" / "umläut").write_bytes(b"u")
    return top


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(data: bytes) -> Initramfs:
        file = tmp_path / "initramfs.img"
        file.write_bytes(data)
        return read_initramfs(file)

    return read


def content(initramfs: Initramfs, path: str) -> bytes | None:
    member = initramfs.resolve(path)
    return None if member is None else member.content


@pytest.mark.parametrize("kind", ["none", *PACKERS])
def test_each_compression(tree: Path, read: Read, kind: str) -> None:
    data = pack(tree)
    found = read(data if kind == "none" else compress(data, kind))
    assert found.compression == kind
    assert set(found.members) == {str(path.relative_to(tree)) for path in tree.rglob("*")}
    for size in range(6):
        assert content(found, f"/usr/bin/tool{size}") == b"x" * size
    assert content(found, "usr/umläut") == b"u"
    assert found.members["etc/secret"].mode & 0o7777 == 0o600
    assert found.members["usr/bin/tool5"].is_file
    assert found.members["bin"].is_link
    assert not found.members["run"].is_file


@pytest.mark.parametrize("padding", [0, 512, 4096])
def test_an_early_archive_before_the_main_one(tree: Path, tmp_path: Path, read: Read, padding: int) -> None:
    early = tmp_path / "early"
    (early / "kernel" / "x86" / "microcode").mkdir(parents=True)
    (early / "kernel" / "x86" / "microcode" / "GenuineIntel.bin").write_bytes(b"m" * 77)
    found = read(pack(early) + b"\0" * padding + compress(pack(tree), "zstd"))
    assert content(found, "/kernel/x86/microcode/GenuineIntel.bin") == b"m" * 77
    assert content(found, "/bin/tool5") == b"xxxxx"
    assert found.compression == "zstd"


def test_a_later_archive_replaces_files(tree: Path, read: Read) -> None:
    first = pack(tree)
    (tree / "etc" / "secret").write_bytes(b"later")
    assert content(read(first + pack(tree)), "etc/secret") == b"later"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/bin/tool5", b"xxxxx"),
        ("bin/./../bin//tool5", b"xxxxx"),
        ("/etc/absolute", b"xxxxx"),
        ("/etc/chain", b"xxxxx"),
        ("/etc/out", b"x"),
        ("/etc/loop1", None),
        ("/etc/self", None),
        ("/etc/nowhere", None),
        ("/bin/tool9", None),
        ("/etc/secret/x", None),
    ],
)
def test_links_are_followed_inside_the_archive(tree: Path, read: Read, path: str, expected: bytes | None) -> None:
    assert content(read(pack(tree)), path) == expected


def test_the_content_of_hard_links_is_that_of_the_last_one(tree: Path, read: Read) -> None:
    # dracut hard-links files that are alike, and cpio writes the bytes of such files once.
    for name in ("a", "b", "c"):
        (tree / "run" / name).hardlink_to(tree / "usr" / "bin" / "tool5")
    found = read(pack(tree))
    for path in ("run/a", "run/b", "run/c", "usr/bin/tool5"):
        assert found.members[path].content == b"xxxxx", path
        assert found.members[path].mode & 0o777 == 0o755
    assert sum(found.members[path].size for path in ("run/a", "run/b", "run/c", "usr/bin/tool5")) == 5


@pytest.mark.parametrize("kind", ["none", *PACKERS])
@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_file_that_is_cut_off(tree: Path, read: Read, kind: str, keep: float) -> None:
    (tree / "big").write_bytes(bytes(range(256)) * 64)
    data = pack(tree) if kind == "none" else compress(pack(tree), kind)
    with pytest.raises(AnchorError):
        read(data[: int(len(data) * keep)])


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd"])
def test_a_file_with_a_damaged_byte(tree: Path, read: Read, kind: str) -> None:
    (tree / "big").write_bytes(b"".join(str(n).encode() for n in range(9999)))
    data = bytearray(compress(pack(tree), kind))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(AnchorError):
        read(bytes(data))


def test_a_damaged_header_names_its_place(tree: Path, read: Read) -> None:
    data = bytearray(pack(tree))
    data[54:62] = b"zzzzzzzz"
    with pytest.raises(AnchorError, match="the archive is cut off or damaged at byte 0") as caught:
        read(bytes(data))
    assert caught.value.hint == "build it again"


@pytest.mark.parametrize("kind", list(PACKERS))
def test_a_cut_off_file_is_called_so_and_no_temporary_one_named(tree: Path, read: Read, kind: str) -> None:
    (tree / "big").write_bytes(bytes(range(256)) * 64)
    data = compress(pack(tree), kind)
    with pytest.raises(AnchorError, match=f"initramfs.img: its {kind} data is cut off or damaged") as caught:
        read(data[: int(len(data) * 0.9)])
    assert caught.value.hint == "build it again"
    assert "packed" not in caught.value.message


@pytest.mark.parametrize("size", [b"FFFFFFFF", b"-0000100", b"+0000001", b"  000001"])
def test_a_damaged_size_does_not_lead_astray(tree: Path, read: Read, size: bytes) -> None:
    data = bytearray(pack(tree))
    data[54:62] = size
    with pytest.raises(AnchorError, match="cut off or damaged"):
        read(bytes(data))


@pytest.mark.parametrize("data", [b"", b"not an archive", b"\x89LZO rest", b"070707" + b"0" * 100], ids=ascii)
def test_what_is_no_initramfs(read: Read, data: bytes) -> None:
    with pytest.raises(AnchorError, match="initramfs"):
        read(data)


def test_a_loop_of_links_in_a_directory_ends() -> None:
    link = Member("a", 0o120777, 3, b"a/a")
    assert Initramfs({"a": link}, "none").resolve("a/b") is None


@pytest.mark.parametrize(("size", "form"), [*((size, "newc") for size in (0, 1, 3, 4, 5000)), (5000, "crc")])
def test_an_archive_is_written_anew_with_less_and_other_content(
    tree: Path, tmp_path: Path, size: int, form: str
) -> None:
    data = pack(tree, form)
    contents = {"usr/bin/tool3": b"y" * size}
    written = rewrite_archives(tmp_path, data, {"usr/bin/tool1", "etc/up", "not/there"}, contents)
    before, after = parse_initramfs(tmp_path, data).members, parse_initramfs(tmp_path, written).members
    assert set(before) - set(after) == {"usr/bin/tool1", "etc/up"}
    assert after["usr/bin/tool3"].content == b"y" * size
    assert after["usr/bin/tool3"].mode == before["usr/bin/tool3"].mode
    assert all(after[path] == before[path] for path in after if path != "usr/bin/tool3")
    # The real cpio reads it, too.
    (tmp_path / "out").mkdir()
    argv = ["cpio", "-i", "-d", "--quiet"]
    done = subprocess.run(argv, input=written, cwd=tmp_path / "out", check=True, capture_output=True)
    assert (tmp_path / "out/usr/bin/tool3").read_bytes() == b"y" * size
    assert done.stderr == b""  # where it complains of a wrong sum
    assert rewrite_archives(tmp_path, data, (), {}) == data
    # dracut 112 puts drivers that are compressed already into an archive of their own, before the others.
    both = rewrite_archives(tmp_path, pack(tree / "etc") + bytes(512) + data, {"usr/bin/tool1", "etc/up"}, contents)
    assert both.endswith(written)
    assert parse_initramfs(tmp_path, both).members["usr/bin/tool3"].content == b"y" * size


def names_of(tree: Path) -> list[str]:
    return [".", *sorted(f"./{path.relative_to(tree)}" for path in tree.rglob("*"))]


def test_a_tree_is_written_as_cpio_does(tree: Path) -> None:
    (tree / "usr/bin/also").hardlink_to(tree / "usr/bin/tool1")
    (tree / "zz").hardlink_to(tree / "usr/bin/tool1")
    (tree / "alone").write_bytes(b"has another name elsewhere")
    (tree.parent / "elsewhere").hardlink_to(tree / "alone")
    (tree / "empty").touch(0o600)
    (tree / "empty-too").hardlink_to(tree / "empty")
    written = io.BytesIO()
    write_archive(written, read_tree(tree, names_of(tree)).members.values())
    argv = ["cpio", "-o", "-0", "-H", "newc", "--quiet", "--reproducible"]
    theirs = subprocess.run(argv, input="\0".join(names_of(tree)).encode(), cwd=tree, capture_output=True, check=True)
    assert without_links_of_directories(written.getvalue()) == without_links_of_directories(theirs.stdout)


def without_links_of_directories(data: bytes) -> bytes:
    """Return an archive with one number in place of how many directories are in each, which cpio writes before 2.14."""
    return re.sub(rb"(070701.{8}000041.{18})(........)", rb"\g<1>00000002", data)


def test_a_tree_that_was_written_is_what_is_read(tree: Path, tmp_path: Path) -> None:
    made = read_tree(tree, names_of(tree))
    with (tmp_path / "archive").open("wb") as file:
        write_archive(file, made.members.values())
    read = read_initramfs(tmp_path / "archive")
    assert {path: replace(member, inode=0) for path, member in made.members.items()} == read.members
    assert made.archives == read.archives == (("none", len(made.members)),)


@pytest.mark.parametrize("name", ["./out/passwd", "../elsewhere", "/etc/passwd", "./etc/..", "./not/there"])
def test_only_what_is_in_the_tree_is_read(tree: Path, name: str) -> None:
    (tree / "out").symlink_to("/etc")
    with pytest.raises((ValueError, FileNotFoundError)):
        read_tree(tree, [".", "./etc", "./out", name])


@pytest.mark.parametrize("seconds", [-1, -0.5])
def test_a_time_without_room_in_a_header_is_left_to_cpio(tree: Path, seconds: float) -> None:
    os.utime(tree / "etc/secret", (seconds, seconds))
    with pytest.raises(ValueError, match="secret"):
        read_tree(tree, [".", "./etc", "./etc/secret"])


def test_what_no_header_has_room_for_is_left_to_cpio(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchor_build.cpio.NUMBER_END", int((tree / "etc").stat().st_mtime) + 1)
    assert set(read_tree(tree, [".", "./etc"]).members) == {".", "etc"}
    monkeypatch.setattr("anchor_build.cpio.NUMBER_END", int((tree / "etc").stat().st_mtime))
    with pytest.raises(ValueError, match="tree"):
        read_tree(tree, [".", "./etc"])


def test_a_device_is_left_to_cpio(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        read_tree(tree, [".", "./pipe"])
