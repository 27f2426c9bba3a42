"""A manifest for an image at a registry: signed text that names its digest, as nodes take it for the stage oci.

Its `sha256` and `size` are those of the OCI manifest or index, and each `mirror` is https://REGISTRY/NAME[:TAG]; a tag
there is for people, because nodes ask for the digest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_build.console import Step
from anchor_build.errors import AnchorError
from anchor_build.files import beside, disk_errors, output_problems, put_in_place, sha256, work_directory
from anchor_build.manifest import REGISTRY_STAGE, Manifest, manifest_text
from anchor_build.oci import Access, Reference, Skopeo, missing_programs
from anchor_build.signing import SigningKey, open_key, sign_text, trust_warnings


@dataclass(frozen=True)
class Signing:
    """Where a manifest goes, the private key that signs it (empty for none), and its end, in seconds from now.

    `option` is what the user named the output with, for messages; empty where its name follows from another.
    """

    output: Path
    key: str = ""
    pass_file: Path | None = None
    valid_for: int | None = None
    option: str = "--output "

    def open(self) -> SigningKey | None:
        """Try the key, before there is work that would be lost; raises AnchorError as open_key does."""
        if problems := output_problems(self.output, option=self.option):
            hint = "" if self.option else "the manifest goes beside the image: put that where you may write"
            raise AnchorError("\n".join(problems), hint)
        return open_key(self.key, self.pass_file) if self.key else None


@dataclass(frozen=True)
class Named:
    """An image at a registry by its digest, and the bytes of what has that digest; the rest is as in a manifest."""

    reference: Reference
    size: int
    format: str = ""
    unpacked: int | None = None
    kernels: Sequence[str] = field(default=())


def name_image(reference: Reference, access: Access, signing: Signing, step: Step) -> dict[str, Any]:
    """Ask a registry for the digest of an image, and write a manifest that names it; return a report.

    Raises AnchorError for what is not there, or is neither a manifest nor an index.
    """
    what = f"--at {reference}"
    if problems := missing_programs("skopeo"):
        raise AnchorError("\n".join(problems))
    if reference.plain and not reference.digest:
        raise AnchorError(f"{what}: nothing protects http://", "add the digest (@sha256:...), or use https")
    with disk_errors():
        key = signing.open()
        with step(f"ask for the digest of {reference}"), work_directory() as work:
            document = Skopeo(work, access).document(reference, what)
        if document is None:
            raise AnchorError(f"{what}: the registry has no such image or tag", "check both: was it pushed there?")
        try:
            found = json.loads(document)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not ("layers" in found or "manifests" in found):
            raise AnchorError(f"{what}: is neither an image nor an index of images", "is it of an old schema?")
        return write_manifest(Named(reference.at(f"sha256:{sha256(document)}"), len(document)), signing, key)


def write_manifest(named: Named, signing: Signing, key: SigningKey | None) -> dict[str, Any]:
    """Write the manifest, whole or not at all; return a report."""
    now = int(time.time())
    place = named.reference
    mirror = f"{'http' if place.plain else 'https'}://{place.registry}/{place.name}"
    manifest = Manifest(
        image=REGISTRY_STAGE,
        format=named.format,
        sha256=place.digest.removeprefix("sha256:"),
        size=named.size,
        unpacked=named.unpacked,
        created=now,
        expires=now + signing.valid_for if signing.valid_for is not None else None,
        kernels=tuple(named.kernels),
        mirrors=(f"{mirror}:{place.tag}" if place.tag else mirror,),
    )
    text = manifest_text(manifest)
    if key is not None:
        text = sign_text(text, key)
    with beside(signing.output) as partial:
        partial.write_text(text, encoding="ascii")
        put_in_place(partial, signing.output)
    return {
        "manifest": str(signing.output),
        "reference": str(place),
        "digest": place.digest,
        "created": manifest.created,
        "expires": manifest.expires,
        "signed_by": key.public.fingerprint if key else None,
        "warnings": trust_warnings(signed=key is not None, ends=signing.valid_for is not None),
    }
