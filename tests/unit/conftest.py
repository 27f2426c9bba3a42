"""Unit tests start no real process through the product: only programs that the test itself put below tmp_path.

A test that means to start one asks for the fixture `processes`. Tests that call subprocess themselves say so already.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anchor_build import cli


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


@dataclass(frozen=True)
class Said:
    """How a command ended and what it wrote."""

    status: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """What it complained of, without the mark of the first line."""
        lines = [line.removeprefix("error: ") for line in self.err.splitlines()]
        return [line for line in lines if not line.startswith(("hint: ", "profile "))]


Anchor = Callable[..., Said]


@pytest.fixture
def anchor(
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Anchor:
    """Run anchor-build in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    for number in (signal.SIGTERM, signal.SIGHUP):
        # main() changes these; the fixture's end brings them back.
        request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))

    def run(*words: str) -> Said:
        status = 0
        try:
            cli.main(list(words))
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return run
