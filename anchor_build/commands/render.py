"""`anchor-build render`: the dracut modules of a plan, as files."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.errors import AnchorError
from anchor_build.options import Choice, json_option, stage_options


@click.command(short_help="Write the dracut modules of a plan into a directory.")
@stage_options
@click.option("--all", "every", is_flag=True, help="Every stage there is.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="The directory to make; it must not hold any of these modules yet.",
)
@json_option
@click.pass_obj
def command(
    console: Console,
    choice: Choice,
    every: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Write the dracut modules of a plan into a directory, for reading or for /usr/lib/dracut/modules.d.

    \b
    Example:
      anchor-build render --auth acme --image squashfs -o modules
    """  # noqa: D301
    from anchor_build.render import place_modules, render_plan

    plan = choice.everything() if every else choice.plan()
    modules = render_plan(plan)
    there = [module.name for module in modules if (output / module.name).exists()]
    if there:
        raise AnchorError(f"{output}: already holds {', '.join(there)}", "remove them, or name another directory")
    try:
        place_modules(modules, output)
    except OSError as error:
        raise AnchorError(f"{error.filename or output}: cannot be written: {error.strerror}") from None
    if as_json:
        console.json({module.name: sorted(module.files) for module in modules})
    else:
        for module in modules:
            click.echo(output / module.name)
