"""A node that downloads with the s3 transport from OpenStack Swift's S3 service."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from contrib.site import pki, servers
from tests.shell.conftest import SHELLS, TOP, Shell
from tests.shell.downloads import DATA, OTHER, Downloader, limits, loop

STAGE = TOP / "dracut-modules/transport-s3"
DOMAIN = "s3.example"
# Keys that a careless signer or a careless client gets wrong.
KEYS = (
    "node.squashfs",
    "images",
    "a b+c.img",
    "100%25 é ü.img",
    "images//el9/../x/./y",
    "(all)!*'&=;:@$,~_-.img",
    '#?["quoted\\"]{x}|^`<>',
    "日本",
)

SCRIPT = (
    loop("s3", {"s3": False}, "$LIB/anchor-http.sh", "$STAGE/anchor-s3.sh", "$STAGE/stage.sh")
    + '[ -z "$TRACE" ] || set -x\nanchor_fetch "$@"\n'
)


@dataclass(frozen=True)
class S3Site:
    """A CA and an S3 service with some objects in the bucket images."""

    directory: Path
    authority: pki.Authority
    s3: servers.S3

    def requests(self) -> list[str]:
        """Return method, path and status of the requests since the last call; those of `put` are logged late."""
        text = self.s3.access_log.read_text()
        self.s3.access_log.write_text("")
        found = re.findall(r'"([A-Z]+ \S+) HTTP/1.1" (\d+)', text)
        return [f"{line} {code}" for line, code in found if not line.startswith("PUT ")]

    def put(self, key: str, data: bytes) -> None:
        """Store an object of the bucket images."""
        file = self.directory / "upload"
        file.write_bytes(data)
        self.s3.put("images", key, file)


def need_swift() -> None:
    """Skip where there is no Swift. On Debian it is a package, and contrib/packages.txt names it."""
    if not servers.SWIFT.is_dir():
        pytest.skip(f"{servers.SWIFT} is missing" if shutil.which("dpkg") else "this distribution has no Swift")


@pytest.fixture(scope="module")
def s3_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Site]:
    need_swift()
    directory = tmp_path_factory.mktemp("s3")
    authority = pki.make_authority(directory / "ca")
    leaf = pki.issue(authority, directory, "s3", addresses=["127.0.0.1", DOMAIN, f"*.{DOMAIN}"])
    with servers.swift_s3(directory / "swift", leaf=leaf, ca=authority.certificate, domain=DOMAIN) as s3:
        site = S3Site(directory, authority, s3)
        s3.make_bucket("images")
        for key in KEYS:
            site.put(key, DATA)
        yield site


@dataclass(frozen=True)
class S3Node(Downloader):
    """A node with the site's CA, and credentials that are baked in."""

    site: S3Site

    def get(
        self,
        url: str = "s3://images/node.squashfs",
        sha256: str = "",
        *,
        env: Mapping[str, str] | None = None,
        setup: str = "",
        trace: bool = False,
        unshare: tuple[str, ...] = (),
        fetch: Mapping[str, int] | None = None,
        given: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> subprocess.CompletedProcess[str]:
        """Download after the shell text `setup`; `parameters`, and what is in `given`, are those of the stage."""
        s3 = self.site.s3
        values = {"endpoint": s3.endpoint, "region": s3.region, "style": "", "proxy": "", "session_token": ""}
        values |= {"access_key": s3.access_key, "secret_key": s3.secret_key, **(given or {}), **parameters}
        environment = {f"anchor_s3_{name}": value for name, value in values.items()}
        environment |= limits(fetch or {}) | {"STAGE": str(STAGE), "TRACE": "1" if trace else "", **(env or {})}
        done = self.shell.run(setup + SCRIPT, url, str(self.image), sha256, env=environment, unshare=unshare)
        assert not list(self.image.parent.glob("*.fetch"))
        return done


def s3_node(shell: str, root: Path, site: S3Site) -> S3Node:
    """Prepare a node's root."""
    node = S3Node(Shell(shell, root), site)
    node.make_directories()
    shutil.copy(site.authority.certificate, root / "etc/anchor/ca.pem")
    site.s3.access_log.write_text("")
    return node


@pytest.fixture(params=sorted(SHELLS))
def s3(request: pytest.FixtureRequest, tmp_path: Path, s3_site: S3Site) -> S3Node:
    return s3_node(request.param, tmp_path, s3_site)


@pytest.fixture
def s3_dash(tmp_path: Path, s3_site: S3Site) -> S3Node:
    """One shell only, for what takes its time and is the same in all."""
    return s3_node("dash", tmp_path, s3_site)


def presigned(s3: servers.S3, bucket: str, key: str, lifetime_s: int = 300) -> str:
    """Return a presigned URL as S3's documentation has it, good for `lifetime_s` seconds.

    https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
    """
    now = datetime.datetime.now(datetime.UTC)
    time, scope = now.strftime("%Y%m%dT%H%M%SZ"), f"{now:%Y%m%d}/{s3.region}/s3/aws4_request"
    path = f"/{bucket}/{quote(key, safe='/~')}"
    query = {
        "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
        "X-Amz-Credential": f"{s3.access_key}/{scope}",
        "X-Amz-Date": time,
        "X-Amz-Expires": str(lifetime_s),
        "X-Amz-SignedHeaders": "host",
    }
    text = urlencode(sorted(query.items()), quote_via=quote)
    request = f"GET\n{path}\n{text}\nhost:127.0.0.1:{s3.port}\n\nhost\nUNSIGNED-PAYLOAD"
    to_sign = f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    secret = f"AWS4{s3.secret_key}".encode()
    for word in scope.split("/"):
        secret = hmac.digest(secret, word.encode(), "sha256")
    signature = hmac.digest(secret, to_sign.encode(), "sha256").hex()
    return f"{s3.endpoint}{path}?{text}&X-Amz-Signature={signature}"


__all__ = ["DATA", "KEYS", "OTHER", "S3Node", "S3Site", "need_swift", "presigned", "s3", "s3_dash", "s3_site"]
