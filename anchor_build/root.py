"""The system that a build takes dracut, kernel and programs from: this host, or a directory with another one.

In another one dracut runs in mount, process and IPC namespaces of its own, with everything in the directory read-only.
Namespaces end with their last process, and the kernel ends all of these with the first: so nothing is left mounted or
running whatever ends a build, even SIGKILL. See unshare(1), pid_namespaces(7).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from anchor_build.elf import machine_of
from anchor_build.errors import AnchorError
from anchor_build.run import SYSTEM_PATH, which

# dracut.sh sets its PATH to this (DRACUT_PATH): what lies in /usr/local is not found.
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# All that dracut gets of our environment: it and its modules take settings from there.
ENVIRONMENT = {"PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8"}
# Where the work directory of a build is seen inside.
WORK = Path("/tmp/anchor-build")  # noqa: S108 - a tmpfs of its own
WRITABLE = ("run", "tmp", "var/tmp")
TOOLS = ("unshare", "setpriv", "mount", "chroot")
TOP_HINT = "name the top directory of an installed system, the one that holds usr and etc"
MAX_LINKS = 40
# Below what is no directory: a circle of links inside may be none for the kernel, which follows them on the host.
NOWHERE = Path("/dev/null/nowhere")
NO_MOUNTS: Mapping[Path, Path | None] = MappingProxyType({})
# Which programs of another processor each of them runs as well.
ALSO_RUNS = {"x86_64": {"i386"}}

# $1 the root, $2 the work directory, $3 to $6 where proc, sys, dev and the work directory are seen, then how many
# mounts below the root, their paths, how many mount points for what is written, their paths; then the command. What is
# mounted belongs to these namespaces and goes with them. No path has a link in it: mount and mkdir would follow an
# absolute one on the host.
ENTER = """
set -e
root=$1 work=$2 inside=$2/root
proc=$inside$3 sys=$inside$4 dev=$inside$5 seen=$inside$6
shift 6
show() {
    mount --bind "$root$1" "$inside$1"
    mount -o remount,bind,ro "$inside$1"
}
show ''
n=$1
shift
while [ "$n" -gt 0 ]; do
    show "$1"
    shift
    n=$((n - 1))
done
mount -t proc proc "$proc"
mount -t sysfs -o ro sysfs "$sys"
mount -t tmpfs -o mode=755 tmpfs "$dev"
for name in null zero full random urandom; do
    : >"$dev/$name"
    mount --bind "/dev/$name" "$dev/$name"
done
ln -s /proc/self/fd "$dev/fd"
ln -s fd/0 "$dev/stdin"
ln -s fd/1 "$dev/stdout"
ln -s fd/2 "$dev/stderr"
mkdir "$dev/shm"
n=$1
shift
while [ "$n" -gt 0 ]; do
    mount -t tmpfs -o mode=1777 tmpfs "$inside$1"
    shift
    n=$((n - 1))
done
mkdir "$seen"
mount --bind "$work" "$seen"
# The first process of the namespace stays: it ends with the command, and everything else with it.
chroot "$inside" /bin/sh -c 'cd /tmp/anchor-build && exec "$@"' sh "$@" && exit
exit $?
"""


@dataclass(frozen=True)
class Root:
    """The system below a directory, which is absolute and has no symbolic link in it; `/` is this host.

    `label` is what a user calls it. An `identity` stands for all that is in it, and never changes.
    """

    directory: Path = Path("/")
    label: str = ""
    identity: str = ""

    @property
    def is_host(self) -> bool:
        """Whether it is this host itself."""
        return self.directory == Path("/")

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return "this host" if self.is_host else self.label or str(self.directory)

    def at(self, path: Path | str) -> Path:
        """Return where a path of this system is on the host; symbolic links are followed inside of it.

        For one that leads in a circle, that is a place where nothing can be.
        """
        if self.is_host:
            return Path("/", path)
        return self.find(path) or NOWHERE

    def find(
        self, path: Path | str, mounts: Mapping[Path, Path | None] = NO_MOUNTS, *, follow_last: bool = True
    ) -> Path | None:
        """Return where a path is on the host for whoever sees `mounts` in this system, as `mounts_of` has them.

        None where it leads in a circle, or to what is not to be seen on the host. With `follow_last` its last part is
        followed, too, if it is a symbolic link.
        """
        tops = {Path("/"): self.directory, **mounts}
        here = Path("/")
        todo = _parts(str(path))
        links = 0
        while todo:
            part = todo.pop(0)
            if part == "..":
                here = here.parent
                continue
            here /= part
            # What something is mounted on is no link.
            if here in tops or not (todo or follow_last):
                continue
            place = _place(here, tops)
            if place is None:
                return None
            try:
                target = str(place.readlink())
            except OSError:
                continue
            links += 1
            if links > MAX_LINKS:
                return None
            here = Path("/") if target.startswith("/") else here.parent
            todo = _parts(target) + todo
        return _place(here, tops)

    def inside(self, path: Path) -> Path:
        """Return the path in this system of what is at `path` on the host, below its directory."""
        return path if self.is_host else Path("/") / path.relative_to(self.directory)

    def follow(self, path: Path) -> Path:
        """Return where what is at `path` on the host, below its directory, leads: its links are this system's."""
        if self.is_host:
            return path
        return self.at(self.inside(path)) if path.is_relative_to(self.directory) else NOWHERE

    def find_program(self, name: str) -> Path | None:
        """Return where on the host a program of this system is, found where dracut looks for it."""
        if self.is_host:
            found = shutil.which(name, path=PROGRAM_PATH)
            return Path(found) if found else None
        for directory in PROGRAM_PATH.split(":"):
            path = self.at(f"{directory}/{name}")
            if path.is_file() and os.access(path, os.X_OK):
                return path
        return None


