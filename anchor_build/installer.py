"""Copies files into the initramfs for dracut, which would start dracut-install, and that cp, for each of them.

dracut is a script of bash; it calls dracut-install some 140 times in a build, and that starts cp some 370 times: a
third of a build's time. In the configuration that a build gives dracut (dracut_functions.sh) there is a function by the
path of dracut-install, which asks this process first, over named pipes. It copies plain files, which needs no other
program. Whatever is more than that (a symbolic link, a driver, what is missing and its message) is left to the real
dracut-install, which takes what is there already for installed: dracut_install() in dracut-install.c, from 049 to 111.

Programs of this host are looked at with the dynamic linker's --list at once, on another core, so that it is known at
the end which libraries they need. And the tree is read from where dracut made it, not packed by cpio to be unpacked
again.
"""

# Paths are text here, as they come, and there are thousands of them.
# ruff: noqa: PTH101, PTH102, PTH108, PTH110, PTH112, PTH114, PTH115, PTH116, PTH119, PTH120
from __future__ import annotations

import os
import queue
import re
import select
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from anchor_build.cpio import Initramfs, read_tree
from anchor_build.dracut import BASE
from anchor_build.elf import MAGIC
from anchor_build.errors import AnchorError
from anchor_build.root import MAX_LINKS, Root, mounts_of
from anchor_build.run import run

# Beside this file: what dracut reads, and what it calls.
FUNCTIONS, PROGRAM = "dracut_functions.sh", "dracut_install.sh"
# In the work directory: questions, answers, and a byte for whoever may ask.
ASK, ANSWER, TURN = "ask", "answer", "turn"
# What is to be packed; what a call of dracut-install for all programs comes down to: each word ends with a zero.
NAMES, PROGRAMS, LIBRARIES = "names", "programs", "libraries"
INSTALL = "dracut-install"
# How long to wait for the linker, in seconds, with all programs and with one; what is not known by then is left to
# dracut-install.
PATIENCE, LIST_S = 30, 10
# dracut-install has these options for plain copies: several files, missing ones are no error, a directory.
OPTIONS = {"-a", "-o", "-d"}
# Lines of dracut's configuration: a function by the path of the program that stands in for dracut-install, and others.
CONFIGURATION = """anchor_place={place}
. "$anchor_place/{functions}"
{place}/dracut/{install}() {{
    anchor_ask "$@" || "$anchor_real" "$@"
}}
"""
# What dracut-install has in it when it asks ldd, and nothing else, for what a program needs: in 110 it has not.
ASKS_LDD = b"DRACUT_LDD\0"
# And when cp keeps files' owners for it: from 057 on, the second since 110; before, they are whoever builds.
KEEPS_OWNERS = re.compile(rb"timestamps,ownership\0|\0-fLp\0")
# How dracut calls cpio for an archive that does not depend on where it is made, of version 2.12 or newer.
REPRODUCIBLE = {"-o", "--reproducible", "--null", "-H", "newc", "--quiet"}


class _NotHere(Exception):  # noqa: N818 - no error: the program is to do it
    """What is asked for is not done here."""


@dataclass
class Made:
    """What came of it: the tree that dracut made, where it was read."""

    tree: Initramfs | None = None


@contextmanager
def installing(root: Root, work: Path, linker: str) -> Iterator[Made]:
    """Copy for a dracut that runs meanwhile; `prepare` has made its side.

    `linker` lists what programs need, if there is one. A bug that showed meanwhile, while dracut helped itself, is
    raised at the end.
    """
    handles = {name: os.open(work / name, os.O_RDWR | os.O_CLOEXEC) for name in (ASK, ANSWER, TURN)}
    wake, end = os.pipe()
    program = root.at(BASE / INSTALL).read_bytes()
    asks = linker and root.is_host and ASKS_LDD in program
    lister = _Lister(linker if asks else "")
    made = Made()
    files = _Files(root, work, mounts_of(root, work), keeps_owners=KEEPS_OWNERS.search(program) is not None)
    server = _Server(files, lister, handles[ASK], handles[ANSWER], made)
    thread = threading.Thread(target=server.serve, args=(wake,), name="installer")
    os.write(handles[TURN], b".")
    thread.start()
    try:
        yield made
    finally:
        os.close(end)
        thread.join()
        lister.stop()
        for handle in (*handles.values(), wake):
            os.close(handle)
    if server.bug is not None:
        raise server.bug


