"""`anchor-build publish`: put an image and its manifest where nodes fetch them."""

from __future__ import annotations

from pathlib import Path

import click

from anchor_build.console import Console
from anchor_build.options import json_option

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(short_help="Put an image and its manifest where nodes fetch them.")
@click.argument("image", type=FILE)
@click.option("--to", required=True, metavar="DIR|s3://BUCKET/PREFIX", help="Where to: a directory, or a bucket.")
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
    as_json: bool,
) -> None:
    """Verify IMAGE and its manifest (IMAGE.manifest), then put them where nodes fetch them.

    The image comes first, under a name that holds its digest, and the manifest last, so a node finds either the old
    pair or the new one. What is there already is not sent again. S3 credentials come from AWS_ACCESS_KEY_ID and
    AWS_SECRET_ACCESS_KEY, or from ~/.aws/credentials (AWS_PROFILE).

    \b
    Examples:
      anchor-build publish node.squashfs --to /srv/images --manifest-key manifest.pub
      anchor-build publish node.squashfs --to s3://images/el9 --endpoint https://s3.example --manifest-key k.pub
    """  # noqa: D301
    from anchor_build.publish import find_target, publish
    from anchor_build.signing import read_public_keys

    target = find_target(to, endpoint=endpoint, region=region, ca=ca)
    report = publish(image, to, target, read_public_keys(manifest_keys), console.step)
    if as_json:
        console.json(report)
        return
    console.table(["FILE", "MB", "RESULT"], [[f["name"], f["bytes"] / 1e6, f["result"]] for f in report["files"]])
