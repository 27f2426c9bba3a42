"""`anchor-build inspect` on initramfs that cpio makes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from anchor_build.errors import UsageError
from anchor_build.inspect.artifact import Artifact, compare, read_artifact
from anchor_build.oci import MANIFEST, add_blob, json_bytes, write_layout
from anchor_build.signing import read_public_keys
from tests.integration.inspect_files import LATER, inspect, make_tree

MANIFEST_KEY = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAERB5zm54SDCktKD/XTJCCD/vhWYXf
YkBXhXXVrZCNFfxgDI2HKGjo+f7wLkOXpv5pEXsvbYYIVygDA/oPB+gcvA==
-----END PUBLIC KEY-----
"""


def pack(tree: Path, file: Path, *, early: Path | None = None) -> Path:
    """Pack a tree as an initramfs, gzip compressed, behind an early archive."""
    data = b""
    for top, packer in ((early, ["cat"]), (tree, ["gzip", "-n"])):
        if top is not None:
            names = "\0".join(sorted(str(path.relative_to(top)) for path in top.rglob("*")))
            argv = ["cpio", "-o", "-0", "-H", "newc", "--quiet"]
            archive = subprocess.run(argv, input=os.fsencode(names), cwd=top, capture_output=True, check=True).stdout
            data += subprocess.run(packer, input=archive, capture_output=True, check=True).stdout
    file.write_bytes(data)
    return file


@pytest.fixture
def root(tmp_path: Path, site_ca: Path) -> Path:
    """Make the tree of an initramfs as anchor-build leaves it, in what inspect looks at."""
    top = tmp_path / "root"
    files = {
        "etc/anchor/version": "0.2.0\n",
        "etc/anchor/build-time": f"{LATER}\n",
        "etc/anchor/ca.pem": site_ca.read_text(),
        "etc/anchor/params": "rd.anchor.acme.eab_key=hunter2\nrd.anchor.acme.server=https://ca\nrd.anchor.own.x=1234\n",
        "etc/anchor/manifest.pub": MANIFEST_KEY,
        "etc/anchor/manifest-since": f"{LATER + 1}\n",
        "etc/key.pem": (site_ca.parent / "ca.key").read_text(),
        "usr/lib/anchor/stages/core/50-anchor/params.sh": "",
        "usr/lib/anchor/stages/auth/10-acme/params.sh": "",
        "usr/lib/anchor/stages/auth/10-acme/stage.sh": "x" * 1000,
        "usr/lib/anchor/stages/image/10-own/params.sh": "",
        "usr/lib/modules/6.1.0-x/modules.dep": "kernel/fs/overlay.ko:\n",
        "usr/lib/modules/6.1.0-x/kernel/fs/overlay.ko": "o" * 500,
        "usr/lib/initrd-release": 'DRACUT_VERSION="059-4"\nPRETTY_NAME="A \x1b[31msystem"\n',
        "usr/lib/dracut/modules.txt": "base\nanchor\n",
    }
    for name, text in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


