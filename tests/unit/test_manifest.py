"""manifest.py: what is accepted and refused, and and which times count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError, UsageError
from anchor_build.manifest import (
    MAX_BYTES,
    Manifest,
    manifest_text,
    parse_manifest,
    read_since,
    split_manifest,
)
from tests.conftest import TOP

VECTORS = json.loads((TOP / "tests/vectors/manifest.json").read_text(encoding="utf-8"))
MANIFEST = Manifest(
    image="squashfs",
    sha256="a" * 64,
    size=5,
    created=1700000000,
    format="erofs",
    file="node-1.erofs",
    unpacked=9,
    expires=1800000000,
    verity="b" * 64,
    mirrors=("https://a/b", "s3://c/d"),
    peers=("http://e/f",),
    kernels=("6.1.0", "6.2.0"),
    notes=(("x-note", "text"),),
)


@pytest.mark.parametrize("name", VECTORS["accept"])
def test_accepted(name: str) -> None:
    manifest = parse_manifest(VECTORS["accept"][name].encode())
    assert manifest.image == "squashfs"
    assert manifest.sha256 == "a" * 64


@pytest.mark.parametrize("reason", VECTORS["refuse"])
def test_refused(reason: str) -> None:
    for text in VECTORS["refuse"][reason]:
        with pytest.raises(AnchorError) as caught:
            parse_manifest(text.encode())
        assert caught.value.message == f"not a manifest: {reason}", text


def test_text_and_reading_are_inverse() -> None:
    text = manifest_text(MANIFEST)
    assert parse_manifest(text.encode()) == MANIFEST
    assert split_manifest(text.encode()) == (text.encode(), b"")


def test_what_would_be_refused_is_not_written() -> None:
    with pytest.raises(AnchorError, match="line 4: file is not a name"):
        manifest_text(Manifest("squashfs", "a" * 64, 5, 1, format="x", file="a/b"))


def test_a_manifest_has_a_largest_size() -> None:
    with pytest.raises(AnchorError, match=f"it has {MAX_BYTES + 1} bytes"):
        parse_manifest(b"x" * (MAX_BYTES + 1))


def test_since_is_a_time_or_a_manifest(tmp_path: Path) -> None:
    assert read_since("1700000000") == 1700000000
    assert read_since("2023-11-14T22:13:20Z") == 1700000000
    assert read_since("2023-11-14T22:13:20") == 1700000000
    assert read_since("2023-11-15T00:13:20+02:00") == 1700000000
    (tmp_path / "m").write_text(manifest_text(MANIFEST))
    assert read_since(str(tmp_path / "m")) == MANIFEST.created
    with pytest.raises(UsageError, match="neither a time nor the file of a manifest"):
        read_since("yesterday")


@pytest.mark.parametrize("text", ["1900", "2024", "1900-01-01", "0001-01-01T00:00:00+14:00", "2019-12-31T23:59:59"])
def test_since_is_not_before_there_were_manifests(text: str) -> None:
    with pytest.raises(UsageError, match="is before 2020-01-01"):
        read_since(text)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-14:00", "999999999999", "2999-01-01"])
def test_since_is_not_in_the_future(text: str) -> None:
    with pytest.raises(UsageError, match="lies in the future"):
        read_since(text)
