"""Unit tests start no real process through the product: only programs that the test itself put below tmp_path.

A test that means to start one asks for the fixture `processes`. Tests that call subprocess themselves say so already.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def processes() -> None:
    """Let this test start real programs."""


@pytest.fixture(autouse=True)
def forbid_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the product's one door to processes refuse every program that is not the test's own."""
    if "processes" in request.fixturenames:
        return

    def popen(argv: list[str], **options: Any) -> subprocess.Popen[str]:
        # setpriv ties a program to its starter, and becomes it.
        program = argv[argv.index("--") + 1] if Path(argv[0]).name == "setpriv" else argv[0]
        found = shutil.which(program) or program
        if not Path(found).resolve().is_relative_to(tmp_path.resolve()):
            pytest.fail(f"a unit test would start a real process: {argv}")
        return subprocess.Popen(argv, **options)

    guarded = SimpleNamespace(**{**vars(subprocess), "Popen": popen})
    monkeypatch.setattr("anchor_build.run.subprocess", guarded)
