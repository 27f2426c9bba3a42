"""`anchor-build stages`: what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.options import json_option, stage_dir_option
from anchor_build.registry import load_registry


@click.command(short_help="List the stages that can be used.")
@stage_dir_option
@json_option
@click.pass_obj
def command(console: Console, stage_dir: tuple[Path, ...], as_json: bool) -> None:
    """List the stages that can be used: built in, from Python packages, and from --stage-dir.

    \b
    Example:
      anchor-build stages --stage-dir ./my-stages
    """  # noqa: D301
    stages = load_registry(stage_dir).stages
    if as_json:
        console.json([{"kind": s.kind, "name": s.name, "summary": s.summary, "origin": s.origin} for s in stages])
        return
    rows = [[s.kind, s.name, s.summary, s.origin] for s in stages]
    console.table(["KIND", "NAME", "SUMMARY", "FROM"], rows, prose=2)
