"""Puts an image at an OCI registry as an artifact that nodes boot, alone or with the kernel and initramfs for it.

The image alone is one manifest with one layer. A set is an index: the image's manifest for a platform, which is what a
node takes from it, and beside it a manifest with kernel, initramfs and Anchor's signed manifest, for whoever serves
them.

skopeo pushes, from an OCI layout of links to the files: it keeps an artifact's bytes as they are from 1.9 on at the
least, asks for each blob before it sends it, and knows every way in which registries want to be talked to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from anchor_build.console import Step
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import disk_errors, file_digest, sha256, work_directory
from anchor_build.image import image_format
from anchor_build.manifest import SUFFIX, Manifest, read_manifest
from anchor_build.manifest_oci import Named, Signing, write_manifest
from anchor_build.oci import (
    INDEX,
    MANIFEST,
    Access,
    Reference,
    Skopeo,
    add_blob,
    check_platform,
    json_bytes,
    missing_programs,
    parse_reference,
    write_layout,
)
from anchor_build.publish import VERIFY, verified
from anchor_build.settings import HIDDEN
from anchor_build.signing import PublicKey, verify_signature
from anchor_build.transfer import Reading
from anchor_build.version import source_date_epoch

SCHEMES = ("oci://", "oci+http://")
# The types of what is ours; the last word of a layer's is what dracut-modules/image-oci knows it by.
IMAGE = "application/vnd.anchor.image.v1"
LAYER = "application/vnd.anchor.image.layer.v1"
BOOT = "application/vnd.anchor.boot.v1"
PART = "application/vnd.anchor.boot.part.v1"
EMPTY = "application/vnd.oci.empty.v1+json"
KEYS = "org.opencontainers.image."
# What no node takes for its own, as other tools have it for manifests beside images.
NOWHERE = {"os": "unknown", "architecture": "unknown"}
ANNOTATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
PARAMETER = "rd.anchor.oci.image"


@dataclass(frozen=True)
class Push:
    """What to put where: `initramfs` and `kernel` make it a set, for `platform`; `annotations` are of its documents.

    With `signing` a manifest is made that names what was pushed.
    """

    image: Path
    target: Reference
    keys: Sequence[PublicKey] = ()
    initramfs: Path | None = None
    kernel: Path | None = None
    platform: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    signing: Signing | None = None


def is_registry(to: str) -> bool:
    """Whether --to means a registry."""
    return to.startswith(SCHEMES)


def parse_target(to: str) -> Reference:
    """Read oci://REGISTRY/NAME:TAG, or oci+http:// for a registry without TLS; raises UsageError."""
    what = f"--to {to}"
    target = parse_reference(("http://" if to.startswith(SCHEMES[1]) else "") + to.partition("://")[2], what)
    if target.digest or not to.endswith(f":{target.tag}"):
        raise UsageError(f"{what}: needs a tag, and no digest: that follows from the image", "oci://REGISTRY/NAME:TAG")
    return target


