"""A node that boots the site's root from a registry with a password, as two tar layers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from contrib.site import pki
from contrib.site.registry import PASSWORD, USER, registry
from tests.integration.conftest import BuildInitramfs, Site, booted
from tests.stages.oci_image import Layer, push

pytestmark = [pytest.mark.boot, pytest.mark.slow]

# The emulated processor takes a second for each 2 MB of a layer: what no boot needs is left out.
ARCHIVE = """
mount -t squashfs -o loop,ro "$1" /mnt && tar -C /mnt --numeric-owner --xattrs --xattrs-include="*" \\
    --exclude=./usr/lib/modules --exclude="./usr/*/perl*" --exclude="./usr/lib/*/perl*" --exclude="hwdb.*" \\
    --exclude=gconv --exclude="./usr/share/[i-z]*" --exclude=./var/lib/dpkg --exclude=./var/cache -cf "$2" .
"""


def test_a_node_boots_tar_layers_from_a_registry(site: Site, build_initramfs: BuildInitramfs, tmp_path: Path) -> None:
    tar = tmp_path / "root.tar"
    squashfs = site.root_image.squashfs
    subprocess.run(["unshare", "--mount", "sh", "-c", ARCHIVE, "sh", squashfs, tar], check=True, timeout=120)
    change = (
        Layer()
        .add("etc/.wh.os-release")
        .add("etc/from-layer", b"two\n")
        .directory("usr/share/doc/")
        .add("usr/share/doc/.wh..wh..opq")
    )
    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    leaf = pki.issue(site.authority, tmp_path, "registry")
    storage = tmp_path / "storage"
    with (
        registry(tmp_path / "plain", storage=storage) as plain,
        registry(tmp_path / "basic", storage=storage, leaf=leaf, auth="basic") as server,
    ):
        digest = push(plain, "nodes/demo", [tar.read_bytes(), change], ("zstd",))
        tar.unlink()
        embedded = push(plain, "tools/monitor", [Layer().directory("./").add("monitor", b"embedded")])
        name = f"{plain.host}/tools/monitor:v1"
        words = ("--set", f"rd.anchor.oci.password=@{secret}", "--embed-image", f"http://{name}@sha256:{embedded}")
        initrd = build_initramfs("--image", "oci", *words)
        report = json.loads(initrd.with_name("node.img.json").read_bytes())
        assert [image["digest"] for image in report["embedded"]] == [f"sha256:{embedded}"]
        append = (
            f"root=anchor rd.anchor.oci.image=10.0.2.2:{server.port}/nodes/demo:v1@sha256:{digest} "
            f"rd.anchor.oci.user={USER} rd.anchor.on_failure=poweroff"
        )
        with booted(site, site.machine(initrd, append, memory="2G"), tmp_path) as node:
            step = next(step for step in node.report["steps"] if step["step"] == "image")
            assert (step["stage"], step["manifest"], step["layers"]) == ("oci", f"sha256:{digest}", 2)
            assert node.host.file("/etc/from-layer").content_string == "two\n"
            assert not node.host.file("/etc/os-release").exists
            assert node.host.file("/usr/bin/env").mode == 0o755
            assert node.host.check_output("ls -A /usr/share/doc; touch /written && stat -c %U /etc") == "root"
            assert not node.host.file("/run/anchor/oci").exists
            # What came in the initramfs is there, though the file that it was in has gone with it.
            layout = json.loads(node.host.file("/run/anchor/images/index.json").content_string)
            entry = layout["manifests"][0]
            assert entry["annotations"]["org.opencontainers.image.ref.name"] == name
            blobs = "cd /run/anchor/images/blobs/sha256 && for f in *; do printf '%s  %s\\n' $f $f; done | sha256sum -c"
            assert node.host.check_output(blobs).count(": OK") == 3
            assert f"{embedded}: OK" in node.host.check_output(blobs)
            logs = node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log /run/anchor/boot.json")
            assert PASSWORD not in logs
