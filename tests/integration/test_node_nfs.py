"""A node that has its credentials and its image from an NFS server: the kernel's own client, which this host may lack.

One boot tries everything. The real auth stage finds a half-copied key at first. Then a stage of this test's own
(tests/fixtures/nfs_cases) drives the real transport through what can go wrong, and the kernel's dm-verity, which this
host may lack, too. At last it boots an image that stays on the server, each block checked when it is read.
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
from anchor_build.events import End
from contrib.site import pki
from tests.conftest import TOP
from tests.integration.conftest import WRONG_SHA256, BuildInitramfs, Node, Site, booted
from tests.stages.nfs_server import Export, nfs_server
from tests.stages.verity_image import BLOCK, VerityImage, add_tree

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SMALL = b"small " * 500


@dataclass(frozen=True)
class Booted:
    """The node, its console, what its steps noted, and the image that it should have."""

    node: Node
    console: str
    notes: dict[str, str]
    image: VerityImage


@pytest.fixture(scope="module")
def leaf(site: Site, tmp_path_factory: pytest.TempPathFactory) -> pki.Leaf:
    return pki.issue(site.authority, tmp_path_factory.mktemp("nfs-leaf"), "node1", client=True)


def make_exports(top: Path, leaf: pki.Leaf) -> dict[str, Export]:
    """Make what is served: whole files, and files that are not."""
    data, auth, denied = (top / name for name in ("data", "auth", "denied"))
    for directory in (data, auth, denied):
        directory.mkdir(parents=True)
    (data / "small").write_bytes(SMALL)
    (data / "link-inside").symlink_to("small")
    (data / "link-outside").symlink_to("/etc/passwd")
    os.mkfifo(data / "pipe")
    with (data / "large").open("wb") as large:
        large.truncate(1500 << 20)
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


def make_image(site: Site, data: Path) -> VerityImage:
    """Serve the site's image with a hash tree; and once more with one bit changed, in its block 777."""
    image = add_tree(site.root_image.squashfs, data / "image.squashfs")
    flipped = data / "flipped.squashfs"
    shutil.copyfile(image.file, flipped)
    with flipped.open("r+b") as file:
        file.seek(777 * BLOCK)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return image


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
    exports = make_exports(top / "exports", leaf)
    image = make_image(site, exports["/data"].path)
    with nfs_server(top / "server", exports) as server, pytest.MonkeyPatch.context() as patch:
        wrapper = server.wrapped(Path(qemu.find_qemu()), top / "bin")
        patch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
        append = (
            f"root=anchor nfs_mount=nfs4:10.0.2.2:/auth:port={server.port},hard "
            "nfs_files=node1.crt:/client.cert,node1.key:/client.key,token:/run/anchor/credentials/site.token "
            f"rd.anchor.nfs-cases.server=10.0.2.2:{server.port} rd.anchor.nfs-cases.mountport={server.mount_port} "
            f"rd.anchor.squashfs.url=nfs://10.0.2.2:{server.port}/data/image.squashfs "
            f"rd.anchor.squashfs.verity={image.root_hash} rd.anchor.nfs-cases.wrong={WRONG_SHA256} "
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
            with booted(site, site.machine(initrd, append), top, server.inside) as node:
                ends = [event for event in node.result.events if isinstance(event, End)]
                notes = {key: str(value) for event in ends for key, value in event.notes.items()}
                yield Booted(node, console.read_text(encoding="utf-8", errors="replace"), notes, image)
        finally:
            stop.set()
            copier.join(10)


def test_the_root_is_read_on_the_server(booted_node: Booted) -> None:
    node, image = booted_node.node, booted_node.image
    mounts = {line.split()[1]: line.split() for line in node.host.check_output("cat /proc/self/mounts").splitlines()}
    device, _, kind, options, *_ = mounts["/run/anchor/lower"]
    assert (device, kind, options.split(",")[0]) == ("/dev/mapper/anchor-image", "squashfs", "ro")
    assert mounts["/"][2] == "overlay"
    device, _, kind, options, *_ = mounts["/run/anchor/nfs-image"]
    assert (device, kind) == ("10.0.2.2:/data", "nfs4")
    assert {"ro", "hard", "nosuid", "nodev", "noexec"} <= set(options.split(","))
    below = node.host.check_output("cat /sys/block/dm-0/dm/name /sys/block/dm-0/slaves/loop*/loop/backing_file")
    assert below.split() == ["anchor-image", "/run/anchor/nfs-image/image.squashfs"]
    # All of it is there, and none of it is kept in a file system of memory.
    digest = hashlib.sha256(image.file.read_bytes()[: image.data_size]).hexdigest()
    assert node.host.check_output("sha256sum </dev/mapper/anchor-image").split()[0] == digest
    assert "/run/anchor/image" not in mounts
    shared = node.host.check_output("sed -n 's/^Shmem: *//p' /proc/meminfo").split()
    assert int(shared[0]) * 1024 < image.data_size / 4


def test_nobody_looks_for_volumes_beside_dm_verity(booted_node: Booted) -> None:
    told = booted_node.node.host.check_output("udevadm info -q property /dev/loop0").splitlines()
    assert "SYSTEMD_READY=0" in told
    assert not [line for line in told if line.startswith("ID_FS_")]


def test_the_server_knows_the_node_from_others(booted_node: Booted) -> None:
    files = "/sys/module/nfs/parameters/nfs4_unique_id /proc/sys/kernel/random/boot_id"
    identity, boot = booted_node.node.host.check_output(f"cat {files}").split()
    assert identity == boot


def test_the_booted_system_waits_for_nothing_and_nothing_failed(booted_node: Booted) -> None:
    assert booted_node.node.host.check_output("systemctl list-units --failed --no-legend --plain") == ""
    assert booted_node.node.host.check_output("systemctl list-jobs --no-legend --plain") == ""


def test_the_report_says_where_the_image_is(booted_node: Booted) -> None:
    notes = booted_node.notes
    assert notes["url"].startswith("nfs://10.0.2.2:")
    assert (notes["verity"], notes["format"], notes["in_place"]) == (booted_node.image.root_hash, "squashfs", "yes")
    assert "sha256" not in notes


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


def test_blocks_of_another_image_are_refused(booted_node: Booted) -> None:
    notes = booted_node.notes
    assert notes["case-wrong-root"] == (
        f"1 the image is not the one of the root hash {WRONG_SHA256}: its first block does not check out"
    )
    # Mounted, and all blocks are read that have not been changed.
    assert notes["case-flipped"] == "1 777"
    for case in ("wrong-root", "flipped", "place-silent", "place-dead"):
        assert notes[f"mounts-{case}"] == "left:"
        assert notes[f"devices-{case}"] == "left:No devices found"


def test_a_server_that_falls_silent_is_not_waited_for(booted_node: Booted) -> None:
    notes = booted_node.notes
    assert notes["case-place-silent"] == "2 cannot mount 10.0.2.2:/data: no answer within 3 s"
    assert notes["case-place-dead"] == "1 no answer within 1 s when the image was read"
    assert int(notes["ms-place-dead"]) < 60_000


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
