"""`./build.sh bench disk`: writing the image of a disk, with all its checks, beside `curl | gunzip | dd` without any.

Everything runs on this host: the node's own shell text, nginx on loopback, a loop device over a file in memory, so
that no disk counts. The image has 1 GB, half of it noise and half of it text that compresses well. The stage takes the
digests of what comes and of what is in it, and flushes; what the read-back adds is shown apart. With --node a QEMU node
writes the same image to a virtio disk, which is compared then. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from anchor_build import qemu
from anchor_build.console import format_table
from anchor_build.events import End
from contrib.site import image as root_image
from contrib.site import pki, servers
from tests.bench.fetch import RATE, timed
from tests.stages.disk_images import MIB, gpt, loop_device
from tests.stages.disk_node import DEFAULTS, LOAD, STAGES

TOP = Path(__file__).resolve().parents[2]
SIZE = 1024 * MIB
NODE_LIMIT_S = 1800
# The digest of the read-back is then that of what was written, without a look at the disk.
NO_READ_BACK = """
anchor_disk__read_back() { cat >/dev/null; }
anchor_fetch_digest() {
    local into
    { into=$(readlink /proc/self/fd/3); } 3>&1
    case $into in
        */back.sha256)
            cat >/dev/null
            until [ -s "$anchor_disk__dir/raw.sha256" ]; do sleep 0.02; done
            cat "$anchor_disk__dir/raw.sha256"
            ;;
        *) openssl dgst -sha256 -r ;;
    esac
}
anchor_disk__complete() { sync "$anchor_disk__device"; }
anchor_disk__then=reboot
"""
STAGE = LOAD + "ANCHOR_DISK_CHUNK=33554432\n"
UNPACK = {"gzip": "gzip -dc", "zstd": "zstd -dcq"}


@dataclass(frozen=True)
class Packed:
    """A packed image as it is served."""

    kind: str
    file: Path
    sha256: str


def digest_of(file: Path, size: int = SIZE) -> str:
    """Return the SHA-256 digest of the first `size` bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for _ in range(size // MIB):
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def make_image(directory: Path) -> Path:
    """Make the image of a disk with one partition; its contents compress to about a half."""
    first, last = gpt(SIZE)
    image = directory / "disk.raw"
    text = b"".join(b"%d: a line of a log that is like the others\n" % n for n in range(1 << 16))
    with image.open("wb") as file:
        file.write(first.ljust(MIB, b"\0"))
        for n in range((SIZE - 2 * MIB) // MIB):
            half = os.urandom(MIB // 2)
            file.write(half + (text * 2)[n * 997 % len(text) :][: MIB - len(half)])
        file.write(last.rjust(MIB, b"\0"))
    return image


def pack(image: Path, www: Path) -> list[Packed]:
    """Pack the image in both ways."""
    www.mkdir()
    files = []
    for kind, argv in (("gzip", ["gzip", "-1c"]), ("zstd", ["zstd", "-3cq", "-T0"])):
        target = www / f"disk.{kind}"
        with image.open("rb") as source, target.open("wb") as sink:
            subprocess.run(argv, stdin=source, stdout=sink, check=True)
        files.append(Packed(kind, target, hashlib.sha256(target.read_bytes()).hexdigest()))
    return files


def environment(root: Path, device: Path, url: str, sha256: str) -> dict[str, str]:
    """Return what the stage reads."""
    values = {**DEFAULTS, "disk_target": str(device), "disk_url": url, "disk_sha256": sha256, "disk_bs": str(MIB)}
    values |= {"disk_overwrite": "always", "fetch_timeout": "900", "fetch_stall": "20"}
    return {
        "PATH": os.environ["PATH"],
        "LIB": str(TOP / "lib"),
        "STAGES": str(STAGES),
        "ANCHOR_ROOT": str(root),
        **{f"anchor_{name}": value for name, value in values.items()},
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median with the least and most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measure(work: Path, packed: Packed, url: str, raw: str, runs: int) -> list[object]:
    """Time all three ways in turn; return seconds and ratios of the rates."""
    root, disk = work / "node", work / "disk"
    alone: list[float] = []
    whole: list[float] = []
    read_back: list[float] = []
    with disk.open("wb") as file:
        file.truncate(SIZE)
    with loop_device(disk) as device:
        env = environment(root, device, url, packed.sha256)
        pipe = (
            f"set -o pipefail; curl -sS {url} | {UNPACK[packed.kind]} | dd of={device} bs=1M iflag=fullblock conv=fsync"
        )
        for _ in range(runs):
            for times, argv in (
                (alone, ["bash", "-c", f"{pipe} 2>/dev/null"]),
                (whole, ["dash", "-c", f"{STAGE}{NO_READ_BACK}anchor_disk_run"]),
                (read_back, ["dash", "-c", f"{STAGE}anchor_disk_run"]),
            ):
                subprocess.run(["blkdiscard", "-z", str(device)], check=False, capture_output=True)
                times.append(timed(argv, env))
    if digest_of(disk) != raw:
        # The record of the stage is the one difference that there may be.
        with disk.open("r+b") as file:
            file.seek(MIB - 512)
            file.write(bytes(512))
        if digest_of(disk) != raw:
            raise SystemExit("what is on the disk is not the image")
    ratios = [[a / b for a, b in zip(alone, other, strict=True)] for other in (whole, read_back)]
    return [spread(alone), spread(whole), spread(ratios[0]), spread(read_back), spread(ratios[1])]


def node(work: Path, packed: Packed, url: str, raw: str) -> str:
    """Let a QEMU node write the image to a virtio disk; return what it took, or raise where the bytes differ."""
    key = root_image.login_key(root_image.CACHE)
    public = key.with_suffix(".pub").read_text(encoding="utf-8")
    site = root_image.build_image(root_image.CACHE, authorized_key=public)
    initrd, target = work / "disk.img", work / "target"
    argv = [sys.executable, "-m", "anchor_build", "-q", "initramfs", "--auth", "none", "--image", "disk"]
    argv += ["--kernel", str(site.kernel), "--modules", str(site.modules), "-o", str(initrd)]
    subprocess.run(argv, check=True)
    with target.open("wb") as file:
        file.truncate(SIZE)
    append = f"root=anchor rd.anchor.auth=none rd.anchor.disk.target=only rd.anchor.disk.sha256={packed.sha256} "
    append += f"rd.anchor.disk.url={url.replace('127.0.0.1', '10.0.2.2')} rd.anchor.on_failure=poweroff"
    disks = (qemu.Disk(target, "BENCH"),)
    machine = qemu.Machine(site.kernel, initrd, append, memory="512M", accel="tcg", disks=disks)
    result = qemu.boot(machine, timeout=NODE_LIMIT_S)
    if not result.ok:
        raise SystemExit(f"the node did not install: {result}")
    with target.open("r+b") as file:
        file.seek(MIB - 512)
        file.write(bytes(512))
    if digest_of(target) != raw:
        raise SystemExit("what the node wrote is not the image")
    step = next(event for event in result.events if isinstance(event, End) and event.step == "image")
    seconds = step.duration_ms / 1000
    return f"QEMU node ({packed.kind}, TCG, 512 MB): {seconds:.1f} s, {SIZE / 1e6 / seconds:.1f} MB/s, bytes compared"


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="build.sh bench disk", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="installs of each kind")
    parser.add_argument("--only", action="append", metavar="ROW", help="this row of the table only, such as zstd")
    parser.add_argument("--node", action="store_true", help="let a QEMU node write the image, too")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anchor-bench-", dir="/dev/shm")))
        image = make_image(work)
        raw = digest_of(image)
        files = pack(image, work / "www")
        image.unlink()
        leaf = pki.issue(pki.make_authority(work / "ca"), work, "store")
        for name in ("run/anchor/steps/10", "run/anchor/credentials", "etc/anchor"):
            (work / "node" / name).mkdir(parents=True)
        for name in ("dev", "proc", "sys"):
            (work / "node" / name).symlink_to(f"/{name}")
        rows = []
        for rate, speed in ((0, ""), (RATE, ", 2.5 Gbit/s")):
            store = stack.enter_context(servers.nginx(work / f"nginx{rate}", root=work / "www", leaf=leaf, rate=rate))
            for packed in files if options.runs else []:
                row = f"{packed.kind}{speed}"
                if options.only and row not in options.only:
                    continue
                url = f"http://127.0.0.1:{store.http_port}/{packed.file.name}"
                rows.append([row, *measure(work, packed, url, raw, options.runs)])
                # What an interrupted run has is not lost.
                print(*rows[-1], sep="  ", file=sys.stderr)  # noqa: T201 - progress
        sizes = ", ".join(f"{packed.kind} {packed.file.stat().st_size / 1e6:.0f} MB" for packed in files)
        print(f"image: {SIZE / 1e6:.0f} MB; {sizes}")  # noqa: T201 - the result
        head = ["", "curl | unpack | dd, s", "stage, s", "rate", "with read-back, s", "rate"]
        print(format_table(head, rows))  # noqa: T201 - the result
        if options.node:
            url = f"http://127.0.0.1:{store.http_port}/{files[1].file.name}"
            print(node(work, files[1], url, raw))  # noqa: T201 - the result
