"""Each generation of dracut boots to multi-user, over each network back end that it has, in every kind of network.

The initramfs of each is built in a root of that generation, and boots with that root's kernel. The full cross product
of all dimensions would be some 600 boots. Instead each back end of each generation meets each kind of network, and what
remains (systemd in the initramfs or dracut's script, dash or bash, with or without ACME) is dealt out so that every
generation boots each value of it: see `combinations`. What a generation does not have is asked for too: the build has
to say why. `./build.sh test --matrix` runs all and writes doc/generations.md; else a subset runs, SHORT.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchor_build import qemu
from anchor_build.bootwatch import BootResult
from anchor_build.events import SwitchRoot
from tests.integration import generations_table as table
from tests.integration.conftest import LIMIT_S, Site
from tests.integration.generations_table import Combination
from tests.integration.roots import CACHE, debian_root, package_version
from tests.integration.test_faults_booted import Wires, wired
from tests.stages.hostile_http import hostile, whole

pytestmark = [pytest.mark.boot, pytest.mark.slow]

VLAN = 7
STATIC = "ip=10.0.2.77::10.0.2.2:255.255.255.0:static.example:eth0:off"
# What a node is told, and the interface and the beginning of the address that it has to come up with.
NETWORKS = {
    "dhcp": ("", "eth0", "10.0.2.15"),
    "static": (STATIC, "eth0", "10.0.2.77"),
    "ipv6": ("ip=eth0:auto6", "eth0", "fd07::"),
    "vlan": (f"vlan=eth0.{VLAN}:eth0 ip=eth0.{VLAN}:dhcp", f"eth0.{VLAN}", "10.0.2.15"),
    "bond": ("bond=bond0:eth0,eth1:mode=active-backup,miimon=100 ip=bond0:dhcp", "bond0", "10.0.2.15"),
}
# The cards' addresses in QEMU, and those of its own end of a network.
CARDS = (bytes.fromhex("525400"), bytes.fromhex("5255"), bytes.fromhex("5256"))
FRAMES = "frames.pcap"
HUB = ("-netdev", "hubport,id=uplink,hubid=0,netdev=wan")


@dataclass(frozen=True)
class Built:
    """An initramfs of a generation, the kernel beside it, and what the build reported."""

    initrd: Path
    kernel: Path
    report: dict[str, Any]


Build = Callable[[Combination], Built]


def root_of(combination: Combination) -> Path:
    """Return the root to build in: the generation's, or a copy of it (links to the same files) whose sh is bash."""
    root = debian_root(combination.suite)
    if combination.shell == "dash":
        return root
    copy = CACHE / f"bash-{root.name}"
    if not copy.exists():
        fresh = CACHE / f"unfinished-bash-{root.name}-{os.getpid()}"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(root, fresh, symlinks=True, copy_function=os.link, ignore=shutil.ignore_patterns("dev"))
        (fresh / "bin" / "sh").unlink()
        (fresh / "bin" / "sh").symlink_to("bash")
        (fresh / "dev").mkdir()
        with suppress(OSError):  # another process was faster
            fresh.rename(copy)
        shutil.rmtree(fresh, ignore_errors=True)
    return copy


def command(combination: Combination, site: Site, output: Path) -> list[str]:
    """Return the command that a user would run for it."""
    argv = [
        sys.executable,
        "-m",
        "anchor_build",
        "initramfs",
        "--auth",
        "acme",
        "--auth",
        "none",
        "--image",
        "squashfs",
    ]
    argv += ["--sysroot", str(root_of(combination)), "--network", combination.back_end]
    argv += ["--systemd" if combination.init == "systemd" else "--no-systemd"]
    return [*argv, "--ca", str(site.authority.certificate), "-o", str(output)]


