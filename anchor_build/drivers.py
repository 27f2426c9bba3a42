"""Which kernel drivers an initramfs holds: sets to choose from, a node's own list, and the firmware they ask for."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build.cpio import Initramfs, Member, decompress
from anchor_build.errors import AnchorError, InvalidFilesError
from anchor_build.stage import DRIVER

# The module of dracut that brings every network driver; the core and systemd-networkd ask for it.
NETWORK_MODULE = "kernel-network-modules"
# The module of dracut that brings what disks, file systems, keyboards and their controllers need.
GENERIC_MODULE = "kernel-modules"
# What no card asks for, but an address does: DHCP, IPv6, VLANs and bonds. Kernels that have it built in have no driver.
ADDRESSING = ("af_packet?", "ipv6?", "8021q?", "bonding?")
# The network cards and buses of virtual machines: KVM and QEMU, VMware, Hyper-V, Xen, Amazon, Google, Azure.
VIRTUAL = (
    *("virtio_net?", "virtio_pci?", "virtio_mmio?", "virtio_blk?", "e1000?", "e1000e?", "vmxnet3?"),
    *("hv_netvsc?", "pci_hyperv?", "xen_netfront?", "ena?", "gve?", "mana?"),
)
SUMMARIES = {
    "minimal": "virtual machines: the cards of the common hypervisors and clouds, and nothing else",
    "network": "any node that boots over the network: every wired network card (the default)",
    "generic": "a node with disks, or one that nothing is known of: network, and storage, file systems, USB, keyboards",
}
DEFAULT = "network"
FIELD = re.compile(rb"(?:^|\0)(firmware|name)=([^\0]*)")
FIRMWARE_TREES = ("usr/lib/firmware", "lib/firmware")
COMPRESSED = ("", ".xz", ".zst")
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class DriverSet:
    """Drivers for an initramfs beside those of its stages; a `?` at a name's end marks one that need not be there.

    `modules` are more modules of dracut, `without` those that bring drivers which are not wanted.
    """

    name: str = DEFAULT
    drivers: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def driver_set(wanted: str) -> DriverSet:
    """Return one of the sets, or that of a file; raises AnchorError for a file that is none."""
    if wanted == "minimal":
        return DriverSet(wanted, (*ADDRESSING, *VIRTUAL), without=(NETWORK_MODULE,))
    if wanted == "generic":
        return DriverSet(wanted, modules=(GENERIC_MODULE,))
    if wanted == DEFAULT:
        return DriverSet()
    return DriverSet("file", (*ADDRESSING, *read_list(Path(wanted))), without=(NETWORK_MODULE,))


def read_list(path: Path) -> tuple[str, ...]:
    """Read names of drivers, separated by blanks, commas or new lines; what follows a # is a comment.

    Raises AnchorError for a file that cannot be read, InvalidFilesError with every name that is none.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except OSError as error:
        sets = ", ".join(SUMMARIES)
        raise AnchorError(
            f"--drivers {path}: {error.strerror}", f"it is one of {sets}, or a file with names of drivers"
        ) from None
    except UnicodeDecodeError:
        raise AnchorError(f"--drivers {path}: is not UTF-8 text", "it holds names of drivers") from None
    names: dict[str, None] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        for name in line.partition("#")[0].replace(",", " ").split():
            if DRIVER.fullmatch(name):
                names[name] = None
            else:
                problems.append(f"{path}: line {number}: {name[:64]!r} is not the name of a driver")
    if problems:
        raise InvalidFilesError(problems, "`anchor-build drivers --from-host` writes such a file")
    if not names:
        raise AnchorError(f"--drivers {path}: names no driver", "`anchor-build drivers --from-host` writes such a file")
    return tuple(names)


def wanted_names(drivers: Iterable[str], known: frozenset[str]) -> tuple[str, ...]:
    """Return the names to give to dracut: without the mark, and without those that may be missing and are."""
    return tuple(
        dict.fromkeys(
            name.rstrip("?")
            for name in drivers
            if not name.endswith("?") or name.rstrip("?").replace("-", "_") in known or name.startswith("=")
        )
    )


