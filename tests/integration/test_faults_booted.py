"""Booted nodes that meet faults: several in one boot that must come up all the same, or one that must end it clearly.

Each is a row or more of doc/faults.md. A node either gets the right image or powers off with the reason in its report.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build import qemu
from contrib.site import pki
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site
from tests.stages import hostile_http as fake
from tests.stages.hostile_http import Fault, hostile

pytestmark = [pytest.mark.boot, pytest.mark.slow]

FAIL = "root=anchor rd.anchor.auth=none rd.anchor.on_failure=poweroff"


@pytest.fixture(scope="module")
def initrd(build_initramfs: BuildInitramfs) -> Path:
    """Return the initramfs of all nodes here, which another file builds alike."""
    return build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")


@pytest.fixture(scope="module")
def data(site: Site) -> bytes:
    """Return the root image."""
    return site.root_image.squashfs.read_bytes()


@dataclass(frozen=True)
class Wires:
    """What else QEMU gets: options, another beginning of its network's option, and links that are down at first.

    Those in `later` come up `later_s` seconds after the start.
    """

    options: tuple[str, ...] = ()
    network: str = "user,id=net0"
    down: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    later_s: float = 0.0


@contextmanager
def wired(wires: Wires, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let QEMU start with these, its processors stopped until the links are as they should be."""
    directory.mkdir()
    control = directory / "qmp"
    wrapper = directory / qemu.PROGRAMS[0]
    extra = shlex.join([*wires.options, "-qmp", f"unix:{control},server=on,wait=off", "-S"])
    wrapper.write_text(
        "#!/bin/sh\nfor word; do\n    shift\n"
        f'    case $word in user,id=net0*) word="{wires.network}${{word#user,id=net0}}" ;; esac\n'
        f'    set -- "$@" "$word"\ndone\nexec {shlex.quote(str(qemu.find_qemu()))} "$@" {extra}\n'
    )
    wrapper.chmod(0o755)
    over = threading.Event()
    hands = threading.Thread(target=operate, args=(wires, control, over))
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    hands.start()
    try:
        yield
    finally:
        over.set()
        hands.join()
        monkeypatch.undo()


def operate(wires: Wires, control: Path, over: threading.Event) -> None:
    """Pull the cables, let the processors run, and plug the late ones in (QEMU's machine protocol)."""
    while not control.exists() and not over.wait(0.05):
        pass
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(control))
        with connection.makefile("rw") as talk:
            talk.readline()

            def tell(command: str, **arguments: object) -> None:
                talk.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                talk.flush()
                while "return" not in (answer := json.loads(talk.readline())):
                    assert "event" in answer, answer

            tell("qmp_capabilities")
            for name in wires.down:
                tell("set_link", name=name, up=False)
            tell("cont")
            if wires.later and not over.wait(wires.later_s):
                for name in wires.later:
                    tell("set_link", name=name, up=True)


def node(site: Site, initrd: Path, append: str, rtc: str = "", memory: str = "1G") -> qemu.Machine:
    """Return a node without forwards, whose network may then be of any kind."""
    return qemu.Machine(site.root_image.kernel, initrd, append, memory=memory, accel="tcg", rtc=rtc)