def parse_annotations(texts: Sequence[str]) -> dict[str, str]:
    """Read KEY=VALUE, where a KEY without a dot is one of org.opencontainers.image; raises UsageError."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not ANNOTATION.fullmatch(key) or not value.isprintable():
            raise UsageError(
                f"--annotation {text}: is not KEY=VALUE", "such as version=2026.11 or org.example.ticket=1"
            )
        found[key if "." in key else f"{KEYS}{key}"] = value
    return found


def publish_oci(push: Push, step: Step) -> dict[str, Any]:
    """Verify an image and its manifest, then push; return a report. Blobs that are there are not sent again.

    Everything is there and was read back, by its digest, before the tag moves. Raises AnchorError when the files do not
    belong together, the tag has something newer, or the registry refuses.
    """
    if problems := missing_programs("skopeo"):
        raise AnchorError("\n".join(problems))
    manifest_file = push.image.with_name(push.image.name + SUFFIX)
    with disk_errors():
        # What is wrong with the key is said before anything is pushed.
        key = push.signing.open() if push.signing else None
    with step(VERIFY), disk_errors():
        manifest, digest = verified(push.image, manifest_file, push.keys)
        _, data = read_manifest(manifest_file)
        kernel, warnings = _boot_files(push, manifest)
    to = f"{'oci+http' if push.target.plain else 'oci'}://{push.target.registry}/{push.target.name}:{push.target.tag}"
    what = f"--to {to}"
    with disk_errors(), work_directory() as work:
        layout = work / "layout"
        entry, files = _layout(push, layout, manifest, digest, kernel)
        skopeo = Skopeo(work, push.access)
        here = push.target.at(str(entry["digest"]))
        options = ("--preserve-digests", "--remove-signatures", *(("--all",) if push.initramfs else ()))
        with step(f"ask {push.target.registry} what {push.target.name}:{push.target.tag} is"):
            previous = _there(skopeo, push, manifest, what)
        size = sum(file["bytes"] for file in files)
        reading = Reading([layout / "blobs/sha256" / file["sha256"] for file in files])
        with step(f"push {len(files)} files, {size / 1e6:.1f} MB, what is there left out", reading):
            skopeo.copy("oci:layout:new", here.source, what, *options, plain=here.plain, watch=reading.watch)
        with step("read it back, and move the tag"):
            for name in dict.fromkeys([str(entry["digest"]), *(file["manifest"] for file in files)]):
                if skopeo.document(push.target.at(name), what) is None:
                    raise AnchorError(f"{what}: {name} is not there though it was pushed", "does something remove it?")
            # Somebody else may have published meanwhile.
            _there(skopeo, push, manifest, what)
            skopeo.copy("oci:layout:new", push.target.source, what, *options, plain=here.plain)
            if _digest_of(skopeo.document(push.target, what)) != entry["digest"]:
                raise AnchorError(f"{what}: the tag is something else already", "does somebody else publish there?")
        made: dict[str, Any] = {}
        if push.signing:
            facts = (manifest.format, manifest.unpacked, manifest.kernels)
            made = write_manifest(Named(here, int(entry["size"]), *facts), push.signing, key)
    return {
        "to": to,
        "reference": str(here),
        "digest": here.digest,
        "previous": previous,
        "result": "was there" if previous == here.digest else "published",
        "signed_by": verify_signature(data, push.keys).fingerprint if push.keys else None,
        "boot_parameter": f"{PARAMETER}={here}",
        "manifest": made.get("manifest"),
        "manifest_signed_by": made.get("signed_by"),
        "files": files,
        "warnings": [*warnings, *made.get("warnings", ())],
    }


def _digest_of(document: bytes | None) -> str | None:
    return None if document is None else f"sha256:{sha256(document)}"


def _there(skopeo: Skopeo, push: Push, manifest: Manifest, what: str) -> str | None:
    """Return the digest that the tag has; raises AnchorError where that is of something newer."""
    document = skopeo.document(push.target, what)
    try:
        found = json.loads(document or b"{}")["annotations"][f"{KEYS}created"]
        then = int(datetime.fromisoformat(str(found)).timestamp())
    except (KeyError, TypeError, ValueError, OverflowError):
        then = 0
    if then > _created(manifest):
        raise AnchorError(
            f"{what}: is there already, and newer: of {found}, while {push.image}{SUFFIX} is of {_time(manifest)}",
            f"if nodes are to go back to it, make it the newest: anchor-build image {push.image} --sign-key KEY",
        )
    return _digest_of(document)


def _created(manifest: Manifest) -> int:
    epoch = source_date_epoch()
    return manifest.created if epoch is None else epoch


def _time(manifest: Manifest) -> str:
    return datetime.fromtimestamp(_created(manifest), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _boot_files(push: Push, manifest: Manifest) -> tuple[Path | None, list[str]]:
    """Return the kernel of a set, which the report of the initramfs may name, and warnings."""
    if push.initramfs is None:
        return None, []
    report = _report(push.initramfs, file_digest(push.initramfs))
    kernel = push.kernel
    if kernel is None and report.get("kernel_file"):
        kernel = push.initramfs.with_name(Path(str(report["kernel_file"])).name)
    if kernel is None or not kernel.is_file():
        raise AnchorError(
            f"{push.initramfs}: its kernel is not known" if kernel is None else f"{kernel}: there is no such file",
            "name it: --kernel FILE",
        )
    release = str(report.get("kernel", ""))
    if release and manifest.kernels and release not in manifest.kernels:
        raise AnchorError(
            f"{push.initramfs}: is for kernel {release}, and the image has modules of {', '.join(manifest.kernels)}",
            "build it for this image: anchor-build initramfs --for-image",
        )
    settings = report.get("settings")
    secret = [key for key, value in settings.items() if HIDDEN in str(value)] if isinstance(settings, dict) else []
    text = f"{push.initramfs} holds secrets ({', '.join(secret)}): whoever may pull this can read them"
    return kernel, [text] if secret else []


def _report(file: Path, digest: str) -> dict[str, Any]:
    """Return the report beside a file; nothing where it is of another file."""
    try:
        report = json.loads(file.with_name(f"{file.name}.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) and report.get("sha256") == digest else {}


def _layout(
    push: Push, layout: Path, manifest: Manifest, digest: str, kernel: Path | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the OCI layout to push; return the descriptor of what the tag will be, and the files in it."""
    report = _report(push.image, digest)
    annotations = _annotations(push, manifest, report)
    files: list[dict[str, Any]] = []
    kind = f"{LAYER}.{image_format(push.image)}"
    image = _document(layout, IMAGE, [(kind, manifest.file or push.image.name, push.image, digest)], annotations, files)
    if push.initramfs is None or kernel is None:
        entry = image
    else:
        parts = [
            ("kernel", kernel),
            ("initramfs", push.initramfs),
            ("manifest", push.image.with_name(push.image.name + SUFFIX)),
        ]
        rows = [(f"{PART}.{part}", path.name, path, file_digest(path)) for part, path in parts]
        boot = _document(layout, BOOT, rows, annotations, files)
        system, architecture, *variant = check_platform(push.platform or str(report.get("platform", ""))).split("/")
        where = {"os": system, "architecture": architecture, **({"variant": variant[0]} if variant else {})}
        # No artifactType here: skopeo 1.9 drops it from an index, and the digest would be another one.
        index = {
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{**image, "platform": where}, {**boot, "platform": NOWHERE}],
            "annotations": annotations,
        }
        entry = {"mediaType": INDEX, **add_blob(layout, json_bytes(index))}
    write_layout(layout, {"new": entry})
    return entry, files


