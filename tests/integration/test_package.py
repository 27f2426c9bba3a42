"""`pip install .` gives an anchor-build that carries its stages and libraries, and nothing of the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TOP

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """An installed anchor-build: where, and how to run it from elsewhere."""

    target: Path
    elsewhere: Path

    def run(self, *words: str, path: str = "") -> subprocess.CompletedProcess[str]:
        """Run the installed command from another directory; `path` is added to where Python looks."""
        return subprocess.run(
            [self.target / "bin" / "anchor-build", *words],
            cwd=self.elsewhere,
            env={"PATH": os.environ["PATH"], "HOME": str(self.elsewhere), "PYTHONPATH": f"{self.target}{path}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the checkout as a user would, without touching the environment of the tests."""
    target = tmp_path_factory.mktemp("installed")
    build = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *build]
    subprocess.run([*pip, "--target", target, TOP], check=True, timeout=120, cwd=target)
    return Installed(target, tmp_path_factory.mktemp("elsewhere"))


def test_the_package_is_all_that_is_used(installed: Installed) -> None:
    script = "import anchor_build, anchor_build.registry as r; print(anchor_build.__file__, r.data_directory())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=installed.elsewhere,
        env={"PYTHONPATH": str(installed.target)},
        capture_output=True,
        text=True,
        check=True,
    )
    for place in done.stdout.split():
        assert Path(place).is_relative_to(installed.target)


def test_the_stages_are_those_of_the_checkout(installed: Installed) -> None:
    done = installed.run("stages", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {(row["kind"], row["name"]) for row in json.loads(done.stdout)}
    directories = {path.parent.name for path in (TOP / "dracut-modules").glob("*/stage.toml")} - {"anchor"}
    assert {f"{kind}-{name}" for kind, name in rows} == directories


def test_rendering_gives_the_same_as_the_checkout(installed: Installed) -> None:
    done = installed.run("render", "--all", "-o", "installed")
    assert done.returncode == 0, done.stderr
    argv = [sys.executable, "-m", "anchor_build", "render", "--all", "-o", str(installed.elsewhere / "checkout")]
    subprocess.run(argv, cwd=TOP, check=True, capture_output=True, timeout=60)
    trees = []
    for name in ("installed", "checkout"):
        top = installed.elsewhere / name
        files = [path for path in top.rglob("*") if path.is_file()]
        trees.append({path.relative_to(top): (path.read_bytes(), path.stat().st_mode) for path in files})
    assert trees[0] == trees[1]
    assert len(trees[0]) > 20


def test_the_other_commands_work_from_elsewhere(installed: Installed) -> None:
    line = "root=anchor acme_server=ca.example squashfs_server=https://store/i.squashfs"
    for words in (["--version"], ["show", "acme"], ["check", line], ["--help"]):
        done = installed.run(*words)
        assert done.returncode == 0, (words, done.stderr)
    assert "anchor-build" in installed.run("--version").stdout


def test_the_modules_are_packaged_from_elsewhere(installed: Installed) -> None:
    """The spec's template, the changelog and the licence travel with it, too."""
    done = installed.run("rpm", "--stage", "none", "--out", "packages")
    assert done.returncode == 0, done.stderr
    assert len(list((installed.elsewhere / "packages").glob("*.noarch.rpm"))) == 2


def test_a_package_of_stages_is_found_beside_it(installed: Installed, installed_package: Path) -> None:
    done = installed.run("show", "local-file", "--json", path=f":{installed_package}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["origin"] == "entry point site"


def test_the_fixture_is_what_pip_installs(installed_package: Path, tmp_path: Path) -> None:
    """The package of stages that the tests write by hand is the one that its pyproject.toml makes."""
    source = TOP / "tests" / "fixtures" / "site_package"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    target = tmp_path / "by-pip"
    subprocess.run([*pip, "--no-build-isolation", "--target", target, source], check=True, timeout=120)
    trees = []
    for top in (installed_package, target):
        stages = [path for path in (top / "site_stages").rglob("*") if path.is_file() and path.suffix != ".pyc"]
        points = (top / "site_stages-1.0.dist-info" / "entry_points.txt").read_text(encoding="utf-8").strip()
        trees.append(({path.relative_to(top): path.read_bytes() for path in stages}, points))
    assert trees[0] == trees[1]
