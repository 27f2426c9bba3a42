"""The container images inside an initramfs: the squashfs that embed.py packed, read without unpacking any layer."""

from __future__ import annotations

import json
import re
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.oci import DIGEST, DOCUMENT_MAX, NAME, read_blob
from anchor_build.run import run, which

LIMIT_S = 60
IMAGES_MAX = 1000
MODE = re.compile(r"[a-zA-Z-][rwxsStTl-]{9} ")  # how unsquashfs begins the line of an entry
LEADING = ("", "blobs", "blobs/sha256")  # the directories that it lists, too
BATCH = 8  # manifests that are unpacked at a time, each of DOCUMENT_MAX bytes at most


def embedded_images(content: bytes) -> tuple[dict[str, dict[str, Any]], str]:
    """Return digest and bytes (of configuration and layers) of each image by its name, and a note where that failed.

    The digest is that of the image's manifest, whatever its name led to when it was embedded.
    """
    if which("unsquashfs") is None:
        return {}, "its container images are not listed: unsquashfs (squashfs-tools) is not installed"
    try:
        with tempfile.TemporaryDirectory(prefix="anchor-inspect-") as name:
            work = Path(name)
            (work / "images").write_bytes(content)
            _extract(work, "index.json")
            index = work / "layout/index.json"
            if index.is_symlink() or not index.is_file():
                raise KeyError("index.json")
            entries = json.loads(index.read_bytes())["manifests"][:IMAGES_MAX]
            digests = [str(entry["digest"]) for entry in entries]
            if not all(DIGEST.fullmatch(digest) for digest in digests):
                raise KeyError("digest")
            (work / "layout").rename(work / "index")
            found: dict[str, dict[str, Any]] = {}
            for start in range(0, len(entries), BATCH):
                found |= _manifests(work, entries[start : start + BATCH])
            return found, ""
    except (AnchorError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return {}, "its container images cannot be read: what is there is no OCI layout in a squashfs"


def _manifests(work: Path, entries: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Return what the manifests of these entries of the index say; what was unpacked for that is gone then."""
    names = [str(entry["digest"]).removeprefix("sha256:") for entry in entries]
    _extract(work, *(f"blobs/sha256/{name}" for name in names))
    found = {}
    for entry, name in zip(entries, names, strict=True):
        # To read a pipe or a device would never end.
        if not stat.S_ISREG((work / "layout/blobs/sha256" / name).lstat().st_mode):
            raise KeyError(name)
        manifest = read_blob(work / "layout", entry["digest"], "")
        size = sum(int(part["size"]) for part in (manifest["config"], *manifest["layers"]))
        if not 0 <= size < 1 << 63:
            raise ValueError(size)
        found[str(entry["annotations"][NAME])] = {"digest": str(entry["digest"]), "bytes": size}
    shutil.rmtree(work / "layout")
    return found


def _extract(work: Path, *names: str) -> None:
    """Take files out of the squashfs into work/layout, bounded: whoever made it may have meant harm.

    Each has DOCUMENT_MAX bytes at most, and there are no more of them than `names`: what has such a name could be a
    directory of many.
    """
    run(["unsquashfs", "-lls", "images", *names], cwd=work, log=work / "list", timeout=LIMIT_S, file_limit=DOCUMENT_MAX)
    listed = (work / "list").read_text(encoding="utf-8", errors="replace").splitlines()
    if sum(bool(MODE.match(line)) for line in listed) > len(names) + len(LEADING):
        raise AnchorError("it has more files than it should have")
    argv: Sequence[str] = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", "layout", "images", *names]
    try:
        run(argv, cwd=work, timeout=LIMIT_S, file_limit=DOCUMENT_MAX)
    except ProcessError as error:
        raise AnchorError(error.tail) from None
