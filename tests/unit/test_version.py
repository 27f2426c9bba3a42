"""The version that a tree's packages get: from its tag, between tags, changed, without git; and how they sort."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.version import Version as Pep440

from anchor_build.errors import AnchorError
from anchor_build.version import (
    GitState,
    RpmVersion,
    decide,
    parse_declared,
    parse_tag,
    rpm_version,
    tree_time,
    tree_version,
)

C = "abcdef0"


@dataclass(frozen=True)
class Tree:
    """A checkout of a project that declares a version."""

    top: Path

    def git(self, *words: str) -> str:
        """Run git with a configuration and a clock of its own."""
        when = "2026-01-02T03:04:05Z"
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(self.top)}
        env |= {
            f"GIT_{who}_{what}": value
            for who in ("AUTHOR", "COMMITTER")
            for what, value in (("NAME", "A"), ("EMAIL", "a@example.org"), ("DATE", when))
        }
        argv = ["git", "-C", str(self.top), *words]
        return subprocess.run(argv, env=env, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, count: int = 1) -> None:
        """Add commits."""
        for _ in range(count):
            self.git("commit", "--quiet", "--allow-empty", "-m", "a change")

    @property
    def rpm(self) -> str:
        """The RPM version with the commit's name made the same everywhere."""
        return re.sub(r"\.g[0-9a-f]{7}\b", f".g{C}", rpm_version(self.top).version)


@pytest.fixture
def tree(tmp_path: Path, processes: None) -> Tree:
    made = Tree(tmp_path / "tree")
    (made.top / "anchor_build").mkdir(parents=True)
    (made.top / "anchor_build" / "__init__.py").write_text('"""A."""\n\n__version__ = "0.2.0.dev0"\n')
    made.git("init", "--quiet")
    made.git("add", ".")
    made.commit()
    return made


# --- Deciding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "state", "python", "rpm"),
    [
        ("0.2.0.dev0", None, "0.2.0.dev0", "0.2.0~dev0"),
        ("0.2.0.dev42+gabcdef0.dirty", None, "0.2.0.dev42+gabcdef0.dirty", "0.2.0~dev42.gabcdef0.dirty"),
        ("1.2.3", None, "1.2.3", "1.2.3"),
        ("1.2.3", GitState(C, ("v1.2.3",), 0), "1.2.3", "1.2.3"),
        ("1.2.3", GitState(C, ("1.2.3",), 0), "1.2.3", "1.2.3"),
        ("1.2.3rc1", GitState(C, ("v1.2.3-rc1",), 0), "1.2.3rc1", "1.2.3~rc1"),
        ("1.2.3rc1", GitState(C, ("v1.2.3-rc.1",), 0), "1.2.3rc1", "1.2.3~rc1"),
        ("1.2.3", GitState(C, ("v1.2.3-rc2", "v1.2.3"), 0), "1.2.3", "1.2.3"),
        ("1.2.3", GitState(C, ("v1.2.3",), 5), "1.2.4.dev5+gabcdef0", "1.2.4~dev5.gabcdef0"),
        ("1.3.0.dev0", GitState(C, ("v1.2.3",), 5), "1.3.0.dev5+gabcdef0", "1.3.0~dev5.gabcdef0"),
        ("1.3.0.dev0", GitState(C, ("v1.3.0-rc1",), 3), "1.3.0rc2.dev3+gabcdef0", "1.3.0~rc2~dev3.gabcdef0"),
        ("1.2.3", GitState(C, ("v1.2.3",), 0, dirty=True), "1.2.4.dev0+gabcdef0.dirty", "1.2.4~dev0.gabcdef0.dirty"),
        ("0.2.0.dev0", GitState(C, (), 42), "0.2.0.dev42+gabcdef0", "0.2.0~dev42.gabcdef0"),
    ],
)
def test_a_tree_gets_its_version(declared: str, state: GitState | None, python: str, rpm: str) -> None:
    version = decide(parse_declared(declared), state).version
    assert (version.python, version.rpm) == (python, RpmVersion(rpm, "1"))
    assert str(Pep440(version.python)) == version.python, "not the normal form of PEP 440"
    assert parse_declared(version.python) == version, "a source archive that declares it would get another one"


