"""The tree of a container image: fetched by skopeo, unpacked by umoci into a directory of its own, which goes away.

Nothing is mounted that could be left behind, and each file is written once. (An engine of containers without overlayfs
copies the tree for each layer, and loses extended attributes on the way: containers/storage, vfs.) Layers may be made
to do harm: umoci keeps to the tree whatever links are in it, and what no layer may hold is refused before it begins.
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from anchor_build.console import Step, printable
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import disk_errors, disk_hint, file_digest, work_directory
from anchor_build.oci import (
    DIGEST,
    MANIFEST,
    TIMEOUT,
    Access,
    Skopeo,
    add_blob,
    check_platform,
    entry_named,
    json_bytes,
    missing_programs,
    parse_reference,
    read_blob,
    sizes_of,
    write_layout,
)
from anchor_build.root import Root, open_root
from anchor_build.run import run
from anchor_build.transfer import Fetching, Reading

PROGRAMS = ("skopeo", "umoci")
# containers-transports(5): what skopeo takes as it is.
TRANSPORTS = ("oci:", "oci-archive:", "docker-archive:", "dir:", "containers-storage:")
LOCAL = "containers-storage:"
CONFIG = "application/vnd.oci.image.config.v1+json"
TAR = "application/vnd.oci.image.layer.v1.tar"
LAYERS = (TAR, f"{TAR}+gzip", f"{TAR}+zstd")
LAYERS_MAX = 128
WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
# What umoci puts before the reason of a failure.
FAILED = "\u2a2f"


@dataclass(frozen=True)
class Container:
    """An unpacked image: its tree, and what it is: digests (of the manifest, of the configuration) with `sha256:`.

    `created` is in seconds since the epoch, 0 where the image says nothing.
    """

    directory: Path
    digest: str
    identity: str
    platform: str
    created: int
    labels: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened(reference: str, access: Access, step: Step) -> Iterator[Root]:
    """Yield the system in a container image, as `unpacked` does; everything of it is gone afterwards."""
    what = f"--container {reference}"
    with unpacked(reference, what, access, "", step) as container:
        yield open_root(container.directory, what, identity=container.identity)


@contextmanager
def unpacked(reference: str, what: str, access: Access, platform: str, step: Step) -> Iterator[Container]:
    """Yield the tree of a container image; everything of it is gone afterwards.

    `reference` is an OCI directory, an archive as `buildah push` and `podman save` write them, the name of an image in
    a registry, a name with a transport, or containers-storage:NAME for an image of this host. `what` is what a user
    calls it; `platform` is OS/ARCHITECTURE, or nothing for this host's. Raises AnchorError.
    """
    problems = missing_programs(*PROGRAMS)
    if os.geteuid() != 0:
        problems.append("only root can unpack owners, capabilities and device files: run it as root")
    if problems:
        raise AnchorError(f"{what}: " + "\n".join(problems))
    wanted = check_platform(platform)
    with disk_errors(), work_directory() as work:
        source, plain = find_source(reference, what, work)
        skopeo = Skopeo(work, access, wanted)
        progress = Fetching(work / "layout")
        with step(f"fetch the container image {reference}", progress):
            if source.startswith("docker://"):
                progress.sizes = sizes_of(skopeo, parse_reference(reference, what), what)
            skopeo.copy(source, "oci:layout:image", what, "--dest-oci-accept-uncompressed-layers", plain=plain)
        manifest, config, digest = _examined(work / "layout", what, wanted)
        layers = manifest["layers"]
        reading = Reading((), "layer")
        with step(
            f"unpack its layers, {len(layers)}, {sum(layer['size'] for layer in layers) / 1e6:.0f} MB as they are",
            reading,
        ):
            _unpack(work, manifest, config, what, reading)
        yield Container(
            work / "root",
            digest,
            manifest["config"]["digest"],
            "/".join(filter(None, (config.get(key, "") for key in ("os", "architecture", "variant")))),
            _created(config),
            _labels(config),
        )


def find_source(reference: str, what: str, work: Path) -> tuple[str, bool]:
    """Return what skopeo calls the image, as seen in `work`, and whether it comes over plain http."""
    if reference.startswith(TRANSPORTS):
        transport, _, rest = reference.partition(":")
        # skopeo works in another directory.
        return f"{transport}:{rest if transport == 'containers-storage' else Path(rest).absolute()}", False
    path = Path(reference)
    if path.is_dir():
        if not (path / "index.json").is_file():
            raise AnchorError(
                f"{what}: is a directory, but not that of an OCI image: it has no index.json",
                "the directory of a system is named by itself, or with --sysroot DIR",
            )
        return f"oci:{_linked(path, work)}", False
    if path.is_file():
        return f"{_archive_kind(what, path)}:{_linked(path, work)}", False
    if reference.startswith(("/", ".")):
        raise AnchorError(f"{what}: there is no such file or directory")
    registry, slash, _ = reference.removeprefix("docker://").removeprefix("http://").partition("/")
    if not slash or not (re.search(r"[.:]", registry) or registry == "localhost"):
        # It would be taken for the name of an image at a public registry that nobody named.
        raise AnchorError(
            f"{what}: there is no such file or directory, and no registry in the name",
            "an image at a registry is REGISTRY/NAME:TAG, an image of this host is containers-storage:NAME",
        )
    found = parse_reference(reference, what)
    if found.plain and not found.digest:
        raise AnchorError(f"{what}: nothing protects http://", "add the digest (@sha256:...), or use https")
    return found.source, found.plain


def _linked(path: Path, work: Path) -> str:
    """Return a name without special characters: a colon would mean something to skopeo."""
    (work / "source").symlink_to(path.resolve())
    return "source"


def _archive_kind(what: str, path: Path) -> str:
    """Return the transport for an archive: `podman save` and `docker save` write another kind than `buildah push`."""
    try:
        with tarfile.open(path) as archive:
            names = {name.removeprefix("./") for name in archive.getnames()}
    except (OSError, EOFError, tarfile.TarError, zlib.error):
        names = set()
    # docker save writes both since version 25
    if "index.json" in names:
        return "oci-archive"
    if "manifest.json" in names:
        return "docker-archive"
    raise AnchorError(
        f"{what}: is no archive of a container image: it has no index.json and no manifest.json",
        "a tar of a system is none: `initramfs` takes it unpacked, with --sysroot DIR, and `image` as SOURCE",
    )


def _examined(layout: Path, what: str, wanted: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Return manifest, configuration and the manifest's digest of an image that can be unpacked here."""
    try:
        digest = str(entry_named(layout, "image", what)["digest"])
        manifest = read_blob(layout, digest, what)
        layers, types = manifest["layers"], {str(layer["mediaType"]) for layer in manifest["layers"]}
        kind = str(manifest["config"]["mediaType"])
        if kind != CONFIG or not types <= set(LAYERS) or not 1 <= len(layers) <= LAYERS_MAX:
            raise AnchorError(
                f"{what}: is not an image of 1 to {LAYERS_MAX} tar layers: configuration {printable(kind)}, "
                f"layers {printable(', '.join(sorted(types)) or 'none')}",
                "an artifact of squashfs or erofs files is booted as it is: rd.anchor.oci.image=",
            )
        config = read_blob(layout, str(manifest["config"]["digest"]), what)
        diffs = config["rootfs"]["diff_ids"]
        sizes = [layer["size"] for layer in layers]
        sound = len(diffs) == len(layers) and all(DIGEST.fullmatch(str(text)) for text in diffs)
        if not sound or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise KeyError
        has = printable(f"{config['os']}/{config['architecture']}")
        if not f"{wanted}/".startswith(f"{has}/"):
            raise AnchorError(f"{what}: is for {has}, and {wanted} is wanted", f"name it: --platform {has}")
    except (KeyError, TypeError, ValueError, AttributeError, FileNotFoundError):
        raise AnchorError(
            f"{what}: its manifest and its configuration do not belong together", "publish the image again"
        ) from None
    return manifest, config, digest


