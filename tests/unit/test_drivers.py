"""Driver sets, the list of a node's own, and the firmware that drivers ask for."""

from __future__ import annotations

import gzip
import json
import lzma
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from anchor_build import drivers
from anchor_build.cli import cli
from anchor_build.cpio import Initramfs, Member
from anchor_build.drivers import Bound, bound_drivers, driver_set, firmware, list_text, read_list, wanted_names
from anchor_build.errors import AnchorError, InvalidFilesError

# As modpost lays it out: what the source says, then the name.
MODINFO = b"\0firmware=%s\0license=GPL\0firmware=%s\0depends=\0name=%s\0vermagic=6.1\0"


@pytest.fixture
def sys_tree(tmp_path: Path) -> Path:
    """Lay out a /sys: a network card, a disk behind a built-in driver, a device without a driver, a bridge."""
    top = tmp_path / "sys"

    def device(bus: str, name: str, driver: str, module: str = "") -> Path:
        path = top / "devices" / name
        path.mkdir(parents=True)
        (top / "bus" / bus / "devices").mkdir(parents=True, exist_ok=True)
        (top / "bus" / bus / "devices" / name).symlink_to(path)
        if driver:
            place = top / "bus" / bus / "drivers" / driver
            place.mkdir(parents=True, exist_ok=True)
            (path / "driver").symlink_to(place)
            if module and not (place / "module").exists():
                (top / "module" / module).mkdir(parents=True, exist_ok=True)
                (place / "module").symlink_to(top / "module" / module)
        return path

    card = device("pci", "0000:41:00.0", "mlx5_core", "mlx5_core")
    device("pci", "0000:41:00.1", "mlx5_core", "mlx5_core")
    device("pci", "0000:00:1f.2", "ahci")
    device("pci", "0000:00:00.0", "")
    device("virtio", "virtio0", "virtio-net", "virtio_net")
    (top / "class" / "net" / "eth0").mkdir(parents=True)
    (top / "class" / "net" / "eth0" / "device").symlink_to(card)
    (top / "class" / "net" / "br0").mkdir()
    return top


def test_the_drivers_of_a_hosts_devices(sys_tree: Path, tmp_path: Path) -> None:
    bound = bound_drivers(sys_tree)
    assert bound == (Bound("mlx5_core", ("0000:41:00.0 (eth0)", "0000:41:00.1")), Bound("virtio_net", ("virtio0",)))
    text = list_text(bound, "6.1.0")
    assert text.splitlines()[1:] == ["mlx5_core   # 0000:41:00.0 (eth0), 0000:41:00.1", "virtio_net  # virtio0"]
    (tmp_path / "list").write_text(text, encoding="utf-8")
    assert read_list(tmp_path / "list") == ("mlx5_core", "virtio_net")
    assert bound_drivers(tmp_path / "nothing") == ()