def prepare(work: Path, seen: Path) -> str:
    """Make the pipes, and what dracut calls; return the lines for its configuration. `seen` is `work` for dracut."""
    for name in (ASK, ANSWER, TURN):
        os.mkfifo(work / name, 0o600)
    shutil.copyfile(Path(__file__).parent / FUNCTIONS, work / FUNCTIONS)
    program = work / "dracut" / INSTALL
    program.unlink(missing_ok=True)  # the link to the real one
    # Installed, it is no program: packages have it without its mode.
    program.write_text(f"#!/bin/bash\n{(Path(__file__).parent / PROGRAM).read_text('utf-8')}", encoding="utf-8")
    program.chmod(0o755)
    return CONFIGURATION.format(place=seen, functions=FUNCTIONS, install=INSTALL)


@dataclass(frozen=True)
class _Files:
    """Where on the host the paths are that dracut speaks of, and whether files keep their owners."""

    root: Root
    work: Path
    mounts: Mapping[Path, Path | None]
    keeps_owners: bool = True

    def at(self, path: str) -> str:
        """Return where a path is, its last part as it is and links in the others followed as they are for dracut.

        Raises _NotHere for what is not the system's nor the build's, or depends on where dracut is at the moment.
        """
        if not path.startswith("/"):
            raise _NotHere
        if self.root.is_host:
            return path
        found = self.root.find(path, self.mounts, follow_last=False)
        if found is None:
            raise _NotHere
        return str(found)

    def inside(self, top: str) -> str:
        """Return where the tree of the initramfs is that dracut makes; raises _NotHere for another directory."""
        made = os.path.realpath(self.at(top))
        if not made.startswith(f"{os.path.realpath(self.work)}/tmp/"):  # noqa: S108 - our own
            raise _NotHere
        return made


@dataclass
class _Server:
    """Answers the questions that come through a pipe, one after the other."""

    files: _Files
    lister: _Lister
    ask: int
    answer: int
    made: Made
    bug: Exception | None = None
    _rest: bytearray = field(default_factory=bytearray)

    def serve(self, wake: int) -> None:
        """Answer until the other end of `wake` is closed; nobody asks afterwards, whatever it was that ended this."""
        try:
            while wake not in (ready := select.select([self.ask, wake], [], [])[0]):
                if self.ask in ready:
                    self._rest += os.read(self.ask, 1 << 16)
                while (words := self._question()) is not None:
                    self._reply(words[0], words[1], words[2:])
        finally:
            (self.files.work / TURN).unlink(missing_ok=True)

    def _reply(self, name: str, path: str, arguments: list[str]) -> None:
        try:
            done = "done" if self._install(path, arguments) else "more"
        except (OSError, ValueError, _NotHere):
            done = "more"
        except Exception as bug:  # raised later: who asks must not wait for an answer
            done, self.bug = "more", bug
        os.write(self.answer, os.fsencode(f"{name} {done}\n"))

    def _question(self) -> list[str] | None:
        """Take one whole question: who asks, PATH, and the arguments."""
        parts = bytes(self._rest).split(b"\0")
        if len(parts) < 4:
            return None
        count = 3 + int(parts[2])
        if len(parts) <= count:
            return None
        del self._rest[: sum(map(len, parts[:count])) + count]
        words = [os.fsdecode(part) for part in parts[:count]]
        return [*words[:2], *words[3:]]

    def _install(self, path: str, arguments: list[str]) -> bool:
        """Do what a program does with these arguments, as far as it is known here; return whether that is all."""
        if arguments[:1] == ["cpio"]:
            return self._read(arguments[1], arguments[2:])
        if arguments[:1] == ["mkdir"]:
            return self._make(arguments[1])
        if len(arguments) < 2 or arguments[0] != "-D":
            raise _NotHere
        top, words = arguments[1], arguments[2:]
        tree = _Tree(self.files, top, self.lister)
        if words[:2] == ["-R", "--"]:
            return self._resolve(tree, words[2:])
        options = set()
        while words and words[0].startswith("-"):
            options.add(words.pop(0))
        if (
            options - OPTIONS
            or not words
            or any(not word or word.startswith(("-", top)) or word.endswith("/") for word in words)
        ):
            raise _NotHere
        optional, directory = "-o" in options, "-d" in options
        if len(words) == 2 and "-a" not in options:
            if "/" not in words[0] or "*" in words[0]:
                raise _NotHere
            return tree.copy(words[0], words[1], optional=optional, directory=directory)
        whole = True
        for word in words:
            if "*" in word:  # a name for 051, a pattern since
                whole = False
                continue
            for each in [word] if "/" in word else self._programs(path, word):
                whole &= tree.copy(each, each, optional=optional, directory=directory)
            # A program that is nowhere is an error, which dracut-install words.
            whole &= optional or "/" in word or bool(self._programs(path, word))
        return whole

    def _resolve(self, tree: _Tree, programs: Sequence[str]) -> bool:
        """Write down the libraries of those programs that are known, and the other programs."""
        libraries, unknown = self.lister.libraries(programs)
        tree.copy_targets(libraries)
        for name, words in ((LIBRARIES, sorted(libraries)), (PROGRAMS, unknown)):
            (self.files.work / name).write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
        return bool(libraries)

    def _make(self, directory: str) -> bool:
        """Make a directory of the initramfs that dracut makes, and those that lead there."""
        top = re.fullmatch("(.*/tmp/dracut[.][^/]+/initramfs)/+(.*)", directory, re.DOTALL)
        if top is None:
            raise _NotHere
        made = self.files.inside(top[1])
        parts = [part for part in top[2].split("/") if part]
        if "." in parts or ".." in parts:
            raise _NotHere
        place = made
        for part in parts:
            place = os.path.realpath(f"{place}/{part}")
            if not place.startswith(f"{made}/"):
                raise _NotHere
            if not os.path.isdir(place):
                _make_directory(place)
        return True

    def _read(self, directory: str, options: list[str]) -> bool:
        """Read what is to be packed, instead of cpio; return whether that is the whole initramfs."""
        made = Path(self.files.inside(directory))
        image = made.parent / "initramfs.img"
        if made.name != "initramfs" or set(options) != REPRODUCIBLE or (image.exists() and image.stat().st_size):
            raise _NotHere
        names = (self.files.work / NAMES).read_bytes().split(b"\0")[:-1]
        self.made.tree = read_tree(made, map(os.fsdecode, names))
        return True

    def _programs(self, path: str, name: str) -> list[str]:
        """Return all paths of a program, as find_binary() in dracut-install.c does."""
        candidates = (f"{directory}/{name}" for directory in path.split(":") if directory)
        return [each for each in candidates if os.path.lexists(self.files.at(each))]


