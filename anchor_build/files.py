"""Where work is done and how results are put in place: whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from anchor_build.errors import AnchorError, ProcessError, UsageError

# What is done with macros and unquoted shell text, as by rpmbuild, does not survive other characters in a path.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
)
# Seconds in which a work directory that was just made may not be locked yet.
UNLOCKED_S = 60
# A file system in memory that every Linux system has (shm_overview(7)), and what has to be free there in bytes: a build
# has the initramfs there as files and as an archive, 172 MB each with --drivers generic of Debian 12.
MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own in it
ROOM = 2 << 30
WORK_PREFIX = "anchor-build-"
# Bytes of a text that a user names, such as a key or a parameter's value: the largest bundles of CAs have 1 MB.
TEXT_MAX = 16 << 20


def cache_directory() -> Path:
    """Return the directory for work and caches: $XDG_CACHE_HOME/anchor-build, which may vanish at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "anchor-build"


def sha256(data: bytes) -> str:
    """Return the SHA-256 as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def read_bounded(path: Path) -> bytes:
    """Return what is in a file; /dev/zero and the like must not fill the memory. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(TEXT_MAX + 1)
    if len(data) > TEXT_MAX:
        raise OSError(errno.EFBIG, f"has more than {TEXT_MAX >> 20} MiB", str(path))
    return data


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def place(source: Path, target: Path, seconds: int) -> None:
    """Copy a file for everyone to read, dated `seconds` since the epoch."""
    target.write_bytes(source.read_bytes())
    target.chmod(0o644)
    os.utime(target, (seconds, seconds))


def disk_hint(output: str) -> str:
    """Return what to do about a message of a full or closed disk, and nothing about others."""
    # Programs in Go write them in lower case.
    if re.search(r"no space left on device|disk quota exceeded|out of space", output, re.IGNORECASE):
        if f"{MEMORY}/" in output:
            return f"make room in {MEMORY}; a build works there where it has {ROOM >> 30} GiB free, else in the cache"
        return f"make room where the output goes and in the cache, {cache_directory()} (XDG_CACHE_HOME names another)"
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
def disk_hints() -> Iterator[None]:
    """Let a program that failed on a full or closed disk say what helps there, whatever else it would advise."""
    try:
        yield
    except ProcessError as error:
        error.hint = disk_hint(error.tail) or error.hint
        raise


@contextmanager
def work_directory(*, plain: bool = False, in_memory: bool = False) -> Iterator[Path]:
    """Yield a directory that goes away; those of builds that were killed long ago go first.

    It is in the cache, or with `in_memory` in MEMORY, where there is room for the many small files of an initramfs.
    With `plain` its path has no characters that macros or unquoted shell text would trip over: where the cache's has,
    it is the system's directory for temporary files. Raises AnchorError when it cannot be made.
    """
    place = cache = cache_directory().absolute()
    if plain and not PLAIN_PATH.fullmatch(str(cache)):
        place = Path(tempfile.gettempdir())
    try:
        for left in (*cache.glob("build-*"), *MEMORY.glob(f"{WORK_PREFIX}*")):
            _remove_left(left)
        # logind removes what other users have there when they log out (RemoveIPC, logind.conf(5)).
        if in_memory and os.geteuid() == 0 and _has_room(MEMORY):
            place = MEMORY
        place.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=WORK_PREFIX if place == MEMORY else "build-", dir=place)
        lock = os.open(work.name, os.O_RDONLY)
    except OSError as error:
        raise AnchorError(
            f"{place}: cannot be written: {error.strerror}",
            "name another cache directory with XDG_CACHE_HOME",
        ) from None
    try:
        with suppress(OSError):  # NFS locks no directories; then nobody can lock it to remove it, either
            fcntl.flock(lock, fcntl.LOCK_EX)
        with work as name:
            yield Path(name)
    finally:
        os.close(lock)


