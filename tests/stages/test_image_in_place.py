"""image squashfs with a root hash: which place is used and how, with real images, trees, loop devices and mounts.

tests/stages/verity_image.py says what stands in for the kernel's dm-verity. Places are files of the node; anchor_fetch,
and what makes a file of an nfs:// URL, are stand-ins with their contracts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS, Shell
from tests.stages.test_image_squashfs import LOAD, STAGE, make_image, note
from tests.stages.verity_image import VerityImage, add_tree, stand_in

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts in a namespace")

# nfs://HOST/NAME is $TOP/NAME, where HOST is not away.
SCRIPT = (
    LOAD.replace("anchor_fetch_place() {", "unused() {")
    + """
anchor_stages='transport_nfs transport_file transport_https'
anchor_stage_for_scheme() {
    anchor_transport=$1 anchor_transport_needs_digest=0
    [ "$1" != nfs ] || anchor_transport_needs_digest=1
}
anchor_file_place() { anchor_fetch_placed=${1#file://}; }
anchor_nfs_place() {
    printf '%s\\n' "$1" >>"$ANCHOR_ROOT/tried"
    case $1 in
        nfs://away/*)
            anchor_fetch_error='away is away' anchor_fetch_hint='see to it'
            return 2
            ;;
    esac
    : >"$ANCHOR_ROOT/mounted"
    anchor_fetch_placed=$TOP/${1##*/} anchor_fetch_sized=1
    anchor_fetch_size=$(stat -c %s "$anchor_fetch_placed") && return 0
    anchor_fail "$1 is not there" 'check the path'
}
anchor_nfs_leave() { rm -f "$ANCHOR_ROOT/mounted"; }
free() {
    rm -f "$ANCHOR_ROOT/dm-busy"
    dir=$IMAGE_DIR
    anchor_squashfs__free >/dev/null 2>&1
}
trap 'status=$?; free; exit "$status"' EXIT
loops() {
    for file in "$TOP"/* "$IMAGE_DIR/image"; do losetup -n -O NAME -j "$file"; done
}
left() { # what a failed boot must not leave
    show
    ls "$ANCHOR_ROOT/mounted" "$ANCHOR_ROOT/dm" "$ANCHOR_ROOT/run/anchor/image.verity" 2>/dev/null
    # Whoever looks at all loop devices of the host keeps each open for a moment.
    tries=50
    while loops=$(loops) && [ -n "$loops" ] && [ "$tries" -gt 0 ]; do
        sleep 0.1
        tries=$((tries - 1))
    done
    printf '%s' "$loops"
}
"""
)
NFS = "nfs://store/image"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> VerityImage:
    """Make a squashfs of about 300 KB with its tree."""
    top = tmp_path_factory.mktemp("verity")
    (top / "served").mkdir()
    return add_tree(make_image(top, size=300_000), top / "served/image")


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    return prepared(request.param, tmp_path)


@pytest.fixture
def dash(tmp_path: Path) -> Shell:
    return prepared("dash", tmp_path)


def prepared(name: str, top: Path) -> Shell:
    (top / "node").mkdir()
    stand_in(top / "node")
    return Shell(name, top / "node")


def run(
    shell: Shell, image: VerityImage, script: str, url: str = NFS, *, served: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `script` on a node that has the image's root hash on its command line; `served` is what its servers have."""
    env = {
        "PATH": f"{shell.root}/bin:{os.environ['PATH']}",
        "STAGE": str(STAGE),
        "SOURCE": "",
        "TOP": served or str(image.file.parent),
        "anchor_squashfs_url": url,
        "anchor_squashfs_verity": image.root_hash,
        "anchor_fetch_attempts": "1",
        "anchor_fetch_timeout": "9",
        **more,
    }
    return shell.run(SCRIPT + script, env=env, unshare=("--mount",))


@pytest.mark.parametrize("url", [NFS, "file://{}"])
def test_an_image_in_place_is_mounted_through_dm_verity(shell: Shell, image: VerityImage, url: str) -> None:
    script = """
    anchor_squashfs_run && (anchor_squashfs_mount "$LOWER") || exit 1
    cat "$LOWER/etc/motd"
    show
    anchor_squashfs_run && (anchor_squashfs_mount "$LOWER" && anchor_squashfs_mount "$LOWER") && show
    dir=$IMAGE_DIR
    anchor_squashfs__free
    left
    """
    done = run(shell, image, script, url.format(image.file))
    assert done.returncode == 0, done.stderr
    motd, first, second = done.stdout.splitlines()
    assert motd == "from the image"
    for lower in (first, second):
        assert lower.startswith("/dev/loop") and " /run/anchor/lower squashfs ro," in lower
    (_, table), again = (line.split(" --table ") for line in (shell.root / "dm-calls").read_text().splitlines())
    assert again[0].startswith("create anchor-image --readonly")
    assert table.split()[:3] == ["0", str(image.data_size // 512), "verity"]
    assert table.split()[-2] == image.root_hash
    assert not (shell.root / "fetched").exists()
    assert [note(shell, f"note-{name}") for name in ("verity", "in_place")] == [image.root_hash, "yes"]
    assert f"using {url.format(image.file)} in place" in done.stderr
    assert not (shell.root / "run/anchor/steps/10/note-sha256").exists()


@pytest.mark.parametrize("change", ["root", "block", "tree"])
def test_another_image_is_refused_and_nothing_is_left(
    shell: Shell, image: VerityImage, tmp_path: Path, change: str
) -> None:
    (tmp_path / "served").mkdir()
    served = Path(shutil.copy(image.file, tmp_path / "served/image"))
    offset = {"root": 0, "block": 200_000, "tree": image.data_size + 4096 + 7}[change]
    if change != "root":
        with served.open("r+b") as file:
            file.seek(offset)
            file.write(b"\0changed\0")
    root = "0" * 64 if change == "root" else image.root_hash
    script = "anchor_squashfs_run; echo $?; left"
    done = run(shell, image, script, served=str(served.parent), anchor_squashfs_verity=root)
    assert done.stdout == "1\n", done.stderr
    assert f"is not the one of the root hash {root}: its first block does not check out" in note(shell, "error")
    assert note(shell, "hint")


def test_garbage_a_missing_tree_and_what_the_kernel_refuses(shell: Shell, image: VerityImage, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    (served / "garbage").write_bytes(b"<html>" * 999)
    (served / "bare").write_bytes(image.file.read_bytes()[: image.data_size])
    shutil.copy(image.file, served / "image")
    for name, why in (
        ("garbage", "HTML or XML page"),
        ("bare", "has no hash tree"),
        ("nothing", "is not there"),
        ("image", "cannot set up dm-verity: device-mapper: reload ioctl"),
    ):
        (shell.root / "dm-refuses").touch()
        done = run(shell, image, "anchor_squashfs_run; echo $?; left", f"nfs://store/{name}", served=str(served))
        assert done.stdout == "1\n", done.stderr
        assert why in note(shell, "error")


def test_places_are_tried_before_a_download(shell: Shell, image: VerityImage) -> None:
    urls = {"url": "https://store/image", "anchor_squashfs_mirrors": f"nfs://away/image,nfs://store/nothing,{NFS}"}
    done = run(shell, image, 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && show', **urls)
    assert done.returncode == 0, done.stderr
    assert not (shell.root / "fetched").exists()
    tried = (shell.root / "tried").read_text().splitlines()
    assert tried[-1] == NFS and len(tried) == len(set(tried)) <= 3
    assert not (shell.root / "run/anchor/steps/10/error").exists()


def test_where_no_place_can_be_used_the_others_are_downloaded(shell: Shell, image: VerityImage) -> None:
    urls = {"url": "nfs://away/image", "anchor_squashfs_mirrors": "https://a/image,nfs://store/nothing,http://b/image"}
    script = 'anchor_squashfs_run && (anchor_squashfs_mount "$LOWER") && cat "$LOWER/etc/motd" && show'
    done = run(shell, image, script, SOURCE=str(image.file), anchor_squashfs_sha256="f" * 64, **urls)
    assert done.returncode == 0, done.stderr
    motd, tmpfs, lower = done.stdout.splitlines()
    assert motd == "from the image" and " tmpfs ro," in tmpfs and " squashfs ro," in lower
    asked = (shell.root / "fetched").read_text().splitlines()
    assert asked[0] == "https://a/image http://b/image" and asked[2] == "f" * 64
    assert "the image cannot be used in place and is downloaded: " in done.stderr
    assert "away is away" in done.stderr and "nfs://store/nothing is not there" in done.stderr
    assert not (shell.root / "dm-calls").exists(), "its digest has been taken"
    assert not (shell.root / "run/anchor/steps/10/note-verity").exists()


def test_a_download_with_a_root_hash_alone_goes_through_dm_verity(shell: Shell, image: VerityImage) -> None:
    script = """
    anchor_squashfs_run && anchor_squashfs_run && (anchor_squashfs_mount "$LOWER") && cat "$LOWER/etc/motd" && show
    wc -l <"$ANCHOR_ROOT/dm-calls"
    anchor_squashfs_verity=WRONG
    anchor_squashfs_run
    left
    """.replace("WRONG", "0" * 64)
    done = run(shell, image, script, "https://store/image", SOURCE=str(image.file))
    motd, tmpfs, lower, tables = done.stdout.splitlines()
    assert motd == "from the image" and " tmpfs ro," in tmpfs and " squashfs ro," in lower, done.stderr
    assert tables == "1", "the second run has found what the first one left"
    assert "is not the one of the root hash 000" in note(shell, "error")


def test_a_signed_root_hash_counts_and_that_of_the_command_line_does_not(shell: Shell, image: VerityImage) -> None:
    (shell.root / "etc/anchor").mkdir(parents=True)
    (shell.root / "etc/anchor/manifest.pub").write_text("a key\n")
    place = f"file://{image.file}"
    done = run(shell, image, "anchor_squashfs_run && show", place, SOURCE=str(image.file))
    assert " tmpfs ro," in done.stdout, done.stderr
    assert not (shell.root / "dm-calls").exists()
    manifest = {"anchor_manifest_urls": f"https://store/image {place}", "anchor_manifest_sha256": "e" * 64}
    manifest |= {"anchor_manifest_verity": image.root_hash, "anchor_squashfs_verity": "0" * 64}
    done = run(shell, image, 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && show', "", **manifest)
    (lower,) = done.stdout.splitlines()
    assert " squashfs ro," in lower, done.stderr


def test_without_dm_verity_a_digest_is_needed(dash: Shell, image: VerityImage) -> None:
    (dash.root / "sys/module/dm_verity").rmdir()
    (dash.root / "bin/modprobe").write_text("#!/bin/sh\nexit 1\n")
    (dash.root / "bin/modprobe").chmod(0o755)
    done = run(dash, image, "anchor_squashfs_run; echo $?; left")
    assert done.stdout == "1\n"
    assert "has a root hash alone, and this initramfs has no dm-verity" in note(dash, "error")
    done = run(dash, image, "anchor_squashfs_run && show", SOURCE=str(image.file), anchor_squashfs_sha256="f" * 64)
    assert " tmpfs ro," in done.stdout, done.stderr
    assert (dash.root / "fetched").read_text().splitlines()[0] == NFS


def test_nothing_but_a_root_hash_lets_nfs_be_used_in_place(dash: Shell, image: VerityImage) -> None:
    more = {"SOURCE": str(image.file), "anchor_squashfs_sha256": "f" * 64, "anchor_squashfs_verity": ""}
    done = run(dash, image, "anchor_squashfs_run && show", **more)
    assert " tmpfs ro," in done.stdout, done.stderr
    assert not (dash.root / "tried").exists()
    assert (dash.root / "fetched").read_text().splitlines()[0] == NFS


def test_what_is_in_use_is_said(dash: Shell, image: VerityImage) -> None:
    (dash.root / "dm-busy").touch()
    script = 'anchor_squashfs_run || exit 9; anchor_squashfs_run; echo $?; rm "$ANCHOR_ROOT/dm-busy"'
    hurry = "anchor_uptime_ms() { anchor_uptime_ms=$((${anchor_uptime_ms:-0} + 3000)); }\n"
    done = run(dash, image, f"{hurry}{script}; dir=$IMAGE_DIR; anchor_squashfs__free; left", anchor_fetch_timeout="99")
    assert done.stdout == "1\n", done.stderr
    assert "another device anchor-image is in use" in note(dash, "error")
    assert "/dev/mapper/anchor-image is in use and cannot be taken away" in done.stderr


def test_a_file_that_ends_anywhere(dash: Shell, image: VerityImage, tmp_path: Path) -> None:
    """Losetup warns of a size that is no multiple of 512, and prints that before the device."""
    (tmp_path / "served").mkdir()
    served = Path(shutil.copy(image.file, tmp_path / "served/image"))
    with served.open("ab") as file:
        file.write(b"x")
    script = """
    anchor_squashfs_run && (anchor_squashfs_mount "$LOWER") && cat "$LOWER/etc/motd" || exit 1
    dir=$IMAGE_DIR
    anchor_squashfs__free
    left
    """
    done = run(dash, image, script, served=str(served.parent))
    assert (done.returncode, done.stdout) == (0, "from the image\n"), done.stderr


def test_a_device_that_stays_behind_is_not_mounted(shell: Shell, image: VerityImage) -> None:
    """The server fell silent in the midst of it; the download that comes after has nothing to do with the device."""
    (shell.root / "dm-busy").touch()
    script = """
    anchor_uptime_ms() { anchor_uptime_ms=$((${anchor_uptime_ms:-0} + 1000)); }
    anchor_squashfs__link() { return 1; }
    anchor_squashfs_run && (anchor_squashfs_mount "$LOWER") && show
    """
    more = {"anchor_squashfs_mirrors": "https://store/image", "anchor_squashfs_sha256": "f" * 64}
    done = run(shell, image, script, SOURCE=str(image.file), anchor_fetch_timeout="99", **more)
    assert "/dev/mapper/anchor-image is in use and cannot be taken away" in done.stderr
    tmpfs, lower = done.stdout.splitlines()
    device = lower.split()[0]
    assert " tmpfs ro," in tmpfs and " squashfs ro," in lower
    assert device != os.path.realpath(shell.root / "dev/mapper/anchor-image")


def test_a_superblock_that_changes_between_two_looks_is_refused(
    dash: Shell, image: VerityImage, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = make_image(tmp_path / "other", size=100_000)
    script = f"""
    anchor_verity_open() {{ mkdir -p "${{ANCHOR_VERITY_DEVICE%/*}}" && ln -s {other} "$ANCHOR_VERITY_DEVICE"; }}
    anchor_squashfs_run
    echo $?
    left
    """
    done = run(dash, image, script)
    assert done.stdout == "1\n", done.stderr
    assert "has another size than its server said at first" in note(dash, "error")


def test_an_unreadable_place_is_said(dash: Shell, image: VerityImage, tmp_path: Path) -> None:
    (tmp_path / "served/image").mkdir(parents=True)
    done = run(dash, image, "anchor_squashfs_run; echo $?; left", served=str(tmp_path / "served"))
    assert done.stdout == "1\n"
    assert note(dash, "error") == "the image cannot be read"
