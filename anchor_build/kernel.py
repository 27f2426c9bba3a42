"""Which kernel an initramfs is for: its release, its modules, and what it can unpack."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from anchor_build.elf import machine_of
from anchor_build.errors import AnchorError, UsageError
from anchor_build.root import HOST, Root

MODULE_TREES = (Path("/lib/modules"), Path("/usr/lib/modules"))
IMAGE_NAMES = ("vmlinuz", "vmlinux", "Image")
RELEASE = re.compile(r"[0-9]+\.[0-9]+[A-Za-z0-9.+_~-]*")
# Where the kernel's source has the drivers of network cards. The rest of drivers/net is bonds, tunnels and the like.
# What others made lies in these directories (depmod.d(5), DKMS), and its path does not say what it drives.
CARD = re.compile(
    r"drivers/net/(?:(?:ethernet|usb|vmxnet3|hyperv)/|thunderbolt[/.]|(?:virtio_net|xen-netfront)\.)"
    r"|drivers/(?:infiniband/ulp/(?:ipoib|opa_vnic)|s390/net|staging/qlge)/"
    r"|lib/modules/[^/]+/(?:updates|extra|weak-updates)/.*\.ko(?:\.[a-z0-9]+)?$"
)
# Offsets of the x86 boot protocol: Documentation/arch/x86/boot.rst, "HdrS" and kernel_version.
SETUP_MAGIC = (0x202, b"HdrS")
VERSION_POINTER = 0x20E
SETUP_START = 0x200
# What uname(2) calls the processors that this protocol is of, and the numbers that they have in ELF and PE files: the
# image may be a vmlinux (QEMU starts one with a PVH note) or a unified kernel image (systemd-stub), too.
X86 = ("x86_64", "i686", "i586")
X86_ELF = ("x86_64", "i386")
X86_PE = (0x8664, 0x14C)
# Where a PE file says where its header is, and that header's start (Microsoft: PE Format).
PE_POINTER = 0x3C
PE_MAGIC = b"PE\0\0"
HEAD_BYTES = 0x8000


@dataclass(frozen=True)
class Kernel:
    """A kernel release, its modules directory, and the kernel image if one is known; both paths are the host's.

    `root` is the system that they belong to.
    """

    release: str
    modules: Path
    image: Path | None = None
    root: Root = HOST

    @property
    def modules_dep(self) -> Path:
        """Where depmod's list of the modules is on the host."""
        return self.root.follow(self.modules / "modules.dep")

    def driver_names(self) -> frozenset[str]:
        """Return the names of all loadable modules, with `_` for `-`."""
        return frozenset(_module_name(line.partition(":")[0]) for line in self._lines("modules.dep"))

    def builtin_names(self) -> frozenset[str]:
        """Return the names of the drivers that are part of the kernel itself."""
        return frozenset(_module_name(line) for line in self._lines("modules.builtin"))

    def drives_network(self, paths: Iterable[str]) -> bool:
        """Whether a network card has its driver among the files of an initramfs, or in the kernel itself."""
        return any(CARD.search(path) for path in (*paths, *self._lines("modules.builtin")))

    def unpacks(self, compression: str) -> bool:
        """Say whether this kernel can unpack an initramfs compressed so: by its configuration, else by its version."""
        places = [self.modules / "config", self.root.at(f"/boot/config-{self.release}")]
        if self.image is not None:
            places.insert(0, self.image.parent / f"config-{self.release}")
        for place in map(self.root.follow, places):
            if place.is_file():
                wanted = f"CONFIG_RD_{compression.upper()}=y"
                return wanted in place.read_text(encoding="utf-8", errors="replace").splitlines()
        return compression != "zstd" or version_key(self.release) >= version_key("5.9")

    def _lines(self, name: str) -> list[str]:
        """Return the lines of a file beside the modules, none where there is no such file."""
        try:
            file = self.root.follow(self.modules / name)
            return file.read_text(encoding="utf-8", errors="replace").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def version_key(release: str) -> tuple[tuple[int, int | str], ...]:
    """Order releases as people do: runs of digits by value, so that 1062 comes after 957; `~` and `-rc` before."""
    parts: list[tuple[int, int | str]] = []
    for piece in re.findall(r"[0-9]+|~|[A-Za-z]+", release.replace("-rc", "~rc")):
        if piece.isdigit():
            parts.append((2, int(piece)))
        else:
            parts.append((-1, "") if piece == "~" else (1, piece))
    return (*parts, (0, ""))


