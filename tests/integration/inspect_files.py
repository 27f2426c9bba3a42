"""What the tests of `anchor-build inspect` share: the command, a tree with everything in it, images of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import read_artifact
from tests.conftest import TOP

LATER = 1_700_000_000  # seconds since the epoch
VALUE = b"binary \xff\0=\n" + b"v" * 100
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


def make_tree(tmp_path: Path) -> Path:
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
    for name in ("a", "n\nl"):  # one value for two files: it is shared
        os.setxattr(top / "etc" / name, "user.note", VALUE)
    os.setxattr(top / "usr", "user.of-a-directory", b"")
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