def _created(config: Mapping[str, Any]) -> int:
    try:
        return max(0, int(datetime.fromisoformat(re.sub(r"\.[0-9]+", "", str(config["created"]))).timestamp()))
    except (KeyError, ValueError, OverflowError):
        return 0


def _labels(config: Mapping[str, Any]) -> dict[str, str]:
    own = config.get("config")
    labels = own.get("Labels") if isinstance(own, dict) else None
    pairs = labels.items() if isinstance(labels, dict) else ()
    return {str(key): str(value) for key, value in pairs}


def _unpack(work: Path, manifest: dict[str, Any], config: Mapping[str, Any], what: str, reading: Reading) -> None:
    layout = work / "layout"
    size = 0
    for number, layer in enumerate(manifest["layers"]):
        diff = str(config["rootfs"]["diff_ids"][number])
        which = f"{what}: layer {number + 1} of {len(manifest['layers'])}"
        if layer["mediaType"].endswith("+zstd"):
            # umoci before 0.5 has no zstd.
            manifest["layers"][number] = layer = _decompressed(layout, layer, diff, which)
        size += _judged(layout / "blobs/sha256" / layer["digest"].removeprefix("sha256:"), which)
        free = shutil.disk_usage(work).free
        if size > free:
            raise AnchorError(
                f"{what}: unpacks to more than {size / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free",
                disk_hint("No space left on device"),
            )
    entry = {"mediaType": MANIFEST, **add_blob(layout, json_bytes(manifest))}
    write_layout(layout, {"image": entry})
    reading.files = [layout / "blobs/sha256" / layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]]
    try:
        # It compares the digests of layers with those in manifest and configuration. What no layer has an entry for
        # must not depend on who builds.
        argv = ["umoci", "raw", "unpack", "--image", "layout:image", "root"]
        run(argv, cwd=work, umask=0o022, timeout=TIMEOUT, watch=reading.watch)
    except ProcessError as error:
        said = printable(error.tail.rpartition(FAILED)[2].strip()[-600:])
        raise AnchorError(f"{what}: cannot be unpacked: {said}", disk_hint(said) or "publish the image again") from None
    shutil.rmtree(layout)


