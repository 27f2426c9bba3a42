"""`anchor-build check "CMDLINE"`: every error of a kernel command line, before a node meets it."""

from __future__ import annotations

import sys

import click

from anchor_build.console import Console, printable
from anchor_build.options import Choice, json_option, set_option, stage_options


@click.command(short_help="Check a kernel command line before a node sees it.")
@click.argument("cmdline", nargs=-1, required=True)
@stage_options
@set_option("A default that is baked in.")
@click.option("--signed", is_flag=True, help="The initramfs holds a manifest key (--manifest-key).")
@json_option
@click.pass_obj
def command(
    console: Console,
    cmdline: tuple[str, ...],
    choice: Choice,
    settings: tuple[str, ...],
    signed: bool,
    as_json: bool,
) -> None:
    """Check CMDLINE as a node would, and say everything that is wrong with it at once.

    Without --auth, --transport and --image every known stage counts as being in the initramfs. CMDLINE may
    be - to read it from standard input. Exits 0 when it is right and 1 when not.

    \b
    Examples:
      anchor-build check "root=anchor acme_server=ca.example squashfs_server=https://store/i.sqsh"
      anchor-build check --auth acme --image squashfs "$(cat /proc/cmdline)"
    """  # noqa: D301
    from anchor_build.check import check_command_line
    from anchor_build.settings import read_settings, shown_value

    plan = choice.plan_or_all()
    # A command line is bytes: what is not UTF-8 becomes surrogates, as in arguments (PEP 383).
    if cmdline == ("-",):
        cmdline = (sys.stdin.buffer.read().decode("utf-8", "surrogateescape").rstrip("\n"),)
    line = " ".join(cmdline)
    keys = {param.key: param for _, param in plan.params}
    result = check_command_line(plan, line, read_settings(plan, settings), signed=signed)
    if as_json:
        console.json(
            {
                "ok": not result.errors,
                "errors": list(result.errors),
                "warnings": list(result.warnings),
                "chosen": dict(result.chosen),
                "values": {key: shown_value(keys[key], value) for key, value in result.values.items() if value},
            }
        )
    else:
        for warning in result.warnings:
            console.warn(printable(warning))
        for error in result.errors:
            console.error(printable(error))
        if not result.errors:
            shown = [[key, shown_value(keys[key], value)] for key, value in sorted(result.values.items()) if value]
            console.table(["PARAMETER", "VALUE"], [[k, printable(v)] for k, v in shown])
            console.info(", ".join(f"{kind}: {name}" for kind, name in result.chosen.items()))
    if result.errors:
        sys.exit(1)
