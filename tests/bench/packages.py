"""`./build.sh bench packages`: all packages, from nothing and with nothing changed, and the start of a command.

Everything is run as a user runs it, each time as a process of its own. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anchor_build.console import format_table

LIMIT_S = 600
PROGRAM = [sys.executable, "-m", "anchor_build"]


def timed(argv: list[str], cache: Path) -> float:
    """Run a command with a cache of its own, and return its seconds."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    began = time.monotonic()
    subprocess.run(argv, env=env, check=True, capture_output=True, timeout=LIMIT_S)
    return time.monotonic() - began


def spread(values: list[float]) -> str:
    """Return the median with the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="build.sh bench packages", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each kind")
    options = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="anchor-bench-") as name:
        for run in range(options.runs):
            # In turn, so that a drift of the machine's speed meets all alike.
            out, cache = Path(name, f"out{run}"), Path(name, f"cache{run}")
            rpm = [*PROGRAM, "rpm", "--all", "--out", str(out)]
            for what, argv in (
                ("rpm --all, from nothing", rpm),
                ("rpm --all, nothing changed", rpm),
                ("rpm --all --repo, from nothing", [*rpm[:-1], f"{out}-repository", "--repo"]),
                ("--help", [*PROGRAM, "--help"]),
                ("Python alone", [sys.executable, "-c", "pass"]),
            ):
                seconds.setdefault(what, []).append(timed(argv, cache))
        packages = sorted(out.glob("*.rpm"))
        size = sum(path.stat().st_size for path in packages)
    rows = [[what, spread(values)] for what, values in seconds.items()]
    print(f"{len(packages)} packages, {size / 1e6:.2f} MB")  # noqa: T201 - the result
    print(format_table(["", "median s (least to most)"], rows))  # noqa: T201 - the result