def _remove_left(directory: Path) -> None:
    """Remove a work directory whose process was killed: nobody holds its lock, and its first moment is over."""
    with suppress(OSError):
        found = directory.lstat()
        if found.st_uid != os.geteuid() or found.st_mtime > time.time() - UNLOCKED_S:
            return
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


def _allowed_memory() -> int:
    """Return the bytes that the control groups of this process leave it; a lot where they set no limit (cgroups(7))."""
    allowed = 1 << 62
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").rpartition("0::")[2].strip()
        places = [Path("/sys/fs/cgroup") / group.lstrip("/")]
        for place in (*places, *places[0].parents):
            with suppress(OSError, ValueError):
                most = int((place / "memory.max").read_text(encoding="ascii"))
                allowed = min(allowed, most - int((place / "memory.current").read_text(encoding="ascii")))
    return allowed


def _has_room(directory: Path) -> bool:
    """Whether a file system in memory may take ROOM bytes, and run programs: dracut calls one in its work directory."""
    try:
        found = os.statvfs(directory)
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return False
    available = re.search(r"^MemAvailable: *(\d+) kB$", text, re.MULTILINE)
    room = min(found.f_bavail * found.f_frsize, int(available[1]) * 1024 if available else 0, _allowed_memory())
    return os.path.ismount(directory) and not found.f_flag & os.ST_NOEXEC and room >= ROOM


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """Yield a directory from which finished files only have to be renamed into the directory `output`.

    It is removed on the way out, and after a failure the directories that had to be made for it, too. Raises
    AnchorError when they cannot be made.
    """
    missing = [path for path in (output, *output.parents) if not path.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=".anchor-build-", dir=output)
    except OSError as error:
        _remove_empty(missing)
        raise AnchorError(
            f"--out {output}: cannot be written: {error.strerror}", "name another directory with --out"
        ) from None
    try:
        yield Path(name)
    except BaseException:
        shutil.rmtree(name, ignore_errors=True)
        _remove_empty(missing)
        raise
    shutil.rmtree(name, ignore_errors=True)


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


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


def put_in_place(partial: Path, target: Path) -> None:
    """Rename a finished file to its name. It gets owner and mode of the file that it replaces, else mode 0644."""
    try:
        there = target.stat()
    except FileNotFoundError:
        partial.chmod(0o644)
    else:
        if os.geteuid() == 0:
            os.chown(partial, there.st_uid, there.st_gid)
        partial.chmod(there.st_mode & 0o777)
    partial.replace(target)


def output_problems(output: Path, *others: Path, option: str = "--output ") -> list[str]:
    """Return why a file, and others beside it, could not be put in place; nothing when they could.

    `option` stands before the file's name: what the user gave it with, and nothing where no option gave it.
    """
    problems = []
    directory = output.parent
    if not directory.is_dir():
        problems.append(f"{option}{output}: {directory} is not a directory")
    elif not os.access(directory, os.W_OK):
        problems.append(f"{option}{output}: {directory} may not be written")
    if output.exists() and not output.is_file():
        problems.append(f"{option}{output}: is there and not a plain file")
    for other in others:
        what = "report" if other.suffix == ".json" else "manifest"
        if other.exists() and not other.is_file():
            problems.append(f"{option}{output}: its {what} {other} is there and not a plain file")
    return problems


def directory_problems(output: Path) -> list[str]:
    """Return why nothing could be put into a directory, which need not be there yet; nothing when it could."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return [f"--out {output}: {nearest} is not a directory"]
    return [] if os.access(nearest, os.W_OK | os.X_OK) else [f"--out {output}: {nearest} may not be written"]


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file; not where one leads nowhere, or cannot, being too long say."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def refuse_overwriting(option: str, outputs: Iterable[Path], read: Iterable[Path]) -> None:
    """Raise UsageError where a result would take the place of a file that the same command reads."""
    given = list(read)
    for output in outputs:
        for path in given:
            if is_same(output, path):
                raise UsageError(
                    f"{option} {output}: would take the place of {path}, which is read", "name another file"
                )
