"""Nodes that boot what a signed manifest says, over plain HTTP: an erofs image, and a manifest that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build import qemu
from contrib.site import pki, servers
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site
from tests.integration.test_manifest_signing import make_key

pytestmark = [pytest.mark.boot, pytest.mark.slow]


def anchor_build(*arguments: str | Path) -> None:
    """Run a command as a user does."""
    argv = [sys.executable, "-m", "anchor_build", *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Published:
    """The demo's root as a published erofs; `initrd` holds the manifest's key; `url` is the directory's."""

    www: Path
    initrd: Path
    key: str
    url: str


@pytest.fixture(scope="module")
def published(
    site: Site, build_initramfs: BuildInitramfs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Published]:
    """Make an image of the demo's root and publish it, with the commands that a user has."""
    top = tmp_path_factory.mktemp("published")
    tree, www, image = top / "tree", top / "www", top / "node.erofs"
    www.mkdir()
    unpack = ["unsquashfs", "-quiet", "-no-progress", "-dest", str(tree), str(site.root_image.squashfs)]
    subprocess.run(unpack, check=True, capture_output=True)
    key, public = make_key(top, "site")
    anchor_build("image", tree, "-o", image, "--compression", "lz4", "--sign-key", key, "--valid-for", "1h")
    anchor_build("publish", image, "--to", www, "--manifest-key", public)
    initrd = build_initramfs(
        "--image", "squashfs", "--manifest-key", str(public), "--manifest-since", f"{image}.manifest"
    )
    leaf = pki.issue(site.authority, top, "store")
    with servers.nginx(top / "store", root=www, leaf=leaf) as store:
        yield Published(www, initrd, key, f"http://10.0.2.2:{store.http_port}")


def test_a_signed_manifest_boots_an_erofs_image(site: Site, published: Published, tmp_path: Path) -> None:
    """Over plain HTTP, at an address that the command line says."""
    built = json.loads(Path(f"{published.initrd}.json").read_text(encoding="utf-8"))
    (key,) = built["manifest_keys"]
    assert built["manifest_since"] > time.time() - 3600
    append = f"root=anchor rd.anchor.manifest={published.url}/node.erofs.manifest,{published.url}/absent "
    append += "ip=10.0.2.77::10.0.2.2:255.255.255.0:static.example:eth0:off net.ifnames=0"
    result = qemu.boot(site.machine(published.initrd, append), timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.ok, result
    report = result.boot_json
    assert report is not None
    steps = {step["step"]: step for step in report["steps"]}
    assert list(steps) == ["network", "clock", "auth", "manifest", "image", "mount", "overlay"]
    assert report["node"] == "static.example"
    assert steps["network"]["address"] == "10.0.2.77"
    (image,) = published.www.glob("node-*.erofs")
    assert steps["image"]["format"] == "erofs"
    assert steps["image"]["bytes"] == steps["manifest"]["image_bytes"] == image.stat().st_size
    assert steps["image"]["sha256"] == steps["manifest"]["image_sha256"]
    assert steps["manifest"]["key"] == key, "the report names the key as the node does"
    assert "warning" not in steps["manifest"]
    assert "error" not in steps["manifest"]


def test_a_manifest_of_another_key_is_refused(site: Site, published: Published, tmp_path: Path) -> None:
    (manifest,) = published.www.glob("*.manifest")
    key, _ = make_key(tmp_path, "thief")
    (tmp_path / "node.erofs").write_bytes(next(published.www.glob("node-*.erofs")).read_bytes())
    anchor_build("image", tmp_path / "node.erofs", "--sign-key", key)
    (published.www / "evil").write_bytes((tmp_path / "node.erofs.manifest").read_bytes())
    assert manifest.read_bytes() != (published.www / "evil").read_bytes()
    append = f"root=anchor rd.anchor.manifest={published.url}/evil rd.anchor.on_failure=poweroff"
    result = qemu.boot(site.machine(published.initrd, append), timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.outcome == "failed"
    assert "none of the 1 manifest keys in this initramfs made its signature" in result.reason
    assert "--manifest-key" in result.hint