@dataclass
class _Tree:
    """The tree of an initramfs, `top` for dracut."""

    files: _Files
    top: str
    lister: _Lister
    made: str = ""

    def __post_init__(self) -> None:
        self.made = self.files.inside(self.top)

    def copy(self, source: str, target: str, *, optional: bool = False, directory: bool = False) -> bool:
        """Copy a plain file, or make a directory; return whether it is done, False where dracut-install is to do it."""
        with suppress(_NotHere):
            try:
                found = os.lstat(self.files.at(source))
            except FileNotFoundError:
                return optional and not directory
            place = self._place(target)
            if os.path.islink(place):
                return False
            if os.path.exists(place):
                return not stat.S_ISDIR(found.st_mode) or os.path.isdir(place)
            if stat.S_ISDIR(found.st_mode):
                _make_directory(place)
                return True
            if stat.S_ISREG(found.st_mode) and not directory:
                _copy(self.files.at(source), place, keep_owner=self.files.keeps_owners)
                if found.st_mode & 0o111:
                    self.lister.look_at(place)
                return True
        return False

    def copy_targets(self, libraries: Iterable[str]) -> None:
        """Copy the files that libraries' links lead to, so that only the links are left to make."""
        for library in libraries:
            path = library
            for _ in range(MAX_LINKS):
                if not os.path.islink(path):
                    break
                target = os.readlink(path)
                path = target if target.startswith("/") else f"{os.path.dirname(path)}/{target}"
            with suppress(OSError):
                if ".." not in path.split("/") and stat.S_ISREG(os.lstat(path).st_mode):
                    self.copy(path, path)

    def _place(self, target: str) -> str:
        """Return where a path of the initramfs is on the host, with its directory, which is made where it is missing.

        Raises _NotHere where the system has a link in its place, and for what is not inside.
        """
        parts = [part for part in target.split("/") if part not in ("", ".")]
        if ".." in parts or not parts:
            raise _NotHere
        for count in range(1, len(parts)):
            place = self.made + "/" + "/".join(parts[:count])
            if os.path.lexists(place):
                continue
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR(os.lstat(self.files.at("/" + "/".join(parts[:count]))).st_mode):
                    raise _NotHere
            _make_directory(self._inside(place))
        return self._inside(self.made + "/" + "/".join(parts))

    def _inside(self, place: str) -> str:
        above, _, name = place.rpartition("/")
        real = os.path.realpath(above)
        if real != self.made and not real.startswith(f"{self.made}/"):
            raise _NotHere
        return f"{real}/{name}"


