"""`anchor-build publish`: put an image and its manifest where nodes fetch them."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.oci import Access
from anchor_build.options import json_option, registry_options, valid_seconds

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Put an image and its manifest where nodes fetch them.")
@click.argument("image", type=FILE)
@click.option(
    "--to",
    required=True,
    metavar="DIR|s3://BUCKET/PREFIX|oci://REGISTRY/NAME:TAG",
    help="Where to: a directory, a bucket, or an OCI registry.",
)
@click.option(
    "--manifest-key",
    "manifest_keys",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="The public key (PEM) that nodes have, to verify a signed manifest with. May be repeated.",
)
@click.option("--endpoint", default="", metavar="URL", help="The S3 service. Default: AWS_ENDPOINT_URL, or AWS.")
@click.option("--region", default="", help="The region that requests are signed for. Default: AWS_REGION.")
@click.option("--ca", type=FILE, metavar="FILE", help="The CA of the S3 service. Default: those that this host trusts.")
@click.option("--initramfs", type=FILE, metavar="FILE", help="Push this with the image, and its kernel (registry).")
@click.option("--kernel", type=FILE, metavar="FILE", help="That kernel. Default: what the initramfs's report names.")
@click.option("--platform", default="", metavar="OS/ARCH", help="What these are for. Default: as this host.")
@click.option(
    "--annotation",
    "annotations",
    multiple=True,
    metavar="KEY=VALUE",
    help="Say something of it: version=2026.11, revision=..., or a key of your own with a dot (registry). May be"
    " repeated.",
)
@click.option(
    "--sign-key",
    default="",
    metavar="FILE|URI",
    help="Sign a manifest, IMAGE.oci.manifest, that names what was pushed by its digest (registry): a private key (PEM)"
    " or a PKCS#11 URI.",
)
@click.option("--sign-pass-file", type=FILE, metavar="FILE", help="That key's passphrase or PIN. Default: ask.")
@click.option("--valid-for", metavar="TIME", help="How long nodes may use that manifest, such as 30d.")
@registry_options
@json_option
@click.pass_obj
def command(
    console: Console,
    image: Path,
    to: str,
    manifest_keys: tuple[Path, ...],
    endpoint: str,
    region: str,
    ca: Path | None,
    initramfs: Path | None,
    kernel: Path | None,
    platform: str,
    annotations: tuple[str, ...],
    sign_key: str,
    sign_pass_file: Path | None,
    valid_for: str | None,
    access: Access,
    as_json: bool,
) -> None:
    """Verify IMAGE and its manifest (IMAGE.manifest), then put them where nodes fetch them.

    The image comes first, under a name that holds its digest, and the manifest last, so a node finds either the old
    pair or the new one. What is there already is not sent again. S3 credentials come from AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, or from ~/.aws/credentials (AWS_PROFILE).

    At an OCI registry the image becomes an artifact that the image stage oci boots; with --initramfs, the kernel and
    the manifest go with it. The tag moves last. Needs skopeo, whose logins and certificates count. With --sign-key
    there is a manifest for such an image; IMAGE may be that one, to put it where nodes fetch it.

    \b
    Examples:
      anchor-build publish node.squashfs --to /srv/images --manifest-key manifest.pub
      anchor-build publish node.squashfs --to s3://images/el9 --endpoint https://s3.example --manifest-key k.pub
      anchor-build publish node.squashfs --to oci://registry.example/nodes/compute:2026-11 --manifest-key k.pub
      anchor-build publish node.squashfs --initramfs node.img --to oci://registry.example/nodes/el9:now
      anchor-build publish node.squashfs.oci.manifest --to /srv/images --manifest-key manifest.pub
    """  # noqa: D301
    from anchor_build.manifest import SUFFIX
    from anchor_build.manifest_oci import Signing
    from anchor_build.publish import find_target, publish
    from anchor_build.publish_oci import Push, is_registry, parse_annotations, parse_target, publish_oci
    from anchor_build.signing import read_public_keys

    if is_registry(to):
        if endpoint or region or ca:
            raise click.UsageError("--endpoint, --region and --ca belong to s3://; a registry has --registry-ca.")
        if initramfs is None and (kernel or platform):
            raise click.UsageError("--kernel and --platform belong to --initramfs.")
        if not sign_key and (sign_pass_file or valid_for):
            raise click.UsageError("--sign-pass-file and --valid-for belong to --sign-key.")
        beside = image.with_name(f"{image.name}.oci{SUFFIX}")
        console.refuse_events([beside if sign_key else None])
        signing = Signing(beside, sign_key, sign_pass_file, valid_seconds(valid_for), option="")
        keys, target = read_public_keys(manifest_keys), parse_target(to)
        said = parse_annotations(annotations)
        push = Push(image, target, keys, initramfs, kernel, platform, said, access, signing if sign_key else None)
        report = publish_oci(push, console.step)
        for text in report["warnings"]:
            console.warn(text)
        if as_json:
            console.json(report)
            return
        console.table(["FILE", "MB", "TYPE"], [[f["name"], f["bytes"] / 1e6, f["media_type"]] for f in report["files"]])
        click.echo(f"{report['reference']}: {report['result']}")
        click.echo(report["boot_parameter"])
        if report["manifest"]:
            console.info(f"manifest: {report['manifest']}, signed by {report['manifest_signed_by']}")
        if report["previous"] not in (None, report["digest"]):
            console.info(f"before, {to} was {report['previous']}")
        return
    if initramfs or kernel or platform or annotations or sign_key or sign_pass_file or valid_for or access != Access():
        raise click.UsageError(
            "--initramfs, --kernel, --platform, --annotation, --sign-..., --valid-for, --registry-... and --authfile"
            " belong to oci://."
        )
    place = find_target(to, endpoint=endpoint, region=region, ca=ca)
    report = publish(image, to, place, read_public_keys(manifest_keys), console.step, console.refuse_events)
    if as_json:
        console.json(report)
        return
    console.table(["FILE", "MB", "RESULT"], [[f["name"], f["bytes"] / 1e6, f["result"]] for f in report["files"]])
