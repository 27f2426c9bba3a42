"""`check` for a build to come, and for an initramfs by its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Anchor

REPORT = {
    "anchor_build": "0.2.0",
    "stages": ["anchor", "auth-acme", "transport-https", "image-squashfs"],
    "network": "systemd-networkd",
    "manifest_keys": [],
    "settings": {
        "rd.anchor.acme.server": "https://ca.example",
        "rd.anchor.acme.eab_key": "(secret)",
        "rd.anchor.squashfs.url": "https://(secret)@store.example/i?(secret)",
    },
}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Return an initramfs with its report beside it."""
    return written(tmp_path)


def written(directory: Path, **changes: Any) -> Path:
    image = directory / "node.img"
    image.write_bytes(b"\x28\xb5\x2f\xfd")
    Path(f"{image}.json").write_text(json.dumps({**REPORT, **changes}), encoding="utf-8")
    return image


def test_a_report_tells_stages_settings_and_network(anchor: Anchor, report: Path) -> None:
    for file in (report, f"{report}.json"):
        said = anchor("check", "--initramfs", str(file), "--json", "root=anchor")
        answer = json.loads(said.out)
        assert (said.status, answer["ok"], answer["network"]) == (0, True, "systemd-networkd")
        assert answer["chosen"] == {"auth": "acme", "image": "squashfs"}
        assert answer["values"]["rd.anchor.acme.server"] == "https://ca.example"
    said = anchor("check", "--initramfs", str(report), "root=anchor team=team0:eth0 rd.anchor.nfs.export=nfs:a:/b")
    assert said.status == 1
    assert "error: team=team0: systemd-networkd is not told about teams" in said.err
    assert "rd.anchor.nfs.export: chooses a stage that this initramfs does not hold" in said.err


def test_a_report_of_a_signed_initramfs(anchor: Anchor, tmp_path: Path) -> None:
    said = anchor("check", "--initramfs", str(written(tmp_path, manifest_keys=["SHA256:x"])), "root=anchor")
    assert "rd.anchor.manifest: is required: this initramfs boots only what a signed manifest names" in said.err


def test_a_report_from_before_it_named_the_network(anchor: Anchor, tmp_path: Path) -> None:
    image = written(tmp_path, network=None)
    said = anchor("check", "--initramfs", str(image), "root=anchor team=team0:eth0")
    assert said.status == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"stages": None},
            "node.img.json: is not the report of an initramfs\nhint: name an initramfs that has its report",
        ),
        ({"stages": ["anchor", "auth-nobody", "image-squashfs"]}, "--auth nobody: no such stage"),
        ({"settings": {"rd.anchor.gone": "1"}}, "rd.anchor.gone: is not a parameter of these stages"),
    ],
)
def test_a_report_that_cannot_be_used(anchor: Anchor, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    said = anchor("check", "--initramfs", str(written(tmp_path, **changes)), "root=anchor")
    assert said.status != 0
    assert says in said.err


def test_an_initramfs_without_a_report(anchor: Anchor, tmp_path: Path) -> None:
    (tmp_path / "other.img").write_bytes(b"x")
    said = anchor("check", "--initramfs", str(tmp_path / "other.img"), "root=anchor")
    assert said.status == 1
    assert f"--initramfs {tmp_path}/other.img.json: No such file or directory\nhint: name an initramfs" in said.err


@pytest.mark.parametrize(
    "words", [("--image", "squashfs"), ("--set", "a=b"), ("--signed",), ("--network", "network-legacy"), ("--systemd",)]
)
def test_what_the_report_says_is_not_said_beside_it(anchor: Anchor, report: Path, words: tuple[str, ...]) -> None:
    said = anchor("check", "--initramfs", str(report), *words, "root=anchor")
    assert said.status == 2
    assert f"{words[0]} and --initramfs exclude each other" in said.err


LINE = "root=anchor rd.anchor.auth=none rd.anchor.squashfs.url=https://a/b"


def test_what_a_dracut_cannot_do(anchor: Anchor, tmp_path: Path) -> None:
    base = tmp_path / "usr/lib/dracut"
    (base / "modules.d/35network-manager").mkdir(parents=True)
    (base / "modules.d/35network").mkdir()
    (base / "dracut-version.sh").write_text("DRACUT_VERSION=112-7\n", encoding="utf-8")
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/dracut").write_text("", encoding="utf-8")
    (tmp_path / "usr/bin/dracut").chmod(0o755)
    words = ("--image", "squashfs", "--sysroot", str(tmp_path))
    said = anchor("check", *words, "--network", "network-legacy", LINE)
    assert said.status == 1
    assert f"error: --network network-legacy: dracut 112-7 in {tmp_path} has no module network-legacy" in said.err
    said = anchor("check", *words, "--network", "network-manager", LINE)
    assert f"nm-initrd-generator is missing in {tmp_path}: install network-manager (deb)" in said.err
    assert json.loads(anchor("check", *words, "--json", LINE).out)["network"] is None


def test_without_a_system_the_back_end_alone_tells(anchor: Anchor) -> None:
    words = ("--network", "systemd-networkd")
    assert anchor("check", *words, LINE).status == 0
    assert anchor("check", *words, f"{LINE} ip=ibft").status == 1
    said = anchor("check", *words, "--no-systemd", LINE)
    assert "--network systemd-networkd needs systemd in the initramfs: leave out --no-systemd" in said.err


def test_a_system_that_is_not_there(anchor: Anchor) -> None:
    said = anchor("check", "--sysroot", "/no/such", LINE)
    assert said.status == 1
    assert "--sysroot /no/such: No such file or directory\nhint: name the top directory" in said.err
