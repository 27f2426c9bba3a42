"""`anchor-build inspect` on what the real tools make: rpmbuild, mksquashfs, mkfs.erofs, cpio; whole or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchor_build.cpio import UNPACKED_MAX
from anchor_build.errors import AnchorError, UsageError
from anchor_build.inspect.artifact import Artifact, compare, read_artifact
from tests.conftest import TOP

LATER = 1_700_000_000  # seconds since the epoch
FORGED = "x\n-rw-r--r-- 0/0 5 2026-01-01 00:00 squashfs-root/forged"


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Its output as JSON."""
        return json.loads(self.out)


def inspect(*words: str | Path) -> Ran:
    """Run the command as a user does."""
    argv = [sys.executable, "-m", "anchor_build", "inspect", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(TOP)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


def refuse(file: Path) -> AnchorError:
    """Expect that a file is refused, without what could drive a terminal in the message."""
    with pytest.raises(AnchorError) as caught:
        read_artifact(file)
    assert str(file) in caught.value.message
    assert all(c == "\n" or c.isprintable() for c in caught.value.message)
    return caught.value


def cut(file: Path, size: int) -> Path:
    """Copy the beginning of a file."""
    copy = file.with_name(f"{size}-{file.name}")
    copy.write_bytes(file.read_bytes()[:size])
    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a tree with every type of file, and names that make trouble."""
    top = tmp_path / "tree"
    for directory in ("etc", "usr/bin", "many"):
        (top / directory).mkdir(parents=True)
    (top / "etc" / "a").write_bytes(b"a\n")
    (top / "etc" / "a").chmod(0o4755)
    os.link(top / "etc" / "a", top / "etc" / "b")
    (top / "etc" / "forge").symlink_to(FORGED)
    (top / "etc" / "e\x1b[31m").touch()
    (top / "etc" / "n\nl").write_bytes(b"x")
    os.mkfifo(top / "fifo")
    if os.geteuid() == 0:
        os.mknod(top / "etc" / "null", 0o20666, os.makedev(1, 3))
    (top / "usr" / "bin" / "l -> x").symlink_to("../etc/a")
    (top / "usr" / "umläut").write_bytes(b"u" * 5000)
    (top / "usr").joinpath(os.fsdecode(b"\xff\xfe")).symlink_to(os.fsdecode(b"\xfd"))
    for n in range(300):
        (top / "many" / f"a-name-that-needs-a-second-block-{n}").touch()
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, (LATER, LATER), follow_symlinks=False)
    return top


def image(tree: Path, kind: str, name: str = "root") -> Path:
    """Make an image of a tree. Its name says nothing of what it is."""
    file = tree.parent / f"{name}.{kind}.bin"
    if shutil.which(f"mk{kind}" if kind == "squashfs" else "mkfs.erofs") is None:
        pytest.skip(f"what makes {kind} is missing")
    if kind == "squashfs":
        argv = ["mksquashfs", tree, file, "-quiet", "-no-progress", "-noappend", "-comp", "zstd", "-b", "64K"]
    else:
        argv = ["mkfs.erofs", "--quiet", "-zlz4hc", "-T", str(LATER), file, tree]
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(LATER)} if kind == "squashfs" else None
    subprocess.run(list(map(str, argv)), check=True, capture_output=True, env=env, timeout=60)
    return file


# --- Images -----------------------------------------------------------------------------------------------


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


# --- Packages ---------------------------------------------------------------------------------------------

SPEC = """\
Name: demo
Epoch: 2
Version: 1.2.3~dev5.gabcdef0
Release: 1
Summary: A package
License: Apache-2.0
BuildArch: noarch
Requires: dracut >= 59
Recommends: curl
Provides: older = 1
Obsoletes: older < 2
%description
What it is.
%install
mkdir -p %{buildroot}/usr/lib/demo %{buildroot}/etc
printf '%{?text}%{!?text:text}' >%{buildroot}/usr/lib/demo/file
printf x >%{buildroot}/usr/lib/demo/one
ln %{buildroot}/usr/lib/demo/one %{buildroot}/usr/lib/demo/two
ln -s file %{buildroot}/usr/lib/demo/link
touch %{buildroot}/etc/ghost
%post
:
%files
%dir /usr/lib/demo
%attr(0640, root, root) /usr/lib/demo/file
/usr/lib/demo/one
/usr/lib/demo/two
/usr/lib/demo/link
%ghost /etc/ghost
%changelog
* Sat Jan 03 2026 A <a@example.org> - 1.2.3-1
- It begins.
"""
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    if shutil.which("rpmbuild") is None:
        pytest.skip("rpmbuild is missing")

    def build(*options: str, name: str = "demo", mode: str = "-bb") -> Path:
        top = tmp_path / name
        top.mkdir()
        (top / "demo.spec").write_text(SPEC)
        argv = ["rpmbuild", "--quiet", "--nodeps", mode, "--define", f"_topdir {top}", *options, top / "demo.spec"]
        subprocess.run(list(map(str, argv)), check=True, capture_output=True, timeout=60)
        (made,) = (path for path in top.rglob("*.rpm"))
        return made

    return build


@pytest.mark.parametrize(
    ("macro", "name"), [("w6.gzdio", "gzip"), ("w3.xzdio", "xz"), ("w3.zstdio", "zstd"), ("w3.bzdio", "bzip2")]
)
def test_a_package_with_each_payload(build: Build, macro: str, name: str) -> None:
    found = read_artifact(build("--define", f"_binary_payload {macro}"))
    facts = found.facts
    assert (found.kind, facts["payload"], facts["name"], facts["arch"]) == ("rpm", name, "demo", "noarch")
    assert (facts["version"], facts["release"]) == ("2:1.2.3~dev5.gabcdef0", "1")
    assert "dracut >= 59" in facts["requires"]
    assert facts["recommends"] == ["curl"]
    assert facts["obsoletes"] == ["older < 2"]
    assert {"older = 1", "demo = 2:1.2.3~dev5.gabcdef0-1"} <= set(facts["provides"])
    assert facts["scripts"] == ["postin"]
    assert facts["signature"] == "none"
    assert "It begins." in facts["changelog"]
    entries = found.entries
    assert set(entries) == {f"usr/lib/demo{part}" for part in ("", "/file", "/one", "/two", "/link")} | {"etc/ghost"}
    assert entries["usr/lib/demo/file"].values["mode"] == "0640"
    assert entries["usr/lib/demo/file"].owner == "root:root"
    assert entries["usr/lib/demo/file"].digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert entries["usr/lib/demo/one"].digest == entries["usr/lib/demo/two"].digest != ""
    assert entries["usr/lib/demo/link"].target == "file"
    assert entries["etc/ghost"].digest == ""


@pytest.mark.parametrize("algorithm", ["1", "10"])
def test_a_package_with_other_digests(build: Build, algorithm: str) -> None:
    found = read_artifact(build("--define", f"_binary_filedigest_algorithm {algorithm}"))
    digest = found.entries["usr/lib/demo/file"].digest
    assert digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"


def test_a_source_package(build: Build) -> None:
    found = read_artifact(build(mode="-bs"))
    assert found.facts["arch"] == "src"
    assert set(found.entries) == {"demo.spec"}


def test_a_package_for_people(build: Build) -> None:
    file = build()
    said = inspect(file, "--files")
    assert (said.status, said.err) == (0, "")
    assert "2:1.2.3~dev5.gabcdef0" in said.out
    assert "-rw-r-----  root:root      4  usr/lib/demo/file" in said.out
    brief = inspect(file)
    assert "usr/lib/demo/file" not in brief.out
    assert "dracut >= 59" in brief.out
    assert brief.err == "6 entries: --files lists them\n"


def test_how_two_packages_differ(build: Build) -> None:
    first, second = build(), build("--define", "text other", name="second")
    data = inspect(first, second, "--json").data
    assert data["changed"]["usr/lib/demo/file"]["size"] == ["4", "5"]
    assert "sha256" in data["changed"]["usr/lib/demo/file"]
    assert data["same"] is False
    assert "usr/lib/demo/file: size 4 -> 5, content" in inspect(first, second).out


def test_a_package_that_is_cut_off_or_damaged(build: Build) -> None:
    file = build("--define", "_binary_payload w6.gzdio")
    size = file.stat().st_size
    for length in (4, 90, 100, 120, 500, size // 2, size - 20, size - 1):
        refuse(cut(file, length))
    good = file.read_bytes()
    for position in range(96, size, 13):
        for value in (0, 0xFF):
            file.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                read_artifact(file)
            except AnchorError as error:
                assert all(c == "\n" or c.isprintable() for c in error.message)


def test_a_payload_that_was_replaced(build: Build) -> None:
    """The payload of one package behind the header of another."""
    none = ("--define", "_binary_payload w.ufdio")
    first, second = build(*none), build(*none, "--define", "text evil", name="second")
    genuine, evil = first.read_bytes(), second.read_bytes()
    start = genuine.index(b"07070100")
    first.write_bytes(genuine[:start] + evil[evil.index(b"07070100") :])
    assert "usr/lib/demo/file: has another digest" in refuse(first).message


# --- What is something else -------------------------------------------------------------------------------


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


def test_different_kinds_are_not_compared(tree: Path, build: Build) -> None:
    said = inspect(build(), image(tree, "erofs"))
    assert (said.status, said.out) == (2, "")
    assert "cannot be compared" in said.err


# --- An initramfs -----------------------------------------------------------------------------------------


def pack(tree: Path, file: Path, *, early: Path | None = None) -> Path:
    """Pack a tree as an initramfs, gzip compressed, behind an early archive."""
    data = b""
    for top, packer in ((early, ["cat"]), (tree, ["gzip", "-n"])):
        if top is not None:
            names = "\0".join(sorted(str(path.relative_to(top)) for path in top.rglob("*")))
            argv = ["cpio", "-o", "-0", "-H", "newc", "--quiet"]
            archive = subprocess.run(argv, input=os.fsencode(names), cwd=top, capture_output=True, check=True).stdout
            data += subprocess.run(packer, input=archive, capture_output=True, check=True).stdout
    file.write_bytes(data)
    return file


@pytest.fixture
def root(tmp_path: Path, site_ca: Path) -> Path:
    """Make the tree of an initramfs as anchor-build leaves it, in what inspect looks at."""
    top = tmp_path / "root"
    files = {
        "etc/anchor/version": "0.2.0\n",
        "etc/anchor/build-time": f"{LATER}\n",
        "etc/anchor/ca.pem": site_ca.read_text(),
        "etc/anchor/params": "rd.anchor.acme.eab_key=hunter2\nrd.anchor.acme.server=https://ca\nrd.anchor.own.x=1234\n",
        "etc/key.pem": (site_ca.parent / "ca.key").read_text(),
        "usr/lib/anchor/stages/core/50-anchor/params.sh": "",
        "usr/lib/anchor/stages/auth/10-acme/params.sh": "",
        "usr/lib/anchor/stages/auth/10-acme/stage.sh": "x" * 1000,
        "usr/lib/anchor/stages/image/10-own/params.sh": "",
        "usr/lib/modules/6.1.0-x/modules.dep": "kernel/fs/overlay.ko:\n",
        "usr/lib/modules/6.1.0-x/kernel/fs/overlay.ko": "o" * 500,
        "usr/lib/initrd-release": 'DRACUT_VERSION="059-4"\nPRETTY_NAME="A \x1b[31msystem"\n',
        "usr/lib/dracut/modules.txt": "base\nanchor\n",
    }
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def test_an_initramfs(root: Path, tmp_path: Path, site_ca: Path) -> None:
    early = tmp_path / "early"
    (early / "kernel" / "x86" / "microcode").mkdir(parents=True)
    (early / "kernel" / "x86" / "microcode" / "GenuineIntel.bin").write_bytes(b"m" * 77)
    found = read_artifact(pack(root, tmp_path / "image", early=early))
    facts = found.facts
    assert found.kind == "initramfs"
    assert facts["archives"] == ["none, 4 entries", f"gzip, {len(list(root.rglob('*')))} entries"]
    assert (facts["anchor_build"], facts["build_time"]) == ("0.2.0", "2023-11-14T22:13:20Z")
    assert (facts["kernel"], facts["dracut"], facts["drivers"]) == (["6.1.0-x"], "059-4", ["overlay"])
    assert facts["dracut_modules"] == ["base", "anchor"]
    argv = ["openssl", "x509", "-in", str(site_ca), "-noout", "-fingerprint", "-sha256"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert facts["ca_certificates"] == [printed.partition("=")[2].strip().replace(":", "").lower()]
    assert facts["private_keys"] == ["etc/key.pem"]
    assert facts["bytes_by_stage"]["auth-acme"] == 1000
    assert facts["bytes_by_stage"]["anchor"] == 506  # the driver overlay, and the version
    assert facts["settings"]["rd.anchor.acme.server"] == "https://ca"
    assert any("image-own: is not known here" in note for note in found.notes)


def test_secrets_of_an_initramfs_are_not_shown(root: Path, tmp_path: Path) -> None:
    first = pack(root, tmp_path / "first")
    (root / "etc/anchor/params").write_text("rd.anchor.acme.eab_key=hunter3\n")
    second = pack(root, tmp_path / "second")
    for words in ([first], [first, "--json", "--files"], [first, second], [first, second, "--json"]):
        said = inspect(*words)
        assert "hunter" not in said.out + said.err
        assert "=1234" not in said.out
        assert "\x1b" not in said.out
    entry = read_artifact(first).entries["etc/anchor/params"]
    assert entry.digest == "(secret)"
    assert inspect(first, second).status == 1


def test_another_initramfs(tree: Path, tmp_path: Path) -> None:
    found = read_artifact(pack(tree, tmp_path / "image"))
    assert found.notes == ("holds no stage of anchor-build: it is another initramfs",)
    assert found.entries["etc/b"].digest == found.entries["etc/a"].digest != ""


def test_times_alone(root: Path, tmp_path: Path) -> None:
    first = pack(root, tmp_path / "first")
    os.utime(root / "etc" / "key.pem", (1, 1))
    said = inspect(first, pack(root, tmp_path / "second"))
    assert said.status == 1
    assert "1 more differ in their time only" in said.out
    assert "key.pem" not in said.out


def test_an_artifact_equals_itself(root: Path, tmp_path: Path) -> None:
    found: Artifact = read_artifact(pack(root, tmp_path / "first"))
    assert compare(found, found).same
    with pytest.raises(UsageError):
        compare(found, Artifact("rpm", found.facts, {}))