@pytest.fixture(scope="session")
def build(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build the initramfs of a combination; boots that differ in what they are told share one."""
    built: dict[tuple[str, ...], Built] = {}

    def of(combination: Combination) -> Built:
        key = (combination.suite, combination.back_end, combination.init, combination.shell)
        if key not in built:
            output = tmp_path_factory.mktemp("generation") / "node.img"
            done = subprocess.run(command(combination, site, output), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            report = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
            built[key] = Built(output, output.parent / report["kernel_file"], report)
        return built[key]

    return of


@contextmanager
def switch(node: Path, uplink: Path) -> Iterator[None]:
    """Stand between a port where all frames carry the tag of VLAN 7 (IEEE 802.1Q) and one where none does.

    Both are sockets of QEMU's dgram network at these paths with `.peer` behind them.
    """
    tag = bytes.fromhex("8100") + VLAN.to_bytes(2, "big")
    over = threading.Event()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inner,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outer,
    ):
        for port, path in ((inner, node), (outer, uplink)):
            port.bind(f"{path}.peer")
            port.settimeout(0.2)

        def carry(source: socket.socket, sink: socket.socket, target: Path, *, tagged: bool) -> None:
            while not over.is_set():
                with suppress(TimeoutError, FileNotFoundError, ConnectionRefusedError):
                    frame = source.recv(65536)
                    if tagged:
                        # Another VLAN's frames, and those without a tag, go nowhere.
                        if frame[12:14] != tag[:2] or int.from_bytes(frame[14:16], "big") & 0xFFF != VLAN:
                            continue
                        frame = frame[:12] + frame[16:]
                    else:
                        frame = frame[:12] + tag + frame[12:]
                    sink.sendto(frame, str(target))

        threads = [
            threading.Thread(target=carry, args=(inner, outer, uplink), kwargs={"tagged": True}),
            threading.Thread(target=carry, args=(outer, inner, node), kwargs={"tagged": False}),
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def unix(name: str, path: Path) -> str:
    """Return QEMU's option for a network of frames as datagrams between two sockets."""
    return f"dgram,id={name},local.type=unix,local.path={path},remote.type=unix,remote.path={path}.peer"


@contextmanager
def cabled(network: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let QEMU start with the cables of one kind of network."""
    if network == "ipv6":
        with wired(Wires(network="user,id=net0,ipv4=off,ipv6-net=fd07::/64"), directory, monkeypatch):
            yield
    elif network == "bond":
        options = ["-netdev", "hubport,id=net0,hubid=0", *HUB, "-netdev", "hubport,id=net1,hubid=0"]
        options += ["-device", "virtio-net-pci,netdev=net1,romfile="]
        options += ["-object", f"filter-dump,id=dump,netdev=wan,file={directory / FRAMES}"]
        with wired(Wires(tuple(options), network="user,id=wan"), directory, monkeypatch):
            yield
    elif network == "vlan":
        node, uplink = directory / "node", directory / "uplink"
        options = ["-netdev", unix("net0", node), "-netdev", unix("trunk", uplink)]
        options += ["-netdev", "hubport,id=port,hubid=0,netdev=trunk", *HUB]
        with wired(Wires(tuple(options), network="user,id=wan"), directory, monkeypatch), switch(node, uplink):
            yield
    else:
        yield


def append(combination: Combination, site: Site, url: str) -> str:
    """Return the node's command line."""
    words = ["root=anchor net.ifnames=0 rd.anchor.on_failure=poweroff", NETWORKS[combination.network][0]]
    if combination.auth == "acme":
        words += [f"rd.anchor.acme.server={site.acme_server} rd.anchor.acme.email=root@example.org"]
        words += [f"rd.anchor.squashfs.url={site.url}"]
    else:
        words += [f"rd.anchor.auth=none rd.anchor.squashfs.url={url} {site.digest}"]
    return " ".join(words)


def boot(
    combination: Combination, built: Built, site: Site, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> BootResult:
    """Boot a node of this combination to multi-user."""
    machine = site.machine(built.initrd, "")
    console = directory / "console.log"
    if combination.network == "ipv6":
        # QEMU forwards ports to IPv4 addresses only, and the site's servers listen there.
        data = site.root_image.squashfs.read_bytes()
        with hostile(whole(data), host="::1") as server, cabled("ipv6", directory / "wires", monkeypatch):
            words = append(combination, site, f"http://[fd07::2]:{server.port}/image.squashfs")
            machine = qemu.Machine(built.kernel, built.initrd, words, memory="1G", accel="tcg")
            return qemu.boot(machine, timeout=LIMIT_S, console=console)
    words = append(combination, site, site.open_url)
    machine = qemu.Machine(**{**vars(machine), "kernel": built.kernel, "append": words})
    with cabled(combination.network, directory / "wires", monkeypatch):
        return qemu.boot(machine, timeout=LIMIT_S, console=console)


def senders(dump: Path) -> set[bytes]:
    """Return the addresses that sent a frame, by what QEMU's filter-dump wrote (pcap-savefile(5), little-endian)."""
    data = dump.read_bytes()
    found, at = set(), 24
    while at + 16 <= len(data):
        found.add(data[at + 22 : at + 28])
        at += 16 + int.from_bytes(data[at + 8 : at + 12], "little")
    return found


def wrong(combination: Combination, boot_json: Mapping[str, Any], directory: Path) -> str:
    """Return what is wrong with the network that a node came up with, or nothing."""
    step = next(step for step in boot_json["steps"] if step["step"] == "network")
    _, interface, address = NETWORKS[combination.network]
    if step["interface"] != interface or not step["address"].startswith(address):
        return f"the node came up with {step['address']} at {step['interface']}"
    if combination.network == "bond":
        console = (directory / "console.log").read_text(encoding="utf-8", errors="replace")
        # What the kernel says of a port in the mode active-backup only.
        if "Enslaving as a backup interface" not in console:
            return "the bond is not in the mode active-backup"
        if re.search(r"\(slave eth\d\): Releasing \w+ interface", console):
            return "the image took a port out of the bond"
        # A DHCP server knows the cards' addresses, not what somebody made up for the bond.
        made_up = [mac.hex(":") for mac in senders(directory / "wires" / FRAMES) if not mac.startswith(CARDS)]
        if made_up:
            return f"the bond has the address {made_up[0]}"
    return ""


@pytest.mark.parametrize("combination", [pytest.param(c, id=c.name) for c in table.combinations()])
def test_it_boots_to_multi_user(
    combination: Combination, build: Build, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(combination)
    result = boot(combination, built, site, tmp_path, monkeypatch)
    switched = next((event.at_ms for event in result.events if isinstance(event, SwitchRoot)), 0)
    ready = (result.boot_json or {}).get("ready_ms", 0)
    problem = result.reason or wrong(combination, result.boot_json or {}, tmp_path)
    table.record(
        combination,
        built.report,
        systemd=package_version(root_of(combination), "systemd"),
        switched_ms=switched,
        ready_ms=ready,
        reason=problem,
    )
    assert problem == "", result


@pytest.mark.parametrize("refusal", [pytest.param(r, id=f"{r.suite}-{r.back_end}-{r.init}") for r in table.refusals()])
def test_the_build_says_what_a_generation_cannot_do(refusal: table.Refusal, site: Site, tmp_path: Path) -> None:
    combination = Combination(refusal.suite, refusal.back_end, refusal.init, "dash", "none", "dhcp")
    output = tmp_path / "node.img"
    done = subprocess.run(command(combination, site, output), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert refusal.says in done.stderr
    assert list(tmp_path.iterdir()) == []
    said = next(line for line in done.stderr.splitlines() if refusal.says in line)
    table.record_refusal(
        refusal, said.removeprefix("error: ").removeprefix("hint: ").replace(f" in {root_of(combination)}", "")
    )