def test_an_initramfs(root: Path, tmp_path: Path, site_ca: Path) -> None:
    early = tmp_path / "early"
    (early / "kernel" / "x86" / "microcode").mkdir(parents=True)
    (early / "kernel" / "x86" / "microcode" / "GenuineIntel.bin").write_bytes(b"m" * 77)
    found = read_artifact(pack(root, tmp_path / "image", early=early))
    facts = found.facts
    assert found.kind == "initramfs"
    assert facts["archives"] == ["none, 4 entries", f"gzip, {len(list(root.rglob('*')))} entries"]
    assert (facts["anchor_build"], facts["build_time"]) == ("0.2.0", "2023-11-14T22:13:20Z")
    assert (facts["kernel"], facts["dracut"], facts["drivers"]) == (["6.1.0-x"], "059-4", ["overlay"])
    assert facts["dracut_modules"] == ["base", "anchor"]
    argv = ["openssl", "x509", "-in", str(site_ca), "-noout", "-fingerprint", "-sha256"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert facts["ca_certificates"] == [printed.partition("=")[2].strip().replace(":", "").lower()]
    assert facts["private_keys"] == ["etc/key.pem"]
    key = tmp_path / "manifest.pub"
    key.write_text(MANIFEST_KEY)
    assert facts["manifest_keys"] == [one.fingerprint for one in read_public_keys([key])]
    assert facts["manifest_since"] == "2023-11-14T22:13:21Z"
    assert facts["bytes_by_stage"]["auth-acme"] == 1000
    assert facts["bytes_by_stage"]["anchor"] == 506  # the driver overlay, and the version
    assert facts["settings"]["rd.anchor.acme.server"] == "https://ca"
    assert any("image-own: is not known here" in note for note in found.notes)


def test_secrets_of_an_initramfs_are_not_shown(root: Path, tmp_path: Path) -> None:
    first = pack(root, tmp_path / "first")
    (root / "etc/anchor/params").write_text("rd.anchor.acme.eab_key=hunter3\n")
    second = pack(root, tmp_path / "second")
    for words in ([first], [first, "--json", "--files"], [first, second], [first, second, "--json"]):
        said = inspect(*words)
        assert "hunter" not in said.out + said.err
        assert "=1234" not in said.out
        assert "\x1b" not in said.out
    entry = read_artifact(first).entries["etc/anchor/params"]
    assert entry.digest == "(secret)"
    assert inspect(first, second).status == 1


def test_another_initramfs(tmp_path: Path) -> None:
    found = read_artifact(pack(make_tree(tmp_path), tmp_path / "image"))
    assert found.notes == ("holds no stage of anchor-build: it is another initramfs",)
    assert found.entries["etc/b"].digest == found.entries["etc/a"].digest != ""


def test_times_alone(root: Path, tmp_path: Path) -> None:
    first = pack(root, tmp_path / "first")
    os.utime(root / "etc" / "key.pem", (1, 1))
    said = inspect(first, pack(root, tmp_path / "second"))
    assert said.status == 1
    assert "1 more differ in their time only" in said.out
    assert "key.pem" not in said.out


def test_an_artifact_equals_itself(root: Path, tmp_path: Path) -> None:
    found: Artifact = read_artifact(pack(root, tmp_path / "first"))
    assert compare(found, found).same
    with pytest.raises(UsageError):
        compare(found, Artifact("rpm", found.facts, {}))


def embed(root: Path, tmp_path: Path, text: str = "") -> Path:
    """Put a squashfs of two container images, or of `text` as its index, into the tree of an initramfs; return it."""
    layout = tmp_path / "layout"
    shutil.rmtree(layout, ignore_errors=True)
    entries = {}
    for name, size in (("registry.example/tools/a:v1", 1_500_000), ("b", 70)):
        document = {"config": {"size": 30}, "layers": [{"size": size}, {"size": 400}], "of": name}
        entries[name] = {"mediaType": MANIFEST, **add_blob(layout, json_bytes(document))}
    write_layout(layout, entries)
    if text:
        (layout / "index.json").write_text(text)
    target = root / "etc/anchor/images.squashfs"
    argv: list[str | Path] = ["mksquashfs", layout, target, "-noappend", "-quiet", "-no-progress", "-comp", "zstd"]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    return pack(root, tmp_path / "image")


def test_container_images_in_it_are_told(root: Path, tmp_path: Path) -> None:
    image = embed(root, tmp_path)
    data = json.loads(inspect(image, "--json").out)
    assert {name: found["bytes"] for name, found in data["embedded"].items()} == {
        "b": 500,
        "registry.example/tools/a:v1": 1_500_430,
    }
    digest = data["embedded"]["b"]["digest"]
    text = inspect(image).out
    assert "CONTAINER IMAGE" in text and digest in text and "registry.example/tools/a:v1  1.50  sha256:" in text
    other = tmp_path / "other.img"
    image.rename(other)
    (root / "etc/anchor/images.squashfs").unlink()
    done = inspect(pack(root, tmp_path / "image"), other)
    assert f"+ embedded: b: digest: {digest}" in done.out, done.out


@pytest.mark.parametrize(
    "text", ["no JSON", '{"manifests": 1}', '{"manifests": [{"digest": "sha256:../../../etc/passwd"}]}']
)
def test_container_images_that_are_none_are_a_note(root: Path, tmp_path: Path, text: str) -> None:
    facts = read_artifact(embed(root, tmp_path, text))
    assert "embedded" not in facts.facts
    assert "its container images cannot be read: what is there is no OCI layout in a squashfs" in facts.notes


def test_what_is_no_squashfs_or_leads_away_is_a_note(root: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    layout.mkdir()
    (layout / "index.json").symlink_to("/proc/self/environ")
    target = root / "etc/anchor/images.squashfs"
    subprocess.run(
        ["mksquashfs", layout, target, "-quiet", "-no-progress"], check=True, capture_output=True, timeout=60
    )
    for _ in range(2):
        notes = read_artifact(pack(root, tmp_path / "image")).notes
        assert any("container images cannot be read" in note for note in notes)
        target.write_bytes(b"hsqs" + bytes(5000))