def find_kernel(wanted: str | None, modules: Path | None = None, root: Root = HOST) -> Kernel:
    """Find a kernel by release or by the path of its image; without either, the newest one of the system.

    `modules` names the modules directory when it is not where the distribution puts it. Both paths are the host's; in
    another system the image's may be one of that system, too. Raises AnchorError with a list of what there is.
    """
    if modules is not None and not root.is_host:
        raise UsageError("--modules belongs to builds with this host's dracut", "another system has modules of its own")
    image = _image_of(wanted, root) if wanted and ("/" in wanted or Path(wanted).is_file()) else None
    if modules is not None:
        release = modules.resolve().name
        _check_same(wanted, image, modules, release)
    elif image is not None:
        release = release_of(image)
    elif wanted:
        release = wanted
    else:
        release = _newest_release(root)
    if not RELEASE.fullmatch(release):
        option = "--kernel" if modules is None else f"--modules {modules}"
        raise AnchorError(f"{option}: {release!r} is not a kernel release such as 6.1.0-18-amd64", _there(root))
    directory = _find_modules(release, image, modules, root)
    return Kernel(release, directory, image or _installed_image(release, directory, root, modules is None), root)


def _image_of(wanted: str, root: Root) -> Path:
    """Return the kernel image that a path names: in another system it is one of that system, or below its directory."""
    image = Path(wanted)
    if not root.is_host:
        absolute = image.parent.resolve() / image.name
        image = root.follow(absolute) if absolute.is_relative_to(root.directory) else root.at(wanted)
    if not image.is_file():
        raise AnchorError(f"--kernel {wanted}: no such file" + ("" if root.is_host else f" in {root.name}"))
    return image


def _installed_image(release: str, modules: Path, root: Root, installed: bool) -> Path | None:
    """Return the image of a kernel: beside the modules as kernel-install wants it, or, if `installed`, in /boot."""
    names = [root.follow(modules / name) for name in IMAGE_NAMES]
    names += [root.at(f"/boot/{name}-{release}") for name in IMAGE_NAMES if installed]
    return next((path for path in names if path.is_file()), None)


def _there(root: Root) -> str:
    return f"kernels of {root.name}: {', '.join(installed_releases(root)) or 'none'}"


def _check_same(wanted: str | None, image: Path | None, modules: Path, release: str) -> None:
    """Refuse modules of another kernel: it would load none of them, and the node would have no network."""
    if image is None:
        other = wanted or release
    else:
        head = _head(image)
        try:
            other = release_of(image)
        except AnchorError as error:
            if platform.machine() in X86 and not _is_x86(image, head):
                raise AnchorError(error.message, "the programs in the initramfs are this host's, for x86") from None
            return  # neither another architecture's image nor a vmlinux tells
    if other != release:
        raise AnchorError(f"--kernel {wanted} is {other}, but --modules {modules} is of {release}")


def _is_x86(image: Path, head: bytes) -> bool:
    """Whether a file is a program for x86 without the boot protocol: an ELF or PE file."""
    pointer = int.from_bytes(head[PE_POINTER : PE_POINTER + 4], "little")
    pe = head[pointer : pointer + 6] if head[:2] == b"MZ" else b""
    return machine_of(image) in X86_ELF or (pe[:4] == PE_MAGIC and int.from_bytes(pe[4:], "little") in X86_PE)