def test_it_boots_through_a_late_dhcp_a_dead_cable_a_busy_server_and_resets(
    site: Site, initrd: Path, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Fault] = [fake.status(503, {"Retry-After": 1}), fake.status(503)]
    faults += [fake.whole(data, sent=len(data) * percent // 100, reset=True) for percent in (1, 50)]
    # 98 percent of the file less what is there already: to the 99th percent.
    faults += [fake.whole(data, sent=len(data) * 49 // 100, reset=True), fake.whole(data)]
    wires = Wires(
        (
            # The card is on a hub and has a carrier; behind the hub nobody answers at first.
            *("-netdev", "hubport,id=net0,hubid=0", "-netdev", "hubport,id=uplink,hubid=0,netdev=wan"),
            *("-netdev", "user,id=dark", "-device", "virtio-net-pci,netdev=dark,romfile="),
        ),
        network="user,id=wan",
        down=("wan", "dark"),
        later=("wan",),
        later_s=20,
    )
    with hostile(*faults) as server, wired(wires, tmp_path / "wires", monkeypatch):
        url = f"http://10.0.2.2:{server.port}/image.squashfs"
        append = f"{FAIL} rd.anchor.squashfs.url={url} {site.digest}"
        result = qemu.boot(
            node(site, initrd, append), until="switch-root", timeout=LIMIT_S, console=tmp_path / "console.log"
        )
    assert result.ok, result
    offsets = [int(headers.get("Range", "bytes=0-")[6:-1]) for _, headers in server.requests]
    assert offsets[:3] == [0, 0, 0]
    assert 0 < offsets[3] < offsets[4] < offsets[5] < len(data)
    assert len(offsets) == 6
    console = (tmp_path / "console.log").read_text(errors="replace")
    assert console.count("answered with status 503") == 2
    assert "has the address 10.0.2.15" in console


def test_it_boots_over_ipv6_alone_from_1970_through_a_stall_a_cut_and_a_new_version(
    site: Site, initrd: Path, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = pki.issue(site.authority, tmp_path, "six", addresses=["fd07::2"])
    faults = [fake.whole(data, sent=500, stall=True), fake.whole(data, sent=len(data) // 3)]
    faults += [fake.whole(data, etag='"v2"')]
    wires = Wires(network="user,id=net0,ipv4=off,ipv6-net=fd07::/64")
    with hostile(*faults, tls=tls, host="::1") as server, wired(wires, tmp_path / "wires", monkeypatch):
        url = f"https://[fd07::2]:{server.port}/image.squashfs"
        append = (
            f"{FAIL} rd.anchor.squashfs.url={url} {site.digest} rd.anchor.fetch.stall=2s rd.anchor.clock.timeout=1s"
        )
        machine = node(site, initrd, append, rtc="1970-01-01")
        result = qemu.boot(machine, until="switch-root", timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.ok, result
    console = (tmp_path / "console.log").read_text(errors="replace")
    assert "has the address fd07::" in console
    assert "is too slow or silent" in console
    assert "the file changed on the server" in console


def test_a_clock_of_2099_boots_in_200_mb_or_ends_at_the_certificate(
    site: Site, initrd: Path, data: bytes, tmp_path: Path
) -> None:
    """In so little memory the image fits only where the initramfs gives up its drivers."""
    tls = pki.issue(site.authority, tmp_path, "store")
    with hostile(fake.whole(data), tls=tls) as server:
        append = f"{FAIL} rd.anchor.squashfs.url=https://10.0.2.2:{server.port}/x {site.digest}"
        machine = node(site, initrd, f"{append} rd.anchor.clock.timeout=1s", rtc="2099-01-01", memory="200M")
        result = qemu.boot(machine, until="switch-root", timeout=LIMIT_S, console=tmp_path / "console.log")
    if result.ok:
        # systemd 252 does not believe a clock that is 15 years ahead of its own release, and takes that for the time.
        console = (tmp_path / "console.log").read_text(errors="replace")
        assert "s before the build of this initramfs; raised" in console
        assert "memory is tight: the initramfs gave up drivers that are not in use" in console
        # The first answer named a size that did not fit.
        assert len(server.requests) == 2
    else:
        assert "has expired: the clock says 2099-01-01" in result.reason, result
        assert "set the clock" in result.hint
        assert server.requests == []


def test_an_image_larger_than_memory_ends_before_it_is_downloaded(site: Site, initrd: Path, tmp_path: Path) -> None:
    with hostile(fake.status(200, {"Content-Length": 5 << 30})) as server:
        append = f"{FAIL} rd.anchor.squashfs.url=http://10.0.2.2:{server.port}/x {site.digest}"
        machine = node(site, initrd, append)
        result = qemu.boot(machine, timeout=LIMIT_S, console=tmp_path / "console.log")
        assert len(server.requests) == 1
    assert result.outcome == "failed", result
    assert "is too large: it needs 5120.0 MiB, and " in result.reason
    assert re.search(r"of memory available, of which the initramfs needs 1[5-9]\.. MiB", result.reason)
    assert "give the node more memory" in result.hint
