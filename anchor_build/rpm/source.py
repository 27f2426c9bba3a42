"""The source package of anchor-build itself, as mock, Koji, OBS and Copr take it: archive and spec, nothing to fetch.

The source archive is also one that pip installs.
"""

from __future__ import annotations

import os
import re
import tarfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anchor_build
from anchor_build.errors import AnchorError
from anchor_build.files import directory_problems, disk_errors, place, staging, work_directory
from anchor_build.rpm.archive import pack
from anchor_build.rpm.changelog import read_changelog, rpm_entries
from anchor_build.rpm.rpmbuild import RPMBUILD, missing, run_rpmbuild
from anchor_build.rpm.spec import environment
from anchor_build.run import which
from anchor_build.version import Version, git, tree_time, tree_version

TEMPLATE = Path("specs") / "anchor-build.spec.j2"
DECLARATION = "anchor_build/__init__.py"
DECLARED = re.compile(rb'^__version__ = "[^"\n]*"$', re.MULTILINE)


def tool_srpm(
    out: Path, top: Path | None = None, tell: Callable[[str], None] = lambda line: None
) -> tuple[Path, tuple[str, ...]]:
    """Make the source package of the tree `top` in `out`.

    By default that is the tree that this program runs from, or, for one that is installed, the working directory.

    Returns its path and warnings about its version; `tell` is given each line of rpmbuild's log. The same tree gives
    the same bytes. Raises AnchorError when there is no tree (an installed package), for a version that cannot be, when
    rpmbuild is missing or fails, and when `out` cannot be written; nothing half-written is left.
    """
    own = Path(anchor_build.__file__).resolve().parents[1]
    if top is None:
        top = own if (own / TEMPLATE).is_file() else Path.cwd()
    top = top.resolve()
    if not (top / TEMPLATE).is_file():
        raise AnchorError(f"{top}: holds no {TEMPLATE}", "run it in a checkout or a source archive of anchor-build")
    if problems := [*missing([RPMBUILD]), *directory_problems(out)]:
        raise AnchorError("\n".join(problems))
    decided = tree_version(top)
    seconds = tree_time(top, (top / path for path in source_files(top)))
    with disk_errors(), work_directory(plain=True) as work, staging(out) as staged:
        spec = work / "anchor-build.spec"
        spec.write_text(spec_text(top, decided.version, seconds), encoding="utf-8")
        source = work / f"{archive_name(decided.version)}.tar.gz"
        source.write_bytes(archive(top, decided.version, seconds))
        for path in (spec, source):
            path.chmod(0o644)
            os.utime(path, (seconds, seconds))
        [made] = run_rpmbuild("-bs", spec, "", seconds, tell)
        place(made, staged / made.name, seconds)
        return (staged / made.name).replace(out / made.name), decided.warnings


def archive_name(version: Version) -> str:
    """Return what the source archive and its directory are called: as Python names a source distribution (PEP 625)."""
    return f"anchor_build-{version.python}"


# --- The archive ------------------------------------------------------------------------------------------


def source_files(top: Path) -> list[str]:
    """Return the files of a source archive below `top`: what pyproject.toml says, without what git ignores."""
    with (top / "pyproject.toml").open("rb") as file:
        places = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    if (top / ".git").exists() and which("git") is not None:
        listed = git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout.split("\0")
    else:
        listed = [str(path.relative_to(top)) for place in places for path in _below(top / place)]
    chosen = {path for path in listed if path and path.partition("/")[0] in {*places, "pyproject.toml"}}
    return sorted({*chosen, "pyproject.toml"})


def _below(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    files = [path for path in place.rglob("*") if path.is_file() or path.is_symlink()]
    return [path for path in files if "__pycache__" not in path.parts and path.suffix != ".pyc"]


def archive(top: Path, version: Version, epoch: int) -> bytes:
    """Return the source archive, with the version written into it; the same files give the same bytes."""
    return pack(_entries(top, version), epoch)


def _entries(top: Path, version: Version) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for path in source_files(top):
        file = top / path
        entry = tarfile.TarInfo(f"{archive_name(version)}/{path}")
        if file.is_symlink():
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, str(file.readlink()), 0o777
            yield entry, b""
        elif file.exists():  # else it is deleted, and not yet committed: the version says dirty
            content = file.read_bytes()
            if path == DECLARATION:
                content = DECLARED.sub(f'__version__ = "{version.python}"'.encode(), content)
            entry.mode = 0o755 if os.access(file, os.X_OK) else 0o644
            yield entry, content


# --- The spec ---------------------------------------------------------------------------------------------


def spec_text(top: Path, version: Version, epoch: int) -> str:
    """Return the spec of the tool; `epoch` is the time of its last change."""
    with (top / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    releases = read_changelog(top / "CHANGELOG.md")
    entries = rpm_entries(releases, version.rpm.version, version.rpm.release, epoch)
    return environment(top / TEMPLATE.parent).get_template(TEMPLATE.name).render(_values(project, version, entries))


def _values(project: Mapping[str, Any], version: Version, entries: Sequence[str]) -> dict[str, Any]:
    needed: Sequence[str] = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return {
        "version": version.rpm.version,
        "release": version.rpm.release,
        "archive": archive_name(version),
        # The commands are imported for the man pages, so that the build needs what they need.
        "build_requires": [re.split(r"[^A-Za-z0-9._-]", name)[0].lower() for name in needed],
        "changelog": entries,
    }