def check_image(kernel: Kernel, image: Path) -> str:
    """Check that an image holds the modules of a kernel, by its manifest; return a warning, empty where it does.

    `image` is the image, with its manifest beside it, or the manifest. Raises AnchorError when it has the modules
    of other kernels only: the node would boot, and find none of its drivers.
    """
    from anchor_build.manifest import MAGIC, SUFFIX, read_manifest

    beside = image.with_name(image.name + SUFFIX)
    try:
        with image.open("rb") as file:
            is_manifest = file.read(len(MAGIC)) == MAGIC.encode()
    except OSError as error:
        raise AnchorError(f"--for-image {image}: {error.strerror}") from None
    if not is_manifest and not beside.is_file():
        raise AnchorError(
            f"--for-image {image}: {beside.name} is not beside it, which says what modules it has",
            "`anchor-build image` makes both",
        )
    manifest, _ = read_manifest(image if is_manifest else beside)
    if not manifest.kernels:
        return f"the manifest of {image.name} names no kernel: whether it has modules of {kernel.release} is not known"
    if kernel.release not in manifest.kernels:
        raise AnchorError(
            f"--for-image {image}: has the modules of {', '.join(manifest.kernels)},"
            f" and the initramfs is for kernel {kernel.release}",
            "choose the kernel with --kernel, or build in the image's own root with --sysroot",
        )
    return ""


def release_of(image: Path) -> str:
    """Read the release from an x86 kernel image; raises AnchorError when it is none or may not be read."""
    head = _head(image)
    offset, magic = SETUP_MAGIC
    pointer = int.from_bytes(head[VERSION_POINTER : VERSION_POINTER + 2], "little") + SETUP_START
    if head[offset : offset + 4] != magic or pointer >= len(head):
        raise AnchorError(
            f"--kernel {image}: is not an x86 Linux kernel image",
            "name its modules directory with --modules DIR",
        )
    return head[pointer : pointer + 256].split(b"\0")[0].decode("ascii", "replace").split(" ")[0]


def _head(image: Path) -> bytes:
    try:
        with image.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise AnchorError(f"--kernel {image}: cannot be read: {error.strerror}") from None


def _newest_release(root: Root) -> str:
    found = installed_releases(root)
    if not found:
        raise AnchorError(
            f"{root.name} has no kernel with modules",
            "install one, or name another with --kernel FILE and --modules DIR"
            if root.is_host
            else "install one there: its modules go to /lib/modules/RELEASE, and depmod writes modules.dep",
        )
    return found[-1]


def installed_releases(root: Root = HOST) -> list[str]:
    """Return the releases whose modules are installed in a system, oldest first."""
    names = {
        path.name
        for tree in map(root.at, MODULE_TREES)
        if tree.is_dir()
        for path in tree.iterdir()
        if root.follow(path / "modules.dep").is_file()
    }
    return sorted(names, key=version_key)


def check_place(kernel: Kernel) -> None:
    """Raise AnchorError where dracut would not take a kernel's modules: it knows no other place (dracut.sh)."""
    if kernel.modules.parent.parts[-2:] != ("lib", "modules"):
        rule = f"dracut takes modules only from a directory lib/modules/{kernel.release}"
        if kernel.root.is_host:
            raise AnchorError(f"--modules {kernel.modules}: {rule}", "move or copy them to one; it may lie anywhere")
        place = kernel.root.inside(kernel.modules)
        raise AnchorError(
            f"{kernel.root.name}: the modules of {kernel.release} lie in {place}, and {rule}",
            "move them there: the directory is a link",
        )


def _find_modules(release: str, image: Path | None, modules: Path | None, root: Root) -> Path:
    if modules is not None:
        candidates = [modules.resolve()]
    else:
        # /boot/vmlinuz and a directory that holds a kernel and its lib/modules side by side
        roots = [image.resolve().parent.parent, image.resolve().parent] if image is not None and root.is_host else []
        candidates = [root / sub / release for root in roots for sub in ("lib/modules", "usr/lib/modules")]
        candidates += [root.at(tree / release) for tree in MODULE_TREES]
    for candidate in candidates:
        if root.follow(candidate / "modules.dep").is_file():
            return candidate
    raise AnchorError(
        f"kernel {release}: no modules (modules.dep) in {', '.join(str(c) for c in dict.fromkeys(candidates))}",
        _there(root) + ("; another modules directory is named with --modules DIR" if root.is_host else ""),
    )
