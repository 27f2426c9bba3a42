"""Nodes that really boot: the whole way from the kernel to multi-user, looked at from inside with testinfra."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra

from anchor_build import qemu
from anchor_build.bootwatch import BootResult
from tests.integration.conftest import WRONG_SHA256, BuildInitramfs, Site

pytestmark = [pytest.mark.boot, pytest.mark.slow]
LIMIT_S = 150.0


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
def booted(site: Site, machine: qemu.Machine, tmp_path: Path) -> Iterator[Node]:
    """Boot a node to multi-user and log in to it."""
    with qemu.running(machine, timeout=LIMIT_S, console=tmp_path / "console.log") as result:
        config = tmp_path / "ssh_config"
        config.write_text(
            f"Host node\n HostName 127.0.0.1\n Port {result.forwards[22]}\n User root\n"
            f" IdentityFile {site.login_key.resolve()}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
            " ConnectTimeout 20\n LogLevel ERROR\n"
        )
        yield Node(result, testinfra.get_host("ssh://node", ssh_config=str(config)))


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
    """A node with a certificate, whose clock started in 1970 and was set by NTP."""
    work = tmp_path_factory.mktemp("acme-node")
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor rd.anchor.acme.server={site.acme_server} rd.anchor.squashfs.url={site.url} {site.digest} "
        "rd.anchor.clock.ntp=10.0.2.2 rd.anchor.on_failure=poweroff"
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
    everything = acme_node.host.check_output("du -xsb / 2>/dev/null | cut -f1; df --output=used -B1 /run | tail -n 1")
    assert int(everything.split()[1]) < 20_000_000


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


def test_the_store_saw_the_nodes_certificate(acme_node: Node, site: Site) -> None:
    assert acme_node.result.ok
    served = [line for line in site.store.access_log.read_text().splitlines() if "GET /image.squashfs" in line]
    assert served
    assert all('"CN=' in line for line in served)


def test_an_anchor_0_1_5_command_line_boots_in_384_mb(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor acme_server={site.acme_server} acme_email=root@example.org squashfs_server={site.url} "
        "squashfs_curl=1 overlayfs_size=40% overlayfs_write=/etc,/var,/root,/tmp"
    )
    with booted(site, site.machine(initrd, append, memory="384M"), tmp_path) as node:
        assert node.host.mount_point("/").filesystem == "squashfs"
        assert node.host.mount_point("/etc").filesystem == "overlay"
        assert node.host.run("touch /etc/x /var/x /root/x").rc == 0
        assert node.host.run("touch /usr/x").rc != 0
        assert node.report["result"] == "ok"


def test_a_node_without_authentication_boots_over_plain_http_by_digest(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor rd.anchor.auth=none rd.anchor.squashfs.url={site.open_url} {site.digest} "
        "ip=10.0.2.77::10.0.2.2:255.255.255.0:static.example:eth0:off net.ifnames=0"
    )
    result = qemu.boot(site.machine(initrd, append), timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.ok, result
    report = result.boot_json
    assert report is not None
    assert report["node"] == "static.example"
    network = next(step for step in report["steps"] if step["step"] == "network")
    assert network["address"] == "10.0.2.77"


def test_hostile_text_stays_text_and_a_wrong_digest_ends_in_poweroff(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor rd.anchor.auth=none rd.anchor.squashfs.url={site.open_url} "
        f"rd.anchor.squashfs.sha256={WRONG_SHA256} rd.anchor.on_failure=poweroff "
        '"rd.anchor.acme.eab_kid=$(reboot);reboot -f;`reboot -f`" "rd.anchor.overlay.write=/$(reboot -f);reboot"'
    )
    result = qemu.boot(site.machine(initrd, append), timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.outcome == "failed"
    assert WRONG_SHA256 in result.reason
    assert site.root_image.sha256 in result.reason
    assert "sha256" in result.hint


def test_a_wrong_parameter_is_explained_on_the_console(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--auth", "acme", "--auth", "none", "--image", "squashfs")
    append = (
        f"root=anchor rd.anchor.squashfs.url={site.open_url} rd.anchor.fetch.attempts=many rd.anchor.sqashfs.sha256=x "
        "rd.anchor.on_failure=poweroff"
    )
    console = tmp_path / "console.log"
    result = qemu.boot(site.machine(initrd, append), timeout=LIMIT_S, console=console)
    assert result.outcome == "failed"
    for name in ("rd.anchor.fetch.attempts", "rd.anchor.sqashfs.sha256", "rd.anchor.squashfs.url"):
        assert name in result.reason
    assert "anchor-build check" in result.hint


def test_tls_alpn_and_account_binding_with_an_rsa_key(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    from contrib.site import servers

    kid, key = "kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    secret = tmp_path / "eab-key"
    secret.write_text(f"{key}\n")
    initrd = build_initramfs(
        *("--auth", "acme", "--image", "squashfs", "--set", f"rd.anchor.acme.eab_key=@{secret}"),
        *("--set", f"rd.anchor.acme.eab_kid={kid}"),
    )
    with servers.pebble(tmp_path / "acme", site.authority, http_port=1, tls_port=site.tls_port, eab={kid: key}) as acme:
        append = (
            f"root=anchor rd.anchor.acme.server=10.0.2.2:{acme.port}/dir rd.anchor.acme.challenge=tls-alpn-01 "
            f"rd.anchor.acme.key_type=rsa-2048 rd.anchor.squashfs.url={site.open_url} {site.digest}"
        )
        with booted(site, site.machine(initrd, append), tmp_path) as node:
            kind = node.host.file("/run/anchor/credentials/client.key").content_string.splitlines()[0]
            logs = node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log")
            assert "PRIVATE KEY" in kind
            assert key not in logs
            assert node.report["result"] == "ok"
