"""`anchor-build rpm`: the dracut modules as packages."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.options import complete_stage, json_option, stage_dir_option
from anchor_build.registry import load_registry


@click.command(short_help="Package the dracut modules as RPMs.")
@click.option(
    "--stage",
    "names",
    multiple=True,
    metavar="STAGE",
    shell_complete=complete_stage(""),
    help="A stage to package, as NAME or KIND-NAME; may be repeated. Default: all.",
)
@click.option("--all", "every", is_flag=True, help="Every stage there is, as without --stage.")
@stage_dir_option
@click.option(
    "-o",
    "--out",
    "output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/rpm"),
    show_default=True,
    metavar="DIR",
    help="Where to write; the packages of an earlier run are replaced.",
)
@click.option("--srpm", is_flag=True, help="Make the source package, too.")
@click.option("--tool", is_flag=True, help="Make the source package of anchor-build itself, and nothing else.")
@click.option("--sign", "key", metavar="KEYID", help="Sign packages and repository with this key of gpg's.")
@click.option("--repo", is_flag=True, help="Make the directory a repository for dnf and zypper.")
@click.option(
    "--family",
    type=click.Choice(["fedora", "suse"]),
    help="Whose package names to require: Fedora's and Enterprise Linux's, or SUSE's. Default: this host's.",
)
@click.option("--dist", metavar="TEXT", help="What ends the release, such as .el9. Default: what rpm's macros say.")
@json_option
@click.pass_obj
def command(
    console: Console,
    names: tuple[str, ...],
    every: bool,
    stage_dir: tuple[Path, ...],
    output: Path,
    srpm: bool,
    tool: bool,
    key: str | None,
    repo: bool,
    family: str | None,
    dist: str | None,
    as_json: bool,
) -> None:
    """Package the dracut modules: the core as anchor-dracut-module, each stage as anchor-dracut-KIND-NAME.

    The packages serve plain dracut, on hosts without anchor-build. The same inputs give the same bytes; when nothing
    has changed, nothing is built.

    \b
    Examples:
      anchor-build rpm
      anchor-build rpm --stage acme --stage squashfs --dist .el9 --srpm
      anchor-build rpm --stage-dir ./my-stages --repo --sign packages@example.org --out repository
      anchor-build rpm --tool --out srpm
    """  # noqa: D301
    from anchor_build.describe import find_stage
    from anchor_build.rpm.build import RpmBuild, build_packages, host_family
    from anchor_build.rpm.spec import choose_stages

    if tool:
        # --srpm is what it does anyway.
        others = {"--stage": names, "--all": every, "--sign": key, "--repo": repo, "--family": family, "--dist": dist}
        given = [option for option, value in others.items() if value]
        if given:
            raise click.UsageError(f"--tool makes a source package only: {given[0]} does not go with it.")
        _make_tool(console, output, as_json)
        return
    if names and every:
        raise click.UsageError("--stage and --all exclude each other.")
    registry = load_registry(stage_dir)
    build = RpmBuild(
        stages=choose_stages(registry, [find_stage(registry, name) for name in names]),
        known=registry.stages,
        output=output,
        family=family or host_family(),
        dist=dist,
        source=srpm,
        repository=repo,
        key=key,
        tell=lambda line: console.detail(f"  | {line}"),
    )
    report, built = build_packages(build, console.step)
    for text in report["warnings"]:
        console.warn(text)
    if as_json:
        console.json({**report, "built": built})
        return
    for name in report["files"]:
        if name.endswith(".rpm"):
            click.echo(output / name)
    if not built:
        console.info("nothing has changed since they were built")


def _make_tool(console: Console, output: Path, as_json: bool) -> None:
    """Make the source package of anchor-build itself and print where it is."""
    from anchor_build.rpm.source import tool_srpm

    with console.step("make the source package of anchor-build"):
        package, warnings = tool_srpm(output, tell=lambda line: console.detail(f"  | {line}"))
    for text in warnings:
        console.warn(text)
    if as_json:
        console.json({"files": [package.name], "warnings": list(warnings)})
    else:
        click.echo(package)
