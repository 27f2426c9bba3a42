"""Puts an image and its manifest where nodes fetch them: the image first, the manifest last, so none sees half of it.

The image goes under a name with its digest in it, so that a node that has the manifest of yesterday still finds the
image of yesterday. For S3 the client is curl, which every builder has; a library of a cloud's own would be a hundred
times the size. Requests are signed here (SigV4): curl does so only since 7.87 in the way that S3 wants, and Enterprise
Linux 9 has 7.76.
"""

from __future__ import annotations

import configparser
import hashlib
import hmac
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

from anchor_build.console import Step
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import beside, disk_errors, file_digest, put_in_place
from anchor_build.image import image_format
from anchor_build.manifest import (
    MAX_BYTES,
    REGISTRY_STAGE,
    SUFFIX,
    Manifest,
    parse_manifest,
    read_manifest,
    split_manifest,
)
from anchor_build.run import run
from anchor_build.signing import PublicKey, verify_signature
from anchor_build.verity import has_tree, read_tree

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([A-Za-z0-9._/-]*))?")
# The largest object of one PUT request (docs: Amazon S3, "Uploading objects"); multipart uploads are not made here.
S3_MAX_BYTES = 5 * 2**30
STALL_S = 60
VERIFY = "verify the image, its manifest and the signature"
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
HINTS = {
    "NoSuchBucket": "make the bucket first",
    "SignatureDoesNotMatch": "is the secret key right, and the clock of this host?",
    "InvalidAccessKeyId": "is the access key right?",
    "AccessDenied": "may these credentials list the bucket, and read and write there? (AWS_ACCESS_KEY_ID, AWS_PROFILE)",
    "AuthorizationHeaderMalformed": "name the service's region: --region",
    "RequestTimeTooSkewed": "set the clock of this host",
}

_REACHED = "is the service running there, and is --endpoint right?"
_TRUSTED = "name the CA that its certificate is from: --ca FILE"
STALLED = f"nothing went through for {STALL_S} s: is the service alive, and the network to it?"
# By the status of curl (EXIT CODES in curl(1)).
CURL_HINTS = {
    6: _REACHED,
    7: _REACHED,
    28: _REACHED,
    35: "does it speak TLS there? (--endpoint)",
    60: _TRUSTED,
    77: _TRUSTED,
}
# What is written in the same way in a file's name, in a URL and on a kernel command line.
NAME = re.compile(r"[A-Za-z0-9._~+@:=-]+")


class Target(Protocol):
    """Somewhere to publish."""

    def has(self, name: str, path: Path, sha256: str) -> bool:
        """Whether a file with this content is there already."""

    def put(self, name: str, path: Path, sha256: str) -> None:
        """Put a file there, whole or not at all."""

    def read(self, name: str) -> bytes | None:
        """Return a manifest that is there, None where there is none."""


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
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            put_in_place(partial, self.path / name)

    def read(self, name: str) -> bytes | None:
        """Read it, up to a little more than a manifest may have."""
        try:
            with (self.path / name).open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError):
            return None


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
        status, headers, _ = self._request("HEAD", name, "--head")
        if status == 404:
            return False
        if status != 200:
            # An answer to HEAD has no body that would say why.
            status, _, body = self._request("GET", name)
            raise _s3_error(self._url(name), status, body)
        return headers.get("content-length") == str(path.stat().st_size) and headers.get("x-amz-meta-sha256") == sha256

    def put(self, name: str, path: Path, sha256: str) -> None:
        """Upload; the service checks the digest, which is part of the signature."""
        status, _, body = self._request("PUT", name, "--upload-file", str(path.absolute()), payload=sha256)
        if status != 200:
            raise _s3_error(self._url(name), status, body)
        if not self.has(name, path, sha256):
            raise AnchorError(f"{self._url(name)}: is not there as it was uploaded")

    def read(self, name: str) -> bytes | None:
        """Fetch it."""
        # 416: an empty object has no such range.
        status, _, body = self._request("GET", name, "--range", f"0-{MAX_BYTES}")
        if status not in (200, 206, 404, 416):
            raise _s3_error(self._url(name), status, body)
        return body.encode("utf-8", errors="replace") if status in (200, 206) else None

    def _url(self, name: str) -> str:
        # As the signature has it: nothing else is left as it is there.
        return f"{self.base}/{self.prefix}{quote(name, safe='')}"

    def _request(
        self, method: str, name: str, *options: str, payload: str = EMPTY_SHA256
    ) -> tuple[int, Mapping[str, str], str]:
        """Return status, headers (lower case) and body. Raises AnchorError without an answer."""
        url = self._url(name)
        headers = {"x-amz-content-sha256": payload}
        headers |= {"x-amz-meta-sha256": payload} if method == "PUT" else {}
        headers |= {"x-amz-security-token": self.credentials.token} if self.credentials.token else {}
        signed = sign_request(method, url, headers, self.region, self.credentials, datetime.now(UTC))
        with tempfile.TemporaryDirectory(prefix="anchor-publish-") as top:
            head, body = Path(top, "head"), Path(top, "body")
            argv = ["curl", "--disable", "--silent", "--show-error", "--config", "-", "--path-as-is", "--globoff"]
            argv += ["--dump-header", str(head), "--output", str(body), "--write-out", "%{http_code}"]
            argv += ["--connect-timeout", "20", "--speed-limit", "1", "--speed-time", str(STALL_S)]
            argv += ["--retry", "4", "--retry-connrefused"]
            argv += ["--cacert", str(self.ca)] if self.ca else []
            # Whoever sees the arguments of a process must not see what it may do.
            config = "".join(f'header = "{_quoted(key)}: {_quoted(value)}"\n' for key, value in signed.items())
            done = run([*argv, *options, url], input_text=config, check=False)
            if done.status != 0:
                raise _curl_error(url, done.status, done.stderr)
            lines = head.read_text("latin-1").splitlines()
            pairs = (line.partition(":") for line in lines)
            headers = {key.strip().lower(): value.strip() for key, colon, value in pairs if colon}
            text = body.read_text("utf-8", errors="replace") if body.exists() else ""
        return int(done.stdout[-3:]), headers, text


