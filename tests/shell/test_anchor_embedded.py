"""anchor-embedded.sh: a squashfs of container images is mounted from where it is, and outlives its name."""

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

LOAD = """
for lib in report mounts embedded; do . "$LIB/anchor-$lib.sh" || exit 9; done
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
mkdir -p "$anchor_step_dir" || exit 9
"""


def baked(shell: Shell) -> Path:
    """Return where the images are, in a directory that is there."""
    (shell.root / "etc/anchor").mkdir(parents=True)
    return shell.root / "etc/anchor/images.squashfs"


def test_images_outlive_the_file_that_they_are_in(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout/index.json").write_text("{}\n")
    argv: list[str | Path] = ["mksquashfs", tmp_path / "layout", baked(shell), "-quiet", "-no-progress"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    script = """
    anchor_embedded_run && anchor_embedded_run && rm "$ANCHOR_ROOT/etc/anchor/images.squashfs" || exit 1
    echo 3 >/proc/sys/vm/drop_caches 2>/dev/null
    cat "$ANCHOR_ROOT/run/anchor/images/index.json"
    grep -c "$ANCHOR_ROOT/run/anchor/images squashfs ro,nosuid,nodev,noexec" /proc/self/mounts
    touch "$ANCHOR_ROOT/run/anchor/images/x" && exit 1
    exit 0
    """
    done = shell.run(LOAD + script, unshare=("--mount",))
    assert (done.returncode, done.stdout) == (0, "{}\n1\n"), done.stderr


def test_what_is_no_squashfs_fails_the_step(shell: Shell) -> None:
    baked(shell).write_bytes(bytes(8192))
    assert shell.run(LOAD + "anchor_embedded_run", unshare=("--mount",)).returncode == 1
    step = shell.root / "run/anchor/steps/10"
    assert "cannot mount the container images" in (step / "error").read_text()
    assert "loop and squashfs" in (step / "hint").read_text()
