"""Puts an image and its manifest where nodes fetch them: the image first, the manifest last, so none sees half of it.

The image goes under a name with its digest in it, so that a node that has the manifest of yesterday still finds the
image of yesterday. For S3 the client is curl, which every builder has, signs requests itself (SigV4, since 7.75), and
takes the secrets from standard input; a library of a cloud's own would be a hundred times the size.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from anchor_build.console import Step
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import beside, disk_errors, file_digest
from anchor_build.manifest import SUFFIX, Manifest, PublicKey, read_manifest, split_manifest, verify_signature
from anchor_build.run import run

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9._/-]*))?")
# The largest object of one PUT request (docs: Amazon S3, "Uploading objects"); multipart uploads are not made here.
S3_MAX_BYTES = 5 * 2**30
STALL_S = 60
HINTS = {
    "NoSuchBucket": "make the bucket first",
    "SignatureDoesNotMatch": "is the secret key right, and the clock of this host?",
    "InvalidAccessKeyId": "is the access key right?",
    "AccessDenied": "may these credentials write there? (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "AuthorizationHeaderMalformed": "name the service's region: --region",
    "RequestTimeTooSkewed": "set the clock of this host",
}


class Target(Protocol):
    """Somewhere to publish."""

    def has(self, name: str, path: Path, sha256: str) -> bool:
        """Whether a file with this content is there already."""

    def put(self, name: str, path: Path, sha256: str) -> None:
        """Put a file there, whole or not at all."""


@dataclass(frozen=True)
class Directory:
    """A directory, which a web server or NFS may show."""

    path: Path

    def has(self, name: str, path: Path, sha256: str) -> bool:
        """Compare sizes, then digests."""
        there = self.path / name
        return there.is_file() and there.stat().st_size == path.stat().st_size and file_digest(there) == sha256

    def put(self, name: str, path: Path, sha256: str) -> None:
        """Copy beside, verify what was written, and rename."""
        with beside(self.path / name) as partial:
            shutil.copyfile(path, partial)
            if file_digest(partial) != sha256:
                raise AnchorError(f"{self.path / name}: was not copied as it is", "did something change it meanwhile?")
            partial.chmod(0o644)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.path / name)


@dataclass(frozen=True)
class Credentials:
    """What S3 requests are signed with."""

    access_key: str
    secret_key: str
    token: str = ""


@dataclass(frozen=True)
class Bucket:
    """A bucket of an S3 service and a prefix in it, empty or ending in a slash; `base` is the bucket's URL."""

    base: str
    prefix: str
    region: str
    credentials: Credentials
    ca: Path | None = None

    def has(self, name: str, path: Path, sha256: str) -> bool:
        """Ask for the object's size and the digest that `put` left with it."""
        status, headers, _ = self._request(name, "--head")
        if status == 404:
            return False
        if status != 200:
            # An answer to HEAD has no body that would say why.
            status, _, body = self._request(name)
            raise _s3_error(f"{self.base}/{self.prefix}{name}", status, body)
        return headers.get("content-length") == str(path.stat().st_size) and headers.get("x-amz-meta-sha256") == sha256

    def put(self, name: str, path: Path, sha256: str) -> None:
        """Upload; the service checks the digest, which is part of the signature."""
        options = ["--upload-file", str(path), "--header", f"x-amz-meta-sha256: {sha256}"]
        status, _, body = self._request(name, *options, payload=sha256)
        if status != 200:
            raise _s3_error(f"{self.base}/{self.prefix}{name}", status, body)
        if not self.has(name, path, sha256):
            raise AnchorError(f"{self.base}/{self.prefix}{name}: is not there as it was uploaded")

    def _request(
        self, name: str, *options: str, payload: str = "UNSIGNED-PAYLOAD"
    ) -> tuple[int, Mapping[str, str], str]:
        """Return status, headers (lower case) and body. Raises AnchorError without an answer."""
        url = f"{self.base}/{self.prefix}{name}"
        with tempfile.TemporaryDirectory(prefix="anchor-publish-") as top:
            head, body = Path(top, "head"), Path(top, "body")
            argv = ["curl", "--disable", "--silent", "--show-error", "--config", "-", "--path-as-is", "--globoff"]
            argv += ["--aws-sigv4", f"aws:amz:{self.region}:s3", "--header", f"x-amz-content-sha256: {payload}"]
            argv += ["--dump-header", str(head), "--output", str(body), "--write-out", "%{http_code}"]
            argv += ["--connect-timeout", "20", "--speed-limit", "1", "--speed-time", str(STALL_S)]
            argv += ["--retry", "4", "--retry-connrefused"]
            argv += ["--cacert", str(self.ca)] if self.ca else []
            done = run([*argv, *options, url], input_text=self._secrets(), check=False)
            if done.status != 0:
                raise AnchorError(f"{url}: {done.stderr.strip()[-500:] or f'curl ended with status {done.status}'}")
            lines = head.read_text("latin-1").splitlines()
            pairs = (line.partition(":") for line in lines)
            headers = {key.strip().lower(): value.strip() for key, colon, value in pairs if colon}
            text = body.read_text("utf-8", errors="replace") if body.exists() else ""
        return int(done.stdout[-3:]), headers, text

    def _secrets(self) -> str:
        keys = self.credentials
        lines = [f'user = "{_quoted(keys.access_key)}:{_quoted(keys.secret_key)}"']
        lines += [f'header = "x-amz-security-token: {_quoted(keys.token)}"'] if keys.token else []
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _s3_error(url: str, status: int, body: str) -> AnchorError:
    code, message = (
        found[1] if (found := re.search(rf"<{tag}>([^<]{{1,300}})</{tag}>", body)) else ""
        for tag in ("Code", "Message")
    )
    told = ": ".join(filter(None, (f"{url}: the service answered {status}", code, message)))
    return AnchorError(told, HINTS.get(code, ""))