def sign_request(
    method: str, url: str, headers: Mapping[str, str], region: str, credentials: Credentials, now: datetime
) -> dict[str, str]:
    """Return the headers of a request, in lower case, with those that sign it: AWS Signature Version 4.

    `headers` are in lower case and have x-amz-content-sha256; the URL's path is as it is sent, without a query.
    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    """
    where = urlsplit(url)
    time_, scope = now.strftime("%Y%m%dT%H%M%SZ"), f"{now:%Y%m%d}/{region}/s3/aws4_request"
    # As curl sends it: the port stays away where it is the scheme's own.
    host = where.netloc.lower().removesuffix({"https": ":443", "http": ":80"}[where.scheme])
    signed = dict(sorted({**headers, "host": host, "x-amz-date": time_}.items()))
    names = ";".join(signed)
    lines = [method, where.path, "", *(f"{key}:{value}" for key, value in signed.items()), "", names]
    request = "\n".join([*lines, headers["x-amz-content-sha256"]])
    to_sign = f"AWS4-HMAC-SHA256\n{time_}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    secret = f"AWS4{credentials.secret_key}".encode()
    for word in (*scope.split("/"), to_sign):
        secret = hmac.digest(secret, word.encode(), "sha256")
    names = f"SignedHeaders={names}, Signature={secret.hex()}"
    signed["authorization"] = f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, {names}"
    return signed


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _curl_error(url: str, status: int, said: str) -> AnchorError:
    """Say why there was no answer, once: curl says so for each of its tries, and more about certificates."""
    reasons = re.findall(r"^curl: \(\d+\) (.+)$", said, re.MULTILINE)
    reason = reasons[-1] if reasons else said.strip()[-500:] or f"curl ended with status {status}"
    # The same status for who does not answer and for who stops to read.
    hint = STALLED if "Operation too slow" in reason else CURL_HINTS.get(status, "")
    return AnchorError(f"{url}: {reason}", hint)


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
        if not to:
            raise UsageError("--to: is empty")
        if "://" in to:
            raise UsageError(f"--to {to}: is neither a directory nor s3://BUCKET/PREFIX nor oci://REGISTRY/NAME:TAG")
        if endpoint or region or ca:
            raise UsageError("--endpoint, --region and --ca belong to s3://")
        if not Path(to).is_dir():
            raise AnchorError(f"--to {to}: is not a directory", "make it first")
        return Directory(Path(to))
    match = S3_URL.fullmatch(to)
    if match is None:
        raise UsageError(
            f"--to {to}: is not s3://BUCKET/PREFIX",
            "a bucket's name has 3 to 63 lower-case letters, digits, dots and dashes; a prefix letters, digits, dots,"
            " dashes, underscores and slashes",
        )
    bucket, prefix = match[1], (match[2] or "").strip("/")
    env = os.environ
    where = region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
    service = (endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "").rstrip("/")
    if service and not re.fullmatch(r"https?://[^/\s@]+", service):
        raise UsageError(f"--endpoint {service}: is not a URL such as https://HOST:PORT")
    if not re.fullmatch(r"[A-Za-z0-9-]+", where):
        raise UsageError(f"--region {where}: is not the name of a region such as us-east-1")
    if not service and "." in bucket:
        # The service's certificate is for one more name only.
        service = f"https://s3.{where}.amazonaws.com"
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


