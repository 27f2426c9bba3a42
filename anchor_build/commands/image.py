"""`anchor-build image`: the image that nodes boot, and its manifest."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.oci import Access
from anchor_build.options import json_option, registry_options, stage_dir_option, valid_seconds

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Make an image and its signed manifest.")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=FILE, metavar="FILE", help="Where to write. Default: SOURCE.squashfs or .erofs.")
@click.option(
    "--format", "format_", type=click.Choice(["squashfs", "erofs"]), help="Default: by --output, or squashfs."
)
@click.option("--compression", default="", metavar="NAME[:LEVEL]", help="Default: zstd:6 (squashfs), lz4hc (erofs).")
@click.option(
    "--from",
    "container",
    metavar="NAME|FILE|DIR",
    help="Unpack a container image instead: REGISTRY/NAME:TAG or @sha256:..., an OCI archive or directory, or"
    " containers-storage:NAME. Needs skopeo and umoci.",
)
@click.option("--platform", default="", metavar="OS/ARCH", help="Which of its platforms. Default: this host's.")
@click.option(
    "--at",
    "named",
    metavar="NAME",
    help="Make only the manifest of an image that stays at its registry, for the image stage oci: REGISTRY/NAME:TAG or"
    " @sha256:... Default output: NAME.manifest. Needs skopeo.",
)
@registry_options
@click.option("--distribution", metavar="NAME:VERSION", help="Install a distribution instead: debian:bookworm.")
@click.option(
    "--package",
    "packages",
    multiple=True,
    metavar="NAMES",
    help="Packages of it, with commas. May be repeated.",
)
@click.option(
    "--variant", default="", metavar="NAME", help="How much is there without --package (mmdebstrap). Default: minbase."
)
@click.option("--mirror", "mirrors", multiple=True, metavar="URL", help="Where its packages are. May be repeated.")
@click.option("--mirror-key", type=FILE, metavar="FILE", help="The public keys that sign its packages.")
@click.option(
    "--url",
    "urls",
    multiple=True,
    metavar="URL",
    help="Where nodes find the image; one that ends in / is a directory that it is published in. May be repeated.",
)
@click.option("--peer", "peers", multiple=True, metavar="URL", help="Likewise, on another node. May be repeated.")
@click.option(
    "--verity",
    is_flag=True,
    help="Append a hash tree (dm-verity), and name its root hash in the manifest: nodes then read the image in place"
    " where they can reach it, over NFS say. Initramfs built before this option was known refuse such a manifest."
    " Needs veritysetup.",
)
@click.option("--valid-for", metavar="TIME", help="How long nodes may use the manifest, such as 30d.")
@click.option(
    "--sign-key", default="", metavar="FILE|URI", help="A private key (PEM), or a PKCS#11 URI, that signs it."
)
@click.option("--sign-pass-file", type=FILE, metavar="FILE", help="The key's passphrase or PIN. Default: ask.")
@stage_dir_option
@json_option
@click.pass_obj
def command(
    console: Console,
    source: Path | None,
    output: Path | None,
    format_: str | None,
    compression: str,
    container: str | None,
    platform: str,
    named: str | None,
    access: Access,
    distribution: str | None,
    packages: tuple[str, ...],
    variant: str,
    mirrors: tuple[str, ...],
    mirror_key: Path | None,
    urls: tuple[str, ...],
    peers: tuple[str, ...],
    verity: bool,
    valid_for: str | None,
    sign_key: str,
    sign_pass_file: Path | None,
    stage_dir: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Make a squashfs or erofs image from SOURCE, a directory or a tar, from a container image or a distribution.

    Beside it go its manifest (FILE.manifest), which nodes read, and a JSON report (FILE.json). The same input gives
    the same image. Where SOURCE is an image already, it gets a new manifest: a later end, another key, other URLs.
    With --verity it also gets a hash tree, in a copy that takes its place or goes to --output; one that it has stays.

    \b
    Examples:
      anchor-build image rootfs.tar.zst -o node.squashfs --sign-key manifest.key --valid-for 30d
      anchor-build image --from registry.example/nodes/compute:2026-11 -o node.squashfs --sign-key manifest.key
      anchor-build image --distribution debian:bookworm --package systemd-sysv,linux-image-cloud-amd64 -o node.erofs
      anchor-build image --distribution rocky:9 --mirror https://mirror.example/9/BaseOS/ --mirror-key rocky.key
      anchor-build image node.tar --sign-key "pkcs11:token=site;object=manifest;type=private" --url https://store/el9/
      anchor-build image rootfs.tar.zst -o node.erofs --verity --sign-key manifest.key --url nfs://store/images/
      anchor-build image node.squashfs --sign-key manifest.key --valid-for 30d
      anchor-build image --at registry.example/nodes/compute:2026-11 --sign-key manifest.key --valid-for 30d
    """  # noqa: D301
    from anchor_build.container import TRANSPORTS
    from anchor_build.distribution import VARIANTS, Distribution, known_packages, known_sources
    from anchor_build.files import disk_errors
    from anchor_build.image import ImageBuild, build_image, image_format
    from anchor_build.manifest import SUFFIX
    from anchor_build.manifest_oci import Signing, name_image
    from anchor_build.oci import check_platform, parse_reference
    from anchor_build.paramtypes import InvalidValueError, check_value
    from anchor_build.registry import load_registry

    if sum(given is not None for given in (source, distribution, container, named)) != 1:
        raise click.UsageError("Give one of SOURCE, --from, --at and --distribution.")
    if container is None and platform:
        raise click.UsageError("--platform belongs to --from.")
    if container is None and named is None and access != Access():
        raise click.UsageError("--registry-... and --authfile belong to --from and --at.")
    if named is not None and (format_ or compression or urls or peers or verity):
        raise click.UsageError("--format, --compression, --url, --peer and --verity do not belong to --at.")
    if distribution is None and (packages or mirrors or mirror_key or variant):
        raise click.UsageError("--package, --variant, --mirror and --mirror-key belong to --distribution.")
    if variant and variant not in VARIANTS:
        raise click.UsageError(f"--variant {variant}: is none of {', '.join(VARIANTS)}.")
    if sign_pass_file is not None and not sign_key:
        raise click.UsageError("--sign-pass-file belongs to --sign-key.")
    seconds = valid_seconds(valid_for)
    transports = load_registry(stage_dir).of_kind("transport") if urls or peers else ()
    schemes = [scheme for stage in transports for scheme in stage.schemes]
    for option, given in (("--url", urls), ("--peer", peers)):
        for url in given:
            try:
                check_value("url", url, {"schemes": schemes})
            except InvalidValueError as error:
                raise click.UsageError(f"{option} {url}: {error}.") from None
    if named is not None:
        reference = parse_reference(named, f"--at {named}")
        output = output or Path(reference.name.rpartition("/")[2] + SUFFIX)
        console.refuse_events([output])
        told = name_image(reference, access, Signing(output, sign_key, sign_pass_file, seconds), console.step)
        for text in told["warnings"]:
            console.warn(text)
        if as_json:
            console.json(told)
        else:
            signed = f", signed by {told['signed_by']}" if told["signed_by"] else ""
            click.echo(f"{output}: names {told['reference']}{signed}")
        return
    with disk_errors():
        ready = image_format(source) if source is not None and source.is_file() else ""
    if ready and output is None:
        output = source
    kind = format_ or ready or ("erofs" if output and output.suffix in (".erofs", ".ero") else "squashfs")
    if output is None:
        if container is not None:
            place = container.partition(":")[2] if container.startswith(TRANSPORTS) else container
            name = place.partition("@")[0].rpartition("/")[2].partition(":")[0].split(".tar")[0]
        else:
            name = source.resolve().name.split(".tar")[0] if source else str(distribution).replace(":", "-")
        if not name:
            raise click.UsageError("Name the image: -o FILE.")
        output = Path(f"{name}.{kind}")
    build = ImageBuild(
        output=output,
        source=source,
        container=container or "",
        platform=check_platform(platform),
        access=access,
        distribution=Distribution(distribution, known_packages(packages), known_sources(mirrors), mirror_key, variant)
        if distribution
        else None,
        format=kind,
        compression=compression,
        urls=urls,
        peers=peers,
        verity=verity,
        valid_for=seconds,
        sign_key=sign_key,
        sign_pass_file=sign_pass_file,
    )
    if build.distribution is not None:
        _ = build.distribution.release
    console.refuse_events((build.output, build.manifest_file, build.report_file))
    report = build_image(build, console.step)
    for text in report["warnings"]:
        console.warn(text)
    if as_json:
        console.json(report)
        return
    tree = f", root hash {report['verity']}" if "verity" in report else ""
    click.echo(f"{build.output}: {report['bytes'] / 1e6:.1f} MB {report['format']}, sha256 {report['sha256']}{tree}")
    signed = f", signed by {report['signed_by']}" if report["signed"] else ""
    console.info(f"manifest: {build.manifest_file}{signed}; report: {build.report_file}")
