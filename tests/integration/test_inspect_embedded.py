"""inspect/embedded.py: container images of an initramfs, read out of real squashfs files, hostile ones among them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from anchor_build.inspect import embedded
from anchor_build.oci import NAME
from anchor_build.run import run

pytestmark = pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="needs mksquashfs and unsquashfs")


def layout(directory: Path, count: int) -> list[str]:
    """Make the part of an OCI layout that is read, of `count` images; return their digests."""
    (directory / "blobs/sha256").mkdir(parents=True)
    entries, digests = [], []
    for number in range(count):
        manifest = json.dumps({"config": {"size": 1}, "layers": [{"size": number}]}).encode()
        digests.append(hashlib.sha256(manifest).hexdigest())
        (directory / "blobs/sha256" / digests[-1]).write_bytes(manifest)
        entries.append({"digest": f"sha256:{digests[-1]}", "annotations": {NAME: f"registry.example/image{number}:1"}})
    (directory / "index.json").write_text(json.dumps({"manifests": entries}))
    return digests


def packed(directory: Path) -> bytes:
    """Return a squashfs of a directory."""
    file = directory.with_suffix(".squashfs")
    argv = ["mksquashfs", str(directory), str(file), "-quiet", "-no-progress", "-noappend"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return file.read_bytes()


def test_many_images_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    count = 2 * embedded.BATCH + 3
    digests = layout(tmp_path / "many", count)
    found, note = embedded.embedded_images(packed(tmp_path / "many"))
    assert note == "" and len(found) == count
    assert found[f"registry.example/image{count - 1}:1"] == {"digest": f"sha256:{digests[-1]}", "bytes": count}


def test_a_directory_of_files_in_the_place_of_a_manifest_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [digest, _] = layout(tmp_path / "bad", 2)
    place = tmp_path / "bad/blobs/sha256" / digest
    place.unlink()
    place.mkdir()
    for number in range(20):
        (place / str(number)).write_bytes(bytes(1000))
    unpacked: list[tuple[str, ...]] = []

    def watched(argv: list[str], **options: Any) -> object:
        unpacked.extend([tuple(argv)] if "-dest" in argv else [])
        return run(argv, **options)

    monkeypatch.setattr("anchor_build.inspect.embedded.run", watched)
    found, note = embedded.embedded_images(packed(tmp_path / "bad"))
    assert found == {} and "no OCI layout" in note
    assert [argv[-1] for argv in unpacked] == ["index.json"]
