"""`anchor-build publish`: into a directory, and into an S3 service that checks signatures."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from anchor_build.files import file_digest
from anchor_build.manifest import Manifest, manifest_text
from anchor_build.publish import S3_MAX_BYTES, Credentials, _curl_error, sign_request
from anchor_build.signing import open_key, sign_text
from contrib.site import pki, servers
from tests.integration.test_manifest_signing import make_key

# Credentials that no service knows.
ANY = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}


def run(*arguments: str | Path, **env: str) -> CompletedProcess[str]:
    """Run the command; no credentials but those in `env`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    argv = [sys.executable, "-m", "anchor_build", "publish", *map(str, arguments)]
    return subprocess.run(
        argv, env={**clean, "HOME": "/nonexistent", **env}, capture_output=True, text=True, timeout=100, check=False
    )


class Pair:
    """An image (random bytes) with a signed manifest."""

    def __init__(self, top: Path) -> None:
        self.key, self.public = make_key(top, "site")
        self.image = top / "node.squashfs"
        self.manifest = top / "node.squashfs.manifest"
        self.renew(os.urandom(300_000))

    def renew(self, data: bytes, expires: int = 4_000_000_000, created: int = 1_700_000_000) -> None:
        """Make the image anew, and its manifest."""
        self.image.write_bytes(data)
        sha256 = file_digest(self.image)
        self.name = f"node-{sha256[:12]}.squashfs"
        manifest = Manifest(
            image="squashfs", sha256=sha256, file=self.name, size=len(data), created=created, expires=expires
        )
        self.manifest.write_text(sign_text(manifest_text(manifest), open_key(self.key)))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    (tmp_path / "made").mkdir()
    return Pair(tmp_path / "made")