def _make_directory(path: str) -> None:
    os.mkdir(path)
    os.chmod(path, 0o755)  # noqa: S103 - as dracut-install makes it, whatever our umask


def _copy(source: str, target: str, *, keep_owner: bool) -> None:
    """Copy a plain file with its mode, its times and, if asked to, its owner.

    cp would also copy extended attributes, which a cpio archive cannot hold.
    """
    with os.fdopen(os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as old:
        found = os.fstat(old.fileno())
        new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            place = 0
            while sent := os.sendfile(new, old.fileno(), place, found.st_size or 1 << 20):
                place += sent
            mode = stat.S_IMODE(found.st_mode)
            if keep_owner and not _give(new, found.st_uid, found.st_gid):
                mode &= 0o777
            os.fchmod(new, mode)
            os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(new)


def _give(file: int, uid: int, gid: int) -> bool:
    """Give a file to its owner; whether that could be done, which cp takes away set-user-ID and its like without."""
    made = os.fstat(file)
    if (made.st_uid, made.st_gid) == (uid, gid):
        return True
    try:
        os.fchown(file, uid, gid)
    except PermissionError:
        with suppress(PermissionError):
            os.fchown(file, -1, gid)
        return False
    return True


class _Lister:
    """Asks the dynamic linker, in a thread of its own, what programs need."""

    def __init__(self, linker: str) -> None:
        self._linker = linker
        self._found: dict[str, tuple[tuple[int, ...], set[str]]] = {}
        self._todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._left = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="lister")
        self._thread.start()

    def look_at(self, program: str) -> None:
        """List a program's libraries, soon."""
        if self._linker:
            with self._idle:
                self._left += 1
            self._todo.put(program)

    def stop(self) -> None:
        """End the thread, which may take LIST_S; what is still to do is not done."""
        self._stopped = True
        self._todo.put(None)
        self._thread.join()

    def libraries(self, programs: Sequence[str]) -> tuple[set[str], list[str]]:
        """Return what dracut-install would install for these programs, and those of which it is not known.

        It is known of programs that are as they were when they were listed.
        """
        with self._idle:
            self._idle.wait_for(lambda: self._left == 0 or not self._thread.is_alive(), timeout=PATIENCE)
        libraries: set[str] = set()
        unknown = []
        for program in programs:
            facts, found = self._found.get(program, ((), set()))
            if facts and facts == _facts(program):
                libraries |= found
            else:
                unknown.append(program)
        return {path for library in libraries for path in _names(library) if os.path.lexists(path)}, unknown

    def _run(self) -> None:
        while (program := self._todo.get()) is not None and not self._stopped:
            try:
                with suppress(OSError, AnchorError, subprocess.TimeoutExpired):
                    self._list(program)
            finally:
                with self._idle:
                    self._left -= 1
                    self._idle.notify_all()

    def _list(self, program: str) -> None:
        facts = _facts(program)
        data = Path(program).read_bytes()
        # What it needs may depend on where it is, and on what is put beside it later.
        if not data.startswith(MAGIC) or b"$ORIGIN" in data or b"${ORIGIN}" in data:
            return
        argv = [self._linker, "--list", program]
        done = run(argv, env={"LC_ALL": "C"}, only_env=True, check=False, timeout=LIST_S)
        lines = [line for line in done.stdout.splitlines() if "linux-vdso" not in line]
        found = {f"/{line.partition('/')[2].partition(' ')[0]}" for line in lines}
        # Nor is it for here what dracut-install looks for in other places, or says something about; nor a name that was
        # no text.
        foreign = ("hwcaps", "$", "\N{REPLACEMENT CHARACTER}")
        if done.status == 0 and not any("/" not in line or any(x in line for x in foreign) for line in lines):
            self._found[program] = facts, found


def _facts(program: str) -> tuple[int, ...]:
    found = os.stat(program)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _names(library: str) -> set[str]:
    """Return the paths by which dracut-install tries to install a library: library_install() in dracut-install.c."""
    above = os.path.dirname(os.path.dirname(library))
    paths = {library} | ({f"{above}/{os.path.basename(library)}"} if above not in ("", "/") else set())
    return paths | {f"{path[: path.index('.so.')]}.so" for path in paths if ".so." in path}
