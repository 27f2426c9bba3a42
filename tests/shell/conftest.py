"""Run shell text under each shell that a node may have, with the libraries relocated below a test's own root."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
LIB = TOP / "lib"
SHELLS = {"dash": ["dash"], "busybox": ["busybox", "sh"], "bash": ["bash", "--posix"]}


@dataclass(frozen=True)
class Shell:
    """One of the node's shells; `root` is what ANCHOR_ROOT points to."""

    name: str
    root: Path

    def run(
        self,
        script: str,
        *arguments: str,
        env: dict[str, str] | None = None,
        unshare: tuple[str, ...] = (),
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run `script`; `unshare` names the namespaces it gets for itself, such as ("--mount", "--net")."""
        argv = [*SHELLS[self.name], "-c", script, self.name, *arguments]
        if unshare:
            argv = ["unshare", *unshare, "--", *argv]
        return subprocess.run(
            argv,
            env={"PATH": os.environ["PATH"], "LIB": str(LIB), "ANCHOR_ROOT": str(self.root), **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )


def other_clock(directory: Path, clock: str, *programs: str) -> str:
    """Return a PATH on which these programs see another clock, as faketime(1) writes it.

    They load faketime's library without faketime itself, which shares one semaphore, named by its process number, among
    all it starts: one that is killed leaves it behind, held, and stops the others, or a later faketime of that number.
    """
    library = next(
        path for where in ("lib*", "lib/*") for path in Path("/usr").glob(f"{where}/faketime/libfaketime.so.1")
    )
    settings = f"FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DISABLE_SHM=1 LD_PRELOAD={library} FAKETIME='{clock}'"
    directory.mkdir()
    for name in programs:
        wrapper = directory / name
        wrapper.write_text(f'#!/bin/sh\n{settings} exec {shutil.which(name)} "$@"\n')
        wrapper.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """Each shell in turn, with an empty node root."""
    root = tmp_path / "node"
    root.mkdir()
    return Shell(request.param, root)