def test_a_directory_gets_image_and_manifest_once(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "www"
    target.mkdir()
    arguments = (pair.image, "--to", target, "--manifest-key", pair.public, "--json")
    for result in ("published", "was there"):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert [file["result"] for file in report["files"]] == [result, result]
        assert [file["name"] for file in report["files"]] == [pair.name, "node.squashfs.manifest"]
        assert len(report["signed_by"]) == 64
    assert sorted(path.name for path in target.iterdir()) == [pair.name, "node.squashfs.manifest"]
    assert (target / pair.name).read_bytes() == pair.image.read_bytes()
    assert (target / pair.name).stat().st_mode & 0o777 == 0o644
    first = pair.name
    pair.renew(os.urandom(1000))
    assert run(*arguments).returncode == 0
    assert (target / first).exists(), "a node with the old manifest still finds its image"
    assert (target / "node.squashfs.manifest").read_bytes() == pair.manifest.read_bytes()


def test_events_do_not_go_to_what_is_published(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    for name in (pair.name, "node.squashfs.manifest"):
        events = tmp_path / "www" / name
        options = ["--to", str(tmp_path / "www"), "--manifest-key", str(pair.public)]
        argv = [sys.executable, "-m", "anchor_build", "--events", str(events), "publish", str(pair.image), *options]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
        assert (done.returncode, f"--events: {events} is what this command makes" in done.stderr) == (2, True), (
            done.stderr
        )
        assert json.loads(events.read_text().splitlines()[-1])["event"] == "failed"
        events.unlink()


def test_a_damaged_copy_is_replaced(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / pair.name).write_bytes(b"half")
    done = run(pair.image, "--to", tmp_path, "--manifest-key", pair.public)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / pair.name).read_bytes() == pair.image.read_bytes()


def test_a_newer_manifest_is_not_replaced(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "www"
    target.mkdir()
    there = target / pair.manifest.name
    arguments = (pair.image, "--to", target, "--manifest-key", pair.public)
    old = pair.image.read_bytes()
    pair.renew(os.urandom(1000), created=1_700_000_001)
    assert run(*arguments).returncode == 0
    newer = there.read_bytes()
    pair.renew(old)
    done = run(*arguments)
    assert done.returncode == 1
    assert "node.squashfs.manifest is there already, and newer: of 2023-11-14 22:13:21 UTC" in done.stderr
    assert "make it the newest" in done.stderr
    assert there.read_bytes() == newer
    assert not (target / pair.name).exists()
    # What no node would believe stands in nobody's way.
    for text in (newer.replace(b"created 17", b"created 99"), newer[:50], b"", b"\xff" * 70000):
        there.write_bytes(text)
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert there.read_bytes() == pair.manifest.read_bytes()


def test_a_place_that_is_taken_is_told(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / pair.manifest.name).mkdir()
    done = run(pair.image, "--to", tmp_path, "--manifest-key", pair.public)
    assert (done.returncode, "Is a directory" in done.stderr) == (1, True), done.stderr


def test_nothing_is_published_that_a_node_would_refuse(pair: Pair, tmp_path: Path) -> None:
    target = tmp_path / "www"
    target.mkdir()
    good = pair.image.read_bytes()

    def refused(*words: str, keys: tuple[str | Path, ...] = ("--manifest-key", pair.public)) -> None:
        done = run(pair.image, "--to", target, *keys)
        assert done.returncode == 1, done.stdout
        for word in words:
            assert word in done.stderr
        assert list(target.iterdir()) == []

    pair.image.write_bytes(good[:-1])
    refused("is not the image of", "expected")
    pair.renew(good)
    refused("is signed, and no key is given", "--manifest-key", keys=())
    refused("none of the given keys signed", keys=("--manifest-key", make_key(tmp_path, "other")[1]))
    pair.manifest.write_text(pair.manifest.read_text().replace("created 17", "created 18"))
    refused("none of the given keys signed")
    pair.renew(good, expires=1700000001)
    refused("has expired", "--valid-for")
    pair.manifest.unlink()
    refused("node.squashfs.manifest: No such file")
    done = run(pair.image, "--to", tmp_path / "away")
    assert done.returncode == 1
    assert "is not a directory" in done.stderr
    for to, word in (
        (("https://x/",), "nor oci://REGISTRY/NAME:TAG"),
        (("",), "--to: is empty"),
        ((target, "--endpoint", "https://x"), "belong to s3://"),
    ):
        done = run(pair.image, "--to", *to)
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
    for options in (
        ("--to", "s3://Bad_Bucket/x"),
        ("--to", "s3://images", "--region", "a\nb"),
        ("--to", "s3://images", "--endpoint", "https://user@host"),
    ):
        done = run(pair.image, *options, **ANY)
        assert (done.returncode, "is not" in done.stderr) == (2, True), done.stderr


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3]:
    if not Path("/usr/lib/python3/dist-packages/swift").is_dir():
        pytest.skip("needs OpenStack Swift, Debian's python3-swift; other distributions have none")
    directory = tmp_path_factory.mktemp("s3")
    authority = pki.make_authority(directory / "ca")
    leaf = pki.issue(authority, directory / "ca", "localhost")
    with servers.swift_s3(directory / "swift", leaf=leaf, ca=authority.certificate) as service:
        service.make_bucket("images")
        yield service


def requests(s3: servers.S3) -> list[str]:
    """Return method and path of the requests since the last call."""
    text = s3.access_log.read_text()
    s3.access_log.write_text("")
    return re.findall(r'"([A-Z]+ \S+) HTTP/1.1"', text)


def test_s3_gets_the_image_first_and_the_manifest_last(s3: servers.S3, pair: Pair, tmp_path: Path) -> None:
    assert s3.ca is not None
    arguments = (pair.image, "--to", "s3://images/el/9/", "--endpoint", s3.endpoint, "--region", s3.region)
    options = ("--ca", s3.ca, "--manifest-key", pair.public, "--json")
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    requests(s3)
    done = run(*arguments, *options, **keys)
    assert done.returncode == 0, done.stderr
    made = requests(s3)
    assert [line for line in made if line.startswith("PUT")] == [
        f"PUT /images/el/9/{pair.name}",
        "PUT /images/el/9/node.squashfs.manifest",
    ]
    # The same again, with the credentials of a profile: nothing is sent twice.
    (tmp_path / "credentials").write_text(
        f"[site]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    again = run(*arguments, *options, AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials"), AWS_PROFILE="site")
    assert [file["result"] for file in json.loads(again.stdout)["files"]] == ["was there", "was there"], again.stderr
    assert not [line for line in requests(s3) if line.startswith("PUT")]
    for secret in (s3.secret_key, s3.access_key):
        assert secret not in done.stdout + done.stderr
    # The signature is of the path as it is sent.
    for name in ("n:1@x", "n+1@x"):
        (tmp_path / f"{name}.manifest").write_bytes(pair.manifest.read_bytes())
        (tmp_path / name).write_bytes(pair.image.read_bytes())
    done = run(tmp_path / "n:1@x", *arguments[1:], *options, **keys)
    assert done.returncode == 0, done.stderr
    assert [line for line in requests(s3) if line.startswith("PUT")] == ["PUT /images/el/9/n%3A1%40x.manifest"]
    done = run(tmp_path / "n+1@x", *arguments[1:], *options, **keys)
    assert (done.returncode, "written differently in a URL" in done.stderr, requests(s3)) == (1, True, [])
    (tmp_path / "www").mkdir()
    assert run(tmp_path / "n+1@x", "--to", tmp_path / "www", "--manifest-key", pair.public).returncode == 0


def test_s3_keeps_a_newer_manifest(s3: servers.S3, pair: Pair) -> None:
    arguments = (pair.image, "--to", "s3://images/kept", "--endpoint", s3.endpoint, "--region", s3.region)
    options = ("--ca", str(s3.ca), "--manifest-key", pair.public)
    keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
    old = pair.image.read_bytes()
    pair.renew(os.urandom(1000), created=1_700_000_001)
    assert run(*arguments, *options, **keys).returncode == 0
    pair.renew(old)
    requests(s3)
    done = run(*arguments, *options, **keys)
    assert (done.returncode, "is there already, and newer" in done.stderr) == (1, True), done.stderr
    assert not [line for line in requests(s3) if line.startswith("PUT")]


