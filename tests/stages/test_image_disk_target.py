"""image disk: which disk is meant, what keeps it from being written to, and the question on the console.

The devices are loop devices, and what uses them is real where this host's kernel has it (a mount, swap). Serial
numbers, WWNs, removable media, and what md and device-mapper make of disks, stand in a /sys, /dev and /run/udev of the
node's own.
"""

from __future__ import annotations

import os
import pty
import re
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS
from tests.stages.disk_images import MIB, loop_device
from tests.stages.disk_node import IMAGE, SIZE, Node, prepared, sha256

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for block devices")

TARGET = """
anchor_disk__dir=$ANCHOR_RUN/disk
mkdir -p "$anchor_disk__dir"
anchor_disk__target && printf '%s\\n' "$anchor_disk__name"
"""
UNUSED = "anchor_disk__target >/dev/null || exit 9; anchor_disk__unused"


@dataclass
class Machine:
    """A node with disks as a kernel and udev describe them."""

    node: Node
    numbers: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """What ANCHOR_ROOT points to."""
        return self.node.shell.root

    def write(self, path: str, text: str) -> None:
        """Write a file of the node."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def add(
        self,
        name: str,
        size: int,
        facts: Mapping[str, str] | None = None,
        udev: Mapping[str, str] | None = None,
        device: Path | None = None,
        **flags: int,
    ) -> None:
        """Add a disk of `size` bytes; `facts` are further files of it in /sys, `udev` what udev knows."""
        number = os.makedev(8, 16 * len(self.numbers)) if device is None else device.stat().st_rdev
        self.numbers[name] = f"{os.major(number)}:{os.minor(number)}"
        values = {"dev": self.numbers[name], "size": str(size // 512), "removable": "0", "ro": "0"}
        values |= {key: str(value) for key, value in flags.items()} | dict(facts or {})
        for key, value in values.items():
            self.write(f"sys/class/block/{name}/{key}", value)
        lines = [f"S:disk/by-path/{name}", *(f"E:{key}={value}" for key, value in (udev or {}).items())]
        self.write(f"run/udev/data/b{self.numbers[name]}", "\n".join(lines))
        os.mknod(self.root / "dev" / name, stat.S_IFBLK | 0o600, number)

    def found(self, target: str) -> subprocess.CompletedProcess[str]:
        """Look for the disk that `target` means."""
        return self.node.run(TARGET, disk_target=target)


def made(name: str, top: Path) -> Iterator[Machine]:
    for node in prepared(name, top):
        for directory in ("dev", "sys"):
            (node.shell.root / directory).unlink()
            (node.shell.root / directory).mkdir()
        yield Machine(node)


@pytest.fixture(params=sorted(SHELLS))
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    """Each shell in turn, with the disks that a server may have."""
    for machine in made(request.param, tmp_path):
        scsi = {"ID_SERIAL": "3600508b1001c", "ID_SERIAL_SHORT": "WD-X1", "ID_SCSI_SERIAL": "WDX1"}
        scsi |= {"ID_WWN": "0x5000c500a1b2c3d4", "ID_WWN_WITH_EXTENSION": "0x5000c500a1b2c3d40001000000000000"}
        machine.add("sda", 4000 * MIB, udev=scsi)
        machine.add("sdb", 100 * MIB, removable=1, udev={"ID_SERIAL_SHORT": "STICK"})
        machine.add("vda", 2000 * MIB, {"serial": "TARGET-1"})
        nvme = {"device/serial": "  S4EV NX0R      ", "wwid": "eui.0025385B71B12345"}
        machine.add("nvme0n1", 8000 * MIB, nvme)
        # Nobody means these unless they are named by path.
        for name in ("loop0", "sr0", "dm-0", "md127", "zram0"):
            machine.add(name, 50 * MIB, {"serial": "TARGET-1"})
        machine.add("sdc", 0, {"serial": "NO-MEDIUM"})
        machine.write("sys/class/block/sda1/dev", "8:1")
        machine.write("sys/class/block/sda1/partition", "1")
        os.mknod(machine.root / "dev/sda1", stat.S_IFBLK | 0o600, os.makedev(8, 1))
        for link, name in (("by-id/wwn-0x5000c500a1b2c3d4", "sda"), ("by-path/pci-0000:00:05.0", "vda")):
            (machine.root / "dev/disk" / link).parent.mkdir(parents=True)
            (machine.root / "dev/disk" / link).symlink_to(f"../../{name}")
        yield machine


@pytest.fixture
def dash(tmp_path: Path) -> Iterator[Machine]:
    """One shell only, and no disk yet."""
    yield from made("dash", tmp_path)


def test_a_disk_is_found_by_everything_that_names_it(machine: Machine) -> None:
    names = {
        "/dev/vda": "vda",
        "/dev/disk/by-id/wwn-0x5000c500a1b2c3d4": "sda",
        "/dev/disk/by-path/pci-0000:00:05.0": "vda",
        "/dev/md127": "md127",
        "serial:TARGET-1": "vda",
        "serial:S4EV_NX0R": "nvme0n1",
        "serial:WD-X1": "sda",
        "serial:WDX1": "sda",
        "serial:STICK": "sdb",
        "wwn:0x5000c500a1b2c3d4": "sda",
        "wwn:naa.5000C500A1B2C3D4": "sda",
        "wwn:5000c500a1b2c3d40001000000000000": "sda",
        "wwn:0025385b71b12345": "nvme0n1",
        "wwn:eui.0025385b71b12345": "nvme0n1",
        "smallest": "vda",
        "largest": "nvme0n1",
    }
    script = "".join(f"anchor_disk_target='{target}'\n{TARGET}" for target in names)
    done = machine.node.run(script)
    assert done.returncode == 0, done.stderr
    assert dict(zip(names, done.stdout.split(), strict=True)) == names


@pytest.mark.parametrize(
    ("target", "messages"),
    [
        ("only", ("several disks are only: nvme0n1 sda vda", "serial:... or wwn:...")),
        ("serial:TARGET", ("no disk is serial:TARGET after 0 s; there are:", "vda (2000.0 MiB, serial TARGET-1)")),
        ("serial:*", ("no disk is serial:*",)),
        ("/dev/sda1", ("/dev/sda1 is a partition, not a disk",)),
        ("serial:NO-MEDIUM", ("sdc has no size: there is no medium in it",)),
    ],
)
@pytest.mark.parametrize("machine", ["dash"], indirect=True)
def test_what_names_no_disk_or_several_is_refused(machine: Machine, target: str, messages: tuple[str, ...]) -> None:
    assert machine.node.refused(machine.found(target), *messages)


def test_two_disks_of_one_identity_or_size_are_not_chosen_among(dash: Machine) -> None:
    # Two paths to one disk; and two disks of the smallest size.
    for name in ("sda", "sdb"):
        dash.add(name, 100 * MIB, udev={"ID_SERIAL_SHORT": "TWO-PATHS", "ID_WWN": "0x5000c500a1b2c3d4"})
    dash.add("sdc", 200 * MIB)
    for target in ("serial:TWO-PATHS", "wwn:5000c500a1b2c3d4", "smallest"):
        assert dash.node.refused(dash.found(target), f"several disks are {target}: sda sdb", "name one")
    assert dash.found("largest").stdout == "sdc\n"


def test_an_image_goes_to_the_disk_with_the_serial_number_and_no_other(dash: Machine, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    with other.open("wb") as file:
        file.truncate(SIZE)
    with loop_device(other) as device:
        dash.add("sda", SIZE, {"serial": "OTHER"}, device=device)
        dash.add("sdb", SIZE, {"serial": "TARGET-1"}, device=dash.node.device)
        url = dash.node.put("image", IMAGE)
        done = dash.node.run(disk_url=url, disk_sha256=sha256(IMAGE), disk_target="serial:TARGET-1")
        assert dash.node.installed(done)
    assert not any(other.read_bytes())


# --- In use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [("sda/holders/md127/x", "sda is a part of md127"), ("sda/sda2/holders/dm-0/x", "sda2 is a part of dm-0")],
    ids=["md", "device-mapper"],
)
def test_a_part_of_something_larger_is_in_use(dash: Machine, path: str, message: str) -> None:
    dash.add("sda", SIZE)
    dash.write("sys/class/block/sda/sda2/dev", "8:2")
    dash.node.shell.root.joinpath("proc").unlink()
    dash.write("proc/swaps", "Filename Type Size Used Priority")
    dash.write("proc/self/mountinfo", "22 1 0:20 / / rw - rootfs rootfs rw")
    assert dash.node.run(UNUSED, disk_target="/dev/sda").returncode == 0
    dash.write(f"sys/class/block/{path}", "")
    assert dash.node.refused(dash.node.run(UNUSED, disk_target="/dev/sda"), f"sda is in use: {message}")


def test_a_mounted_partition_and_one_with_swap_are_both_named(dash: Machine) -> None:
    dash.add("sda", SIZE)
    for number in (1, 2):
        dash.write(f"sys/class/block/sda/sda{number}/dev", f"8:{number}")
    dash.node.shell.root.joinpath("proc").unlink()
    dash.write("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 1024 0 -2")
    dash.write(
        "proc/self/mountinfo", "36 22 8:1 / /data rw - ext4 /dev/sda1 rw\n37 22 8:17 / /x rw - ext4 /dev/sdb1 rw"
    )
    done = dash.node.run(UNUSED, disk_target="/dev/sda")
    assert dash.node.refused(done, "sda is in use: sda2 is swap; it is mounted on /data", "nothing may use the disk")


def test_a_disk_that_the_kernel_swaps_to_is_refused(tmp_path: Path) -> None:
    for node in prepared("dash", tmp_path):
        subprocess.run(["mkswap", "-q", str(node.device)], check=True, capture_output=True)
        subprocess.run(["swapon", str(node.device)], check=True)
        try:
            done = node.run(disk_url="file:///none", disk_overwrite="always")
        finally:
            subprocess.run(["swapoff", str(node.device)], check=True)
        assert node.refused(done, f"{node.device.name} is in use: {node.device.name} is swap")


# --- The question on the console --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shell", "answer", "confirmed"),
    [
        *((shell, "{name}\n", True) for shell in sorted(SHELLS)),
        ("dash", "no\n", False),
        ("dash", "y\n", False),
        ("dash", "\n", False),
        ("dash", "{name}x\n", False),
        ("dash", "\x04", False),
        ("dash", "", False),
    ],
    ids=["bash", "busybox", "dash", "no", "y", "empty line", "another name", "end of input", "no answer in time"],
)
def test_with_ask_the_disk_is_written_when_somebody_typed_its_name(
    tmp_path: Path, shell: str, answer: str, confirmed: bool
) -> None:
    controller, terminal = pty.openpty()
    for node in prepared(shell, tmp_path):
        dev = node.shell.root / "dev"
        dev.unlink()
        dev.mkdir()
        (dev / node.device.name).symlink_to(node.device)
        (dev / "console").symlink_to(os.ttyname(terminal))
        os.write(controller, answer.format(name=node.device.name).encode())
        url = node.put("image", IMAGE)
        script = "ANCHOR_DISK_ANSWER_S=1\nanchor_disk_run"
        done = node.run(
            script if not answer else "anchor_disk_run", disk_url=url, disk_ask="1", disk_sha256=sha256(IMAGE)
        )
        if confirmed:
            assert node.installed(done)
        else:
            assert node.refused(done, f"nobody confirmed that {node.device.name} may be overwritten")
            assert not any(node.file.read_bytes())
        shown = os.read(controller, 4096).decode()
        assert re.search(rf"everything on {node.device.name} will be overwritten. Type its name to go on: ", shown)
    os.close(controller)
    os.close(terminal)
