"""`anchor-build image --verity`: veritysetup takes what it makes; it, publish and inspect take what that makes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from anchor_build.errors import AnchorError
from anchor_build.image import ImageBuild, build_image, published_name
from anchor_build.inspect.artifact import read_artifact
from anchor_build.manifest import manifest_text, read_manifest
from anchor_build.verity import BLOCK, Tree, add_tree, has_tree, read_tree

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and capabilities"),
    *(
        pytest.mark.skipif(
            shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None, reason=f"no {program}"
        )
        for program in ("mkfs.erofs", "mksquashfs", "veritysetup")
    ),
]
FORMATS = pytest.mark.parametrize("kind", ["squashfs", "erofs"])
OTHER = "b" * 64


def silent(title: str, progress: object = None) -> nullcontext[None]:
    return nullcontext()


def anchor(*words: str | Path) -> CompletedProcess[str]:
    argv = [sys.executable, "-m", "anchor_build", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def made(*words: str | Path) -> Any:
    """Make an image; return its report."""
    done = anchor("image", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def used_bytes(image: Path) -> int:
    """Read what a node reads (dracut-modules/image-squashfs/stage.sh)."""
    head = image.read_bytes()[:2048]
    if head.startswith(b"hsqs"):
        return int(struct.unpack_from("<Q", head, 40)[0])
    return int(struct.unpack_from("<I", head, 1024 + 36)[0]) << head[1024 + 12]


def by_hand(image: Path, size: int, *options: str) -> str:
    """Append a hash tree with veritysetup, as a site would; return the root hash."""
    argv = ["veritysetup", "format", image, image, f"--hash-offset={size}", f"--data-blocks={size // BLOCK}", *options]
    done = subprocess.run(list(map(str, argv)), check=True, capture_output=True, text=True, timeout=60)
    return re.search(r"Root hash:\s*(\w+)", done.stdout)[1]  # type: ignore[index] # it prints one


def verifies(image: Path, size: int, root_hash: str) -> bool:
    argv = ["veritysetup", "verify", str(image), str(image), root_hash, f"--hash-offset={size}"]
    return subprocess.run(argv, check=False, capture_output=True, timeout=60).returncode == 0


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a root whose image has two levels of hashes."""
    top = tmp_path_factory.mktemp("verity") / "tree"
    for name in ("dev", "proc", "run", "sys", "sbin", "lib/modules/6.1.0-1"):
        (top / name).mkdir(parents=True)
    (top / "lib/modules/6.1.0-1/modules.dep").touch()
    (top / "sbin/init").write_bytes(os.urandom(700_000))
    return top


@pytest.fixture(scope="module")
def plain(tree: Path) -> Path:
    """Make an image without a tree."""
    made(tree, "-o", tree.parent / "plain.squashfs", "--url", "https://store/images/", "--peer", "http://node/fixed")
    return tree.parent / "plain.squashfs"


def copy(image: Path, to: Path) -> Path:
    """Copy an image and its manifest."""
    for suffix in ("", ".manifest"):
        shutil.copy(f"{image}{suffix}", f"{to}{suffix}")
    return to


@FORMATS
def test_veritysetup_takes_it_and_the_same_input_gives_the_same_bytes(tree: Path, tmp_path: Path, kind: str) -> None:
    image, again = tmp_path / f"node.{kind}", tmp_path / "again.img"
    report = made(tree, "-o", image, "--verity")
    assert report["data_bytes"] == -(-used_bytes(image) // BLOCK) * BLOCK
    assert report["bytes"] == image.stat().st_size == report["data_bytes"] + report["tree_bytes"]
    assert read_manifest(Path(f"{image}.manifest"))[0].verity == report["verity"]
    assert verifies(image, report["data_bytes"], report["verity"])
    assert read_tree(image, silent) == Tree(report["verity"], report["data_bytes"], report["tree_bytes"])
    assert made(tree, "-o", again, "--verity", "--format", kind)["sha256"] == report["sha256"]
    # The file system is what it is without a tree.
    without = made(tree, "-o", tmp_path / f"without.{kind}")
    assert "verity" not in without
    assert (tmp_path / f"without.{kind}").read_bytes() == image.read_bytes()[: report["data_bytes"]]
    for position in (0x500, report["data_bytes"] - 1, report["data_bytes"] + BLOCK + 5, image.stat().st_size - BLOCK):
        shutil.copy(image, again)
        flip(again, position)
        assert not verifies(again, report["data_bytes"], report["verity"])
        with pytest.raises(AnchorError, match=r"is not that of its data|its hash tree is"):
            read_tree(again, silent)


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128 + 1])
def test_trees_of_any_height(tmp_path: Path, blocks: int) -> None:
    image, size = tmp_path / "image", blocks * BLOCK
    # The rest of the last block is not written: mksquashfs -nopad.
    image.write_bytes(b"hsqs".ljust(40, b"\0") + struct.pack("<Q", size - 100) + bytes(4000 - 48))
    os.truncate(image, size - 100)
    shutil.copy(image, tmp_path / "other")
    tree = add_tree(image, "image", silent)
    assert (tree.data_bytes, tree.data_bytes + tree.tree_bytes) == (size, image.stat().st_size)
    assert verifies(image, size, tree.root_hash)
    assert read_tree(image, silent) == tree
    os.truncate(tmp_path / "other", size)
    root_hash = by_hand(tmp_path / "other", size)
    assert read_tree(tmp_path / "other", silent).root_hash == root_hash != tree.root_hash