def test_a_signature_is_that_of_the_documents() -> None:
    """The example "PUT Object" of Amazon's documents, with its headers; the path has nothing that needs escaping."""
    keys = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    headers = {
        "date": "Fri, 24 May 2013 00:00:00 GMT",
        "x-amz-content-sha256": "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
        "x-amz-storage-class": "REDUCED_REDUNDANCY",
    }
    url = "https://examplebucket.s3.amazonaws.com/test%24file.text"
    signed = sign_request("PUT", url, headers, "us-east-1", keys, datetime(2013, 5, 24, tzinfo=UTC))
    assert signed["authorization"].endswith(
        "SignedHeaders=date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, "
        "Signature=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
    )


@pytest.mark.parametrize(
    ("bucket", "secret", "words"),
    [
        ("absent", "", ("404", "NoSuchBucket", "make the bucket first")),
        ("images", "wrong", ("403", "SignatureDoesNotMatch", "is the secret key right")),
    ],
)
def test_what_the_service_refuses_is_told(
    s3: servers.S3, pair: Pair, bucket: str, secret: str, words: tuple[str, ...]
) -> None:
    done = run(
        *(pair.image, "--to", f"s3://{bucket}/x", "--endpoint", s3.endpoint, "--region", s3.region),
        *("--ca", str(s3.ca), "--manifest-key", pair.public),
        AWS_ACCESS_KEY_ID=s3.access_key,
        AWS_SECRET_ACCESS_KEY=secret or s3.secret_key,
    )
    assert done.returncode == 1, done.stdout
    for word in words:
        assert word in done.stderr


def test_an_untrusted_service_and_missing_credentials_are_told(s3: servers.S3, pair: Pair) -> None:
    arguments = (pair.image, "--to", "s3://images", "--endpoint", s3.endpoint, "--manifest-key", pair.public)
    done = run(*arguments)
    assert done.returncode == 1
    assert "no S3 credentials" in done.stderr
    assert "AWS_PROFILE" in done.stderr
    done = run(*arguments, **ANY)
    [error, hint] = done.stderr.splitlines()[-2:]
    assert (done.returncode, error.startswith(f"error: {s3.endpoint}/images/"), "certificate" in error) == (
        1,
        True,
        True,
    )
    assert hint == "hint: name the CA that its certificate is from: --ca FILE"


def test_a_service_that_is_away_is_told_once() -> None:
    """As curl 7.88 does, which tries again and says the same each time, 15 s in all."""
    said = "curl: (7) Failed to connect to 127.0.0.1 port 9 after 0 ms: Couldn't connect to server\n" * 5
    error = _curl_error("http://127.0.0.1:9/b/x", 7, said)
    assert error.message == (
        "http://127.0.0.1:9/b/x: Failed to connect to 127.0.0.1 port 9 after 0 ms: Couldn't connect to server"
    )
    assert error.hint == "is the service running there, and is --endpoint right?"
    assert _curl_error("http://h/", 9, "").message == "http://h/: curl ended with status 9"


def test_what_curl_says_is_told() -> None:
    """As curl 7.88 says it of an option, and of a service that stops to read."""
    said = "curl: option --nonsense: is unknown\ncurl: try 'curl --help' for more information\n"
    assert _curl_error("http://h/", 2, said).message == f"http://h/: {said.strip()}"
    assert len(_curl_error("http://h/", 2, "x" * 9000).message) < 600
    slow = "curl: (28) Operation too slow. Less than 1 bytes/sec transferred the last 60 seconds\n"
    assert _curl_error("http://h/", 28, slow).hint.startswith("nothing went through for 60 s")
    late = "curl: (28) Failed to connect to h port 80 after 20000 ms: Timeout was reached\n"
    assert _curl_error("http://h/", 28, late).hint == "is the service running there, and is --endpoint right?"


def test_a_name_that_a_url_has_otherwise_is_refused(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    for name in ("my node.squashfs", "n%20.squashfs", "a,b", "knoten-\N{LATIN SMALL LETTER O WITH DIAERESIS}"):
        image, manifest = pair.image.with_name(name), pair.manifest.with_name(f"{name}.manifest")
        shutil.copy(pair.image, image)
        shutil.copy(pair.manifest, manifest)
        done = run(image, "--to", tmp_path / "www", "--manifest-key", pair.public)
        assert (done.returncode, "which has a character that is written differently in a URL" in done.stderr) == (
            1,
            True,
        )
        assert "hint: rename it, with its image" in done.stderr
    assert list((tmp_path / "www").iterdir()) == []


def test_an_image_that_one_request_cannot_hold_is_refused_at_once(pair: Pair) -> None:
    with pair.image.open("wb") as file:
        file.truncate(S3_MAX_BYTES + 1)
    done = run(
        *(pair.image, "--to", "s3://images", "--endpoint", "https://127.0.0.1:1", "--manifest-key", pair.public),
        **ANY,
    )
    assert done.returncode == 1
    assert "S3 takes 5 GiB in one request" in done.stderr
