"""A node that has its credentials and its image from an NFS server: the kernel's own client, which this host may lack.

One boot tries everything. The real auth stage finds a half-copied key at first. Then a stage of this test's own
(tests/fixtures/nfs_cases) drives the real transport through what can go wrong, and at last boots the image by NFS.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build import qemu
from anchor_build.bootwatch import BootResult
from anchor_build.events import End
from contrib.site import pki
from tests.conftest import TOP
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site
from tests.stages.nfs_server import Export, nfs_server

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SMALL = b"small " * 500


@dataclass(frozen=True)
class Booted:
    """How the node booted, its console, and what its steps noted."""

    result: BootResult
    console: str
    notes: dict[str, str]


@pytest.fixture(scope="module")
def leaf(site: Site, tmp_path_factory: pytest.TempPathFactory) -> pki.Leaf:
    return pki.issue(site.authority, tmp_path_factory.mktemp("nfs-leaf"), "node1", client=True)


def make_exports(top: Path, site: Site, leaf: pki.Leaf) -> dict[str, Export]:
    """Make what is served: whole files, files that are not, and the site's image."""
    data, auth, denied = (top / name for name in ("data", "auth", "denied"))
    for directory in (data, auth, denied):
        directory.mkdir(parents=True)
    (data / "small").write_bytes(SMALL)
    (data / "link-inside").symlink_to("small")
    (data / "link-outside").symlink_to("/etc/passwd")
    os.mkfifo(data / "pipe")
    with (data / "large").open("wb") as large:
        large.truncate(1500 << 20)
    shutil.copyfile(site.root_image.squashfs, data / "image.squashfs")
    (denied / "file").write_bytes(SMALL)
    (auth / "node1.crt").write_bytes(leaf.certificate.read_bytes())
    whole = leaf.key.read_bytes()
    (auth / "node1.key").write_bytes(whole[: len(whole) // 2])
    (auth / "token").write_text("a site's own file\n")
    return {"/data": Export(data), "/auth": Export(auth), "/denied": Export(denied, access="None")}


def finish_copy(console: Path, key: Path, whole: bytes, stop: threading.Event) -> None:
    """Put the whole key in place once the node has seen that it is not whole."""
    while not stop.is_set():
        if console.exists() and b"is not whole" in console.read_bytes():
            beside = key.with_suffix(".new")
            beside.write_bytes(whole)
            beside.rename(key)
            return
        time.sleep(0.2)


@pytest.fixture(scope="module")
def booted_node(
    site: Site, leaf: pki.Leaf, build_initramfs: BuildInitramfs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Booted]:
    top = tmp_path_factory.mktemp("nfs")
    initrd = build_initramfs(
        *("--stage-dir", str(TOP / "tests/fixtures/nfs_cases"), "--auth", "nfs", "--transport", "nfs"),
        *("--image", "squashfs", "--image", "nfs-cases"),
    )
    console = top / "console.log"
    exports = make_exports(top / "exports", site, leaf)
    with nfs_server(top / "server", exports) as server, pytest.MonkeyPatch.context() as patch:
        wrapper = server.wrapped(Path(qemu.find_qemu()), top / "bin")
        patch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        append = (
            f"root=anchor nfs_mount=nfs4:10.0.2.2:/auth:port={server.port},hard "
            "nfs_files=node1.crt:/client.cert,node1.key:/client.key,token:/run/anchor/credentials/site.token "
            f"rd.anchor.nfs-cases.server=10.0.2.2:{server.port} rd.anchor.nfs-cases.mountport={server.mount_port} "
            f"rd.anchor.squashfs.url=nfs://10.0.2.2:{server.port}/data/image.squashfs {site.digest} "
            "rd.anchor.image=nfs-cases rd.anchor.on_failure=poweroff"
        )
        stop = threading.Event()
        copier = threading.Thread(
            target=finish_copy,
            args=(console, exports["/auth"].path / "node1.key", leaf.key.read_bytes(), stop),
            daemon=True,
        )
        copier.start()
        try:
            machine = site.machine(initrd, append)
            result = qemu.boot(machine, timeout=LIMIT_S, until="switch-root", console=console)
        finally:
            stop.set()
            copier.join(10)
        notes = {k: str(v) for event in result.events if isinstance(event, End) for k, v in event.notes.items()}
        yield Booted(result, console.read_text(encoding="utf-8", errors="replace"), notes)


def test_the_node_boots_from_nfs(booted_node: Booted, site: Site) -> None:
    assert booted_node.result.ok, booted_node.console[-6000:]
    assert booted_node.notes["url"].startswith("nfs://10.0.2.2:")
    assert booted_node.notes["sha256"] == site.root_image.sha256


def test_credentials_are_taken_when_they_are_whole(booted_node: Booted, leaf: pki.Leaf) -> None:
    waited = "10.0.2.2:/auth: client.key is not whole: it ends inside of a PEM block; waiting for it"
    assert waited in booted_node.console
    wanted = {"client.crt": leaf.certificate.read_bytes(), "client.key": leaf.key.read_bytes()}
    wanted["site.token"] = b"a site's own file\n"
    for name, content in wanted.items():
        assert booted_node.notes[f"auth-{name}"] == f"600 0 {hashlib.sha256(content).hexdigest()}  -"
    assert leaf.key.read_text().splitlines()[1] not in booted_node.console
    assert (booted_node.notes["server"], booted_node.notes["path"]) == ("10.0.2.2", "/auth")
    assert booted_node.notes["version"] == "4.2"
    assert int(booted_node.notes["attempts"]) > 0


WHOLE = f"0 {hashlib.sha256(SMALL).hexdigest()}  -"
CASES = {
    "v4": WHOLE,
    "v40": WHOLE,
    "v3": WHOLE,
    "v3-rpcbind": WHOLE,
    "denied": "1 cannot mount 10.0.2.2:/denied: access denied by server while mounting 10.0.2.2:/denied",
    "link": WHOLE,
    "link-out": "1 10.0.2.2:/data/link-outside is a link that leads out of the export",
    "pipe": "1 10.0.2.2:/data/pipe is not a regular file",
    "absent": "1 10.0.2.2:/data/nothing is not there",
    "no-export": "1 cannot mount 10.0.2.2:/nowhere: mounting 10.0.2.2:/nowhere failed, "
    "reason given by server: No such file or directory",
    "options": "1 the NFS option krb5 is not allowed, or its value is not",
    "known": WHOLE,
    "unknown": "3 the file on the server is not the one that was begun",
    "dead": "2 10.0.2.2 is too slow or silent: less than 1 KiB/s for 2 s",
    "silent": "2 cannot mount 10.0.2.2:/data: no answer within 3 s",
    "alive": WHOLE,
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_transport_says_of_a_real_mount(booted_node: Booted, case: str) -> None:
    assert booted_node.notes[f"case-{case}"] == CASES[case]
    assert booted_node.notes[f"mounts-{case}"] == "left:"


def test_a_file_that_is_too_large_is_refused_with_numbers(booted_node: Booted) -> None:
    said = booted_node.notes["case-large"]
    assert said.startswith("1 nfs://10.0.2.2:")
    assert said.endswith("/data/small is too large: it needs 3000 bytes, and 1000 bytes fit (a test)")


def test_a_dead_server_takes_no_longer_than_the_limits_say(booted_node: Booted) -> None:
    # Reading: up to twice the stall limit, 2 s for the kill, 6 s for the unmount; mounting: 3 s, 2 s, 6 s.
    assert int(booted_node.notes["ms-dead"]) < 20_000
    assert int(booted_node.notes["ms-silent"]) < 14_000
    assert booted_node.notes["mounts-auth"] == "left:"
