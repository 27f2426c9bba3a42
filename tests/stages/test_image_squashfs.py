"""image squashfs: real images, tmpfs and loop mounts in a mount namespace of each test's own.

The download is a stand-in with the contract of anchor_fetch: it puts a local file where it is told to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS, TOP, Shell

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mksquashfs") is None, reason="needs root and mksquashfs"
)

STAGE = TOP / "dracut-modules/image-squashfs/stage.sh"
URL = "https://store.example/images/node.squashfs"
SHA256 = "0" * 64

LOAD = """
for lib in report mounts memory params fetch fetch-mirrors fetch-digest fetch-room verity; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGE" || exit 9
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
IMAGE_DIR="$ANCHOR_ROOT/run/anchor/image" LOWER="$ANCHOR_ROOT/run/anchor/lower"
mkdir -p "$anchor_step_dir" "$LOWER" || exit 9
anchor_fetch() {
    printf '%s\\n' "$@" >>"$ANCHOR_ROOT/fetched"
    [ -n "$SOURCE" ] || { anchor_fail "the store is away"; return 1; }
    cat "$SOURCE" >"$2"
}
anchor_fetch_place() {
    [ -n "$PLACED" ] || return 2
    printf '%s\\n' "$@" >>"$ANCHOR_ROOT/placed"
    anchor_fetch_placed=$PLACED
}
show() { # the mounts of this node, without the path of the test
    while read -r device dir type options rest; do
        case $dir in
            "$ANCHOR_ROOT"/*) printf '%s %s %s %s\\n' "$device" "${dir#"$ANCHOR_ROOT"}" "$type" "$options" ;;
        esac
    done </proc/self/mounts
}
"""


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """Each shell in turn, with an empty node root."""
    root = tmp_path / "node"
    root.mkdir()
    return Shell(request.param, root)


def make_image(top: Path, compression: str = "zstd", size: int = 3_000_000) -> Path:
    """Make a squashfs of one file that does not compress."""
    (top / "root/etc").mkdir(parents=True)
    (top / "root/etc/motd").write_text("from the image\n")
    (top / "root/noise").write_bytes(os.urandom(size))
    image = top / f"image.{compression}"
    command = ["mksquashfs", str(top / "root"), str(image), "-quiet", "-no-progress", "-comp", compression]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an image of about 3 MB."""
    return make_image(tmp_path_factory.mktemp("image"))


def run(
    shell: Shell, source: Path | None, script: str, sha256: str = SHA256, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run `script`; anchor_fetch gets `source`, or fails without one."""
    env = {
        "STAGE": str(STAGE),
        "SOURCE": str(source or ""),
        "PLACED": "",
        "anchor_squashfs_url": URL,
        "anchor_squashfs_sha256": sha256,
        **more,
    }
    return shell.run(LOAD + script, env=env, unshare=("--mount",))


def note(shell: Shell, name: str) -> str:
    """Return what the step noted."""
    return (shell.root / "run/anchor/steps/10" / name).read_text().rstrip("\n")


def test_image_is_fetched_and_mounted_read_only(shell: Shell, image: Path) -> None:
    script = """
    anchor_squashfs_run && anchor_squashfs_mount "$LOWER" || exit 1
    cat "$LOWER/etc/motd"
    ! touch "$LOWER/new" 2>/dev/null || echo writable
    show
    """
    done = run(shell, image, script)
    assert done.returncode == 0, done.stderr
    motd, tmpfs, lower = done.stdout.splitlines()
    assert motd == "from the image"
    assert tmpfs.startswith("anchor-image /run/anchor/image tmpfs ro,")
    assert {"noexec", "nosuid", "nodev", "mode=700"} <= set(tmpfs.split()[3].split(","))
    assert "mpol" not in tmpfs
    device, directory, kind, options = lower.split()
    assert device.startswith("/dev/loop") and directory == "/run/anchor/lower" and kind == "squashfs"
    assert options.split(",")[0] == "ro" and not {"nosuid", "nodev"} & set(options.split(","))
    assert (shell.root / "fetched").read_text().splitlines() == [
        URL,
        str(shell.root / "run/anchor/image/image"),
        SHA256,
        "",
        "memory",
    ]
    assert note(shell, "note-compression") == "zstd"
    assert "vouches" not in done.stderr


def test_memory_holds_the_image_once_and_nothing_more(shell: Shell, image: Path) -> None:
    script = """
    anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && cat "$LOWER/noise" >/dev/null || exit 1
    stat -f -c '%S %b %f' "$IMAGE_DIR"
    ls -A "$IMAGE_DIR"
    ls -l /proc/[0-9]*/fd >open_files 2>/dev/null
    :
    """
    done = run(shell, image, f'cd "$ANCHOR_ROOT" || exit 9\n{script}')
    assert done.returncode == 0, done.stderr
    block, total, free, *files = done.stdout.split()
    assert files == ["image"]
    needed = -(-image.stat().st_size // int(block))
    assert int(total) == needed, "the tmpfs has the size of the image"
    assert int(free) == 0, "and the image fills it"
    assert str(shell.root / "run/anchor/image") not in (shell.root / "open_files").read_text()
    elsewhere = [file for file in shell.root.rglob("*") if file.is_file() and file.stat().st_size > 1_000_000]
    assert elsewhere == []


def test_running_again_neither_fetches_nor_mounts_again(shell: Shell, image: Path) -> None:
    script = """
    anchor_squashfs_run && anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && anchor_squashfs_mount "$LOWER" &&
        anchor_squashfs_run && show
    """
    done = run(shell, image, script)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert (shell.root / "fetched").read_text().count(URL) == 1


def test_run_after_an_interrupted_one_goes_on_with_its_tmpfs(shell: Shell, image: Path) -> None:
    script = """
    ( anchor_fetch() { echo half >"$2"; exit 1; }; anchor_squashfs_run )
    cat "$IMAGE_DIR/image"
    anchor_squashfs_run && show
    """
    done = run(shell, image, script)
    half, *mounts = done.stdout.splitlines()
    assert half == "half" and len(mounts) == 1 and " ro," in mounts[0], done.stderr


def test_without_a_digest_the_log_says_what_vouches_for_the_image(shell: Shell, image: Path) -> None:
    done = run(shell, image, "anchor_squashfs_run", sha256="")
    assert done.returncode == 0, done.stderr
    log = (shell.root / "run/anchor/boot.log").read_text()
    assert "rd.anchor.squashfs.sha256= is not given: nothing but the server's certificate vouches" in log


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"h", "it is something else"),
        (b"hsqs", "truncated"),
        (b"<html><title>404 Not Found</title></html>\n" * 9, "it is an HTML or XML page"),
        (b'{"errors":[{"code":"DENIED"}]}', "it is JSON"),
        (b"\x1f\x8b\x08\x00" * 99, "it is a compressed file"),
        (b"\x7fELF\x02\x01\x01\x00" * 99, "it is a program"),
        (b"\x00\xff" * 999, "it is something else"),
    ],
)
def test_what_is_no_squashfs_is_refused_and_its_memory_freed(
    shell: Shell, tmp_path: Path, content: bytes, what: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    done = run(shell, source, "anchor_squashfs_run; echo $?; show")
    assert done.stdout == "1\n", done.stderr
    assert what in note(shell, "error")
    assert note(shell, "hint")
    assert "not found" not in done.stderr and "rithmetic" not in done.stderr


@pytest.mark.parametrize("missing", [8192, 2_000_000])
def test_truncated_image_is_refused(shell: Shell, image: Path, tmp_path: Path, missing: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(image.read_bytes()[:-missing])
    done = run(shell, source, "anchor_squashfs_run; echo $?; show")
    assert done.stdout == "1\n"
    assert f"truncated: it has {source.stat().st_size} of " in note(shell, "error")


def test_failed_download_frees_the_memory(shell: Shell) -> None:
    done = run(shell, None, "anchor_squashfs_run; echo $?; show; anchor_squashfs_run; echo $?; show")
    assert done.stdout == "1\n1\n"
    assert note(shell, "error") == "the store is away"


def test_image_that_does_not_mount_frees_the_memory(shell: Shell, image: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    content = bytearray(image.read_bytes())
    content[28] = 9  # the major version
    source.write_bytes(content)
    done = run(shell, source, 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER"; echo $?; show')
    assert done.stdout == "1\n", done.stderr
    assert "cannot mount the image: mount: " in note(shell, "error")
    assert "compression" in note(shell, "hint")


@pytest.mark.parametrize(("nodes", "policy"), [("0\n", False), ("0-1\n", True), ("0,2\n", True), ("", False)])
def test_image_is_spread_over_numa_nodes(shell: Shell, image: Path, nodes: str, policy: bool) -> None:
    file = shell.root / "sys/devices/system/node/has_memory"
    file.parent.mkdir(parents=True)
    file.write_text(nodes)
    done = run(shell, image, "anchor_squashfs_run && show")
    assert done.returncode == 0, done.stderr
    assert ("mpol=interleave" in done.stdout) is policy


@pytest.mark.parametrize("compression", ["gzip", "xz", "lz4", "lzo"])
def test_other_compressions_are_noted_and_mount(tmp_path: Path, compression: str) -> None:
    source = make_image(tmp_path, compression, size=9999)
    (tmp_path / "node").mkdir()
    shell = Shell("dash", tmp_path / "node")
    done = run(shell, source, 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && cat "$LOWER/etc/motd"')
    assert done.stdout == "from the image\n", done.stderr
    assert note(shell, "note-compression") == compression


@pytest.fixture(scope="module")
def erofs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an erofs image of about 3 MB."""
    top = tmp_path_factory.mktemp("erofs")
    make_image(top)
    if shutil.which("mkfs.erofs") is None:
        pytest.skip("mkfs.erofs is missing")
    argv = ["mkfs.erofs", "-zlz4", str(top / "image.erofs"), str(top / "root")]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return top / "image.erofs"


def test_an_erofs_is_known_by_its_magic_and_mounted(shell: Shell, erofs: Path) -> None:
    script = 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && cat "$LOWER/etc/motd" && show'
    done = run(shell, erofs, script)
    assert done.returncode == 0, done.stderr
    motd, tmpfs, lower = done.stdout.splitlines()
    assert motd == "from the image"
    assert " tmpfs ro," in tmpfs
    assert lower.split()[2] == "erofs"
    assert note(shell, "note-format") == "erofs"


def test_a_file_of_a_squashfs_cannot_make_an_erofs_of_it(shell: Shell, image: Path, tmp_path: Path) -> None:
    """What is packed first lies where the superblock of an erofs would be."""
    source = tmp_path / "source"
    data = bytearray(image.read_bytes())
    data[1024:1028] = bytes([0xE2, 0xE1, 0xF5, 0xE0])
    source.write_bytes(data)
    done = run(shell, source, "anchor_squashfs_run")
    assert done.returncode == 0, done.stderr
    assert note(shell, "note-format") == "squashfs"


@pytest.mark.parametrize("left", [1028, 1100, 4096, 2_000_000])
def test_a_truncated_erofs_is_refused(shell: Shell, erofs: Path, tmp_path: Path, left: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(erofs.read_bytes()[:left])
    done = run(shell, source, "anchor_squashfs_run; echo $?; show")
    assert done.stdout == "1\n", done.stderr
    assert f"truncated: it has {left} of " in note(shell, "error")
    assert "rithmetic" not in done.stderr


@pytest.mark.parametrize("bits", [17, 64, 255])
def test_an_absurd_block_size_of_an_erofs_does_not_mount(shell: Shell, erofs: Path, tmp_path: Path, bits: int) -> None:
    source = tmp_path / "source"
    content = bytearray(erofs.read_bytes())
    content[1024 + 12] = bits
    source.write_bytes(content)
    done = run(shell, source, 'anchor_squashfs_run && anchor_squashfs_mount "$LOWER"; echo $?; show')
    assert done.stdout == "1\n", done.stderr
    assert "cannot mount the image" in note(shell, "error")
    assert "rithmetic" not in done.stderr


def test_mirrors_and_the_manifest_say_where_the_image_is(shell: Shell, image: Path) -> None:
    run(shell, image, "anchor_squashfs_run", anchor_squashfs_mirrors="https://a/1,http://b/2")
    assert (shell.root / "fetched").read_text().splitlines()[0] == f"{URL} https://a/1 http://b/2"
    (shell.root / "fetched").unlink()
    manifest = {"anchor_manifest_urls": "https://m/1 https://m/2", "anchor_manifest_sha256": "f" * 64}
    run(shell, image, "anchor_squashfs_run", "", anchor_squashfs_url="", anchor_manifest_size="77", **manifest)
    asked = (shell.root / "fetched").read_text().splitlines()
    assert asked == ["https://m/1 https://m/2", str(shell.root / "run/anchor/image/image"), "f" * 64, "77", "memory"]


def test_an_image_in_place_is_mounted_from_there(shell: Shell, image: Path) -> None:
    script = """
    anchor_squashfs_run && anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && cat "$LOWER/etc/motd" && show
    """
    done = run(shell, None, script, PLACED=str(image))
    assert done.returncode == 0, done.stderr
    motd, lower = done.stdout.splitlines()
    assert (motd, lower.split()[2]) == ("from the image", "squashfs")
    assert (shell.root / "placed").read_text().splitlines()[:2] == [URL, SHA256]
    assert not (shell.root / "fetched").exists()


def test_an_image_in_place_is_copied_where_only_signatures_count(shell: Shell, image: Path) -> None:
    (shell.root / "etc/anchor").mkdir(parents=True)
    (shell.root / "etc/anchor/manifest.pub").write_text("a key\n")
    done = run(shell, image, "anchor_squashfs_run && show", PLACED=str(image))
    assert done.returncode == 0, done.stderr
    assert " tmpfs ro," in done.stdout
    assert not (shell.root / "placed").exists()
    assert (shell.root / "fetched").exists()


def test_garbage_in_place_is_refused(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"<html>" * 999)
    done = run(shell, None, "anchor_squashfs_run; echo $?; show", PLACED=str(tmp_path / "garbage"))
    assert done.stdout == "1\n"
    assert "HTML or XML page" in note(shell, "error")


def test_an_image_of_an_earlier_try_counts_only_while_it_is_wanted(shell: Shell, image: Path) -> None:
    """What is wanted may change between two tries: by another manifest, or a corrected command line."""
    script = """
    anchor_squashfs_run && anchor_squashfs_mount "$LOWER" && anchor_squashfs_run || exit 1
    stat -c %a "$IMAGE_DIR.of"
    anchor_squashfs_sha256=DIGEST
    anchor_squashfs_run && show && anchor_squashfs_mount "$LOWER" && anchor_squashfs_run || exit 1
    anchor_squashfs_url=https://other.example/i
    anchor_fetch() { return 1; }
    anchor_squashfs_run
    printf '%s\\n' $?
    show
    ls "$IMAGE_DIR.of" 2>&1 | grep -c "No such"
    """.replace("DIGEST", "1" * 64)
    done = run(shell, image, script)
    mode, tmpfs, status, gone = done.stdout.splitlines()
    assert mode == "600", "the URLs may hold passwords"
    # The old image is no longer mounted when the new one has come; nothing is left when none comes.
    assert tmpfs.startswith("anchor-image /run/anchor/image tmpfs ro,")
    assert (status, gone) == ("1", "1"), done.stderr
    fetched = (shell.root / "fetched").read_text().splitlines()
    assert [fetched[n] for n in (2, 7)] == [SHA256, "1" * 64]
    assert len(fetched) == 10
