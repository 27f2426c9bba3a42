"""transfer.py: how far a copy is, by what a real process has read and what lies in a layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from anchor_build.transfer import Fetching, Reading, far

READER = """
import sys
first, second = (open(name, "rb", buffering=0) for name in sys.argv[1:])
first.read(400_000)
print("some", flush=True)
sys.stdin.readline()
first.read(), first.close(), second.read(250_000)
print("more", flush=True)
sys.stdin.readline()
"""


def test_what_a_process_reads_is_told(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1_000_000))
    (tmp_path / "link").symlink_to(files[0])
    reading = Reading([tmp_path / "link", files[1]], "layer")
    assert reading() == ""
    with subprocess.Popen(
        [sys.executable, "-c", READER, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout and child.stdin
        reading.watch(child.pid)
        child.stdout.readline()
        assert reading() == "0.4 of 2.0 MB (20 %), layer 1 of 2"
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        assert reading() == "1.2 of 2.0 MB (62 %), layer 2 of 2"
        child.stdin.write("\n")
    files[0].unlink()
    assert reading() == "2.0 of 2.0 MB (100 %), layer 2 of 2"


def test_a_layout_that_grows_is_told(tmp_path: Path) -> None:
    blobs = tmp_path / "layout/blobs/sha256"
    progress = Fetching(tmp_path / "layout", [3_000_000, 1_000_000])
    assert progress() == "0.0 of 4.0 MB (0 %), layer 1 of 2"
    blobs.mkdir(parents=True)
    (tmp_path / "layout/oci-put-blob1").write_bytes(bytes(1_000_000))
    (blobs / ("a" * 64)).write_bytes(bytes(1_000_000))
    assert progress() == "2.0 of 4.0 MB (50 %), layer 2 of 2"
    assert Fetching(tmp_path / "layout", [5])() == "0.0 of 0.0 MB (0 %), layer 1 of 1", "what was there before"
    progress.sizes = ()
    assert progress() == "2.0 MB"


@pytest.mark.parametrize(("done", "text"), [(0, "0.0 of 1.0 MB (0 %), file 1 of 1"), (9**9, "(100 %), file 1 of 1")])
def test_more_than_all_is_all(done: int, text: str) -> None:
    assert far(done, 1_000_000, 1 if done else 0, 1, "file").endswith(text)
