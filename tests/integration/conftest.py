"""What all boots share: the root image, the site's servers, and the initramfs of a plan, each made once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra

from anchor_build import qemu
from anchor_build.bootwatch import BootResult
from contrib.reports.receiver import tls
from contrib.site import image, pki, servers
from tests.reports import Served, receiver

LIMIT_S = 240.0  # for one boot, on a busy machine
# A digest that no image of ours has.
WRONG_SHA256 = "0" * 64


@dataclass(frozen=True)
class Site:
    """A site on loopback: its CA, an ACME server, image stores with and without mutual TLS, a receiver of reports."""

    root_image: image.SiteImage
    login_key: Path
    authority: pki.Authority
    acme: servers.Acme
    store: servers.Store
    open_store: servers.Store
    reports: Served
    http_port: int
    tls_port: int

    @property
    def digest(self) -> str:
        """The parameter that names the image's digest."""
        return f"rd.anchor.squashfs.sha256={self.root_image.sha256}"

    @property
    def acme_server(self) -> str:
        """The ACME directory as a node reaches it, without its scheme."""
        return f"10.0.2.2:{self.acme.port}/dir"

    @property
    def url(self) -> str:
        """The image as a node reaches it, behind mutual TLS."""
        return f"https://10.0.2.2:{self.store.https_port}/image.squashfs"

    @property
    def open_url(self) -> str:
        """The image over plain HTTP."""
        return f"http://10.0.2.2:{self.open_store.http_port}/image.squashfs"

    @property
    def report(self) -> str:
        """The parameter that makes a node report here."""
        return "rd.anchor.report=" + self.reports.url.replace("127.0.0.1", "10.0.2.2")

    def machine(self, initrd: Path, append: str, memory: str = "1G", rtc: str = "") -> qemu.Machine:
        """Return a node of this site whose ACME challenges and SSH come through."""
        return qemu.Machine(
            self.root_image.kernel,
            initrd,
            append,
            memory=memory,
            accel="tcg",
            hostname="node1.demo.example",
            rtc=rtc,
            forwards=(qemu.Forward(80, self.http_port), qemu.Forward(443, self.tls_port), qemu.Forward(22, 0)),
        )


@pytest.fixture(scope="session")
def root_image() -> image.SiteImage:
    """Return the demo's root image, from the cache or made now (a minute)."""
    key = image.login_key(image.CACHE)
    return image.build_image(image.CACHE, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def site(root_image: image.SiteImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Real servers for one test process."""
    top = tmp_path_factory.mktemp("site")
    www = top / "www"
    www.mkdir()
    (www / "image.squashfs").symlink_to(root_image.squashfs)
    authority = pki.make_authority(top / "pki")
    leaf = pki.issue(authority, top / "pki", "store")
    ports = servers.free_port(), servers.free_port()
    with (
        servers.pebble(top / "acme", authority, http_port=ports[0], tls_port=ports[1]) as acme,
        servers.nginx(top / "store", root=www, leaf=leaf, client_ca=acme.root, plain=False) as store,
        servers.nginx(top / "open", root=www, leaf=leaf) as open_store,
        receiver(top, tls(leaf.certificate, leaf.key, None)) as reports,
    ):
        key = image.login_key(image.CACHE)
        yield Site(root_image, key, authority, acme, store, open_store, reports, *ports)


@dataclass(frozen=True)
class Node:
    """A running node: how it booted, and a testinfra host to look inside."""

    result: BootResult
    host: Any

    @property
    def report(self) -> dict[str, Any]:
        """boot.json as the node has it."""
        return dict(json.loads(self.host.file("/run/anchor/boot.json").content_string))


@contextmanager
def booted(site: Site, machine: qemu.Machine, tmp_path: Path, inside: str = "") -> Iterator[Node]:
    """Boot a node to multi-user and log in to it; `inside` is a command that runs another where QEMU's ports are."""
    with qemu.running(machine, timeout=LIMIT_S, console=tmp_path / "console.log") as result:
        config = tmp_path / "ssh_config"
        config.write_text(
            f"Host node\n HostName 127.0.0.1\n Port {result.forwards[22]}\n User root\n"
            f" IdentityFile {site.login_key.resolve()}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
            " LogLevel ERROR\n"
            + (f" ProxyCommand {inside} socat - TCP4:127.0.0.1:{result.forwards[22]}\n" if inside else "")
        )
        # A busy machine's node may need more than testinfra's 10 s to answer, which ssh takes before its configuration.
        yield Node(result, testinfra.get_host("ssh://node?timeout=90", ssh_config=str(config)))


BuildInitramfs = Callable[..., Path]


@pytest.fixture(scope="session")
def build_initramfs(site: Site, tmp_path_factory: pytest.TempPathFactory) -> BuildInitramfs:
    """Build with the command that a user runs; the same arguments give the same file."""
    built: dict[tuple[str, ...], Path] = {}

    def build(*arguments: str) -> Path:
        if arguments not in built:
            output = tmp_path_factory.mktemp("initramfs") / "node.img"
            argv = [sys.executable, "-m", "anchor_build", "initramfs", *arguments]
            argv += ["--kernel", str(site.root_image.kernel), "--modules", str(site.root_image.modules)]
            argv += ["--ca", str(site.authority.certificate), "-o", str(output)]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            built[arguments] = output
        return built[arguments]

    return build
