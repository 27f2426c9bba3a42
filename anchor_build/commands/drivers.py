"""`anchor-build drivers`: the sets that an initramfs can have, and the list of this host's own."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.options import json_option


@click.command(short_help="List driver sets, or the drivers of this host's devices.")
@click.option("--from-host", is_flag=True, help="Print the drivers that this host's devices are bound to.")
@click.option(
    "--sysfs",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="A copy of another host's /sys, its directories and links: with --from-host, print that host's drivers.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the list to a file. Default: to standard output.",
)
@json_option
@click.pass_obj
def command(
    console: Console,
    from_host: bool,
    sysfs: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say what each set of `initramfs --drivers` is for, or make a list of one's own.

    On a node that runs, --from-host prints the drivers of its network cards, disks and other devices. Such a list, or
    those of several nodes one after the other, is a FILE for `initramfs --drivers FILE`. A node without anchor-build
    needs tar and find alone: doc/building.md has the line.

    \b
    Examples:
      anchor-build drivers
      anchor-build drivers --from-host -o node.drivers
      anchor-build drivers --from-host --sysfs node-sys -o node.drivers
      anchor-build initramfs --image squashfs --drivers node.drivers
    """  # noqa: D301
    from anchor_build.drivers import DEFAULT, SUMMARIES, bound_drivers, list_text
    from anchor_build.errors import AnchorError
    from anchor_build.files import beside, disk_errors

    for option, value in (("--output", output), ("--sysfs", sysfs)):
        if value is not None and not from_host:
            raise click.UsageError(f"{option} belongs to --from-host.")
    if not from_host:
        if as_json:
            console.json({"default": DEFAULT, "sets": SUMMARIES})
        else:
            console.table(["SET", "FOR"], [[name, text] for name, text in SUMMARIES.items()], prose=1)
            click.echo("\n--drivers FILE takes only those that a file names; --from-host writes one.")
        return
    bound = bound_drivers(sysfs or Path("/sys"))
    if not bound:
        raise AnchorError(
            f"no device {f'in {sysfs}' if sysfs else 'of this host'} has a loadable driver",
            "its kernel has all of them built in, or it is no copy of a /sys with bus, class, devices and module"
            if sysfs
            else "its kernel has all of them built in, or it is a container without /sys",
        )
    release = "" if sysfs else platform.release()
    if as_json:
        text = ""
        console.json({"kernel": release or None, "drivers": [dataclasses.asdict(entry) for entry in bound]})
    else:
        text = list_text(bound, release)
    if output is None:
        click.echo(text, nl=False)
        return
    text = text or list_text(bound, release)
    with disk_errors(), beside(output) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o644)
        partial.replace(output)
