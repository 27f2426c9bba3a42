"""Container images inside an initramfs, for use after the boot: one squashfs with an OCI layout of all of them.

The node mounts that file from where it is (lib/anchor-embedded.sh), so memory holds it once. What a tag means is asked
for first: the digest decides whether a build is in the cache, and only a build fetches.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build.console import Step
from anchor_build.container import TRANSPORTS, find_source
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import disk_errors, disk_hints, file_digest, sha256, work_directory
from anchor_build.oci import (
    Access,
    Skopeo,
    entry_named,
    host_platform,
    missing_programs,
    parse_reference,
    read_blob,
    sizes_of,
)
from anchor_build.run import run
from anchor_build.transfer import Fetching

# In /etc/anchor, as the other files of a site; lib/anchor-embedded.sh has the name, too.
FILE = "images.squashfs"
LARGE_BYTES = 100_000_000
# Building reads an initramfs back as a whole, and nodes unpack it as one.
MAX_BYTES = 1 << 30
# lz4 and gzip are not in every kernel's squashfs, and layers are compressed already.
PACK = ("-noappend", "-all-root", "-no-xattrs", "-no-progress", "-quiet", "-comp", "zstd", "-Xcompression-level", "3")


@dataclass(frozen=True)
class Embedded:
    """An image to embed: what it will be called, and the digest that its tag, or its name here, has now.

    `source` is as it was given, with the digest where it is at a registry. The digest is that of an index where the
    name leads to one.
    """

    name: str
    digest: str
    source: str


def resolve(references: Sequence[str], access: Access, step: Step) -> tuple[Embedded, ...]:
    """Return what to embed, by digest; raises AnchorError for what cannot be had, UsageError for a name given twice."""
    if not references:
        return ()
    if problems := missing_programs("skopeo"):
        raise AnchorError("--embed-image: " + "\n".join(problems))
    found = []
    for reference in references:
        with step(f"ask for the digest of {reference}"), disk_errors(), work_directory() as work:
            found.append(_resolved(reference, Skopeo(work, access, host_platform())))
    names = [image.name for image in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--embed-image {', '.join(twice)}: is there twice")
    return tuple(found)


def _resolved(reference: str, skopeo: Skopeo) -> Embedded:
    what = f"--embed-image {reference}"
    source, plain = find_source(reference, what, skopeo.work)
    if source.startswith("docker://"):
        wanted = parse_reference(reference, what)
        document = skopeo.document(wanted, what)
        if document is None:
            raise AnchorError(f"{what}: the registry has no such image or tag", "check both: was it pushed there?")
        digest = wanted.digest or f"sha256:{sha256(document)}"
        name = f"{wanted.registry}/{wanted.name}" + (f":{wanted.tag}" if wanted.tag else f"@{digest}")
        return Embedded(name, digest, str(wanted.at(digest)))
    skopeo.copy(source, "oci:layout:image", what, "--dest-oci-accept-uncompressed-layers", plain=plain)
    digest = str(entry_named(skopeo.work / "layout", "image", what)["digest"])
    if reference.startswith(TRANSPORTS):
        return Embedded(reference.partition(":")[2].strip("/"), digest, reference)
    return Embedded(Path(reference).resolve().name.partition(".")[0], digest, reference)


def pack(images: Sequence[Embedded], access: Access, work: Path, step: Step) -> tuple[bytes, list[dict[str, Any]]]:
    """Fetch images and return the squashfs of them, and what a report says of each. The same digests give the same.

    Raises AnchorError for what cannot be had, or was changed since it was resolved, and for more than MAX_BYTES.
    """
    if problems := missing_programs("mksquashfs"):
        raise AnchorError("--embed-image: " + problems[0].replace("install mksquashfs", "install squashfs-tools"))
    top = work / "embedded"
    top.mkdir(mode=0o700)
    skopeo = Skopeo(top, access, host_platform())
    rows = []
    for image in images:
        what = f"--embed-image {image.source}"
        (top / "source").unlink(missing_ok=True)
        source, plain = find_source(image.source, what, top)
        progress = Fetching(top / "layout")
        with step(f"fetch {image.name} for use after the boot", progress):
            if source.startswith("docker://"):
                progress.sizes = sizes_of(skopeo, parse_reference(image.source, what), what)
            skopeo.copy(source, f"oci:layout:{image.name}", what, "--dest-oci-accept-uncompressed-layers", plain=plain)
        rows.append(_row(top / "layout", image, what))
    for blob in (top / "layout/blobs/sha256").iterdir():
        if file_digest(blob) != blob.name:
            raise AnchorError(f"--embed-image: {blob.name} is not what its digest says", "is the disk sound?")
    output = top / FILE
    with disk_hints(), step("pack what was fetched", lambda: _written(output)):
        for path in sorted((top / "layout").rglob("*")):
            os.utime(path, (0, 0))
        os.utime(top / "layout", (0, 0))
        run(["mksquashfs", "layout", FILE, *PACK], cwd=top, env={"SOURCE_DATE_EPOCH": "0"})
    if output.stat().st_size > MAX_BYTES:
        raise AnchorError(
            f"--embed-image: {output.stat().st_size / 1e6:.0f} MB are too much for an initramfs",
            "put the images into the root image, or let nodes fetch them when they have booted",
        )
    return output.read_bytes(), rows


def _written(output: Path) -> str:
    return f"{output.stat().st_blocks * 512 / 1e6:.0f} MB written" if output.exists() else ""


def _row(layout: Path, image: Embedded, what: str) -> dict[str, Any]:
    try:
        entry = entry_named(layout, image.name, what)
        manifest = read_blob(layout, str(entry["digest"]), what)
        size = sum(int(part["size"]) for part in (manifest["config"], *manifest["layers"]))
    except (KeyError, TypeError, ValueError, json.JSONDecodeError):
        raise AnchorError(f"{what}: its manifest is none", "publish the image again") from None
    if not image.source.endswith(f"@{image.digest}") and entry["digest"] != image.digest:
        raise AnchorError(f"{what}: was changed meanwhile", "build again")
    return {"name": image.name, "digest": image.digest, "manifest": entry["digest"], "bytes": size}


def size_warning(size: int) -> str:
    """Return a warning for images that make an initramfs large, given the bytes of their squashfs; else nothing."""
    if size <= LARGE_BYTES:
        return ""
    return (
        f"the images in it (--embed-image) have {size / 1e6:.0f} MB: each node fetches them before anything else, and"
        " they stay in its memory"
    )
