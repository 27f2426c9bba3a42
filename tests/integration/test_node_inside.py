"""A node with a certificate and an image over mutual TLS, looked at from inside with testinfra."""

from __future__ import annotations

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.conftest import BuildInitramfs, Node, Site, booted

pytestmark = [pytest.mark.boot, pytest.mark.slow]


@contextmanager
def ntp_server(directory: Path) -> Iterator[None]:
    """Run a real NTP server on loopback's port 123, which is where a node's 10.0.2.2 leads; it sets no clock."""
    config = directory / "chrony.conf"
    config.write_text(
        f"local stratum 1\nallow 127.0.0.0/8\nbindaddress 127.0.0.1\ncmdport 0\npidfile {directory}/chronyd.pid\n"
        f"bindcmdaddress /\n"
    )
    with (directory / "chronyd.log").open("wb") as log:
        server = subprocess.Popen(["chronyd", "-x", "-d", "-u", "root", "-f", str(config)], stdout=log, stderr=log)
    try:
        time.sleep(0.5)
        assert server.poll() is None, (directory / "chronyd.log").read_text()
        yield
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def acme_node(site: Site, build_initramfs: BuildInitramfs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Boot a node that gets a certificate, whose clock started in 1970 and was set by NTP."""
    work = tmp_path_factory.mktemp("acme-node")
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor rd.anchor.acme.server={site.acme_server} rd.anchor.squashfs.url={site.url} {site.digest} "
        f"rd.anchor.clock.ntp=10.0.2.2 rd.anchor.on_failure=poweroff {site.report}"
    )
    with ntp_server(work), booted(site, site.machine(initrd, append, rtc="1970-01-01"), work) as node:
        yield node


def test_root_is_a_writable_overlay_on_the_squashfs(acme_node: Node) -> None:
    root = acme_node.host.mount_point("/")
    assert root.filesystem == "overlay"
    assert acme_node.host.mount_point("/run/anchor/lower").filesystem == "squashfs"
    assert acme_node.host.run("echo changed > /etc/motd && cat /etc/motd").stdout == "changed\n"
    assert acme_node.host.run("touch /run/anchor/lower/x").rc != 0
    assert acme_node.host.file("/mnt/overlay_writable").is_directory


def test_there_is_one_copy_of_the_image_in_memory(acme_node: Node, site: Site) -> None:
    used = int(acme_node.host.check_output("df --output=used -B1 /run/anchor/image | tail -n 1"))
    size = site.root_image.squashfs.stat().st_size
    assert size <= used < size * 1.02
    assert int(acme_node.host.check_output("df --output=used -B1 /run | tail -n 1")) < 20_000_000


@pytest.mark.parametrize("name", ["client.crt", "client.key"])
def test_credentials_are_for_root_alone(acme_node: Node, name: str) -> None:
    directory = acme_node.host.file("/run/anchor/credentials")
    file = acme_node.host.file(f"/run/anchor/credentials/{name}")
    assert (directory.mode, directory.user) == (0o700, "root")
    assert (file.mode, file.user, file.size > 100) == (0o600, "root", True)


def test_nothing_secret_is_in_the_logs(acme_node: Node) -> None:
    key = acme_node.host.file("/run/anchor/credentials/client.key").content_string.splitlines()
    assert key[0].startswith("-----BEGIN")
    logs = acme_node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log /run/anchor/boot.json")
    assert "dracut" in logs
    assert not [line for line in key[1:-1] if line in logs]
    assert "PRIVATE KEY" not in logs


def test_boot_json_is_complete(acme_node: Node, site: Site) -> None:
    report = acme_node.report
    steps = {step["step"]: step for step in report["steps"]}
    assert list(steps) == ["network", "clock", "auth", "image", "mount", "overlay"]
    assert all(step["result"] == "ok" and step["duration_ms"] >= 0 for step in report["steps"])
    assert steps["image"]["sha256"] == site.root_image.sha256
    assert steps["image"]["bytes"] == site.root_image.squashfs.stat().st_size
    assert (report["result"], report["node"], report["kernel"]) == ("ok", "node1.demo.example", site.root_image.release)
    assert report["steps"][-1]["start_ms"] < report["switch_root_ms"] < report["ready_ms"]
    assert acme_node.result.boot_json == report


def test_the_clock_was_set_before_the_first_tls(acme_node: Node) -> None:
    assert abs(int(acme_node.host.check_output("date +%s")) - time.time()) < 5
    clock = next(step for step in acme_node.report["steps"] if step["step"] == "clock")
    assert clock["source"] == "ntp"


def test_every_step_was_reported_over_tls(acme_node: Node, site: Site) -> None:
    """The image has no curl: all that the receiver knows came from the initramfs."""
    boot = acme_node.host.file("/proc/sys/kernel/random/boot_id").content_string.strip()
    events = [event for event in site.reports.events() if event["boot_id"] == boot]
    assert [event["event"] for event in events] == ["boot", *["begin", "end"] * 6, "switch_root"]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {event["node"] for event in events} == {"node1.demo.example"}
    envelope = {"event", "node", "machine", "boot_id", "seq", "received", "from"}
    ends = [{key: event[key] for key in event.keys() - envelope} for event in events if event["event"] == "end"]
    assert ends == acme_node.report["steps"]
    assert ends[3]["bytes"] == site.root_image.squashfs.stat().st_size


def test_its_sysfs_tells_its_drivers(acme_node: Node, tmp_path: Path) -> None:
    """As doc/building.md says; the node has no Python."""
    listed = "find . \\( -type d -o -type l \\) -print0 | tar -cz --null --no-recursion -T -"
    packed = acme_node.host.check_output(f"cd /sys && {listed} | base64 -w 0")
    (tmp_path / "sys").mkdir()
    subprocess.run(["tar", "-xz", "-C", tmp_path / "sys"], input=base64.b64decode(packed), check=True)
    argv = [sys.executable, "-m", "anchor_build", "drivers", "--from-host", "--sysfs", str(tmp_path / "sys")]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    drivers = {line.split()[0]: line for line in told.splitlines() if not line.startswith("#")}
    loaded = {line.split()[0] for line in acme_node.host.check_output("cat /proc/modules").splitlines()}
    assert {"virtio_net", "virtio_pci", "virtio_rng"} <= drivers.keys() <= loaded
    step = next(step for step in acme_node.report["steps"] if step["step"] == "network")
    assert f"({step['interface']})" in drivers["virtio_net"]


def test_the_store_saw_the_nodes_certificate(acme_node: Node, site: Site) -> None:
    assert acme_node.result.ok
    served = [line for line in site.store.access_log.read_text().splitlines() if "GET /image.squashfs" in line]
    assert served
    assert all('"CN=' in line for line in served)
