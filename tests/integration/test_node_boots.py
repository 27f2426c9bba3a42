"""Nodes that really boot, each its own way: an older entry in little memory, and hostile text."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchor_build import qemu
from contrib.site import pki, servers
from tests.integration.conftest import LIMIT_S, WRONG_SHA256, BuildInitramfs, Site, booted

pytestmark = [pytest.mark.boot, pytest.mark.slow]


def test_an_anchor_0_1_5_command_line_boots_in_256_mb(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    """And newer words beside the older ones: TLS-ALPN, an account that is bound to the site's, an RSA key."""
    kid, key = "kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    secret = tmp_path / "eab-key"
    secret.write_text(f"{key}\n")
    initrd = build_initramfs(
        *("--auth", "acme", "--image", "squashfs", "--set", f"rd.anchor.acme.eab_key=@{secret}"),
        *("--set", f"rd.anchor.acme.eab_kid={kid}"),
    )
    leaf = pki.issue(site.authority, tmp_path, "store")
    with (
        servers.pebble(tmp_path / "acme", site.authority, http_port=1, tls_port=site.tls_port, eab={kid: key}) as acme,
        servers.nginx(
            tmp_path / "store", root=site.root_image.squashfs.parent, leaf=leaf, client_ca=acme.root, plain=False
        ) as store,
    ):
        append = (
            f"root=anchor acme_server=10.0.2.2:{acme.port}/dir acme_email=root@example.org "
            f"squashfs_server=https://10.0.2.2:{store.https_port}/{site.root_image.squashfs.name} squashfs_curl=1 "
            "overlayfs_size=40% overlayfs_write=/etc,/var,/root,/tmp "
            "rd.anchor.acme.challenge=tls-alpn-01 rd.anchor.acme.key_type=rsa-2048"
        )
        with booted(site, site.machine(initrd, append, memory="256M"), tmp_path) as node:
            assert node.host.mount_point("/").filesystem == "squashfs"
            assert node.host.mount_point("/etc").filesystem == "overlay"
            assert node.host.run("touch /etc/x /var/x /root/x").rc == 0
            assert node.host.run("touch /usr/x").rc != 0
            assert node.report["result"] == "ok"
            kind = node.host.file("/run/anchor/credentials/client.key").content_string.splitlines()[0]
            logs = node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log")
            assert "PRIVATE KEY" in kind
            assert key not in logs


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