# --- A node's own list ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """A driver that a device of this host is bound to, and the devices: `0000:00:03.0 (eth0)`."""

    driver: str
    devices: tuple[str, ...]


def bound_drivers(sys: Path = Path("/sys")) -> tuple[Bound, ...]:
    """Return the loadable drivers that devices of this host are bound to, by name; built-in ones have no module.

    See Documentation/driver-api/driver-model/platform.rst and sysfs-rules.rst: a device's `driver` is a link to its
    driver, and that one's `module` a link to the module that has it.
    """
    found: dict[str, list[str]] = {}
    interfaces = _interfaces(sys)
    for device in sorted(sys.glob("bus/*/devices/*")):
        try:
            name = (device / "driver" / "module").resolve(strict=True).name
            where = device.resolve()
        except OSError:
            continue
        label = where.name + (f" ({interfaces[where]})" if where in interfaces else "")
        if label not in found.setdefault(name, []):
            found[name].append(label)
    return tuple(Bound(name, tuple(found[name])) for name in sorted(found))


def _interfaces(sys: Path) -> dict[Path, str]:
    """Return the network interfaces of each device."""
    found: dict[Path, list[str]] = {}
    for interface in sorted(sys.glob("class/net/*")):
        try:
            found.setdefault((interface / "device").resolve(strict=True), []).append(interface.name)
        except OSError:
            continue  # lo and bridges have no device
    return {device: ", ".join(names) for device, names in found.items()}


def list_text(bound: Sequence[Bound], release: str) -> str:
    """Return a list of drivers as a file for --drivers; `release` is the node's kernel, or "" if it is not known."""
    kernel = f" (kernel {release})" if release else ""
    lines = [f"# The drivers of a node's devices{kernel}: anchor-build drivers --from-host"]
    width = max((len(entry.driver) for entry in bound), default=0)
    lines += [f"{entry.driver:<{width}}  # {', '.join(entry.devices)}" for entry in bound]
    return "\n".join(lines) + "\n"


# --- Firmware ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Firmware:
    """The firmware that drivers ask for: files that are in the initramfs, and those that are not, by driver."""

    included: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]


def firmware(initramfs: Initramfs, directory: Path) -> Firmware:
    """Say which firmware the drivers in an initramfs ask for (modinfo's `firmware`); `directory` is for unpacking."""
    asked: dict[str, list[str]] = {}
    packed: list[Member] = []
    for path, member in initramfs.members.items():
        name = path.rpartition("/")[2]
        if ".ko" not in name or not member.is_file:
            continue
        if name.endswith(".zst"):
            packed.append(member)
        else:
            _note(asked, _plain(name, member.content), name.partition(".ko")[0])
    if packed:
        # One process for all: frames that follow each other unpack to what follows each other.
        data = b"".join(member.content for member in packed)
        _note(asked, decompress(Path(packed[0].path), data, "zstd", directory), "")
    included, missing = set(), {}
    for driver, files in sorted(asked.items()):
        absent = []
        for file in files:
            there = any(initramfs.resolve(f"{tree}/{file}{end}") for tree in FIRMWARE_TREES for end in COMPRESSED)
            if there:
                included.add(file)
            else:
                absent.append(file)
        if absent:
            missing[driver.replace("-", "_")] = tuple(sorted(set(absent)))
    return Firmware(tuple(sorted(included)), missing)


def _plain(name: str, content: bytes) -> bytes:
    try:
        if name.endswith(".xz"):
            return lzma.decompress(content)
        if name.endswith(".gz"):
            return gzip.decompress(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error):
        return b""
    return content


def _note(asked: dict[str, list[str]], data: bytes, driver: str) -> None:
    """Collect the firmware named in modules' .modinfo; in several modules in a row, `name` follows what it is about."""
    if b"firmware=" not in data:
        return  # most of them, of several MB
    files: list[str] = []
    for key, value in FIELD.findall(data):
        text = value.decode("utf-8", "replace")
        if key == b"firmware":
            files.append(text)
        elif files and not driver:
            asked.setdefault(text, []).extend(files)
            files = []
    if files and driver:
        asked.setdefault(driver, []).extend(files)