def _document(
    layout: Path,
    kind: str,
    rows: Sequence[tuple[str, str, Path, str]],
    annotations: Mapping[str, str],
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """Add a manifest whose layers are `rows` of type, name, file and SHA-256; return its descriptor."""
    layers = [
        {"mediaType": media_type, **add_blob(layout, path, digest), "annotations": {f"{KEYS}title": name}}
        for media_type, name, path, digest in rows
    ]
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": kind,
        "config": {"mediaType": EMPTY, **add_blob(layout, b"{}"), "data": "e30="},
        "layers": layers,
        "annotations": annotations,
    }
    entry = {"mediaType": MANIFEST, **add_blob(layout, json_bytes(document))}
    for media_type, name, path, digest in rows:
        facts = {"name": name, "bytes": path.stat().st_size, "sha256": digest, "media_type": media_type}
        files.append({**facts, "manifest": entry["digest"]})
    return entry


def _annotations(push: Push, manifest: Manifest, report: Mapping[str, Any]) -> dict[str, str]:
    """Return what is said of the image: what its report has from a container image, its time, and what was given."""
    labels = report.get("labels")
    found = {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
    if report.get("container_digest"):
        found[f"{KEYS}base.digest"] = str(report["container_digest"])
        if "://" not in str(report["container"]) and not str(report["container"]).startswith((".", "/")):
            found[f"{KEYS}base.name"] = str(report["container"]).partition("@")[0]
    found[f"{KEYS}created"] = _time(manifest)
    found[f"{KEYS}title"] = push.image.name
    return dict(sorted({**found, **push.annotations}.items()))