def find_target(to: str, *, endpoint: str = "", region: str = "", ca: Path | None = None) -> Target:
    """Return where `to` leads: s3://BUCKET/PREFIX, or an existing directory.

    An S3 endpoint, region and credentials come from the arguments, or from where every S3 client takes them: the
    environment's AWS_... variables and ~/.aws/credentials. Raises UsageError and AnchorError.
    """
    if not to.startswith("s3://"):
        if "://" in to:
            raise UsageError(f"--to {to}: is neither s3://BUCKET/PREFIX nor a directory")
        if not Path(to).is_dir():
            raise AnchorError(f"--to {to}: is not a directory", "make it first")
        return Directory(Path(to))
    match = S3_URL.fullmatch(to)
    if match is None:
        raise UsageError(
            f"--to {to}: is not s3://BUCKET/PREFIX",
            "a prefix has letters, digits, dots, dashes, underscores and slashes",
        )
    bucket, prefix = match[1], (match[2] or "").strip("/")
    env = os.environ
    where = region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
    service = (endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "").rstrip("/")
    if service and not re.fullmatch(r"https?://[^/\s]+", service):
        raise UsageError(f"--endpoint {service}: is not a URL such as https://HOST:PORT")
    base = f"{service}/{bucket}" if service else f"https://{bucket}.s3.{where}.amazonaws.com"
    return Bucket(base, f"{prefix}/" if prefix else "", where, find_credentials(env), ca)


def find_credentials(env: Mapping[str, str]) -> Credentials:
    """Return credentials from the environment or the shared credentials file; raises AnchorError without any."""
    key, secret = env.get("AWS_ACCESS_KEY_ID", ""), env.get("AWS_SECRET_ACCESS_KEY", "")
    found = Credentials(key, secret, env.get("AWS_SESSION_TOKEN", ""))
    file = Path(env.get("AWS_SHARED_CREDENTIALS_FILE") or Path(env.get("HOME", "/root")) / ".aws" / "credentials")
    profile = env.get("AWS_PROFILE") or "default"
    if not (key and secret) and file.is_file():
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            raise AnchorError(f"{file}: cannot be read as a file of credentials") from None
        if parser.has_section(profile):
            values = parser[profile]
            names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
            found = Credentials(*(values.get(name, "") for name in names))
    if not (found.access_key and found.secret_key):
        raise AnchorError(
            f"no S3 credentials: neither AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY nor {file} [{profile}]",
            "set them in the environment, or name another profile with AWS_PROFILE",
        )
    if any(not text.isprintable() for text in (found.access_key, found.secret_key, found.token)):
        raise AnchorError("the S3 credentials hold a control character")
    return found


def publish(image: Path, to: str, target: Target, keys: Sequence[PublicKey], step: Step) -> dict[str, Any]:
    """Verify an image and its manifest, then publish them; return a report. What is there already is left alone.

    Raises AnchorError when the two do not belong together, the signature is not by one of `keys`, the manifest has
    expired, or the target refuses.
    """
    if isinstance(target, Bucket) and image.is_file() and image.stat().st_size > S3_MAX_BYTES:
        raise AnchorError(
            f"{image}: has {image.stat().st_size / 2**30:.1f} GiB, and S3 takes 5 GiB in one request",
            "publish into a directory and upload that with a client that does multipart uploads",
        )
    manifest_file = image.with_name(image.name + SUFFIX)
    with step("verify the image, its manifest and the signature"), disk_errors():
        manifest, sha256 = _verified(image, manifest_file, keys)
    report: dict[str, Any] = {"to": to, "signed_by": None, "files": []}
    _, data = read_manifest(manifest_file)
    if keys:
        report["signed_by"] = verify_signature(data, keys).fingerprint
    files = [
        (manifest.file or image.name, image, sha256),
        (manifest_file.name, manifest_file, file_digest(manifest_file)),
    ]
    for name, path, digest in files:
        started = time.monotonic()
        with step(f"publish {name}, {path.stat().st_size / 1e6:.1f} MB"), disk_errors():
            there = target.has(name, path, digest)
            if not there:
                target.put(name, path, digest)
        report["files"].append(
            {
                "name": name,
                "bytes": path.stat().st_size,
                "sha256": digest,
                "result": "was there" if there else "published",
                "seconds": round(time.monotonic() - started, 2),
            }
        )
    return report


def _verified(image: Path, manifest_file: Path, keys: Sequence[PublicKey]) -> tuple[Manifest, str]:
    if not image.is_file():
        raise AnchorError(f"{image}: there is no such file")
    manifest, data = read_manifest(manifest_file)
    sha256 = file_digest(image)
    if (sha256, image.stat().st_size) != (manifest.sha256, manifest.size):
        raise AnchorError(
            f"{image}: is not the image of {manifest_file}: its SHA-256 is {sha256}, expected {manifest.sha256}",
            "make them together: anchor-build image",
        )
    if keys:
        verify_signature(data, keys)
    elif split_manifest(data)[1]:
        raise AnchorError(
            f"{manifest_file}: is signed, and no key is given to verify it with",
            "name the public key that nodes have: --manifest-key FILE",
        )
    if manifest.expires is not None and manifest.expires <= time.time():
        raise AnchorError(
            f"{manifest_file}: has expired: no node would accept it",
            f"give it a later end: anchor-build image {image} --valid-for 30d",
        )
    return manifest, sha256
