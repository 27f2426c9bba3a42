"""oci.py, container.py and publish_oci.py: references, targets, and what tools of containers say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_build.container import find_source
from anchor_build.embed import LARGE_BYTES, size_warning
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import sha256
from anchor_build.oci import (
    MissingError,
    Reference,
    add_blob,
    check_platform,
    entry_named,
    explained,
    parse_reference,
    read_blob,
    write_layout,
)
from anchor_build.publish_oci import is_registry, parse_annotations, parse_target

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "found", "source"),
    [
        ("a.example/x", Reference("a.example", "x", "latest"), "docker://a.example/x:latest"),
        (
            "docker://a.example:5000/x/y-z:1",
            Reference("a.example:5000", "x/y-z", "1"),
            "docker://a.example:5000/x/y-z:1",
        ),
        (f"a.example/x@{DIGEST}", Reference("a.example", "x", "", DIGEST), f"docker://a.example/x@{DIGEST}"),
        (f"[::1]:5000/x:1@{DIGEST}", Reference("[::1]:5000", "x", "1", DIGEST), f"docker://[::1]:5000/x@{DIGEST}"),
        ("http://localhost/x:1", Reference("localhost", "x", "1", "", True), "docker://localhost/x:1"),
    ],
)
def test_references_are_read(text: str, found: Reference, source: str) -> None:
    assert parse_reference(text, "x") == found
    assert found.source == source
    assert parse_reference(str(found), "x") == found


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("node", "has no registry"),
        ("library/node:1", "has no registry"),
        ("docker://library/node", "has no registry"),
        ("user:pass@a.example/x", "has a user"),
        ("-a.example/x", "is not HOST"),
        ("a.example:/x", "is not HOST"),
        ("a.example/../x", "its name is none"),
        ("a.example/x/", "its name is none"),
        ("a.example/X", "its name is none"),
        ("a.example/x;reboot", "its name is none"),
        ("a.example/x:", "its tag is none"),
        ("a.example/x:a b", "its tag is none"),
        ("a.example/x:" + "t" * 129, "its tag is none"),
        ("a.example/x@sha256:12", "its digest is not"),
        ("a.example/x@md5:" + "0" * 32, "its digest is not"),
    ],
)
def test_what_is_no_reference_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_reference(text, "--from x")


def test_a_target_has_a_tag_and_no_digest() -> None:
    assert is_registry("oci://a.example/x:1") and not is_registry("s3://a/b") and not is_registry("/srv/oci:")
    assert parse_target("oci://a.example/x:1") == Reference("a.example", "x", "1")
    assert parse_target("oci+http://a.example/x:latest").plain
    for text in ("oci://a.example/x", f"oci://a.example/x@{DIGEST}", f"oci://a.example/x:1@{DIGEST}"):
        with pytest.raises(UsageError, match="needs a tag"):
            parse_target(text)


def test_annotations_without_a_dot_are_those_of_the_specification() -> None:
    found = parse_annotations(["version=1=2", "org.example.ticket=OPS-1"])
    assert found == {"org.opencontainers.image.version": "1=2", "org.example.ticket": "OPS-1"}
    for text in ("version", "=1", "a b=1", "version=\x1b[31m"):
        with pytest.raises(UsageError, match="is not KEY=VALUE"):
            parse_annotations([text])


def test_platforms_are_words_of_oci() -> None:
    assert check_platform("linux/arm/v7") == "linux/arm/v7"
    assert check_platform("").startswith("linux/")
    for text in ("arm64", "linux/", "linux/arm64/v8/x", "--all/x"):
        with pytest.raises(UsageError, match="is not OS/ARCHITECTURE"):
            check_platform(text)


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("pinging container registry x: dial tcp 127.0.0.1:9: connect: connection refused", "the registry up?"),
        ("dial tcp: lookup nohost.invalid: no such host", "the registry up?"),
        ("checking whether a blob exists: unauthorized: authentication required", "skopeo login"),
        ("denied: requested access to the resource is denied", "may this user"),
        ("x509: certificate signed by unknown authority", "--registry-ca"),
        ("x509: certificate is valid for a, not b", "belong to this name"),
        ("remote error: tls: bad certificate", "--registry-cert"),
        ("server gave HTTP response to HTTPS client", "plain http"),
        ("uploading manifest: unsupported: The operation is unsupported", "read-only"),
        (
            "denied: adding 5.0 MiB of storage, which will exceed the configured upper limit of 10 MiB",
            "make some there",
        ),
        ("writing blob: StatusCode: 413 <html>", "make some there"),
        ("no image found in image index for architecture s390x", "--platform"),
        ("write /x: no space left on device", "make room"),
        ("Source image rejected: Running image is rejected by policy.", "policy.json"),
    ],
)
def test_what_a_registry_says_comes_with_what_to_do(said: str, hint: str) -> None:
    error = explained("--to x", f'time="2026" level=info msg="x"\ntime="2026" level=fatal msg="{said}"\n')
    assert error.message == f"--to x: {said}" and hint in error.hint


def test_a_registry_that_breaks_off_is_not_away_and_its_urls_keep_their_secrets() -> None:
    url = "http://r:5000/v2/x/blobs/uploads/1"
    error = explained("x", f'level=fatal msg="writing blob: Patch \\"{url}?_state=SECRET\\": write: broken pipe"')
    assert error.message == f'x: writing blob: Patch "{url}": write: broken pipe'
    assert "is there room in its storage?" in error.hint


@pytest.mark.parametrize(
    "said", ["name unknown: x", "unknown: repository nodes/x not found", "artifact x:v1 not found"]
)
def test_registries_have_several_ways_to_say_that_there_is_none(said: str) -> None:
    assert isinstance(explained("x", f'level=fatal msg="{said}"'), MissingError)
    assert not isinstance(explained("x", 'level=fatal msg="executable file not found"'), MissingError)


def test_an_image_that_is_not_there_is_told_apart() -> None:
    text = 'level=fatal msg="reading manifest v1 in \\"x\\": manifest unknown\\nx\x1b[31m"'
    assert isinstance(explained("x", text), MissingError)
    assert explained("x", text).message == 'x: reading manifest v1 in "x": manifest unknown x\\x1b[31m'


def test_a_layout_gives_what_was_put_in(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    linked = add_blob(tmp_path / "layout", tmp_path / "file", sha256(b"content"))
    assert linked == {"digest": f"sha256:{sha256(b'content')}", "size": 7}
    entry = add_blob(tmp_path / "layout", b'{"a": 1}')
    write_layout(tmp_path / "layout", {"one": entry})
    assert entry_named(tmp_path / "layout", "one", "x")["digest"] == entry["digest"]
    assert read_blob(tmp_path / "layout", entry["digest"], "x") == {"a": 1}
    blob = tmp_path / "layout/blobs/sha256" / entry["digest"][7:]
    blob.write_text(json.dumps({"a": 2}))
    for digest in (entry["digest"], "sha256:../../x", "md5:1"):
        with pytest.raises(AnchorError):
            read_blob(tmp_path / "layout", digest, "x")
    with pytest.raises(AnchorError, match="was not fetched"):
        entry_named(tmp_path / "layout", "two", "x")


def test_sources_keep_away_from_registries_that_nobody_named(tmp_path: Path) -> None:
    (tmp_path / "node:1").mkdir()
    (tmp_path / "node:1/index.json").write_text("{}")
    assert find_source(str(tmp_path / "node:1"), "x", tmp_path) == ("oci:source", False)
    assert find_source("containers-storage:localhost/x", "x", tmp_path) == ("containers-storage:localhost/x", False)
    assert find_source(f"http://a.example/x@{DIGEST}", "x", tmp_path) == (f"docker://a.example/x@{DIGEST}", True)
    for text in ("node", "library/node", "docker://library/node", "/gone", "./gone"):
        with pytest.raises(AnchorError, match="no such file or directory"):
            find_source(text, "x", tmp_path)
    with pytest.raises(AnchorError, match="nothing protects http://"):
        find_source("http://a.example/x:1", "x", tmp_path)


def test_large_images_give_a_warning() -> None:
    assert size_warning(LARGE_BYTES) == ""
    assert "100 MB" in size_warning(LARGE_BYTES + 1)