def test_the_command(sys_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bound_drivers(sys_tree)
    monkeypatch.setattr(drivers, "bound_drivers", lambda sys: found)
    output = tmp_path / "node.drivers"
    shown = CliRunner().invoke(cli, ["drivers", "--from-host", "-o", str(output)])
    assert (shown.exit_code, shown.output) == (0, "")
    assert driver_set(str(output)).drivers[-2:] == ("mlx5_core", "virtio_net")
    data = json.loads(CliRunner().invoke(cli, ["drivers", "--from-host", "--json"]).stdout)
    assert [entry["driver"] for entry in data["drivers"]] == ["mlx5_core", "virtio_net"]
    sets = CliRunner().invoke(cli, ["drivers"]).stdout
    assert all(name in sets for name in drivers.SUMMARIES)
    assert CliRunner().invoke(cli, ["drivers", "-o", "x"]).exit_code == 2
    monkeypatch.setattr(drivers, "bound_drivers", lambda sys: ())
    assert isinstance(CliRunner().invoke(cli, ["drivers", "--from-host"]).exception, AnchorError)


def test_a_copy_of_another_hosts_sys(sys_tree: Path, tmp_path: Path) -> None:
    words = ["drivers", "--from-host", "--sysfs"]
    shown = CliRunner().invoke(cli, [*words, str(sys_tree)]).stdout
    assert shown == list_text(bound_drivers(sys_tree), "")
    assert "(kernel" not in shown
    assert json.loads(CliRunner().invoke(cli, [*words, str(sys_tree), "--json"]).stdout)["kernel"] is None
    (tmp_path / "empty").mkdir()
    refused = CliRunner().invoke(cli, [*words, str(tmp_path / "empty")]).exception
    assert isinstance(refused, AnchorError)
    assert str(refused) == f"no device in {tmp_path}/empty has a loadable driver"
    assert CliRunner().invoke(cli, ["drivers", "--sysfs", str(sys_tree)]).exit_code == 2


def test_the_sets_differ_in_dracuts_modules(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("ice, mlx5_core?\n", encoding="utf-8")
    assert driver_set("network") == drivers.DriverSet()
    assert driver_set("generic").modules == ("kernel-modules",)
    for name in ("minimal", str(tmp_path / "mine")):
        assert driver_set(name).without == ("kernel-network-modules",)
    assert driver_set(str(tmp_path / "mine")).drivers[-2:] == ("ice", "mlx5_core?")


def test_every_mistake_in_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("ice $(reboot) # $(comment)\n\n-x\n", encoding="utf-8")
    with pytest.raises(InvalidFilesError) as caught:
        read_list(path)
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "line 1: '$(reboot)' is not the name of a driver",
        "line 3: '-x' is not the name of a driver",
    ]
    path.write_bytes(b"\xff")
    with pytest.raises(AnchorError, match="is not UTF-8 text"):
        read_list(path)
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(AnchorError, match="names no driver"):
        read_list(path)
    with pytest.raises(AnchorError, match="--drivers netwrok: No such file") as missing:
        driver_set("netwrok")
    assert "minimal, network, generic" in missing.value.hint


def test_what_may_be_missing_is_left_out() -> None:
    known = frozenset({"virtio_net", "ice"})
    assert wanted_names(("virtio-net?", "e1000?", "ice", "gone", "=drivers/x", "ice?"), known) == (
        *("virtio-net", "ice", "gone", "=drivers/x"),
    )


def test_firmware_is_inside_or_named(tmp_path: Path, processes: None) -> None:
    def module(name: str, first: str, second: str) -> bytes:
        return b"\x7fELF..." + MODINFO % (first.encode(), second.encode(), name.encode())

    packed = tmp_path / "packed"
    packed.write_bytes(module("three", "c.bin", "d.bin"))
    zstd = subprocess.run(["zstd", "-q", "-c", packed], capture_output=True, check=True).stdout
    contents = {
        "usr/lib/modules/6/one.ko": module("one", "a.bin", "b/c.bin"),
        "usr/lib/modules/6/two-x.ko.xz": lzma.compress(module("two_x", "a.bin", "e.bin")),
        "usr/lib/modules/6/gz.ko.gz": gzip.compress(module("gz", "b/c.bin", "b/c.bin")),
        "usr/lib/modules/6/three.ko.zst": zstd,
        "usr/lib/modules/6/four.ko.zst": zstd,
        "usr/lib/modules/6/broken.ko.xz": b"not xz",
        "usr/lib/firmware/a.bin": b"",
        "usr/lib/firmware/c.bin.xz": b"",
    }
    members = {path: Member(path, stat.S_IFREG | 0o644, len(data), data) for path, data in contents.items()}
    found = firmware(Initramfs(members, "none"), tmp_path)
    assert found.included == ("a.bin", "c.bin")
    assert found.missing == {"one": ("b/c.bin",), "two_x": ("e.bin",), "gz": ("b/c.bin",), "three": ("d.bin",)}
