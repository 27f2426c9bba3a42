"""A node that writes a disk: 96 MiB over HTTP, a power cut on the way, and the system that is then on the disk."""

from __future__ import annotations

import hashlib
import mmap
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build import qemu
from anchor_build.bootwatch import Watcher
from anchor_build.events import End, Finished
from contrib.site import pki, servers
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site
from tests.stages.disk_images import MIB, RECORD_AT, SECTOR, gpt, noise

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SIZE = 96 * MIB


@dataclass(frozen=True)
class Served:
    """The image as a file, and packed on a server."""

    raw: Path
    url: str
    sha256: str


def make_image(directory: Path, kernel: Path) -> Path:
    """Make the image of a disk: a GPT, and a root file system just good enough to switch to, or to start its kernel."""
    tree, file = directory / "tree", directory / "disk.raw"
    for name in ("proc", "sys", "dev", "run", "tmp", "etc", "sbin", "usr/lib"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=installed\n")
    shutil.copy("/bin/busybox", tree / "sbin/init")
    (tree / "usr/lib/ld-test.so").write_bytes(b"\0")  # what older versions of dracut look for in a root
    (tree / "boot/loader/entries").mkdir(parents=True)
    shutil.copy(kernel, tree / "boot/vmlinuz")
    # Its kernel shows that it has been started, and with what; that it then finds no init is no matter.
    argv = ["cpio", "--quiet", "-o", "-H", "newc"]
    packed = subprocess.run(argv, cwd=tree, input=b"etc/os-release\n", stdout=subprocess.PIPE, check=True).stdout
    (tree / "boot/initramfs.img").write_bytes(packed.ljust(MIB, b"\0"))
    entry = (
        "title node\nversion 1\nlinux /boot/vmlinuz\ninitrd /boot/initramfs.img\noptions console=ttyS0 of=the-disk\n"
    )
    (tree / "boot/loader/entries/node.conf").write_text(entry)
    # Two thirds of the disk are in use, all over it.
    for n in range(8):
        (tree / f"data{n}").write_bytes(noise(f"boot{n}", 8 * MIB))
    first, last = gpt(SIZE)
    with file.open("wb") as image:
        image.truncate(SIZE)
    offset = f"offset={MIB}"
    argv = ["mkfs.ext4", "-q", "-d", str(tree), "-E", offset, str(file), f"{(SIZE - 2 * MIB) // 1024}k"]
    subprocess.run(argv, check=True, capture_output=True)
    with file.open("r+b") as image:
        image.write(first)
        image.seek(SIZE - len(last))
        image.write(last)
    return file


@pytest.fixture(scope="module")
def served(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    top = tmp_path_factory.mktemp("disk")
    raw = make_image(top, site.root_image.kernel)
    (top / "www").mkdir()
    packed = top / "www/disk.img.zst"
    subprocess.run(["zstd", "-1", "-q", "-T0", str(raw), "-o", str(packed)], check=True)
    leaf = pki.issue(pki.make_authority(top / "ca"), top, "store")
    with servers.nginx(top / "nginx", root=top / "www", leaf=leaf) as store:
        digest = hashlib.sha256(packed.read_bytes()).hexdigest()
        yield Served(raw, f"http://10.0.2.2:{store.http_port}/disk.img.zst", digest)


class PowerCutError(Exception):
    """The plug was pulled."""


class PowerCut(Watcher):
    """Ends the machine when `offset` of the disk has been written to."""

    def __init__(self, disk: Path, offset: int) -> None:
        self.disk, self.offset = disk, offset

    def tick(self) -> None:
        """Look at the disk."""
        with self.disk.open("rb") as disk:
            disk.seek(self.offset)
            if any(disk.read(MIB)):
                raise PowerCutError


def wait_for(console: Path, pattern: bytes) -> None:
    """Wait until the console shows it."""
    end = time.monotonic() + LIMIT_S / 2
    while not re.search(pattern, console.read_bytes(), re.DOTALL):
        assert time.monotonic() < end, console.read_bytes()[-2000:]
        time.sleep(0.2)


def differences(disk: Path, image: Path) -> list[int]:
    """Return the numbers of the sectors in which two files of one size differ."""
    with disk.open("rb") as one, image.open("rb") as two:
        a, b = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in (one, two))
        blocks = [at for at in range(0, SIZE, MIB) if a[at : at + MIB] != b[at : at + MIB]]
        sectors = [at for block in blocks for at in range(block, block + MIB, SECTOR)]
        return [at // SECTOR for at in sectors if a[at : at + SECTOR] != b[at : at + SECTOR]]


def test_a_power_cut_then_a_whole_image_then_the_system_on_it(
    site: Site, served: Served, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--auth", "none", "--image", "disk")
    target, other = tmp_path / "target", tmp_path / "other"
    for file, size in ((target, SIZE), (other, 2 * SIZE)):
        with file.open("wb") as empty:
            empty.truncate(size)
    append = (
        f"root=anchor rd.anchor.auth=none dd.of=serial:TARGET-1 rd.anchor.disk.url={served.url} "
        f"rd.anchor.disk.sha256={served.sha256} rd.anchor.on_failure=poweroff rd.anchor.disk.root=LABEL=none"
    )
    disks = (qemu.Disk(other, "OTHER-1"), qemu.Disk(target, "TARGET-1"))
    arguments = (site.root_image.kernel, initrd)

    def machine(append: str) -> qemu.Machine:
        return qemu.Machine(*arguments, append, memory="384M", accel="tcg", disks=disks)

    with pytest.raises(PowerCutError):
        qemu.boot(machine(append), timeout=LIMIT_S, console=tmp_path / "1.log", watcher=PowerCut(target, 33 * MIB))
    with target.open("rb") as disk:
        assert disk.read(24) == b"anchor-disk-unfinished 1"

    # Then all of it, and the kernel that it brings takes over.
    console = tmp_path / "2.log"
    with qemu.running(machine(f"{append} rd.anchor.disk.then=kexec"), timeout=LIMIT_S, console=console) as result:
        wait_for(console, rb"Kernel command line: console=ttyS0 of=the-disk\s.*Freeing initrd memory: 1024K")
    assert isinstance(result.events[-1], Finished)
    assert result.events[-1].action == "kexec"
    step = next(event for event in result.events if isinstance(event, End) and event.step == "image")
    assert step.notes["disk"] == "vdb"
    assert step.notes["resumed"] == "an install that was cut off"
    assert step.notes["raw_bytes"] == SIZE
    # All of it is there, and the record where the image has nothing but zeros.
    assert differences(target, served.raw) == [RECORD_AT // SECTOR]
    assert other.stat().st_blocks == 0

    # The next boot finds it, and goes on from there.
    append = append.replace(" rd.anchor.disk.root=LABEL=none", "")
    result = qemu.boot(machine(append), until="switch-root", timeout=LIMIT_S, console=tmp_path / "3.log")
    assert result.ok, result
    steps = {event.step: event for event in result.events if isinstance(event, End)}
    assert steps["image"].notes["installed"] == "already"
    assert steps["root"].notes["root"] == "vdb1"
    assert "overlay" not in steps
    assert target.stat().st_size == SIZE
