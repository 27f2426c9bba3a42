"""What this tree is called: the version and release of its packages, from the git tag.

Tags are `v1.2.3` and, for release candidates, `v1.2.3-rc1`. A commit that is not tagged, or a changed tree, is a
pre-release of the version that comes next: the one that anchor_build.__version__ announces when it is newer than the
tag, else the tag with its last number (or that of its rc) raised.

| tree | Python (PEP 440) | RPM |
|---|---|---|
| at v1.2.3 | `1.2.3` | `1.2.3` |
| at v1.2.4-rc1 | `1.2.4rc1` | `1.2.4~rc1` |
| 5 commits after v1.2.3 | `1.2.4.dev5+gabcdef0` | `1.2.4~dev5.gabcdef0` |
| 3 commits after v1.2.4-rc1 | `1.2.4rc2.dev3+gabcdef0` | `1.2.4~rc2~dev3.gabcdef0` |
| at v1.2.3, with changes | `1.2.4.dev0+gabcdef0.dirty` | `1.2.4~dev0.gabcdef0.dirty` |
| without any tag, 42 commits | `0.2.0.dev42+gabcdef0` | `0.2.0~dev42.gabcdef0` |

`~` and not `^`: rpm knows it since 4.10, so Enterprise Linux 8 and SUSE 15 (4.14) do, too; `^` came with 4.15.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import anchor_build
from anchor_build.errors import AnchorError, InvalidFilesError
from anchor_build.run import Completed, run, which

TAG = re.compile(r"v?([0-9]+(?:\.[0-9]+){1,3})(?:-?rc\.?([0-9]+))?")
# What tags are taken for versions: others (`last-good`) mean something else to their owner.
TAG_PATTERNS = ("v[0-9]*", "[0-9]*.[0-9]*")
DECLARED = re.compile(r"([0-9]+(?:\.[0-9]+){1,3})(?:rc([0-9]+))?(?:\.dev([0-9]+))?(?:\+([a-z0-9]+(?:\.[a-z0-9]+)*))?")
LIMIT_S = 30


@dataclass(frozen=True)
class RpmVersion:
    """Version and release of a package; the spec adds `%{?dist}` to the release."""

    version: str
    release: str

    def __str__(self) -> str:
        """Return it as in a package's name."""
        return f"{self.version}-{self.release}"


@dataclass(frozen=True)
class Version:
    """A version in parts: `1.2.3`, its release candidate, and for a snapshot the number of commits and which one.

    `dev` is None for a release; `local` is the abbreviated commit, with `.dirty` when the tree had changes.
    """

    numbers: tuple[int, ...]
    candidate: int | None = None
    dev: int | None = None
    local: str = ""

    @property
    def python(self) -> str:
        """The version for Python, in the normal form of PEP 440."""
        text = ".".join(map(str, self.numbers))
        text += "" if self.candidate is None else f"rc{self.candidate}"
        text += "" if self.dev is None else f".dev{self.dev}"
        return text + (f"+{self.local}" if self.local else "")

    @property
    def rpm(self) -> RpmVersion:
        """Version and release for packages: sorts as the Python one does (rpm.org/docs: `~` is before nothing)."""
        text = ".".join(map(str, self.numbers))
        text += "" if self.candidate is None else f"~rc{self.candidate}"
        text += "" if self.dev is None else f"~dev{self.dev}"
        return RpmVersion(text + (f".{self.local}" if self.local else ""), "1")


@dataclass(frozen=True)
class GitState:
    """Where a checkout stands: its commit (abbreviated, without the g), the tags that count, and its changes.

    `tags` are those of the nearest tagged commit, `distance` the number of commits since then, or, without a tag,
    of all; `shallow` says that the history is cut off, so that neither may be the whole truth.
    """

    commit: str
    tags: tuple[str, ...]
    distance: int
    dirty: bool = False
    shallow: bool = False


@dataclass(frozen=True)
class TreeVersion:
    """The version of a tree, and what its maker should know about it."""

    version: Version
    warnings: tuple[str, ...] = ()


def parse_declared(text: str) -> Version:
    """Read anchor_build.__version__; raises InvalidFilesError when it is not of the form that this module writes."""
    found = DECLARED.fullmatch(text)
    if found is None:
        raise InvalidFilesError(
            [f"anchor_build/__init__.py: __version__: {text}: is not a version such as 1.2.3, 1.2.3rc1 or 1.2.3.dev0"]
        )
    candidate, dev = (None if part is None else int(part) for part in found.group(2, 3))
    return Version(_numbers(found[1]), candidate, dev, found[4] or "")


