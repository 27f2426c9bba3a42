"""anchor-overlay.sh: real overlays of a real squashfs image, in a mount namespace of each test's own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import Shell

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mksquashfs") is None, reason="needs root and mksquashfs"
)

# Names that a shell, mount(8) or overlayfs would read as something else. (A comma separates the list's elements.)
HOSTILE = ["/srv/a b", "/srv/$(touch pwned)", "/srv/co:lon", '/srv/quo"te', "/srv/back\\slash", "/srv/*", "/srv/-o ro"]

LOAD = """
for lib in report mounts overlay; do . "$LIB/anchor-$lib.sh"; done
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
LOWER="$ANCHOR_ROOT/run/anchor/lower" NEWROOT="$ANCHOR_ROOT/sysroot" BASE="$ANCHOR_ROOT/run/anchor/overlay"
mkdir -p "$anchor_step_dir" "$LOWER" "$NEWROOT" && cd "$ANCHOR_ROOT" || exit 9
mount -t squashfs -o loop,ro "$IMAGE" "$LOWER" || exit 9
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a root image of a few files."""
    top = tmp_path_factory.mktemp("image")
    root = top / "root"
    for name in ["/etc", "/mnt", "/tmp", "/var/lib/app", "/var/log", *HOSTILE]:  # noqa: S108 (inside the image)
        (root / name[1:]).mkdir(parents=True)
    (root / "etc/motd").write_text("from the image\n")
    (root / "var/log/old").write_text("from the image\n")
    (root / "tmp").chmod(0o1777)
    (root / "var/lib/app").chmod(0o750)
    os.chown(root / "var/lib/app", 123, 45)
    (root / "var/run").symlink_to("/run")
    (root / "data").symlink_to("var")
    subprocess.run(
        ["mksquashfs", root, top / "image", "-quiet", "-no-progress"], check=True, capture_output=True, timeout=60
    )
    return top / "image"


def run(
    shell: Shell, image: Path, script: str, write: str = "/", size: str = "8388608"
) -> subprocess.CompletedProcess[str]:
    """Run `script` with the image mounted on $LOWER."""
    env = {"IMAGE": str(image), "anchor_overlay_write": write, "anchor_overlay_size": size}
    return shell.run(LOAD + script, env=env, unshare=("--mount",))


def note(shell: Shell, name: str) -> str:
    """Return what the step noted."""
    return (shell.root / "run/anchor/steps/10" / name).read_text().rstrip("\n")


def test_whole_root_is_writable_and_the_image_stays_as_it_is(shell: Shell, image: Path) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    echo changed >"$NEWROOT/etc/motd" && echo new >"$NEWROOT/etc/new" && rm "$NEWROOT/var/log/old" || exit 2
    cat "$NEWROOT/etc/motd" "$LOWER/etc/motd" "$LOWER/var/log/old" "$NEWROOT/mnt/overlay_writable/etc/new"
    [ ! -e "$NEWROOT/var/log/old" ] || echo "still there"
    ! touch "$NEWROOT/mnt/overlay_writable/x" 2>/dev/null || echo "the view is writable"
    stat -c %a "$NEWROOT" "$LOWER" "$NEWROOT/tmp"
    """
    done = run(shell, image, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == ["changed", "from the image", "from the image", "new"]
    assert done.stdout.split()[-3:] == ["755", "755", "1777"]
    assert "still there" not in done.stdout and "the view is writable" not in done.stdout
    assert note(shell, "note-writable") == "/"
    assert "warning" not in done.stderr


def test_only_the_listed_directories_are_writable(shell: Shell, image: Path) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    for dir in etc var tmp var/log var/lib/app mnt; do
        ! touch "$NEWROOT/$dir/new" 2>/dev/null || echo "$dir"
    done
    ls "$NEWROOT/mnt/overlay_writable" "$NEWROOT/mnt/overlay_writable/1"
    stat -c '%a %u:%g' "$NEWROOT/tmp" "$NEWROOT/var/lib/app"
    """
    done = run(shell, image, script, write="/tmp,/var/log,/var/lib/app")  # noqa: S108 (inside the image)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["tmp", "var/log", "var/lib/app"]
    assert "1" in lines and "new" in lines, "the view shows what was written"
    assert lines[-2:] == ["1777 0:0", "750 123:45"]
    assert "warning" not in done.stderr


@pytest.mark.parametrize(
    ("write", "mounts"),
    [("/var/log,/", ["root"]), ("/var/lib/app,/var/log,/var", ["root/var"]), ("/var,/var", ["root/var"])],
)
def test_directories_inside_writable_ones_are_no_mounts_of_their_own(
    shell: Shell, image: Path, write: str, mounts: list[str]
) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    touch "$NEWROOT/var/lib/app/x" "$NEWROOT/var/log/y" || exit 2
    while read -r device dir type rest; do
        [ "$type" != overlay ] || printf 'root%s\\n' "${dir#"$NEWROOT"}"
    done </proc/self/mounts
    """
    done = run(shell, image, script, write=write)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line != "root/mnt"] == mounts


