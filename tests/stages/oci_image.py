"""Images for a registry, made entry by entry, and what a tree of files has: what the tests of image oci share."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrib.site.registry import CONFIG, MANIFEST, Registry

TAR = "application/vnd.oci.image.layer.v1.tar"


@dataclass
class Layer:
    """A tar archive in the making; the methods return it."""

    stream: io.BytesIO = field(default_factory=io.BytesIO)

    def add(self, name: str, content: bytes = b"", xattrs: dict[str, bytes] | None = None, **facts: Any) -> Layer:
        """Add an entry: a file, or what `facts`, attributes of a TarInfo, make of it."""
        entry = tarfile.TarInfo(name)
        entry.mtime = 1_600_000_000
        entry.size = len(content)
        entry.pax_headers = {
            f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in (xattrs or {}).items()
        }
        for key, value in facts.items():
            setattr(entry, key, value)
        blocks = entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        self.stream.write(blocks + content + bytes(-len(content) % 512))
        return self

    def directory(self, name: str, mode: int = 0o755, **facts: Any) -> Layer:
        """Add a directory."""
        return self.add(name, type=tarfile.DIRTYPE, mode=mode, **facts)

    def link(self, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Layer:
        """Add a symbolic link, or a hard link."""
        return self.add(name, type=kind, linkname=target)

    @property
    def tar(self) -> bytes:
        """The archive."""
        return self.stream.getvalue() + bytes(1024)


def compressed(tar: bytes, kind: str) -> bytes:
    """Return an archive as a layer's bytes: `kind` is empty, gzip or zstd."""
    if kind == "zstd":
        return subprocess.run(["zstd", "-q"], input=tar, capture_output=True, check=True, timeout=60).stdout
    return gzip.compress(tar, 1, mtime=0) if kind else tar


def config_of(tars: Sequence[bytes], architecture: str = "amd64") -> dict[str, Any]:
    """Return the configuration of an image."""
    diffs = [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]
    return {"os": "linux", "architecture": architecture, "config": {}, "rootfs": {"type": "layers", "diff_ids": diffs}}


def push(
    registry: Registry, name: str, layers: Sequence[Layer | bytes], kinds: Sequence[str] = ("gzip",), tag: str = "v1"
) -> str:
    """Push an image whose layers have the compressions `kinds` in turn; return its digest."""
    tars = [layer.tar if isinstance(layer, Layer) else layer for layer in layers]
    config = registry.put_blob(name, json.dumps(config_of(tars)).encode())
    blobs = []
    for number, tar in enumerate(tars):
        kind = kinds[number % len(kinds)]
        blob = registry.put_blob(name, compressed(tar, kind))
        blobs.append({"mediaType": f"{TAR}+{kind}" if kind else TAR, **blob})
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": {"mediaType": CONFIG, **config}, "layers": blobs}
    return registry.put_manifest(name, tag, document)


def unpacked_by_umoci(layers: Sequence[Layer], directory: Path) -> Path:
    """Unpack an image with umoci; return its root."""
    layout = directory / "layout"
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    tars = [layer.tar for layer in layers]
    config = {"mediaType": CONFIG, **blob(json.dumps(config_of(tars)).encode())}
    entries = [{"mediaType": f"{TAR}+gzip", **blob(compressed(tar, "gzip"))} for tar in tars]
    manifest = blob(json.dumps({"schemaVersion": 2, "config": config, "layers": entries}).encode())
    names = {"org.opencontainers.image.ref.name": "v1"}
    index = {"schemaVersion": 2, "manifests": [{"mediaType": MANIFEST, **manifest, "annotations": names}]}
    (layout / "index.json").write_text(json.dumps(index))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    bundle = directory / "bundle"
    argv = ["umoci", "unpack", "--image", f"{layout}:v1", str(bundle)]
    subprocess.run(argv, check=True, capture_output=True, timeout=120)
    return bundle / "rootfs"


def facts_of(root: str) -> dict[str, list[Any]]:
    """Return what each entry of a tree is: type and mode, owner, device, xattrs, content or target, links, time.

    The time is not a directory's: it tells when the tree was made. Links are the names of one inode.
    """
    inodes: dict[tuple[int, int], list[str]] = {}
    found: dict[str, list[Any]] = {}
    paths = [root]
    for top, directories, files in os.walk(root):
        paths += [f"{top}/{name}" for name in (*directories, *files)]
    for path in paths:
        name = os.path.relpath(path, root)
        status = os.lstat(path)
        xattrs = xattrs_of(path)
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = str(Path(path).readlink())
        kept = {key: value for key, value in xattrs.items() if not key.startswith("user.umoci.")}
        device = status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0
        time = 0 if stat.S_ISDIR(status.st_mode) else int(status.st_mtime)
        found[name] = [oct(status.st_mode), status.st_uid, status.st_gid, device, kept, content, time]
        if not stat.S_ISDIR(status.st_mode):
            inodes.setdefault((status.st_dev, status.st_ino), []).append(name)
    for names in inodes.values():
        for name in names:
            found[name].append(sorted(names))
    return found


def xattrs_of(path: str) -> dict[str, str]:
    """Return the extended attributes of a file; on a file system without any there are none."""
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return {}
    return {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}


def main() -> None:
    """Print the facts of the tree that is the only argument."""
    import sys

    sys.stdout.write(json.dumps(facts_of(sys.argv[1])))


if __name__ == "__main__":
    main()
