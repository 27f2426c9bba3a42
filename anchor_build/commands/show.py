"""`anchor-build show STAGE`: one stage in full."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.options import complete_stage, json_option, stage_dir_option
from anchor_build.registry import load_registry


@click.command(short_help="Describe one stage and its parameters.")
@click.argument("stage", shell_complete=complete_stage(""))
@stage_dir_option
@json_option
@click.pass_obj
def command(console: Console, stage: str, stage_dir: tuple[Path, ...], as_json: bool) -> None:
    """Describe one stage: what it needs, what it installs, and its kernel command-line parameters.

    STAGE is a name such as acme, or kind and name (auth-acme) where one name serves two kinds; anchor is
    the core.

    \b
    Examples:
      anchor-build show acme
      anchor-build show anchor --json
    """  # noqa: D301
    from anchor_build.describe import find_stage, stage_facts, stage_text

    found = find_stage(load_registry(stage_dir), stage)
    if as_json:
        console.json(stage_facts(found))
    else:
        click.echo(stage_text(found))
