"""`anchor-build check "CMDLINE"`: every error of a kernel command line, before a node meets it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from anchor_build.console import Console, printable
from anchor_build.options import Choice, json_option, network_options, set_option, stage_options

# What the report of an initramfs says.
IN_REPORT = ("auth", "transport", "image", "settings", "signed", "sysroot", "network", "systemd")
STDIN_MAX = 1 << 20  # bytes: enough to say that it is too long


@click.command(short_help="Check a kernel command line before a node sees it.")
@click.argument("cmdline", nargs=-1, required=True)
@stage_options
@set_option("A default that is baked in.")
@click.option("--signed", is_flag=True, help="The initramfs holds a manifest key (--manifest-key).")
@click.option(
    "--sysroot",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The system that the initramfs is built in, whose dracut has to be able to do this; / is this host.",
)
@network_options
@click.option(
    "--initramfs",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An initramfs with its report beside it, or the report: its stages, settings, keys and network.",
)
@json_option
@click.pass_obj
def command(
    console: Console,
    cmdline: tuple[str, ...],
    choice: Choice,
    settings: tuple[str, ...],
    signed: bool,
    sysroot: Path | None,
    network: str | None,
    systemd: bool,
    initramfs: Path | None,
    as_json: bool,
) -> None:
    """Check CMDLINE as a node would, and say everything that is wrong with it at once.

    Without --auth, --transport and --image every known stage counts as being in the initramfs. What brings up the
    network, and whether it understands vlan=, bond= and so on, is known by --initramfs, --sysroot or --network. CMDLINE
    may be - to read it from standard input. Exits 0 when it is right and 1 when not.

    \b
    Examples:
      anchor-build check "root=anchor acme_server=ca.example squashfs_server=https://store/i.sqsh"
      anchor-build check --auth acme --image squashfs "$(cat /proc/cmdline)"
      anchor-build check --initramfs node.img "$(cat cmdline)"
    """  # noqa: D301
    from anchor_build.check import check_command_line
    from anchor_build.settings import read_settings, shown_value
    from anchor_build.target import built, planned

    if initramfs is not None:
        context = click.get_current_context()
        for name in IN_REPORT:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                option = {"settings": "set"}.get(name, name)
                raise click.UsageError(f"--{option} and --initramfs exclude each other: its report says that.")
        target = built(initramfs, choice.stage_dir)
    else:
        plan = choice.plan_or_all()
        baked = read_settings(plan, settings)
        target = planned(plan, baked, signed=signed, sysroot=sysroot, network=network or "", systemd=systemd)
    # A command line is bytes: what is not UTF-8 becomes surrogates, as in arguments (PEP 383).
    if cmdline == ("-",):
        cmdline = (sys.stdin.buffer.read(STDIN_MAX).decode("utf-8", "surrogateescape").rstrip("\n"),)
    line = " ".join(cmdline)
    keys = {param.key: param for _, param in target.plan.params}
    result = check_command_line(
        target.plan, line, target.baked, signed=target.signed, back_end=target.back_end, impossible=target.problems
    )
    if as_json:
        console.json(
            {
                "ok": not result.errors,
                "errors": list(result.errors),
                "warnings": list(result.warnings),
                "chosen": dict(result.chosen),
                "network": target.back_end or None,
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