HOST = Root()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _place(path: Path, tops: Mapping[Path, Path | None]) -> Path | None:
    """Return where a path without links is, below the nearest of `tops`."""
    top = next(each for each in (path, *path.parents) if each in tops)
    place = tops[top]
    return place and place / path.relative_to(top)


def open_root(directory: Path, label: str = "", identity: str = "", *, to_run: bool = True) -> Root:
    """Return the system below `directory`; raises AnchorError when nothing of it could run here.

    What is only looked at needs none of that: not `to_run`.
    """
    what = label or f"--sysroot {directory}"
    try:
        path = directory.resolve(strict=True)
        if not path.is_dir():
            raise NotADirectoryError(20, os.strerror(20))
    except OSError as error:
        raise AnchorError(f"{what}: {error.strerror}", TOP_HINT) from None
    root = Root(path, label, identity)
    if root.is_host or not to_run:
        return root
    problems = [f"{name} is missing: install util-linux or coreutils" for name in TOOLS if which(name) is None]
    if os.geteuid() != 0:
        problems.append("only root can enter another system: run it as root")
    if problems:
        raise AnchorError("\n".join(problems))
    shell = root.at("/bin/sh")
    if not shell.is_file() or not os.access(shell, os.X_OK):
        raise AnchorError(
            f"{what}: has no /bin/sh: nothing can run in it",
            TOP_HINT,
        )
    theirs, ours = machine_of(shell), machine_of(Path("/proc/self/exe")) or platform.machine()
    if theirs and theirs != ours and theirs not in ALSO_RUNS.get(ours, ()):
        raise AnchorError(
            f"{what}: is a system for {theirs}, and this host is {ours}: its programs cannot run here",
            f"build it on a host with that processor, {theirs}",
        )
    for name in ("proc", "sys", "dev", "run", "tmp"):
        place = root.at(name)
        if not place.is_dir() or place == root.directory:
            raise AnchorError(f"{what}: has no directory /{name}, which dracut needs", "make it, empty")
    return root


def mounts_of(root: Root, work: Path) -> dict[Path, Path | None]:
    """Return what `enter` mounts in a system besides what is there: where, and what of the host; None if it is not.

    That is the work directory, and the kernel's file systems and empty ones in memory.
    """
    if root.is_host:
        return {}
    *kernel, seen = _mount_points(root)
    return {**dict.fromkeys([*kernel, *_written(root)]), seen: work}


def _mount_points(root: Root) -> list[Path]:
    """Return where proc, sys, dev and the work directory are mounted in a system: paths without links."""
    proc, sys, dev, tmp = (
        root.inside(place) if (place := root.at(path)) != NOWHERE else path
        for path in (Path("/proc"), Path("/sys"), Path("/dev"), WORK.parent)
    )
    return [proc, sys, dev, tmp / WORK.name]


def _written(root: Root) -> list[Path]:
    """Return the directories of a system that a command inside may write to, being empty file systems in memory."""
    return sorted({root.inside(path) for name in WRITABLE if (path := root.at(name)).is_dir()})


def enter(root: Root, work: Path, argv: Sequence[str | Path]) -> list[str]:
    """Return the command that runs `argv` in a system, in `work`, which is seen as WORK there.

    `work` is absolute and gets a directory `root`, which stays empty.
    """
    if root.is_host:
        return [str(word) for word in argv]
    (work / "root").mkdir(exist_ok=True)
    places, tops = _written(root), mounts_of(root, work)
    shown = [place for place in _mounts_below(root.directory) if not any(place.is_relative_to(top) for top in tops)]
    words = [root.directory, work, *_mount_points(root), len(shown), *shown, len(places), *places, *argv]
    # If this process is killed, the kernel kills unshare (setpriv), and that kills the first process inside.
    return [
        *("setpriv", "--pdeathsig", "KILL", "--", "unshare", "--mount", "--propagation", "private"),
        *("--pid", "--fork", "--kill-child=KILL", "--ipc", "sh", "-c", ENTER, "sh", *map(str, words)),
    ]


def _mounts_below(directory: Path) -> list[Path]:
    """Return what is mounted below a directory, as paths in it, outer mounts first (proc_pid_mountinfo(5))."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        text = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        place = Path(text)
        if place != directory and place.is_relative_to(directory) and place.is_dir():
            found.append(Path("/") / place.relative_to(directory))
    return sorted(set(found), key=lambda path: len(path.parts))
