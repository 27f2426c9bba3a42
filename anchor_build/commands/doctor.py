"""`anchor-build doctor`: is this host ready to build and boot."""

from __future__ import annotations

import dataclasses
import sys

import click

from anchor_build.console import Console
from anchor_build.options import Choice, json_option, stage_options


@click.command(short_help="Say what this host lacks, and which package has it.")
@stage_options
@json_option
@click.pass_obj
def command(
    console: Console,
    choice: Choice,
    as_json: bool,
) -> None:
    """Look at everything that a build needs on this host, and name the packages of what is missing.

    Without --auth, --transport and --image it looks at what all stages need. Exits 1 when something that a
    build needs is missing.

    \b
    Example:
      anchor-build doctor --auth acme --image squashfs
    """  # noqa: D301
    from anchor_build.doctor import examine, package_family, packages

    plan = choice.plan_or_all()
    findings = examine(plan)
    lacking = [finding for finding in findings if not finding.ok and finding.needed]
    install = packages(findings, package_family())
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        console.json({"ok": not lacking, "findings": found, "packages": install})
    else:
        verbose = console.verbosity > 0
        shown = [finding for finding in findings if verbose or not finding.ok]
        if shown:
            rows = [[_mark(f.ok, f.needed), f.what, f.detail] for f in shown]
            console.table(["", "WHAT", "FOUND"], rows, prose=2)
        good = sum(finding.ok for finding in findings)
        more = "" if verbose else "; `anchor-build -v doctor` lists them"
        click.echo(f"{good} of {len(findings)} things are in place{more}")
        if install:
            tool = "apt-get install" if package_family() == "deb" else "dnf install"
            click.echo(f"\nto get what is missing: {tool} {' '.join(install)}")
    if lacking:
        sys.exit(1)


def _mark(ok: bool, needed: bool) -> str:
    if ok:
        return "ok"
    return "MISSING" if needed else "optional"
