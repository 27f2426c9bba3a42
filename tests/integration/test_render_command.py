"""`anchor-build render` on a real disk that is too small for the modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TOP

# What is on the disk is gone with its name space: it is listed there.
SCRIPT = """
mount -t tmpfs -o "size=$1" tmpfs "$2" && cd "$2" || exit 9
shift 2
"$@" >&2
status=$?
find . -mindepth 1
exit "$status"
"""


@pytest.mark.parametrize("output", ["out", "deep/er/out"])
def test_a_full_disk_leaves_no_half_of_a_module(tmp_path: Path, output: str) -> None:
    def render(size: str) -> subprocess.CompletedProcess[str]:
        disk = tmp_path / "disk"
        disk.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "anchor_build", "render", "--auth", "acme", "--image", "squashfs"]
        argv = ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", size, str(disk), *command, "-o", output]
        env = {"PYTHONPATH": str(TOP), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)

    done = render("64k")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be written: No space left on device" in done.stderr
    done = render("4m")
    assert done.returncode == 0, done.stderr
    assert f"./{output}/50anchor/module-setup.sh" in done.stdout.splitlines()
    assert ".modules-" not in done.stdout