def parse_tag(tag: str) -> Version:
    """Read a tag; raises AnchorError when it begins like a version and is none that packages can have."""
    found = TAG.fullmatch(tag)
    if found is None:
        remedy = f"git tag -d {tag}, then tag again, such as v1.2.3, or v1.2.3-rc1 for a release candidate"
        raise AnchorError(f"the git tag {tag}: is not a version: an RPM version holds no '-' or other addition", remedy)
    return Version(_numbers(found[1]), None if found[2] is None else int(found[2]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def decide(declared: Version, state: GitState | None) -> TreeVersion:
    """Return the version of a tree from what it declares and from what git knows of it, None where there is no git.

    Raises AnchorError for a tag that is no version.
    """
    if state is None:
        return TreeVersion(declared)
    warnings = []
    local = f"g{state.commit}" + (".dirty" if state.dirty else "")
    if state.dirty:
        warnings.append("the tree holds changes that are not committed: the version says dirty")
    # Several tags may stand at one commit: the candidate that became the release.
    tagged = max((parse_tag(tag) for tag in state.tags), key=_order, default=None)
    if tagged is not None and state.distance == 0 and not state.dirty:
        if declared.python != tagged.python:
            warnings.append(
                f"the tag is {tagged.python} and anchor_build/__init__.py says {declared.python}: "
                "packages follow the tag, `pip install` does not"
            )
        return TreeVersion(tagged, tuple(warnings))
    coming = replace(declared, dev=None, local="")
    if tagged is None:
        warnings.append(f"no git tag such as v1.2.3: the version follows anchor_build/__init__.py, {declared.python}")
    elif coming.numbers <= tagged.numbers:
        coming = _successor(tagged)
    if state.shallow:
        warnings.append("the git history is cut off (shallow clone): fetch it all, with tags, for a version that sorts")
    return TreeVersion(replace(coming, dev=state.distance, local=local), tuple(warnings))


def _order(version: Version) -> tuple[tuple[int, ...], float]:
    return version.numbers, float("inf") if version.candidate is None else version.candidate


def _successor(version: Version) -> Version:
    if version.candidate is not None:
        return replace(version, candidate=version.candidate + 1)
    return replace(version, numbers=(*version.numbers[:-1], version.numbers[-1] + 1))


def read_git(top: Path) -> GitState | None:
    """Ask git about the checkout `top`; None where it is none (a source archive, an installed package) or is empty.

    Raises AnchorError when git itself fails.
    """
    # An installed package may lie inside somebody's checkout of something else: only our own .git counts.
    if not (top / ".git").exists() or which("git") is None:
        return None
    if git(top, "rev-parse", "--quiet", "--verify", "HEAD^{commit}", check=False).status != 0:
        return None
    commit = git(top, "rev-parse", "--short=7", "HEAD").stdout.strip()
    dirty = bool(git(top, "status", "--porcelain", "--untracked-files=normal").stdout)
    shallow = git(top, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
    match = [word for pattern in TAG_PATTERNS for word in ("--match", pattern)]
    nearest = git(top, "describe", "--tags", "--long", "--abbrev=7", *match, check=False)
    if nearest.status != 0:
        count = int(git(top, "rev-list", "--count", "HEAD").stdout)
        return GitState(commit, (), count, dirty, shallow)
    tag, distance, _ = nearest.stdout.strip().rsplit("-", 2)
    tags = git(top, "tag", "--points-at", f"{tag}^{{commit}}", "--list", *TAG_PATTERNS).stdout.split()
    return GitState(commit, tuple(tags), int(distance), dirty, shallow)


def git(top: Path, *words: str, check: bool = True) -> Completed:
    """Run git on the checkout `top` and nothing else; raises as run does."""
    # Who runs this runs the tree's Python already, so that the tree belongs to somebody else (a container's
    # user) is no reason to refuse it. The directory is named: GIT_DIR may point elsewhere, as in a git hook.
    argv = ["git", "-c", f"safe.directory={top}", f"--git-dir={top / '.git'}", f"--work-tree={top}", *words]
    return run(argv, cwd=top, check=check, timeout=LIMIT_S, env={"GIT_OPTIONAL_LOCKS": "0"})


def tree_version(top: Path | None = None) -> TreeVersion:
    """Return the version of the tree `top`, by default the one that this program runs from.

    Without git it is anchor_build.__version__, which a source archive carries; `__version__` of another tree is read
    from its text. Raises AnchorError for a tag that is no version, and when git fails.
    """
    here = Path(anchor_build.__file__).resolve().parents[1]
    top = here if top is None else top.resolve()
    declared = parse_declared(anchor_build.__version__ if top == here else _declaration(top))
    state = read_git(top)
    decided = decide(declared, state)
    if state is None and (top / ".git").exists():
        reason = "has no commit" if which("git") else "cannot be asked: git is not installed"
        warning = f"the git checkout {top} {reason}: the version follows anchor_build/__init__.py, {declared.python}"
        return replace(decided, warnings=(*decided.warnings, warning))
    return decided


def _declaration(top: Path) -> str:
    file = top / "anchor_build" / "__init__.py"
    try:
        found = re.search(r'^__version__ = "([^"\n]*)"$', file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError as error:
        raise AnchorError(f"{file}: cannot be read: {error.strerror}") from None
    if found is None:
        raise InvalidFilesError([f"{file}: __version__: is missing"])
    return found[1]


def source_date_epoch() -> int | None:
    """Return SOURCE_DATE_EPOCH in seconds, None where it is not set (reproducible-builds.org/specs/source-date-epoch).

    Raises AnchorError when it is no number, or later than the 32 bits of rpm, cpio and squashfs reach (2106).
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is not None and not re.fullmatch(r"[0-9]+", given):
        raise AnchorError(f"SOURCE_DATE_EPOCH={given}: is not a number of seconds")
    if given is not None and (len(given) > 10 or int(given) >= 2**32):
        raise AnchorError(f"SOURCE_DATE_EPOCH={given}: is later than 2106, the last year that file systems can note")
    return None if given is None else int(given)


def tree_time(top: Path, files: Iterable[Path]) -> int:
    """Return the time of a tree's packages in seconds since the epoch.

    That is SOURCE_DATE_EPOCH, else the time of the commit, else that of the newest of `files`: a clock reading would
    make two builds of the same inputs differ. Raises as source_date_epoch does.
    """
    given = source_date_epoch()
    if given is not None:
        return given
    if (top / ".git").exists() and which("git") is not None:
        committed = git(top, "log", "-1", "--format=%ct", check=False)
        if committed.status == 0:
            return int(committed.stdout)
    return min(max(int(path.lstat().st_mtime) for path in files), int(time.time()))


def rpm_version(top: Path | None = None) -> RpmVersion:
    """Return version and release for packages of the tree `top`; raises as tree_version does, and warns of nothing."""
    return tree_version(top).version.rpm