def test_an_image_that_is_there_gets_a_tree_and_keeps_it(plain: Path, tmp_path: Path) -> None:
    image = copy(plain, tmp_path / "node.squashfs")
    image.chmod(0o640)
    before = read_manifest(Path(f"{image}.manifest"))[0]
    elsewhere = made(image, "-o", tmp_path / "copy.squashfs", "--verity")
    assert image.read_bytes() == plain.read_bytes()
    report = made(image, "--verity")
    assert report["sha256"] == elsewhere["sha256"]
    assert (tmp_path / "copy.squashfs").read_bytes() == image.read_bytes()
    assert image.stat().st_mode & 0o777 == 0o640
    assert verifies(image, plain.stat().st_size, report["verity"])
    manifest = read_manifest(Path(f"{image}.manifest"))[0]
    name = published_name(image, report["sha256"])
    assert (manifest.verity, manifest.kernels, manifest.unpacked) == (report["verity"], before.kernels, before.unpacked)
    assert (manifest.mirrors, manifest.peers) == ((f"https://store/images/{name}",), ("http://node/fixed",))
    # A new manifest names the same root hash, asked for or not, of the same file.
    inode = image.stat().st_ino
    for words in (["--valid-for", "30d"], ["--verity"]):
        assert made(image, *words)["verity"] == report["verity"]
        assert read_manifest(Path(f"{image}.manifest"))[0].mirrors == manifest.mirrors
    assert made(image, "-o", tmp_path / "renewed.squashfs")["verity"] == report["verity"]
    assert (image.stat().st_ino, image.stat().st_size) == (inode, report["bytes"])
    # A manifest that says otherwise of an image without a tree is not passed on.
    bare = read_manifest(Path(f"{plain}.manifest"))[1].decode() + f"verity {OTHER}\n"
    shutil.copy(plain, image)
    Path(f"{image}.manifest").write_text(bare)
    done = anchor("image", image)
    assert (done.returncode, "names a root hash, and it has no hash tree" in done.stderr) == (1, True), done.stderr


def test_a_tree_that_a_site_made_is_kept_and_checked(plain: Path, tmp_path: Path) -> None:
    image = tmp_path / "node.squashfs"
    shutil.copy(plain, image)
    size = plain.stat().st_size
    root_hash = by_hand(image, size)
    whole = image.read_bytes()
    # Older nodes refuse a manifest with a root hash: nobody gets one who has not asked for it.
    done = anchor("image", image)
    assert (done.returncode, "add --verity" in done.stderr) == (0, True), done.stderr
    assert read_manifest(Path(f"{image}.manifest"))[0].verity == ""
    assert made(image, "--verity")["verity"] == root_hash
    assert image.read_bytes() == whole
    kept = Path(f"{image}.manifest").read_bytes()
    for damage in ("data", "tree", "cut"):
        image.write_bytes(whole[:-BLOCK] if damage == "cut" else whole)
        if damage != "cut":
            flip(image, 300_000 if damage == "data" else size + BLOCK + 100)
        for more in ([], ["-o", str(tmp_path / "new.squashfs")]):
            done = anchor("image", image, "--verity", *more)
            reason = "its hash tree is cut off" if damage == "cut" else "is not that of its data"
            assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
            assert "truncate -s" in done.stderr
        assert Path(f"{image}.manifest").read_bytes() == kept
        assert not (tmp_path / "new.squashfs").exists()


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--hash=sha512", "of a kind that nodes do not open"),
        ("--hash-block-size=1024", "of a kind that nodes do not open"),
        ("--data-blocks=2", "is for 2 blocks"),
    ],
)
def test_a_tree_that_nodes_do_not_open_is_refused(plain: Path, tmp_path: Path, option: str, reason: str) -> None:
    image = tmp_path / "node.squashfs"
    shutil.copy(plain, image)
    by_hand(image, plain.stat().st_size, option)
    with pytest.raises(AnchorError, match=reason):
        read_tree(image, silent)


