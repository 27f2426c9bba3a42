"""Nodes that really boot, each its own way: older entries, no authentication, hostile text, every kind of failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchor_build import qemu
from contrib.site import servers
from tests.integration.conftest import LIMIT_S, WRONG_SHA256, BuildInitramfs, Site, booted

pytestmark = [pytest.mark.boot, pytest.mark.slow]


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
        f"rd.anchor.squashfs.sha256={WRONG_SHA256} rd.anchor.on_failure=poweroff {site.report} "
        '"rd.anchor.acme.eab_kid=$(reboot);reboot -f;`reboot -f`" "rd.anchor.overlay.write=/$(reboot -f);reboot"'
    )
    result = qemu.boot(site.machine(initrd, append), timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.outcome == "failed"
    assert WRONG_SHA256 in result.reason
    assert site.root_image.sha256 in result.reason
    assert "digest on the command line" in result.hint
    # The machine is gone: what it had to say came before.
    *_, failed = (event for event in site.reports.events() if event["event"] == "failed")
    assert (failed["step"], failed["stage"], failed["on_failure"]) == ("image", "squashfs", "poweroff")
    assert WRONG_SHA256 in failed["error"]
    assert any("this node could not boot: step image (squashfs) failed" in line for line in failed["log"])
    assert 5 < len(failed["log"]) <= 20


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
