"""The linters are tests: on everything that is written, and on everything that is rendered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anchor_build.plan import whole_plan
from anchor_build.registry import load_registry
from anchor_build.render import render_plan, write_modules
from tests.conftest import SITE_STAGES, TOP

SHELL_TREES = ("anchor_build", "lib", "dracut-modules", "contrib", "tests/fixtures", ".ci")
LIMIT_S = 200
Lint = Callable[..., None]


def shell_files(top: Path) -> Iterator[Path]:
    """Find what a shell runs: by suffix, or by its first line."""
    for path in sorted(top.rglob("*")):
        if path.is_file() and not path.is_symlink():
            if path.suffix == ".sh":
                yield path
            elif not path.suffix:
                with path.open("rb") as file:
                    if file.readline().rstrip() in (b"#!/bin/sh", b"#!/bin/bash"):
                        yield path


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render every stage, the site's too, below the linters' configuration."""
    top = tmp_path_factory.mktemp("rendered")
    shutil.copy(TOP / ".shellcheckrc", top)
    write_modules(render_plan(whole_plan(load_registry([SITE_STAGES]))), top)
    return top


@pytest.fixture(scope="session")
def node_files(rendered: Path) -> list[Path]:
    """Return every file that the node's own shell reads."""
    return [path for path in shell_files(rendered) if path.name != "module-setup.sh"]


@pytest.fixture(scope="session")
def all_files(rendered: Path) -> list[Path]:
    """Return every shell file: written and rendered."""
    # install-core.sh is a part of the core's module-setup.sh, and no file of its own.
    written = [p for tree in SHELL_TREES for p in shell_files(TOP / tree) if p.name != "install-core.sh"]
    return [TOP / "build.sh", *written, *shell_files(rendered)]


@pytest.fixture
def lint() -> Lint:
    def run(program: str, *arguments: str | Path) -> None:
        found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if found is None:
            pytest.skip(f"{program} is missing")
        argv = [found, *map(str, arguments)]
        done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, f"{program}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"

    return run


def test_ruff(lint: Lint) -> None:
    lint("ruff", "check", ".")


def test_ruff_format(lint: Lint) -> None:
    lint("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy(lint: Lint) -> None:
    lint("mypy")


@pytest.mark.slow
def test_shellcheck(lint: Lint, all_files: list[Path]) -> None:
    lint("shellcheck", *all_files)


def test_shfmt(lint: Lint, all_files: list[Path]) -> None:
    lint("shfmt", "-i", "4", "-ci", "-d", *all_files)


def test_the_files_of_the_node_are_found(node_files: list[Path], all_files: list[Path]) -> None:
    names = {path.name for path in node_files}
    assert {"params.sh", "stage.sh", "hook-pre-mount.sh", "anchor-boot.sh", "acme-challenge.sh"} <= names
    assert {"build.sh", "module-setup.sh", "run"} <= {path.name for path in all_files}


@pytest.mark.parametrize("shell", [["dash"], ["busybox", "sh"], ["bash", "--posix"]], ids=" ".join)
def test_node_files_parse(shell: list[str], node_files: list[Path]) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is missing")
    script = "\n".join(f"{' '.join(shell)} -n '{path}' || printf '%s\\n' '{path}'" for path in node_files)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout + done.stderr == ""


def test_module_setup_parses(rendered: Path) -> None:
    for path in rendered.glob("*/module-setup.sh"):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), path


def test_node_files_start_with_their_shell_and_hold_no_bashism_of_tests(node_files: list[Path]) -> None:
    for path in node_files:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!/bin/sh\n"), path
        assert "\r" not in text
        assert " == " not in "".join(line for line in text.splitlines() if "[ " in line), path
