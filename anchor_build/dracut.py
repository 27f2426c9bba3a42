"""How dracut is asked for an initramfs: its version, a private base directory, its configuration and arguments."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build.errors import AnchorError
from anchor_build.files import work_directory
from anchor_build.kernel import Kernel
from anchor_build.plan import Plan
from anchor_build.render import RenderedModule, write_modules
from anchor_build.root import ENVIRONMENT, HOST, Root, enter
from anchor_build.run import run, which

BASE = Path("/usr/lib/dracut")
CONFIG_PARTS = "dracut.conf.d"
# What the packages dracut-network hold: %files network of dracut's own spec, and Debian's package.
NETWORK_MODULES = (
    *("cifs", "connman", "fcoe", "iscsi", "kernel-network-modules", "nbd", "network", "network-legacy"),
    *("network-manager", "nfs", "nvmf", "qemu-net", "ssh-client", "systemd-networkd", "url-lib"),
)
# What every one of these builds needs besides the stages' own modules, where this dracut has it.
SYSTEMD_MODULES = ("systemd", "systemd-initrd", "dracut-systemd")
# The modules of dracut that can bring up the network, one of which an initramfs has.
BACK_ENDS = ("systemd-networkd", "network-manager", "network-legacy")
# Drivers of network devices that no word of the command line sets up: dracut takes them for network cards.
VIRTUAL_DEVICES = (
    *("bareudp", "dummy", "geneve", "gtp", "ifb", "ipvlan", "ipvtap", "macsec", "macvlan", "macvtap", "nlmon"),
    *("ppp_generic", "slip", "tap", "tun", "vcan", "veth", "vrf", "vxcan", "vxlan", "wireguard", "xen-netback"),
    "xen_netback",
)
# dracut's modules for D-Bus: the first asks for one of the others.
BUS_MODULES = ("dbus", "dbus-broker", "dbus-daemon")
NEEDS_SYSTEMD = "--network {} needs systemd in the initramfs: leave out --no-systemd"
# A module that asks for D-Bus whatever else there is; since 110 network-manager does so beside systemd only. D-Bus is
# there with systemd alone.
NEEDS_DBUS = re.compile(r"^ {4}echo [^\n]*\bdbus\b", re.MULTILINE)
EMPTY_MODULE = "#!/bin/bash\ncheck() {\n    return 255\n}\ninstall() {\n    :\n}\n"
VERSION = re.compile(r"(?:DRACUT_VERSION=['\"]?|dracut )([0-9]+)([^'\"\s]*)")
DPKG_VERSION = re.compile(r"^Package: dracut-core\n(?:[^\n]+\n)*?Version: ([0-9]+)([^\s]*)", re.MULTILINE)
# the second one where /lib is not a link to /usr/lib
NETWORKD = (Path("/usr/lib/systemd/systemd-networkd"), Path("/lib/systemd/systemd-networkd"))
# What each back end cannot do without: where it may be, what it is, and the packages that have it (deb, rpm).
NETWORK_PROGRAMS = {
    "systemd-networkd": (NETWORKD, "systemd-networkd", "systemd (deb) or systemd-networkd (rpm)"),
    "network-manager": (
        tuple(Path(top) / "nm-initrd-generator" for top in ("/usr/libexec", "/usr/lib", "/usr/lib/NetworkManager")),
        "nm-initrd-generator",
        "network-manager (deb) or NetworkManager (rpm)",
    ),
    "network-legacy": (
        (Path("/usr/sbin/dhclient"), Path("/sbin/dhclient")),
        "dhclient",
        "isc-dhcp-client (deb) or dhcp-client (rpm)",
    ),
}


@dataclass(frozen=True)
class Dracut:
    """An installed dracut: its program, its base directory and its version, such as 059 or 106-5.

    Both paths are those of the system that it is installed in, `root`.
    """

    program: Path
    base: Path
    version_text: str
    root: Root = HOST

    def has_module(self, name: str) -> bool:
        """Whether a module of this name is installed, whatever its number."""
        return any(self.root.at(self.base / "modules.d").glob(f"[0-9][0-9]{name}"))


def module_packages(name: str) -> tuple[str, str]:
    """Return the deb and the rpm package that hold a module of dracut.

    SUSE has them all in `dracut`: it packages no dracut-network.
    """
    if name in NETWORK_MODULES:
        return "dracut-network", "dracut-network"
    return "dracut-core", "dracut"


@dataclass(frozen=True)
class Request:
    """One call of dracut; every path in it exists but `output`, and is as dracut sees it."""

    kernel: Kernel
    modules: tuple[str, ...]
    drivers: tuple[str, ...]
    base: Path
    config: Path
    output: Path
    # A program for dracut to use instead of ldd.
    ldd: Path | None = None
    # And one instead of dracut-install, and the dynamic linker of the system's programs.
    install: Path | None = None
    linker: str = ""


def misplaced_program(name: str) -> str:
    """Return a remark on a program that is there, but not where dracut looks; nothing when there is none."""
    elsewhere = which(name)
    return f" (dracut does not find {elsewhere})" if elsewhere else ""


def find_dracut(root: Root = HOST) -> Dracut:
    """Find dracut in a system; raises AnchorError when there is none or it does not tell its version."""
    program = which("dracut") if root.is_host else root.find_program("dracut")
    if program is None or not root.at(BASE).is_dir():
        where = "" if root.is_host else f" in {root.name}"
        raise AnchorError(f"dracut is not installed{where}", f"install dracut-core (deb) or dracut (rpm){where}")
    script = root.at(BASE / "dracut-version.sh")
    if script.is_file():
        text = script.read_text(encoding="utf-8")
    elif root.is_host:
        text = run([program, "--version"]).stdout
    else:
        with work_directory() as work:
            argv = enter(root, work, [root.inside(program), "--version"])
            text = run(argv, env=ENVIRONMENT, only_env=True).stdout
    found = VERSION.search(text)
    if found is None and text.strip() in ("DRACUT_VERSION=", "dracut"):
        found = DPKG_VERSION.search(_dpkg_status(root))
    if found is None:
        raise AnchorError(f"cannot tell the version of {program}", f"{script} holds: {text.strip()[:200]}")
    return Dracut(root.inside(program), BASE, found[1] + found[2], root)


def _dpkg_status(root: Root) -> str:
    """Return dpkg's records of the installed packages: bullseye's dracut does not know its version itself."""
    try:
        return root.at("/var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def choose_modules(
    dracut: Dracut, plan: Plan, more: Sequence[str] = (), *, network: str = "", systemd: bool = True
) -> tuple[str, ...]:
    """Return the dracut modules to name: ours, the system's kind of sh, and systemd where it is installed; and `more`.

    Without `network`, one of BACK_ENDS, the core's own module says which one it needs.
    """
    ours = (*([network] if network else []), *(stage.module for stage in plan.all), *more)
    if dracut.root.at("/bin/sh").resolve().name == "dash" and dracut.has_module("dash"):
        # Where the system's sh is dash the node's is too: dracut would prefer bash, which starts half as fast.
        ours = ("dash", *ours)
    if systemd and has_networkd(dracut.root) and all(dracut.has_module(name) for name in SYSTEMD_MODULES):
        return (*SYSTEMD_MODULES, *ours)
    return ours


def unused_modules(dracut: Dracut, network: str = "", *, systemd: bool = True) -> tuple[str, ...]:
    """Return the modules that others ask for, and that nothing in an initramfs of these settings uses: the bus.

    systemd-networkd asks for it, and does without: only its `networkctl reload` and the like go over the bus.
    """
    networkd = systemd and network in ("", BACK_ENDS[0]) and dracut.has_module(BACK_ENDS[0])
    return BUS_MODULES if networkd and has_networkd(dracut.root) else ()


def network_problem(dracut: Dracut, network: str, *, systemd: bool) -> str:
    """Return why this dracut cannot bring up the network as it was asked to, with what to do; "" where it can."""
    where = "" if dracut.root.is_host else f" in {dracut.root.name}"
    offered = [name for name in BACK_ENDS if dracut.has_module(name) and (systemd or not _needs_systemd(dracut, name))]
    instead = f"; it has {', '.join(offered)}" if offered else ""
    if not systemd and network == BACK_ENDS[0]:
        return NEEDS_SYSTEMD.format(network)
    if not systemd and network and _needs_systemd(dracut, network):
        return (
            f"--network {network}: dracut {dracut.version_text}{where} has it with D-Bus only, which needs systemd in"
            f" the initramfs: leave out --no-systemd{instead}"
        )
    if network == "network-legacy" and not dracut.has_module(network) and dracut.has_module("network"):
        return (
            f"--network {network}: dracut {dracut.version_text}{where} has no module {network}, which dracut no longer"
            f" installs by default since 110{instead}"
        )
    if network and not dracut.has_module(network):
        return (
            f"--network {network}: dracut {dracut.version_text}{where} has no module {network}{instead};"
            " install dracut-network"
        )
    program = NETWORK_PROGRAMS.get(network)
    if program and not any(dracut.root.at(path).exists() for path in program[0]):
        return f"--network {network}: {program[1]} is missing{where}: install {program[2]}"
    return ""


def _needs_systemd(dracut: Dracut, back_end: str) -> bool:
    if back_end == BACK_ENDS[0]:
        return True
    scripts = dracut.root.at(dracut.base / "modules.d").glob(f"[0-9][0-9]{back_end}/module-setup.sh")
    return any(NEEDS_DBUS.search(script.read_text(encoding="utf-8", errors="replace")) for script in scripts)


def has_networkd(root: Root) -> bool:
    """Whether a system has systemd-networkd."""
    return any(root.at(path).exists() for path in NETWORKD)


def make_base(
    dracut: Dracut,
    modules: Sequence[RenderedModule],
    directory: Path,
    without: Sequence[str] = (),
    *,
    systemd: bool = True,
) -> None:
    """Make a private base directory: links to the installed dracut, and the rendered modules among its modules.

    A build thus needs no installed module and writes nothing below /usr. Installed modules that are named in `without`
    are there and bring nothing, since others ask for them. Without `systemd` its modules are not there at all: the
    others look whether they are.
    """
    tree = directory / "modules.d"
    tree.mkdir(parents=True)
    installed = dracut.root.at(dracut.base)
    for path in sorted(installed.iterdir()):
        if path.name not in ("modules.d", "dracut.conf.d"):
            link = directory / path.name
            link.symlink_to(dracut.base / path.name)
            # --reproducible gives newer files the time of dracut-functions.sh: that of the link itself (touch -h).
            os.utime(link, ns=(dracut.root.at(dracut.base / path.name).stat().st_mtime_ns,) * 2, follow_symlinks=False)
    (directory / "dracut.conf.d").mkdir()
    ours = {re.sub(r"^[0-9]+", "", module.name) for module in modules}
    for path in sorted((installed / "modules.d").iterdir()):
        # An older installed copy of one of our modules must not win over the rendered one.
        name = re.sub(r"^[0-9]+", "", path.name)
        if not systemd and (name in SYSTEMD_MODULES or name.startswith("systemd-")):
            continue
        if name in without:
            (tree / path.name).mkdir()
            (tree / path.name / "module-setup.sh").write_text(EMPTY_MODULE, encoding="utf-8")
            (tree / path.name / "module-setup.sh").chmod(0o755)
        elif name not in ours:
            (tree / path.name).symlink_to(dracut.base / "modules.d" / path.name)
    write_modules(tuple(modules), tree)


def configuration(modules: Path, work: Path) -> str:
    """Return the text of the configuration that replaces the host's, so that builds do not depend on it.

    Paths of this host stand here, because dracut keeps its arguments in the initramfs (build-parameter.txt).
    """
    return "\n".join(
        [
            "# Log to standard error only; the host's own configuration is not read.",
            # What -v shows: newer ones say less without it.
            "stdloglvl=4",
            "sysloglvl=0",
            "fileloglvl=0",
            "kmsgloglvl=0",
            "show_modules=no",
            f"drivers_dir={shlex.quote(str(modules))}",
            f"tmpdir={shlex.quote(str(work))}",
            # dracut asks it for some forty directories one by one, and where there is none looks for itself.
            "pkg-config() { return 1; }",
            "PKG_CONFIG=false",
            "",
        ]
    )


def ldd_script(linker: str) -> str:
    """Return what takes the place of ldd(1), which dracut calls for every program and library.

    ldd is a script of bash that asks each dynamic linker it knows three questions; the right one, asked alone, takes a
    third of the time. What it cannot list, a script or a static program, is left to ldd.
    """
    ask = f'[ $# -eq 1 ] && list=$({shlex.quote(linker)} --list "$1" 2>/dev/null) && printf "%s\\n" "$list" && exit'
    return f'#!/bin/sh\n{ask}\nexec ldd "$@"\n'


def arguments(dracut: Dracut, request: Request) -> list[str]:
    """Return the argument vector: generic, reproducible, not compressed, and only the modules that are named.

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
        "--nostrip",
        "--conf",
        f"./{request.config.name}",
        "--confdir",
        f"./{CONFIG_PARTS}",
        "--kver",
        request.kernel.release,
        "--no-compress",
        "--modules",
        " ".join(request.modules),
    ]
    argv += ["--omit-drivers", " ".join(name for name in VIRTUAL_DEVICES if name not in request.drivers)]
    if request.drivers:
        argv += ["--add-drivers", " ".join(request.drivers)]
    return [*argv, str(request.output)]
