"""`anchor-build initramfs`: the command that the others exist for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.oci import Access
from anchor_build.options import (
    Choice,
    complete_or_path,
    json_option,
    network_options,
    registry_options,
    set_option,
    stage_options,
)

DRIVERS_HELP = (
    "Which drivers beside those of the stages: minimal (virtual machines), network (every wired network card; the"
    " default, since it needs no knowledge of the nodes), generic (disks and USB as well), or those that a file names:"
    " `anchor-build drivers --from-host` writes one."
)


def _releases(ctx: click.Context) -> list[str]:
    from anchor_build.kernel import installed_releases

    if ctx.params.get("sysroot") or ctx.params.get("container"):
        return []  # the kernels there are others
    return installed_releases()


def _driver_sets(_: click.Context) -> list[str]:
    from anchor_build.drivers import SUMMARIES

    return list(SUMMARIES)


@click.command(short_help="Build an initramfs that boots a diskless node.")
@stage_options
@click.option(
    "--sysroot",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Build with dracut, kernel and programs of the system in DIR, such as a node's root. Nothing in it changes.",
)
@click.option(
    "--container",
    metavar="NAME|FILE|DIR",
    help="Likewise with a container image: of a registry, an OCI archive or directory, or containers-storage:NAME."
    " Needs skopeo and umoci.",
)
@registry_options
@click.option(
    "--kernel",
    metavar="RELEASE|FILE",
    shell_complete=complete_or_path(_releases),
    help="The kernel, by release or image. Default: this host's newest.",
)
@click.option(
    "--modules",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The kernel's modules, when they are not in /lib/modules.",
)
@click.option(
    "--copy-kernel/--no-copy-kernel",
    default=True,
    help="Whether the kernel is put beside the initramfs as vmlinuz-RELEASE, where it is known. Default: it is.",
)
@click.option(
    "--for-image",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The image that nodes will boot, or its manifest: refuse a kernel whose modules it does not have.",
)
@click.option("--ca", type=click.Path(path_type=Path), metavar="FILE", help="The CA bundle (PEM) that nodes trust.")
@click.option(
    "--manifest-key",
    "manifest_keys",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="A public key (PEM). Nodes then boot only what a manifest says that its private key signed. May be repeated.",
)
@click.option(
    "--manifest-since",
    metavar="TIME|FILE",
    help="Nodes refuse manifests made before: a date (ISO 8601), seconds since the epoch, or a manifest of that time.",
)
@click.option(
    "--embed-image",
    "embed_images",
    multiple=True,
    metavar="NAME|FILE|DIR",
    help="A container image for use after the boot, as --container takes it: nodes have it in /run/anchor/images. May"
    " be repeated. Needs skopeo.",
)
@set_option("Bake in a parameter's default; KEY=@FILE takes the value from a file. May be repeated.")
@click.option(
    "--drivers",
    default="network",
    metavar="SET|FILE",
    shell_complete=complete_or_path(_driver_sets),
    help=DRIVERS_HELP,
)
@click.option(
    "--add-drivers",
    multiple=True,
    metavar="NAMES",
    help="More kernel drivers, separated by spaces or commas.",
)
@network_options
@click.option(
    "--compress",
    metavar="COMMAND",
    help="Compression, as dracut's --compress. Default: zstd, if the kernel can.",
)
@click.option(
    "--trim/--no-trim",
    default=True,
    help="Whether libraries that programs are linked with and never use on a node are left out. Default: they are.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write. Default: initramfs-RELEASE.img here.",
)
@click.option(
    "--no-cache", is_flag=True, help="Run dracut even if nothing has changed since the same build, and keep nothing."
)
@json_option
@click.pass_obj
def command(
    console: Console,
    choice: Choice,
    sysroot: Path | None,
    container: str | None,
    access: Access,
    kernel: str | None,
    modules: Path | None,
    copy_kernel: bool,
    for_image: Path | None,
    ca: Path | None,
    manifest_keys: tuple[Path, ...],
    manifest_since: str | None,
    embed_images: tuple[str, ...],
    settings: tuple[str, ...],
    drivers: str,
    add_drivers: tuple[str, ...],
    network: str | None,
    systemd: bool,
    compress: str | None,
    trim: bool,
    output: Path | None,
    no_cache: bool,
    as_json: bool,
) -> None:
    """Build an initramfs from the chosen stages, and read it back.

    dracut, the kernel and all programs are this host's, or those of another system: --sysroot, --container. Nothing is
    written but the output, a JSON report (FILE.json) and the kernel beside it, and the cache. The same inputs give the
    same bytes.

    \b
    Examples:
      anchor-build initramfs --auth acme --image squashfs --ca site-ca.pem
      anchor-build initramfs --image squashfs --set rd.anchor.squashfs.url=https://store/image.squashfs
      anchor-build initramfs --image squashfs --manifest-key manifest.pub --manifest-since node.squashfs.manifest
      anchor-build initramfs --auth acme --image squashfs --add-drivers "mlx5_core ice" -o node.img
      anchor-build initramfs --image squashfs --sysroot /srv/node-root --for-image node.squashfs
      anchor-build initramfs --image squashfs --container node.oci.tar --drivers node.drivers
      anchor-build initramfs --image squashfs --embed-image registry.example/tools/monitor:2.1
    """  # noqa: D301
    from anchor_build.build import InitramfsBuild, build_initramfs, check_output
    from anchor_build.container import opened
    from anchor_build.drivers import driver_set
    from anchor_build.embed import resolve
    from anchor_build.files import refuse_overwriting
    from anchor_build.kernel import check_image, find_kernel
    from anchor_build.manifest import read_since
    from anchor_build.profile import used_profile
    from anchor_build.root import HOST, open_root
    from anchor_build.settings import named_files, read_ca, read_settings
    from anchor_build.signing import read_public_keys

    if manifest_since and not manifest_keys:
        raise click.UsageError("--manifest-since needs --manifest-key: without a key anybody can date a manifest.")

    if sysroot is not None and container is not None:
        raise click.UsageError("--sysroot and --container exclude each other.")

    # All that can be wrong with what was typed comes before a container image is fetched.
    plan = choice.plan()
    wanted_drivers = driver_set(drivers)
    baked = read_settings(plan, settings)
    keys = read_public_keys(manifest_keys)
    since = read_since(manifest_since) if manifest_since else None
    given_ca = read_ca(ca) if ca is not None else None
    if output is not None:
        check_output(output)
    with ExitStack() as stack:
        if container is not None:
            root = stack.enter_context(opened(container, access, console.step))
        else:
            root = open_root(sysroot) if sysroot is not None else HOST
        found = find_kernel(kernel, modules, root)
        warnings = [check_image(found, for_image)] if for_image is not None else []
        bundle, warning = given_ca or read_ca(None, root)
        embedded = resolve(embed_images, access, console.step)
        build = InitramfsBuild(
            plan=plan,
            kernel=found,
            output=output or Path(f"initramfs-{found.release}.img"),
            ca=bundle,
            settings=baked,
            manifest_keys=keys,
            manifest_since=since,
            drivers=(
                *(name for names in add_drivers for name in names.replace(",", " ").split()),
                *(("squashfs",) if embedded else ()),
            ),
            embedded=embedded,
            access=access,
            driver_set=wanted_drivers,
            network=network or "",
            systemd=systemd,
            copy_kernel=copy_kernel,
            compress=compress,
            trim=trim,
            inputs=used_profile(),
            warnings=tuple(filter(None, (warning, *warnings))),
            tell=lambda line: console.detail(f"  | {line}"),
        )
        texts = (drivers, container or "", *embed_images, *named_files(settings))
        read = [ca, for_image, found.image, *manifest_keys, *map(Path, filter(None, texts))]
        console.refuse_events((build.output, build.report_file, build.kernel_file))
        refuse_overwriting("--output", (build.output, build.report_file), filter(None, read))
        report = build_initramfs(build, console.step, use_cache=not no_cache)
    for text in report["warnings"]:
        console.warn(text)
    if as_json:
        console.json(report)
        return
    rows = [[owner, size / 1e6] for owner, size in report["bytes_by_stage"].items()]
    console.table(["PART", "MB UNPACKED"], rows)
    click.echo(f"{build.output}: {report['bytes'] / 1e6:.1f} MB, sha256 {report['sha256']}")
    beside = f"; kernel: {build.kernel_file}" if build.kernel_file else ""
    console.info(f"report: {build.report_file}{beside}")
