"""A node that downloads with the https transport, and the site that it belongs to: what the tests of both share."""

from __future__ import annotations

import hashlib
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

STAGE = LIB.parent / "dracut-modules/transport-https/stage.sh"
DATA, OTHER = (hashlib.shake_256(seed).digest(3_000_000) for seed in (b"one", b"two"))
DIGEST = hashlib.sha256(DATA).hexdigest()
DEFAULTS = {"timeout": 20, "connect_timeout": 3, "stall": 3, "attempts": 4, "reserve": 1 << 20}
CURL = shutil.which("curl") or ""

# `od` is where the waits' random numbers come from: 0 makes them as short as they can be. (The certificate's name is
# read with od, too, from a pipe and with other options.)
SCRIPT = r"""
. "$LIB/anchor-report.sh"
. "$LIB/anchor-fetch.sh"
. "$LIB/anchor-http.sh"
. "$STAGE"
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10
anchor_stage_for_scheme() {
    case $1 in
        https) anchor_transport_needs_digest=0 ;;
        http) anchor_transport_needs_digest=1 ;;
        *) return 1 ;;
    esac
    anchor_transport=https
}
od() {
    case $* in
        *urandom) printf '%s\n' "${RANDOM_NUMBER:-0}" ;;
        *) command od "$@" ;;
    esac
}
anchor_fetch "$@"
"""


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
class Node:
    """A node with the site's CA and, at first, a certificate of its own."""

    shell: Shell

    @property
    def image(self) -> Path:
        """Where the download goes."""
        return self.shell.root / "run/anchor/image/node.squashfs"

    @property
    def credentials(self) -> Path:
        """What auth leaves."""
        return self.shell.root / "run/anchor/credentials"

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
        environment = {f"anchor_fetch_{name}": str(value) for name, value in {**DEFAULTS, **parameters}.items()}
        environment |= {"STAGE": str(STAGE), "anchor_https_proxy": proxy, **(env or {})}
        arguments = (url, str(self.image), sha256, str(size))
        done = self.shell.run(setup + SCRIPT, *arguments, env=environment, unshare=unshare)
        assert not list(self.image.parent.glob("*.fetch"))
        return done

    def attempts(self) -> int:
        """Return how many attempts the last download took."""
        return int((self.shell.root / "run/anchor/steps/10/number-attempts").read_text())

    def got(self, done: subprocess.CompletedProcess[str], data: bytes = DATA) -> bool:
        """Whether the download is whole; shows what was said otherwise."""
        assert done.returncode == 0, done.stderr
        return self.image.read_bytes() == data

    def failed(self, done: subprocess.CompletedProcess[str], *messages: str) -> bool:
        """Whether the download failed with all of these on the console."""
        assert done.returncode == 1, done.stderr
        assert not self.image.exists()
        assert [message for message in messages if message not in done.stderr] == [], done.stderr
        return True


def prepared(shell: Shell, site: Site) -> Node:
    for name in ("run/anchor/image", "run/anchor/steps/10", "run/anchor/credentials", "etc/anchor"):
        (shell.root / name).mkdir(parents=True)
    shutil.copy(site.authority.certificate, shell.root / "etc/anchor/ca.pem")
    node = Node(shell)
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
