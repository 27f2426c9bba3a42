"""How dracut is asked for an initramfs: its version, a private base directory, its configuration and arguments."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build.errors import AnchorError
from anchor_build.kernel import Kernel
from anchor_build.plan import Plan
from anchor_build.render import RenderedModule, write_modules
from anchor_build.run import run, which

BASE = Path("/usr/lib/dracut")
CONFIG_PARTS = "dracut.conf.d"
# dracut.sh sets its PATH to this (DRACUT_PATH): what lies in /usr/local is not found.
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What the packages dracut-network hold: %files network of dracut's own spec, and Debian's package.
NETWORK_MODULES = (
    *("cifs", "connman", "fcoe", "iscsi", "kernel-network-modules", "nbd", "network", "network-legacy"),
    *("network-manager", "nfs", "nvmf", "qemu-net", "ssh-client", "systemd-networkd", "url-lib"),
)
# What every one of these builds needs besides the stages' own modules, where this dracut has it.
SYSTEMD_MODULES = ("systemd", "systemd-initrd", "dracut-systemd")
NETWORKD = Path("usr/lib/systemd/systemd-networkd")


@dataclass(frozen=True)
class Dracut:
    """An installed dracut: its program, its base directory and its version, such as 059 or 106-5."""

    program: Path
    base: Path
    version_text: str

    def has_module(self, name: str) -> bool:
        """Whether a module of this name is installed, whatever its number."""
        return any((self.base / "modules.d").glob(f"[0-9][0-9]{name}"))


def module_packages(name: str) -> tuple[str, str]:
    """Return the deb and the rpm package that hold a module of dracut.

    SUSE has them all in `dracut`: it packages no dracut-network.
    """
    if name in NETWORK_MODULES:
        return "dracut-network", "dracut-network"
    return "dracut-core", "dracut"


@dataclass(frozen=True)
class Request:
    """One call of dracut; every path in it exists but `output`."""

    kernel: Kernel
    modules: tuple[str, ...]
    drivers: tuple[str, ...]
    compress: str
    base: Path
    config: Path
    output: Path


def find_program(name: str) -> Path | None:
    """Find a program where dracut looks for it, which is not the caller's PATH."""
    found = shutil.which(name, path=PROGRAM_PATH)
    return Path(found) if found else None


def misplaced_program(name: str) -> str:
    """Return a remark on a program that is there, but not where dracut looks; nothing when there is none."""
    elsewhere = which(name)
    return f" (dracut does not find {elsewhere})" if elsewhere else ""


def find_dracut() -> Dracut:
    """Find dracut on this host; raises AnchorError when there is none or it does not tell its version."""
    program = which("dracut")
    if program is None or not BASE.is_dir():
        raise AnchorError("dracut is not installed", "install dracut-core (deb) or dracut (rpm)")
    script = BASE / "dracut-version.sh"
    text = script.read_text(encoding="utf-8") if script.is_file() else run([program, "--version"]).stdout
    found = re.search(r"(?:DRACUT_VERSION=['\"]?|dracut )([0-9]+)([^'\"\s]*)", text)
    if found is None:
        raise AnchorError(f"cannot tell the version of {program}", f"{script} holds: {text.strip()[:200]}")
    return Dracut(program, BASE, found[1] + found[2])


def choose_modules(dracut: Dracut, plan: Plan) -> tuple[str, ...]:
    """Return the dracut modules to name: ours, the host's kind of sh, and systemd where it is installed.

    The core's own module says which network module it needs.
    """
    ours = tuple(stage.module for stage in plan.all)
    if Path("/bin/sh").resolve().name == "dash" and dracut.has_module("dash"):
        # Where the host's sh is dash the node's is too: dracut would prefer bash, which starts half as fast.
        ours = ("dash", *ours)
    if (Path("/") / NETWORKD).exists() and all(dracut.has_module(name) for name in SYSTEMD_MODULES):
        return (*SYSTEMD_MODULES, *ours)
    return ours


def choose_compression(kernel: Kernel) -> str:
    """Return the compression command: zstd, or gzip where the kernel cannot unpack zstd."""
    if kernel.unpacks("zstd"):
        return "zstd -3 -T0 -q"
    return "pigz -6" if which("pigz") else "gzip -6"


def make_base(dracut: Dracut, modules: Sequence[RenderedModule], directory: Path) -> None:
    """Make a private base directory: links to the installed dracut, and the rendered modules among its modules.

    A build thus needs no installed module and writes nothing below /usr.
    """
    tree = directory / "modules.d"
    tree.mkdir(parents=True)
    for path in sorted(dracut.base.iterdir()):
        if path.name not in ("modules.d", "dracut.conf.d"):
            link = directory / path.name
            link.symlink_to(path)
            # --reproducible gives newer files the time of dracut-functions.sh: that of the link itself (touch -h).
            os.utime(link, ns=(path.stat().st_mtime_ns,) * 2, follow_symlinks=False)
    (directory / "dracut.conf.d").mkdir()
    ours = {re.sub(r"^[0-9]+", "", module.name) for module in modules}
    for path in sorted((dracut.base / "modules.d").iterdir()):
        # An older installed copy of one of our modules must not win over the rendered one.
        if re.sub(r"^[0-9]+", "", path.name) not in ours:
            (tree / path.name).symlink_to(path)
    write_modules(tuple(modules), tree)


def configuration(modules: Path, work: Path) -> str:
    """Return the text of the configuration that replaces the host's, so that builds do not depend on it.

    Paths of this host stand here, because dracut keeps its arguments in the initramfs (build-parameter.txt).
    """
    return "\n".join(
        [
            "# Log to standard error only; the host's own configuration is not read.",
            "sysloglvl=0",
            "fileloglvl=0",
            "kmsgloglvl=0",
            "show_modules=no",
            f"drivers_dir={shlex.quote(str(modules))}",
            f"tmpdir={shlex.quote(str(work))}",
            "",
        ]
    )


def arguments(dracut: Dracut, request: Request) -> list[str]:
    """Return the argument vector: generic, reproducible, and only the modules that are named.

    It is for the directory of `request.config`: no path of this host is in it but the output's.
    """
    argv = [
        str(dracut.program),
        "--force",
        "--no-hostonly",
        "--no-hostonly-cmdline",
        "--reproducible",
        "--no-early-microcode",
        "--nofscks",
        "--conf",
        f"./{request.config.name}",
        "--confdir",
        f"./{CONFIG_PARTS}",
        "--kver",
        request.kernel.release,
        "--compress",
        request.compress,
        "--modules",
        " ".join(request.modules),
    ]
    if request.drivers:
        argv += ["--add-drivers", " ".join(request.drivers)]
    return [*argv, str(request.output)]
