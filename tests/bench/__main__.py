"""`./build.sh bench`: this project's initramfs against dracut's own livenet, same machine, same run, same image.

`./build.sh bench fetch` and `./build.sh bench crowd` measure the download alone, `./build.sh bench disk` the writing of
a disk, `./build.sh bench packages` the RPMs, `./build.sh bench registry` the image stages `oci` and `buildah`.

Prints medians, ratios and their spread; writes them to out/bench.json, and where the time of a boot goes as a plot
beside it (--svg names another place). Nothing here passes or fails: figures do not belong in a timed test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from anchor_build import dracut, qemu
from anchor_build.console import Console, format_table
from anchor_build.errors import AnchorError
from anchor_build.run import run, start, stop
from contrib.site import image, pki, servers
from tests.bench import crowd, disk, fetch, packages, plot, registry
from tests.stages.nfs_server import Export, nfs_server

# What systemd of any version says on the console, in the initramfs and in the booted system.
SWITCH = re.compile(r"Switch Root")
READY = re.compile(r"Reached target \S*multi-user\.target")
FAILED = re.compile(
    r"emergency mode|Kernel panic|Out of memory|dracut: Refusing to continue|Timed out waiting|could not boot"
)
# Seconds that a boot may take, and more for each MB that an image is enlarged to.
BOOT_LIMIT_S = 180.0
MB_LIMIT_S = 0.4
# MB, between which the least memory is looked for beside the image, and how exactly.
MEMORY_RANGE = (128, 1024)
MEMORY_STEP = 16
SMALL_MB = 100
POLL_S = 0.05
ANCHOR_BUILD = (sys.executable, "-m", "anchor_build", "-q")


@dataclass(frozen=True)
class Contender:
    """An initramfs and how to boot it; `program` is QEMU, if it is not the host's own."""

    name: str
    initrd: Path
    append: str
    forwards: tuple[qemu.Forward, ...] = ()
    program: str = ""


@dataclass(frozen=True)
class Boot:
    """Seconds from QEMU's start until the console shows switch_root, and multi-user; and those of each phase."""

    switch_root: float
    ready: float
    phases: dict[str, float] = field(default_factory=dict)


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds `action` took."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def boot(contender: Contender, kernel: Path, memory: str, work: Path, image_mb: int = 0) -> Boot:
    """Boot once; raises AnchorError with the end of the console when it does not come up in time."""
    console = work / "console.log"
    events = work / "events"
    for file in (console, events):
        file.write_bytes(b"")
    machine = qemu.Machine(
        kernel,
        contender.initrd,
        contender.append,
        memory=memory,
        accel="tcg",
        hostname="node1.example",
        forwards=contender.forwards,
    )
    seen: dict[str, float] = {}
    child = start(
        [contender.program or qemu.find_qemu(), *qemu.arguments(machine, work, console)], log=work / "qemu.log"
    )
    began = time.monotonic()
    try:
        limit = BOOT_LIMIT_S + image_mb * MB_LIMIT_S
        while time.monotonic() - began < limit and child.poll() is None:
            text = console.read_text(encoding="utf-8", errors="replace")
            for name, what in (("switch_root", SWITCH), ("ready", READY)):
                if name not in seen and what.search(text):
                    seen[name] = time.monotonic() - began
            if "ready" in seen:
                return Boot(**seen, phases=plot.phases(text, events.read_text(encoding="utf-8", errors="replace")))
            if FAILED.search(text):
                break
            time.sleep(POLL_S)
        raise AnchorError(f"{contender.name} with {memory} did not come up:\n{text[-1500:]}")
    finally:
        stop(child)


def build_livenet(site: image.SiteImage, output: Path, work: Path) -> None:
    """Build dracut's own network live image as dracut.cmdline(7) and dracut.conf(5) describe it."""
    found = dracut.find_dracut()
    argv = [
        str(found.program),
        "--force",
        "--no-hostonly",
        "--no-hostonly-cmdline",
        "--tmpdir",
        str(work),
        "--add",
        "livenet dmsquash-live network-legacy",
        "--add-drivers",
        "virtio_pci virtio_net",
        "--kmoddir",
        str(site.modules),
        "--kver",
        site.release,
        str(output),
    ]
    run(argv, log=work / "livenet.log")


def build_ours(site: image.SiteImage, ca: Path, output: Path, auth: str, *options: str) -> None:
    """Build with the command that a user runs."""
    argv = [*ANCHOR_BUILD, "initramfs", "--auth", auth, "--image", "squashfs", *options]
    run([*argv, "--no-cache", "--ca", ca, "--kernel", site.kernel, "--modules", site.modules, "-o", output])


def add_tree(squashfs: Path, output: Path) -> str:
    """Make the same image with a hash tree, with the command that a user runs; return the tree's root hash."""
    told = run([*ANCHOR_BUILD, "image", squashfs, "--verity", "--json", "-o", output]).stdout
    return str(json.loads(told)["verity"])