def publish(
    image: Path,
    to: str,
    target: Target,
    keys: Sequence[PublicKey],
    step: Step,
    refuse: Callable[[Sequence[Path]], None],
) -> dict[str, Any]:
    """Verify an image and its manifest, then publish them; return a report. What is there already is left alone.

    `image` may be the manifest of an image that is at a registry: then there is only that to publish. `refuse` is told
    which files this is going to write, and may raise.

    Raises AnchorError when the two do not belong together, the signature is not by one of `keys`, the manifest has
    expired, or the target refuses.
    """
    if isinstance(target, Bucket) and image.is_file() and image.stat().st_size > S3_MAX_BYTES:
        raise AnchorError(
            f"{image}: has {image.stat().st_size / 2**30:.1f} GiB, and S3 takes 5 GiB in one request",
            "publish into a directory and upload that with a client that does multipart uploads",
        )
    alone = image.name.endswith(SUFFIX)
    manifest_file = image if alone else image.with_name(image.name + SUFFIX)
    # AWS takes a plus in a URL's path for a blank: nodes would have to write %2B.
    if not NAME.fullmatch(manifest_file.name) or (isinstance(target, Bucket) and "+" in manifest_file.name):
        raise AnchorError(
            f"{manifest_file}: would be published under its name, which has a character that is written differently in"
            " a URL or on a command line",
            "rename it, with its image: letters, digits and ._~@:=- will do",
        )
    with step("verify the manifest and its signature" if alone else VERIFY), disk_errors():
        if alone:
            manifest, sha256 = _verified_alone(manifest_file, keys), ""
        else:
            manifest, sha256 = verified(image, manifest_file, keys)
    if not alone:
        with disk_errors():
            check_tree(image, manifest, step)
    name = manifest_file.name
    image_name = manifest.file or image.name
    if isinstance(target, Directory):
        refuse([target.path / name, *([] if alone else [target.path / image_name])])
    _refuse_older(manifest_file, manifest, target, name, keys)
    report: dict[str, Any] = {"to": to, "signed_by": None, "files": []}
    _, data = read_manifest(manifest_file)
    if keys:
        report["signed_by"] = verify_signature(data, keys).fingerprint
    files = [(manifest_file.name, manifest_file, file_digest(manifest_file))]
    if not alone:
        files.insert(0, (image_name, image, sha256))
    for name, path, digest in files:
        started = time.monotonic()
        with step(f"publish {name}, {path.stat().st_size / 1e6:.1f} MB"), disk_errors():
            there = target.has(name, path, digest)
            if not there and path == manifest_file:
                # Somebody else may have published while the image was on its way.
                _refuse_older(manifest_file, manifest, target, name, keys)
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


def _refuse_older(file: Path, manifest: Manifest, target: Target, name: str, keys: Sequence[PublicKey]) -> None:
    """Refuse to replace a newer manifest; one that nodes would not believe does not count."""
    with disk_errors():
        data = target.read(name)
    if data is None:
        return
    try:
        there = parse_manifest(data)
        if keys:
            verify_signature(data, keys)
    except AnchorError:
        return
    if there.created > manifest.created:
        raise AnchorError(
            f"{name} is there already, and newer: of {_date(there.created)}, while {file} is of "
            f"{_date(manifest.created)}",
            f"if nodes are to go back to this image, make it the newest: {_anew(manifest, file)} --sign-key KEY",
        )


def _date(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s after 1970"


def verified(image: Path, manifest_file: Path, keys: Sequence[PublicKey]) -> tuple[Manifest, str]:
    """Return an image's manifest and SHA-256; raises AnchorError unless both belong together and nodes take them."""
    if not image.is_file():
        raise AnchorError(f"{image}: there is no such file")
    manifest, data = read_manifest(manifest_file)
    sha256 = file_digest(image)
    if (sha256, image.stat().st_size) != (manifest.sha256, manifest.size):
        raise AnchorError(
            f"{image}: is not the image of {manifest_file}: its SHA-256 is {sha256}, expected {manifest.sha256}",
            "make them together: anchor-build image",
        )
    _believed(manifest, data, manifest_file, keys)
    return manifest, sha256


def check_tree(image: Path, manifest: Manifest, step: Step) -> None:
    """Raise AnchorError where a manifest names a root hash by which nodes could not read the image."""
    if not manifest.verity:
        return
    if image_format(image) == "" or not has_tree(image):
        raise AnchorError(
            f"{image}: has no hash tree, and its manifest names a root hash",
            "make both anew: anchor-build image --verity",
        )
    found = read_tree(image, step).root_hash
    if found != manifest.verity:
        raise AnchorError(
            f"{image}: the root hash of its tree is {found}, and its manifest names {manifest.verity}",
            "make the manifest anew: anchor-build image --verity",
        )


def _verified_alone(manifest_file: Path, keys: Sequence[PublicKey]) -> Manifest:
    """Return the manifest of an image at a registry; raises AnchorError for another, and unless nodes take it."""
    manifest, data = read_manifest(manifest_file)
    if manifest.image != REGISTRY_STAGE:
        raise AnchorError(f"{manifest_file}: is the manifest of a file", "name that: both are published together")
    _believed(manifest, data, manifest_file, keys)
    return manifest


def _believed(manifest: Manifest, data: bytes, manifest_file: Path, keys: Sequence[PublicKey]) -> None:
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
            f"give it a later end: {_anew(manifest, manifest_file)} --valid-for 30d",
        )


def _anew(manifest: Manifest, file: Path) -> str:
    """Return the command that makes a manifest anew, without the options for its key and its end."""
    if manifest.image == REGISTRY_STAGE and manifest.mirrors:
        return (
            f"anchor-build image --at {manifest.mirrors[0].removeprefix('https://')}@sha256:{manifest.sha256} -o {file}"
        )
    return f"anchor-build image {str(file).removesuffix(SUFFIX)}"
