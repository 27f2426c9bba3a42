"""What this host lacks for building and booting, and which package has it."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build import dracut
from anchor_build.errors import AnchorError
from anchor_build.kernel import installed_releases
from anchor_build.plan import Plan
from anchor_build.root import HOST
from anchor_build.rpm.rpmbuild import RPMBUILD
from anchor_build.run import which
from anchor_build.stage import NO_PACKAGE, Binary

TOOLS = (
    Binary("cpio", "cpio", "cpio"),
    Binary("zstd", "zstd", "zstd"),
    Binary("ldd", "glibc-common", "libc-bin"),
)
# The distributions of each family of packages, by ID and ID_LIKE of os-release; build.sh has the same.
FAMILIES = {"deb": {"debian", "ubuntu"}, "rpm": {"fedora", "rhel"}}
CONTAINERS = (Binary("skopeo", "skopeo", "skopeo"), Binary("umoci", "umoci", "umoci"))
VERITYSETUP = Binary("veritysetup", "veritysetup", "cryptsetup-bin")
QEMU = Binary("qemu-system-x86_64", "qemu-system-x86-core", "qemu-system-x86")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `needed` tells a missing necessity from a missing convenience."""

    what: str
    ok: bool
    detail: str
    needed: bool = True
    rpm: str = ""
    deb: str = ""


def examine(plan: Plan) -> list[Finding]:
    """Look at everything that building this plan here needs."""
    findings = [_dracut()]
    findings += [_program("build tool", binary) for binary in TOOLS]
    findings += [_copied_program(stage.id, binary) for stage in plan.all for binary in stage.binaries]
    findings += [_dracut_module(name, stage.id) for stage in plan.all for name in stage.dracut if name[-1] != "?"]
    findings += [
        _systemd_networkd(),
        _kernels(),
        _program("packages", RPMBUILD, needed=False),
        _program("boot", QEMU, needed=False),
        *(
            _program("--sysroot", Binary(name, "util-linux", "util-linux"), needed=False)
            for name in ("unshare", "setpriv")
        ),
        *(_program("container images", binary, needed=False) for binary in CONTAINERS),
        _program("images read in place", VERITYSETUP, needed=False),
        _root(),
        _work_space(),
    ]
    return findings


def packages(findings: Sequence[Finding], family: str) -> list[str]:
    """Return the packages of what is missing, for `deb` or `rpm`."""
    return sorted({getattr(f, family) for f in findings if not f.ok and getattr(f, family)})


def package_family() -> str:
    """Return `deb` or `rpm`: what counts is the distribution, as for build.sh (mmdebstrap brings apt to Fedora, too).

    It is what os-release(5) says; only where that names none that is known, it is the package manager.
    """
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    names = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    for family, known in FAMILIES.items():
        if names & known:
            return family
    return "deb" if which("apt-get") else "rpm"


def _program(owner: str, binary: Binary, *, needed: bool = True) -> Finding:
    path = which(binary.name)
    detail = str(path) if path else "not found"
    return _finding(f"{owner}: {binary.name}", path, detail, binary, needed)


def _copied_program(owner: str, binary: Binary) -> Finding:
    path = HOST.find_program(binary.name)
    detail = str(path) if path else f"not found{dracut.misplaced_program(binary.name)}"
    label = f"{owner}: {binary.name}{binary.remark if binary.without else ''}"
    return _finding(label, path, detail, binary, not binary.remark)


def _finding(what: str, path: Path | None, detail: str, binary: Binary, needed: bool) -> Finding:
    rpm, deb = (name if name != NO_PACKAGE else "" for name in (binary.rpm, binary.deb))
    return Finding(what, path is not None, detail, needed, rpm, deb)


def _dracut() -> Finding:
    try:
        found = dracut.find_dracut()
    except AnchorError as error:
        return Finding("dracut", False, error.message, True, "dracut", "dracut-core")
    return Finding("dracut", True, f"{found.program}, version {found.version_text}")


def _dracut_module(name: str, owner: str) -> Finding:
    label = f"{owner}: dracut module {name}"
    try:
        there = dracut.find_dracut().has_module(name)
    except AnchorError:
        there = False
    deb, rpm = dracut.module_packages(name)
    return Finding(label, there, "installed" if there else "not found", True, rpm, deb)


def _systemd_networkd() -> Finding:
    there = dracut.has_networkd(HOST)
    detail = "present" if there else "missing: dracut falls back to a slower network module"
    return Finding("systemd-networkd", there, detail, False, "systemd-networkd", "systemd")


def _kernels() -> Finding:
    releases = installed_releases()
    detail = f"newest {releases[-1]}" if releases else "none here: name one with --kernel FILE --modules DIR"
    return Finding("kernel with modules", bool(releases), detail, False, "kernel", "linux-image-amd64")


def _root() -> Finding:
    root = os.geteuid() == 0
    return Finding("root", root, "yes" if root else "no: dracut may not read all that it copies", False)


def _work_space() -> Finding:
    from anchor_build.files import cache_directory

    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache):
            free = os.statvfs(cache)
    except OSError as error:
        return Finding("cache directory", False, f"{cache}: {error.strerror}")
    megabytes = free.f_bavail * free.f_frsize // 1_000_000
    return Finding("cache directory", megabytes >= 500, f"{cache}, {megabytes} MB free (500 MB are enough)")
