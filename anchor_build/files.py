"""Where work is done and how results are put in place: whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anchor_build.errors import AnchorError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG)
# No build takes so long; what is older than this was left by one that was killed. In seconds.
LEFT_AGE_S = 2 * 86400


def cache_directory() -> Path:
    """Return the directory for work and caches: $XDG_CACHE_HOME/anchor-build, which may vanish at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "anchor-build"


def disk_hint(output: str) -> str:
    """Return what to do about a message of a full or closed disk, and nothing about others."""
    if "No space left on device" in output:
        return "make room in the cache directory (XDG_CACHE_HOME) and where the output goes"
    if "Permission denied" in output:
        return "it may need root"
    return ""


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what a disk or its permissions refuse into a failure that a user can mend; other errors are bugs."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        what = f"{error.filename}: " if error.filename else ""
        raise AnchorError(f"{what}{error.strerror}", disk_hint(str(error))) from None


@contextmanager
def work_directory() -> Iterator[Path]:
    """Yield a directory in the cache that goes away; those of builds that were killed long ago go first."""
    cache = cache_directory().absolute()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob("build-*"):
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - LEFT_AGE_S:
                    shutil.rmtree(left, ignore_errors=True)
        work = tempfile.TemporaryDirectory(prefix="build-", dir=cache)
    except OSError as error:
        raise AnchorError(
            f"{cache}: cannot be written: {error.strerror}",
            "name another cache directory with XDG_CACHE_HOME",
        ) from None
    with work as name:
        yield Path(name)


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold a lock on a file, which is made if it is not there; waits for whoever else holds it."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def beside(output: Path) -> Iterator[Path]:
    """Yield a hidden name beside the output; what is left there on the way out is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def output_problems(output: Path, *others: Path) -> list[str]:
    """Return why a file, and others beside it, could not be put in place; nothing when they could."""
    problems = []
    directory = output.parent
    if not directory.is_dir():
        problems.append(f"--output {output}: {directory} is not a directory")
    elif not os.access(directory, os.W_OK):
        problems.append(f"--output {output}: {directory} may not be written")
    if output.exists() and not output.is_file():
        problems.append(f"--output {output}: is there and not a plain file")
    for other in others:
        what = "report" if other.suffix == ".json" else "manifest"
        if other.exists() and not other.is_file():
            problems.append(f"--output {output}: its {what} {other} is there and not a plain file")
    return problems
