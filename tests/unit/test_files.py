"""Where work is done and results are put: whole or not at all, and nothing left behind."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

import pytest

from anchor_build import files
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import (
    directory_problems,
    disk_errors,
    output_problems,
    refuse_overwriting,
    staging,
    work_directory,
)
from anchor_build.manifest_oci import Signing


def test_a_staged_result_stays_and_the_staging_goes(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staging(output) as made:
        (made / "file").write_text("whole")
        assert made.parent == output
        (made / "file").replace(output / "file")
    assert [path.name for path in output.iterdir()] == ["file"]


def test_a_failure_leaves_neither_staging_nor_directories_that_were_made_for_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "there", tmp_path / "new" / "out"):
        with pytest.raises(KeyboardInterrupt), staging(output) as made:
            (made / "half").touch()
            raise KeyboardInterrupt
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_directories_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    with pytest.raises(AnchorError, match="file/out: cannot be written: Not a directory"), staging(output):
        pass
    assert directory_problems(output) == [f"--out {tmp_path}/file/out: {tmp_path}/file is not a directory"]
    assert directory_problems(tmp_path / "not" / "yet" / "there") == []


def test_a_relative_output_is_looked_for_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert directory_problems(Path("out")) == []
    with staging(Path("out")):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root, who runs the tests in a pipeline, may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert directory_problems(tmp_path / "out") == [f"--out {tmp_path}/out: {tmp_path} may not be written"]


def test_an_output_that_no_option_named_is_called_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    output = tmp_path / "node.squashfs.oci.manifest"
    assert output_problems(output, option="") == [f"{output}: {tmp_path} may not be written"]
    assert output_problems(output) == [f"--output {output}: {tmp_path} may not be written"]
    signing = Signing(output, option="")
    with pytest.raises(AnchorError, match="may not be written") as caught:
        signing.open()
    assert "--output" not in caught.value.message and "beside the image" in caught.value.hint


def test_work_that_macros_look_at_is_done_in_a_plain_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    with work_directory() as work:
        assert work.parent == tmp_path / "a cache" / "anchor-build"
    with work_directory(plain=True) as work:
        assert work.parent == Path(tempfile.gettempdir())
    assert not work.exists()


def test_many_small_files_are_in_memory_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "ROOM", 1)
    with work_directory(in_memory=True) as work:
        assert work.parent == Path("/dev/shm")  # noqa: S108 - a directory of our own in it
        assert work.stat().st_mode & 0o777 == 0o700
    assert not work.exists()
    monkeypatch.setattr(files, "ROOM", 1 << 60)
    with work_directory(in_memory=True) as work:
        assert work.parent == tmp_path / "cache" / "anchor-build"
    # No file system in memory: the directory of some container.
    monkeypatch.setattr(files, "ROOM", 1)
    monkeypatch.setattr(files, "MEMORY", tmp_path)
    with work_directory(in_memory=True) as work:
        assert work.parent == tmp_path / "cache" / "anchor-build"


def test_what_is_no_path_is_no_input(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.touch()
    refuse_overwriting("--output", [output, tmp_path / "new"], [Path("x" * 300), tmp_path / "gone", output / "x"])
    (tmp_path / "link").symlink_to("output")
    with pytest.raises(UsageError, match=r"output: would take the place of .*/link, which is read"):
        refuse_overwriting("--output", [tmp_path / "new", output], [tmp_path / "link"])


def test_the_full_disk_is_named() -> None:
    full = os.strerror(errno.ENOSPC)
    for path in ("/dev/shm/anchor-build-1/tmp", "/home/cache/build-1/tmp"):  # noqa: S108 - only named
        with pytest.raises(AnchorError) as raised, disk_errors():
            raise OSError(errno.ENOSPC, full, path)
        assert raised.value.message == f"{path}: {full}"
        assert raised.value.hint.startswith("make room in /dev/shm;" if "shm" in path else "make room where the output")


def test_what_a_killed_build_left_goes_and_that_of_a_running_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "anchor-build"
    long_ago = time.time() - files.UNLOCKED_S - 1
    with work_directory() as running:
        for name in ("build-left", "build-new"):
            (cache / name / "tree").mkdir(parents=True)
        (cache / "build-link").symlink_to(tmp_path)
        for path in (running, cache / "build-left", cache / "build-link"):
            os.utime(path, (long_ago, long_ago), follow_symlinks=False)
        with work_directory():
            pass
        assert {path.name for path in cache.iterdir()} == {running.name, "build-new", "build-link"}
