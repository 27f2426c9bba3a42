"""transport file: images that are in place, and everything else that a path may name."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS, TOP, Shell

STAGE = TOP / "dracut-modules/transport-file/stage.sh"
DATA = hashlib.shake_256(b"in place").digest(2_500_000)
LOAD = 'for lib in report fetch fetch-room; do . "$LIB/anchor-$lib.sh" || exit 9; done; . "$STAGE" || exit 9\n'
PLACE = LOAD + 'anchor_file_place "$1" && printf "%s\\n" "$anchor_fetch_placed"'
RUN = (
    LOAD
    + """
anchor_fetch_left=20 anchor_fetch_room='a test' anchor_fetch_error=''
anchor_fetch_max=${2:-99999999}
anchor_file_run "$1" "$ANCHOR_ROOT/copy" "$anchor_fetch_max"
status=$?
[ "$status" -lt 2 ] || printf '%s\\n' "$anchor_fetch_error"
exit "$status"
"""
)


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    return prepared(request.param, tmp_path)


@pytest.fixture
def dash(tmp_path: Path) -> Shell:
    return prepared("dash", tmp_path)


def prepared(name: str, top: Path) -> Shell:
    root = top / "node"
    for directory in ("images", "run/anchor/credentials"):
        (root / directory).mkdir(parents=True)
    (root / "images/node.squashfs").write_bytes(DATA)
    return Shell(name, root)


def run(shell: Shell, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return shell.run(script, *arguments, env={"STAGE": str(STAGE), **env})


@pytest.mark.parametrize("url", ["file:///images/node.squashfs", "file://localhost/images/node.squashfs"])
def test_a_file_is_taken_where_it_is(shell: Shell, url: str) -> None:
    done = run(shell, PLACE, url)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{shell.root}/images/node.squashfs\n", "")


def test_a_file_is_copied(shell: Shell) -> None:
    copy = shell.root / "copy"
    assert run(shell, RUN, "file:///images/node.squashfs").returncode == 0
    assert copy.read_bytes() == DATA
    copy.write_bytes(DATA[:1_000_001])
    done = run(shell, RUN, "file:///images/node.squashfs")
    assert (done.returncode, done.stderr, copy.read_bytes() == DATA) == (0, "", True)


def test_what_was_begun_elsewhere_is_continued_only_by_its_digest(dash: Shell) -> None:
    copy = dash.root / "copy"
    copy.write_bytes(DATA[:5000])
    done = run(dash, RUN, "file:///images/node.squashfs")
    assert (done.returncode, done.stdout) == (3, "the file is not the one that was begun\n")
    assert run(dash, RUN, "file:///images/node.squashfs", anchor_fetch_verified="1").returncode == 0
    assert copy.read_bytes() == DATA
    (dash.root / "images/node.squashfs").write_bytes(DATA[:100])
    assert run(dash, RUN, "file:///images/node.squashfs", anchor_fetch_verified="1").returncode == 3


def test_a_file_that_is_too_large(dash: Shell) -> None:
    done = run(dash, RUN, "file:///images/node.squashfs", "1000000")
    assert done.returncode == 1
    assert "is too large: it needs 2.3 MiB, and 1000000 bytes fit (a test)" in done.stderr
    assert not (dash.root / "copy").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/images/../images/node.squashfs", "is not the URL of a file of this node"),
        ("/images/./node.squashfs", "is not the URL of a file of this node"),
        ("/images//node.squashfs", "is not the URL of a file of this node"),
        ("/images/", "is not the URL of a file of this node"),
        ("images/node.squashfs", "is not the URL of a file of this node"),
        ("/images/%6eode.squashfs", "is not the URL of a file of this node"),
        ("/images/node.squashfs?x", "is not the URL of a file of this node"),
        ("/proc/self/exe", "no image is there"),
        ("/dev/zero", "no image is there"),
        ("/sys/kernel/notes", "no image is there"),
        ("/run/anchor/credentials/client.key", "no image is there"),
        ("/images", "is not a file with something in it"),
        ("/images/pipe", "is not a file with something in it"),
        ("/images/empty", "is not a file with something in it"),
        ("/images/link", "there is a link in the path"),
        ("/other/node.squashfs", "there is a link in the path"),
        ("/images/nothing", "is not there"),
        ("/images/$(reboot)", "is not there"),
    ],
)
def test_what_is_no_image_in_place(dash: Shell, path: str, reason: str) -> None:
    images = dash.root / "images"
    os.mkfifo(images / "pipe")
    (images / "empty").touch()
    (images / "link").symlink_to("node.squashfs")
    (dash.root / "other").symlink_to("images")
    for script in (PLACE, RUN):
        done = run(dash, script, f"file://{path}")
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
    assert not (dash.root / "copy").exists()
