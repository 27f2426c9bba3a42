"""A node that joins with a token from its SMBIOS, and gets manifest and image from S3 with what the server gave it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build.manifest import Manifest, manifest_text
from contrib.site import pki, servers
from contrib.token import store
from contrib.token.server import Settings, serving
from tests.integration.conftest import BuildInitramfs, Site, booted
from tests.stages.s3_node import need_swift

pytestmark = [pytest.mark.boot, pytest.mark.slow]
NODE = "node1.demo.example"


def test_a_node_joins_once_and_boots_from_s3(site: Site, build_initramfs: BuildInitramfs, tmp_path: Path) -> None:
    need_swift()
    initrd = build_initramfs("--auth", "token", "--transport", "s3", "--image", "squashfs")
    leaf = pki.issue(site.authority, tmp_path, "services")
    swift = servers.swift_s3(tmp_path / "swift", leaf=leaf, ca=site.authority.certificate)
    tokens = tmp_path / "tokens"
    with swift as s3, serving(Settings(tokens, site.authority, leaf)) as server:
        s3.make_bucket("images")
        s3.put("images", "el9/node.squashfs", site.root_image.squashfs)
        size, created = site.root_image.squashfs.stat().st_size, int(time.time()) - 60
        said = Manifest(
            image="squashfs", sha256=site.root_image.sha256, size=size, created=created, file="node.squashfs"
        )
        manifest = tmp_path / "manifest"
        manifest.write_text(manifest_text(said))
        s3.put("images", "el9/a b+c.manifest", manifest)
        given = tmp_path / "s3-credentials"
        given.write_text(f"access_key={s3.access_key}\nsecret_key={s3.secret_key}\n")
        token = store.issue(tokens, NODE, 600, str(given))
        oem = tmp_path / "oem"
        oem.write_text(f"anchor-token={token}")
        append = (
            f"root=anchor rd.anchor.token.server=10.0.2.2:{server.server_port}/join "
            "rd.anchor.manifest=s3://images/el9/a%20b%2Bc.manifest "
            f"rd.anchor.s3.endpoint=10.0.2.2:{s3.port} rd.anchor.s3.region={s3.region} rd.anchor.on_failure=poweroff"
        )
        machine = replace(site.machine(initrd, append), oem_files=(oem,))
        with booted(site, machine, tmp_path) as node:
            steps = {step["step"]: step for step in node.report["steps"]}
            assert (steps["auth"]["stage"], steps["auth"]["from"]) == ("token", "smbios")
            assert steps["image"]["sha256"] == steps["manifest"]["image_sha256"] == site.root_image.sha256
            assert steps["manifest"]["url"] == "s3://images/el9/a%20b%2Bc.manifest"
            for name in ("client.crt", "client.key", "s3"):
                file = node.host.file(f"/run/anchor/credentials/{name}")
                assert (file.mode, file.user) == (0o600, "root")
            logs = node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log /run/anchor/boot.json")
            assert "join token: smbios" in logs
            assert [secret for secret in (token, s3.secret_key) if secret in logs] == []
            assert not node.host.file("/run/anchor/token").exists
        known = store.load(tokens, token)
        assert known is not None
        assert known.used > 0
        assert json.dumps(known.answer).count("BEGIN CERTIFICATE") == 1
        for key in ("a%20b%2Bc.manifest", "node.squashfs"):
            assert f'"GET /images/el9/{key} HTTP/1.1" 200' in s3.access_log.read_text()