def _decompressed(layout: Path, layer: Mapping[str, Any], diff: str, which: str) -> dict[str, Any]:
    blobs = layout / "blobs/sha256"
    packed, plain = blobs / str(layer["digest"]).removeprefix("sha256:"), blobs / diff.removeprefix("sha256:")
    try:
        with plain.open("wb") as sink:
            run(["zstd", "-dcq", packed], stdout=sink, file_limit=shutil.disk_usage(layout).free, timeout=TIMEOUT)
    except ProcessError as error:
        hint = disk_hint("No space left on device" if error.status < 0 else error.tail)
        raise AnchorError(f"{which}: is no zstd data: {error.tail}", hint or "publish the image again") from None
    if f"sha256:{file_digest(plain)}" != diff:
        raise AnchorError(f"{which}: is not what the image's configuration says it is", "publish the image again")
    packed.unlink()
    return {"mediaType": TAR, "digest": diff, "size": plain.stat().st_size}


def _judged(blob: Path, which: str) -> int:
    """Return the bytes of a layer's files; raises AnchorError for what no layer may hold."""
    size = 0
    try:
        with tarfile.open(blob) as archive:
            for entry in archive:
                size += entry.size
                archive.members = []  # type: ignore[attr-defined]  # it would keep all of them
                places = [entry.name, entry.linkname] if entry.islnk() else [entry.name]
                name = entry.name.rpartition("/")[2]
                gone = name.removeprefix(WHITEOUT) if name.startswith(WHITEOUT) and name != OPAQUE else "x"
                if any(".." in place.split("/") for place in places) or gone in ("", ".", ".."):
                    raise AnchorError(f"{which}: {printable(entry.name)} leads out of the image", "do not use it")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise AnchorError(f"{which}: is no tar archive: {reason}", "publish the image again") from None
    return size


def facts(container: Container, reference: str) -> dict[str, Any]:
    """Return what a report says of where a tree came from."""
    return {
        "container": reference,
        "container_digest": container.digest,
        "container_config": container.identity,
        "platform": container.platform,
        "labels": {
            key: value for key, value in sorted(container.labels.items()) if key.startswith("org.opencontainers.image.")
        },
    }