def test_versions_sort_as_they_came_to_be(processes: None) -> None:
    states = [
        ("1.2.3", GitState(C, ("v1.2.3",), 0)),
        ("1.2.3", GitState(C, ("v1.2.3",), 0, dirty=True)),
        ("1.2.3", GitState("9999999", ("v1.2.3",), 9)),
        ("1.2.3", GitState(C, ("v1.2.3",), 10)),
        ("1.3.0.dev0", GitState("fffffff", ("v1.2.3",), 11)),
        ("1.3.0.dev0", GitState("0000000", ("v1.2.3",), 12)),
        ("1.3.0.dev0", GitState("0000000", ("v1.2.3",), 12, dirty=True)),
        ("1.3.0rc1", GitState(C, ("v1.3.0-rc1",), 0)),
        ("1.3.0rc1", GitState(C, ("v1.3.0-rc1",), 2)),
        ("1.3.0rc2", GitState(C, ("v1.3.0-rc2",), 0)),
        ("1.3.0rc10", GitState(C, ("v1.3.0-rc10",), 0)),
        ("1.3.0", GitState(C, ("v1.3.0",), 0)),
    ]
    versions = [decide(parse_declared(declared), state).version for declared, state in states]
    pairs = list(itertools.pairwise(versions))
    assert all(Pep440(older.python) < Pep440(newer.python) for older, newer in pairs)
    script = "".join(f"%{{lua:print(rpm.vercmp('{old.rpm.version}','{new.rpm.version}'),'')}} " for old, new in pairs)
    done = subprocess.run(["rpm", "--eval", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-1"] * len(pairs)


@pytest.mark.parametrize("tag", ["v1.2.3-beta", "v1.2.3-5", "v1", "v1.2.3-rc", "v1.2.3+x", "v1.2.3.4.5", "v1.2.3 "])
def test_a_tag_that_no_package_can_have(tag: str) -> None:
    with pytest.raises(AnchorError) as caught:
        parse_tag(tag)
    assert tag in caught.value.message
    assert "v1.2.3-rc1" in caught.value.hint


@pytest.mark.parametrize("text", ["", "1", "1.2.3-1", "1.2.3.post1", "1.2.3a1", "x", "1.2.3+A", "1.2.3\n"])
def test_a_declaration_that_is_no_version(text: str) -> None:
    with pytest.raises(AnchorError, match=r"__init__\.py: __version__: "):
        parse_declared(text)


@pytest.mark.parametrize(
    ("declared", "state", "warning"),
    [
        ("1.2.3", GitState(C, ("v1.2.3",), 0, dirty=True), "not committed"),
        ("0.2.0.dev0", GitState(C, (), 3), "no git tag"),
        ("1.2.3", GitState(C, ("v1.2.3",), 2, shallow=True), "shallow"),
        ("1.2.2", GitState(C, ("v1.2.3",), 0), "the tag is 1.2.3 and anchor_build/__init__.py says 1.2.2"),
    ],
)
def test_what_the_maker_should_know(declared: str, state: GitState, warning: str) -> None:
    assert [warning in text for text in decide(parse_declared(declared), state).warnings] == [True]


def test_nothing_to_know() -> None:
    for state in (GitState(C, ("v1.2.3",), 0, shallow=True), GitState(C, ("v1.2.3",), 4), None):
        assert decide(parse_declared("1.2.3"), state).warnings == ()


# --- Asking git -------------------------------------------------------------------------------------------


def test_from_no_tag_to_a_release_and_on(tree: Tree) -> None:
    assert tree.rpm == f"0.2.0~dev1.g{C}"
    tree.git("tag", "last-good")
    tree.git("tag", "v0.2.0-rc1")
    assert tree.rpm == "0.2.0~rc1"
    tree.commit(2)
    assert tree.rpm == f"0.2.0~rc2~dev2.g{C}"
    tree.git("tag", "-a", "-m", "a candidate", "v0.2.0-rc2")
    tree.git("tag", "v0.2.0")
    assert tree.rpm == "0.2.0"
    tree.commit()
    assert tree.rpm == f"0.2.1~dev1.g{C}"
    assert tree.git("rev-parse", "--short=7", "HEAD") in rpm_version(tree.top).version
    (tree.top / "new").touch()
    assert tree.rpm == f"0.2.1~dev1.g{C}.dirty"


def test_a_bad_tag_is_named(tree: Tree) -> None:
    tree.git("tag", "v0.2.0-final")
    tree.commit()
    with pytest.raises(AnchorError, match=r"the git tag v0\.2\.0-final"):
        rpm_version(tree.top)


def test_a_shallow_clone_says_so(tree: Tree, tmp_path: Path) -> None:
    tree.git("tag", "v0.2.0")
    tree.commit(2)
    tree.git("clone", "--quiet", "--depth=1", f"file://{tree.top}", str(tmp_path / "clone"))
    assert any("shallow" in text for text in tree_version(tmp_path / "clone").warnings)


def test_a_tree_of_somebody_else(tree: Tree) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a file away")
    tree.git("tag", "v0.2.0")
    for path in (tree.top, *tree.top.rglob("*")):
        os.chown(path, 12345, 12345)
    assert tree.rpm == "0.2.0"


def test_a_caller_of_another_repository(tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert tree.rpm == f"0.2.0~dev1.g{C}"


def test_without_git(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchor_build.version.which", lambda program: None)
    assert tree.rpm == "0.2.0~dev0"
    assert "git is not installed" in tree_version(tree.top).warnings[0]


def test_a_checkout_without_a_commit(tree: Tree) -> None:
    subprocess.run(["rm", "-r", tree.top / ".git"], check=True)
    assert (tree.rpm, tree_version(tree.top).warnings) == ("0.2.0~dev0", ())
    tree.git("init", "--quiet")
    assert tree.rpm == "0.2.0~dev0"
    assert "has no commit" in tree_version(tree.top).warnings[0]


def test_a_source_archive_inside_another_checkout(tree: Tree) -> None:
    inner = tree.top / "vendor" / "anchor-build"
    (inner / "anchor_build").mkdir(parents=True)
    (inner / "anchor_build" / "__init__.py").write_text('__version__ = "0.1.7"\n')
    tree.git("tag", "v9.9")
    assert rpm_version(inner) == RpmVersion("0.1.7", "1")


def test_a_broken_repository_is_an_error_of_git(tree: Tree) -> None:
    (tree.top / ".git" / "index").write_bytes(b"damaged")
    with pytest.raises(AnchorError, match="git exited with status 128"):
        rpm_version(tree.top)


@pytest.mark.parametrize(("text", "reason"), [(None, "cannot be read"), ("", "__version__: is missing")])
def test_a_tree_that_declares_nothing(tmp_path: Path, text: str | None, reason: str) -> None:
    (tmp_path / "anchor_build").mkdir()
    if text is not None:
        (tmp_path / "anchor_build" / "__init__.py").write_text(text)
    with pytest.raises(AnchorError, match=reason):
        tree_version(tmp_path)


def test_the_time_of_a_tree(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SOURCE_DATE_EPOCH, else the commit's, else that of the newest file, and never one that has not come yet."""
    files = [tmp_path / "old", tmp_path / "new"]
    for number, file in enumerate(files):
        file.touch()
        os.utime(file, (1000 + number, 1000 + number))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert tree_time(tree.top, files) == 86400
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    argv = ["git", "-C", str(tree.top), "log", "-1", "--format=%ct"]
    committed = subprocess.run(argv, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]})
    assert tree_time(tree.top, files) == int(committed.stdout)
    assert tree_time(tmp_path, files) == 1001
    os.utime(files[0], (2**33, 2**33))
    assert tree_time(tmp_path, files) <= time.time()