@pytest.mark.parametrize("write", [*HOSTILE, ",".join(HOSTILE)])
def test_names_of_directories_stay_text(shell: Shell, image: Path, write: str) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    [ ! -e pwned ] && [ ! -e "$NEWROOT/srv/pwned" ] || exit 2
    """
    script += "".join(f"touch '{shell.root}/sysroot{name}/written' || exit 3\n" for name in write.split(","))
    script += '! touch "$NEWROOT/srv/elsewhere" 2>/dev/null || exit 4; ls "$LOWER"/srv/*'
    done = run(shell, image, script, write=write)
    assert done.returncode == 0, done.stderr
    assert "written" not in done.stdout


@pytest.mark.parametrize(
    ("write", "what", "hint"),
    [
        ("/var/log,/nowhere", "no directory /nowhere", "create it in the image"),
        ("/var/nowhere/deep", "no directory /var/nowhere", "create it in the image"),
        ("/etc/motd", "no directory /etc/motd", "create it in the image"),
        ("/var/run", "/var/run is a symbolic link", "name the directory it leads to"),
        ("/data/log", "/data is a symbolic link", "name the directory it leads to"),
    ],
)
def test_directory_that_the_image_lacks_fails_and_leaves_nothing_mounted(
    shell: Shell, image: Path, write: str, what: str, hint: str
) -> None:
    script = 'anchor_overlay_run "$LOWER" "$NEWROOT"; echo "$?"; cat /proc/self/mounts'
    done = run(shell, image, script, write=write)
    status, *mounts = done.stdout.splitlines()
    assert status == "1"
    assert what in note(shell, "error")
    assert hint in note(shell, "hint")
    assert not [line for line in mounts if f"{shell.root}/sysroot" in line or "anchor-overlay" in line]


def test_running_again_changes_nothing(shell: Shell, image: Path) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" && echo kept >"$NEWROOT/var/log/new" || exit 1
    cat /proc/self/mounts >before
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 2
    cmp before /proc/self/mounts && cat "$NEWROOT/var/log/new"
    """
    done = run(shell, image, script, write="/var/log")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kept\n"


def test_run_after_a_broken_one_starts_afresh(shell: Shell, image: Path) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" && umount -R "$NEWROOT" || exit 1
    anchor_overlay_run "$LOWER" "$NEWROOT" && touch "$NEWROOT/etc/new" || exit 2
    while read -r device dir rest; do [ "$dir" != "$BASE" ] || echo "$device"; done </proc/self/mounts
    """
    done = run(shell, image, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "anchor-overlay\n"


def test_foreign_mount_on_the_new_root_is_left_alone(shell: Shell, image: Path) -> None:
    script = """
    mount -t tmpfs foreign "$NEWROOT" && touch "$NEWROOT/theirs" || exit 9
    anchor_overlay_run "$LOWER" "$NEWROOT"; echo "$?"; ls "$NEWROOT"
    """
    done = run(shell, image, script)
    assert done.stdout == "1\ntheirs\n"
    assert "something else is mounted" in note(shell, "error")


@pytest.mark.parametrize("write", ["/", "/var/log"])
def test_writable_layer_has_the_given_size_and_no_more(shell: Shell, image: Path, write: str) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    stat -f -c '%b %S' "$BASE"
    head -c 1500000 /dev/zero >"$NEWROOT/var/log/fits" || exit 2
    ! head -c 1500000 /dev/zero >"$NEWROOT/var/log/too_much" || exit 3
    stat -c %s "$NEWROOT/var/log/fits"
    """
    done = run(shell, image, script, write=write, size="2097152")
    assert done.returncode == 0, done.stderr
    blocks, block_size, size = map(int, done.stdout.split())
    assert blocks * block_size == 2097152
    assert size == 1500000
    assert "No space left" in done.stderr


def test_writable_layer_takes_a_share_of_the_memory(shell: Shell, image: Path) -> None:
    done = run(shell, image, 'anchor_overlay_run "$LOWER" "$NEWROOT" && stat -f -c "%b %S" "$BASE"', size="25%")
    assert done.returncode == 0, done.stderr
    blocks, block_size = map(int, done.stdout.split())
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert blocks * block_size == pytest.approx(total / 4, rel=0.02)


def test_layer_that_cannot_be_made_fails(shell: Shell, image: Path) -> None:
    script = 'anchor_overlay_run "$LOWER" "$NEWROOT"; echo "$?"; cat /proc/self/mounts'
    done = run(shell, image, script, size="-1")
    status, *mounts = done.stdout.splitlines()
    assert status == "1", done.stderr
    assert "cannot make the writable layer of -1" in note(shell, "error")
    assert not [line for line in mounts if f"{shell.root}/sysroot" in line or "anchor-overlay" in line]


def test_written_files_run_but_the_layer_itself_gives_no_privilege(shell: Shell, image: Path) -> None:
    script = """
    anchor_overlay_run "$LOWER" "$NEWROOT" || exit 1
    program="$NEWROOT/tmp/program"
    printf '#!/bin/sh\\necho runs\\n' >"$program" && chmod 0755 "$program" && "$program" || exit 2
    stat -c %a "$BASE"
    while read -r device dir type options rest; do
        [ "$dir" != "$BASE" ] || printf '%s\\n' "$options"
    done </proc/self/mounts
    """
    done = run(shell, image, script)
    assert done.returncode == 0, done.stderr
    runs, mode, options = done.stdout.split()
    assert (runs, mode) == ("runs", "700")
    assert {"nosuid", "nodev"} <= set(options.split(","))


def test_image_without_mnt_gets_no_view(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    subprocess.run(
        ["mksquashfs", tmp_path / "root", tmp_path / "image", "-quiet", "-no-progress"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    done = run(shell, tmp_path / "image", 'anchor_overlay_run "$LOWER" "$NEWROOT" && ls "$NEWROOT"')
    assert done.returncode == 0, done.stderr
    assert done.stdout == "etc\n"
    assert "warning" not in done.stderr
