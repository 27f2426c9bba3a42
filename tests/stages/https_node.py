"""A node that downloads with the https transport, and the site that it belongs to: what the tests of both share."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from contrib.site import pki, servers
from tests.shell.conftest import LIB, SHELLS, Shell
from tests.shell.downloads import DATA, Downloader, limits, loop

STAGE = LIB.parent / "dracut-modules/transport-https/stage.sh"
CURL = shutil.which("curl") or ""

SCRIPT = loop("https", {"https": False, "http": True}, "$LIB/anchor-http.sh", "$STAGE") + 'anchor_fetch "$@"\n'


@dataclass(frozen=True)
class Site:
    """A CA, another CA, an image store with mutual TLS, and the certificate of a node."""

    directory: Path
    authority: pki.Authority
    stranger: pki.Authority
    node: pki.Leaf
    store: servers.Store

    def url(self, path: str = "/node.squashfs", user: str = "") -> str:
        """Return the HTTPS URL of a path in the store."""
        return f"https://{user}127.0.0.1:{self.store.https_port}{path}"

    def log(self) -> list[str]:
        """Return the lines of the store's log that have not been returned before."""
        # nginx writes a line when a request ends, which may be a little after the client has gone.
        time.sleep(0.1)
        lines = self.store.access_log.read_text().splitlines()
        self.store.access_log.write_text("")
        return lines


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    authority = pki.make_authority(directory / "ca")
    stranger = pki.make_authority(directory / "stranger", "another CA")
    leaf = pki.issue(authority, directory, "store")
    node = pki.issue(authority, directory, "node17", client=True, addresses=["node17.example"])
    www = directory / "www"
    www.mkdir()
    (www / "node.squashfs").write_bytes(DATA)
    with (www / "huge").open("wb") as huge:
        huge.truncate(900 << 20)
    with servers.nginx(directory / "nginx", root=www, leaf=leaf, client_ca=authority.certificate) as store:
        yield Site(directory, authority, stranger, node, store)


@dataclass(frozen=True)
class Node(Downloader):
    """A node with the site's CA and, at first, a certificate of its own."""

    def enroll(self, leaf: pki.Leaf) -> None:
        """Give the node a certificate."""
        shutil.copy(leaf.certificate, self.credentials / "client.crt")
        shutil.copy(leaf.key, self.credentials / "client.key")

    def fetch(
        self,
        url: str,
        sha256: str = "",
        *,
        env: Mapping[str, str] | None = None,
        size: int | str = "",
        proxy: str = "",
        setup: str = "",
        unshare: tuple[str, ...] = (),
        **parameters: int,
    ) -> subprocess.CompletedProcess[str]:
        """Download after the shell text `setup`; the result's stderr is what the console shows."""
        environment = limits(parameters) | {"STAGE": str(STAGE), "anchor_https_proxy": proxy, **(env or {})}
        arguments = (url, str(self.image), sha256, str(size))
        done = self.shell.run(setup + SCRIPT, *arguments, env=environment, unshare=unshare)
        assert not list(self.image.parent.glob("*.fetch"))
        return done


def prepared(shell: Shell, site: Site) -> Node:
    node = Node(shell)
    node.make_directories()
    shutil.copy(site.authority.certificate, shell.root / "etc/anchor/ca.pem")
    node.enroll(site.node)
    site.store.access_log.write_text("")
    return node


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, site: Site) -> Node:
    return prepared(Shell(request.param, tmp_path), site)


@pytest.fixture
def dash(tmp_path: Path, site: Site) -> Node:
    """One shell only, for what takes its time and is the same in all."""
    return prepared(Shell("dash", tmp_path), site)


def curl_version() -> tuple[int, ...]:
    text = subprocess.run([CURL or "false", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


# Older ones leave at the status or length that they refuse, before they write the headers down.
tells_refused_headers = pytest.mark.skipif(
    curl_version() < (7, 75), reason="needs curl 7.75, which tells the headers of an answer that it refuses"
)