def least_memory(contender: Contender, kernel: Path, work: Path, image_mb: int) -> int | None:
    """Return the least memory in MB, to MEMORY_STEP, with which the node still comes up; nothing where it never does.

    An image of more than 100 MB comes on top of MEMORY_RANGE. There are as many tries as halvings of MEMORY_RANGE.
    """
    more = image_mb if image_mb > SMALL_MB else 0
    low, high = ((size + more) // MEMORY_STEP for size in MEMORY_RANGE)
    enough = None
    while low < high:
        middle = (low + high) // 2
        try:
            boot(contender, kernel, f"{middle * MEMORY_STEP}M", work, image_mb)
        except AnchorError:
            low = middle + 1
        else:
            high = middle
            enough = middle * MEMORY_STEP
    return enough


def enlarge(site: image.SiteImage, megabytes: int, work: Path) -> image.SiteImage:
    """Return the image with a file of random bytes added, so that it has about so many MB."""
    large, padding = work / "large.squashfs", work / "padding"
    large.write_bytes(site.squashfs.read_bytes())
    with padding.open("wb") as file:
        for _ in range(max(megabytes - large.stat().st_size // 1_000_000, 0)):
            file.write(os.urandom(1_000_000))
    run(["mksquashfs", padding, large, "-quiet", "-no-progress"])
    padding.unlink()
    with large.open("rb") as file:
        return replace(site, squashfs=large, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def spread(values: list[float]) -> str:
    """Return the median with the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def contenders(site: image.SiteImage, work: Path, stack: ExitStack) -> dict[str, Contender]:
    """Start the servers for all, and say how each contender boots from them; the initramfs come later.

    "http" has none's initramfs, and fetches as livenet does. "nfs" reads the image where it is, by its root hash.
    """
    ports = servers.free_port(), servers.free_port()
    for name in ("pki", "pebble", "mtls", "plain", "www"):
        (work / name).mkdir()
    (work / "www" / "image.squashfs").symlink_to(site.squashfs)
    authority = pki.make_authority(work / "pki")
    leaf = pki.issue(authority, work / "pki", "server")
    acme = stack.enter_context(servers.pebble(work / "pebble", authority, http_port=ports[0], tls_port=ports[1]))
    mtls = stack.enter_context(
        servers.nginx(work / "mtls", root=work / "www", leaf=leaf, client_ca=acme.root, plain=False)
    )
    plain = stack.enter_context(servers.nginx(work / "plain", root=work / "www", leaf=leaf))
    (work / "export").mkdir()
    root_hash = add_tree(site.squashfs, work / "export" / "image.squashfs")
    nfs = stack.enter_context(nfs_server(work / "nfs", {"/images": Export(work / "export")}))
    digest = f"rd.anchor.squashfs.sha256={site.sha256}"
    live = f"root=live:http://10.0.2.2:{plain.http_port}/image.squashfs ip=dhcp rd.neednet=1 rd.live.image"
    ours = f"root=anchor rd.anchor.squashfs.url=https://10.0.2.2:{plain.https_port}/image.squashfs {digest}"
    ours_http = f"root=anchor rd.anchor.squashfs.url=http://10.0.2.2:{plain.http_port}/image.squashfs {digest}"
    with_acme = (
        f"root=anchor rd.anchor.acme.server=https://10.0.2.2:{acme.port}/dir {digest} "
        f"rd.anchor.squashfs.url=https://10.0.2.2:{mtls.https_port}/image.squashfs"
    )
    in_place = (
        f"root=anchor rd.anchor.squashfs.url=nfs://10.0.2.2:{nfs.port}/images/image.squashfs "
        f"rd.anchor.squashfs.verity={root_hash}"
    )
    forward = (qemu.Forward(80, ports[0]),)
    return {
        "livenet": Contender("livenet", work / "livenet.img", f"{live} rd.live.overlay.overlayfs=1"),
        "none": Contender("none", work / "none.img", ours),
        "http": Contender("http", work / "none.img", ours_http),
        "acme": Contender("acme", work / "acme.img", with_acme, forward),
        "nfs": Contender(
            "nfs", work / "nfs.img", in_place, program=str(nfs.wrapped(Path(qemu.find_qemu()), work / "bin"))
        ),
    }


def measure(
    options: argparse.Namespace, work: Path, stack: ExitStack, console: Console
) -> dict[str, dict[str, object]]:
    """Build and boot every contender in turn, so that a drift of the machine's speed meets all alike."""
    cache = image.CACHE
    with console.step("prepare the image and the servers"):
        key = image.login_key(cache)
        site = image.build_image(cache, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8"))
        if options.image_mb:
            site = enlarge(site, options.image_mb, work)
        rivals = contenders(site, work, stack)
    ca = work / "pki" / "ca.crt"
    builders: dict[str, Callable[[], None]] = {
        "livenet": lambda: build_livenet(site, rivals["livenet"].initrd, work),
        "none": lambda: build_ours(site, ca, rivals["none"].initrd, "none"),
        "acme": lambda: build_ours(site, ca, rivals["acme"].initrd, "acme"),
        "nfs": lambda: build_ours(site, ca, rivals["nfs"].initrd, "none", "--transport", "nfs"),
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in rivals}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
    failed = dict.fromkeys(rivals, 0)
    for n in range(options.runs):
        for name, contender in rivals.items():
            with console.step(f"run {n + 1} of {options.runs}: build and boot {name}"):
                if name in builders:
                    seconds[name].setdefault("build s", []).append(timed(builders[name]))
                try:
                    result = boot(contender, site.kernel, options.node_memory, work, options.image_mb)
                except AnchorError as error:
                    # A run of half an hour is not given up for one boot; the result says that there was one.
                    console.warn(str(error))
                    failed[name] += 1
                    result = boot(contender, site.kernel, options.node_memory, work, options.image_mb)
                seconds[name].setdefault("switch_root s", []).append(result.switch_root)
                seconds[name].setdefault("ready s", []).append(result.ready)
                phases[name].append(result.phases)
        # What an interrupted run has is not lost.
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"seconds": seconds, "phases": phases}) + "\n", encoding="utf-8")
    results: dict[str, dict[str, object]] = {}
    for name, contender in rivals.items():
        size = contender.initrd.stat().st_size
        results[name] = {"initramfs MB": round(size / 1e6, 1)}
        results[name]["initramfs / livenet"] = round(size / rivals["livenet"].initrd.stat().st_size, 2)
        results[name] |= {what: spread(values) for what, values in seconds[name].items()}
        if failed[name]:
            results[name]["boots that failed, and were repeated"] = failed[name]
        for what, values in seconds[name].items():
            base = seconds["livenet"][what]
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            results[name][what.replace(" s", " / livenet")] = spread(ratios)
        if options.memory and name in builders:  # the others boot one of theirs
            with console.step(f"least memory: {name}"):
                results[name]["least memory MB"] = least_memory(contender, site.kernel, work, options.image_mb)
        results[name] |= {f"{what} s": round(value, 2) for what, value in plot.medians(phases[name]).items()}
    results["image"] = {"initramfs MB": round(site.squashfs.stat().st_size / 1e6, 1)}
    return results


def draw(results: dict[str, dict[str, object]], names: list[str]) -> str:
    """Return the plot: the phases until switch_root where a node tells them, else one bar of the whole."""
    bars: dict[str, dict[str, float]] = {}
    for name in names:
        known = {what: value for what in plot.COLOURS if isinstance(value := results[name].get(f"{what} s"), float)}
        whole = float(str(results[name]["switch_root s"]).partition(" ")[0])
        # What the node does not tell: firmware, boot loader, and with another initramfs all that follows the kernel.
        bars[name] = {**known, "all": max(whole - sum(known.values()), 0.0)}
    return plot.svg("Seconds from power on until switch_root", bars)


def main() -> None:
    """Run everything, print the table and write the figures."""
    # Who gives up leaves nothing behind: a gigabyte in memory, or a loop device.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    benches = {"fetch": fetch, "crowd": crowd, "disk": disk, "packages": packages, "registry": registry}
    for name, bench in benches.items():
        if sys.argv[1:2] == [name]:
            bench.main(sys.argv[2:])
            return
    parser = argparse.ArgumentParser(prog="build.sh bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="builds and boots of each contender")
    parser.add_argument("--memory", action="store_true", help="also look for the least memory that boots")
    parser.add_argument("--image-mb", type=int, default=0, help="enlarge the image to so many MB, such as 1000")
    parser.add_argument("--node-memory", default="2G", help="the nodes' memory, such as 4G for an image of 1000 MB")
    parser.add_argument("--svg", type=Path, help="where the plot goes; beside --output without it")
    parser.add_argument("--output", type=Path, default=Path("out/bench.json"), help="where the figures go as JSON")
    options = parser.parse_args()
    # What is measured does not depend on this host's profiles.
    os.environ["ANCHOR_BUILD_CONFIG"] = os.devnull
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anchor-bench-")))
        results = measure(options, work, stack, Console())
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    names = [name for name in results if name != "image"]
    (options.svg or options.output.with_suffix(".svg")).write_text(draw(results, names), encoding="utf-8")
    figures = list(dict.fromkeys(figure for name in names for figure in results[name]))
    rows = [[figure, *(results[name].get(figure, "") for name in names)] for figure in figures]
    print(f"image: {results['image']['initramfs MB']} MB squashfs")  # noqa: T201 - the result
    print(format_table(["median (least to most)", *names], rows))  # noqa: T201 - the result


if __name__ == "__main__":
    main()