def test_what_follows_a_file_system_is_not_overwritten(plain: Path, tmp_path: Path) -> None:
    image = tmp_path / "node.squashfs"
    image.write_bytes(plain.read_bytes() + bytes(10_000))
    assert made(image, "--verity")["data_bytes"] == plain.stat().st_size
    image.write_bytes(plain.read_bytes() + bytes(5000) + b"x")
    done = anchor("image", image, "--verity")
    assert (done.returncode, "something follows its file system" in done.stderr) == (1, True), done.stderr
    assert image.stat().st_size == plain.stat().st_size + 5001
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "node.squashfs",
        *(f"node.squashfs.{s}" for s in ("json", "manifest")),
    ]


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"hsqs" + bytes(50), "its superblock is not whole"),
        (b"hsqs" + bytes(5000), "it says that nothing is used"),
        (b"hsqs" + bytes(36) + b"\xff" * 8 + bytes(5000), "is cut off: it has 5048 of 18446744073709551615 bytes"),
        (bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(5000), "blocks of 2 to the power of 0"),
    ],
)
def test_a_superblock_that_cannot_be_is_told(tmp_path: Path, head: bytes, reason: str) -> None:
    image = tmp_path / "node.squashfs"
    image.write_bytes(head)
    done = anchor("image", image, "--verity")
    assert (done.returncode, reason in done.stderr) == (1, True), done.stderr
    assert image.read_bytes() == head


def test_without_veritysetup_it_says_so_before_the_work(
    tree: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = copy(plain, tmp_path / "node.squashfs")
    made(image, "--verity")
    monkeypatch.setattr("anchor_build.image.which", lambda name: None if name == "veritysetup" else Path("/bin/true"))
    with pytest.raises(AnchorError, match="veritysetup is missing: install cryptsetup-bin"):
        build_image(ImageBuild(output=tmp_path / "new.squashfs", source=tree, verity=True), silent)
    assert not (tmp_path / "new.squashfs").exists()
    # A tree that is there is checked without it.
    assert build_image(ImageBuild(output=image, source=image, verity=True), silent)["verity"]


def test_an_image_at_a_registry_has_no_tree() -> None:
    done = anchor("image", "--at", "registry.example/a:b", "--verity")
    assert (done.returncode, "--verity do not belong to --at" in done.stderr) == (2, True), done.stderr


def test_no_manifest_is_published_by_which_nodes_could_not_read(plain: Path, tmp_path: Path) -> None:
    image = copy(plain, tmp_path / "node.squashfs")
    (tmp_path / "www").mkdir()
    manifest = Path(f"{image}.manifest")
    manifest.write_text(manifest.read_text() + f"verity {OTHER}\n")
    done = anchor("publish", image, "--to", tmp_path / "www")
    assert (done.returncode, "has no hash tree" in done.stderr) == (1, True), done.stderr
    root_hash = by_hand(image, plain.stat().st_size)
    manifest.unlink()
    made(image, "--verity")
    right = manifest.read_text()
    manifest.write_text(right.replace(root_hash, OTHER))
    done = anchor("publish", image, "--to", tmp_path / "www")
    assert (done.returncode, f"is {root_hash}, and its manifest names" in done.stderr) == (1, True), done.stderr
    # Digest and manifest agree, but the data and the tree do not.
    flip(image, 300_000)
    manifest.unlink()
    made(image)
    text = manifest_text(read_manifest(manifest)[0])
    manifest.write_text(f"{text}verity {root_hash}\n")
    done = anchor("publish", image, "--to", tmp_path / "www")
    assert (done.returncode, "is not that of its data" in done.stderr) == (1, True), done.stderr
    assert list((tmp_path / "www").iterdir()) == []
    flip(image, 300_000)
    manifest.write_text(right)
    assert anchor("publish", image, "--to", tmp_path / "www").returncode == 0
    assert has_tree(tmp_path / "www" / read_manifest(manifest)[0].file)


@FORMATS
def test_inspect_shows_the_root_hash_and_whether_the_manifest_agrees(tree: Path, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"node.{kind}"
    report = made(tree, "-o", image, "--verity")
    manifest = Path(f"{image}.manifest")
    text = manifest.read_text()

    def notes() -> str:
        found = read_artifact(image)
        assert (found.facts["root_hash"], found.facts["hash_tree_bytes"]) == (report["verity"], report["tree_bytes"])
        return "\n".join(found.notes)

    assert "names this root hash" in notes()
    manifest.write_text(text.replace(report["verity"], OTHER))
    assert "names another root hash" in notes()
    manifest.write_text(re.sub("verity .*\n", "", text))
    assert "names no root hash, so that nodes copy the image" in notes()
    manifest.write_text("something else\n")
    assert "not a manifest" in notes()
    manifest.unlink()
    assert notes() == ""
    flip(image, 300_000)
    found = read_artifact(image)
    assert "root_hash" not in found.facts
    assert "no node would read it by its tree" in found.notes[0]
    manifest.write_text(text)
    os.truncate(image, report["data_bytes"])
    assert "and the image has no hash tree" in read_artifact(image).notes[0]
