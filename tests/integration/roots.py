"""Roots of other Debian releases with dracut and a kernel, to build in: made by mmdebstrap, and kept in a cache.

Each is a directory as a node's root would be before it is packed. Who uses one changes nothing in it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import tempfile
from pathlib import Path

from anchor_build.distribution import host_sources
from anchor_build.files import locked
from anchor_build.run import run
from contrib.site.image import ARCHITECTURES, BUILD_TIMEOUT, DPKG_OPTIONS, KEYRING
from tests.conftest import TOP

# Nothing in it is needed, all of it can be made again.
CACHE = TOP / ".cache" / "roots"
# suite -> the version of dracut in it
DRACUT = {"bullseye": "051", "bookworm": "059", "trixie": "106", "forky": "112"}
# The one that the tests share where one has to do.
SHARED = "trixie"
# What the stages acme, token, https and squashfs take, and each network back end that dracut knows in Debian; not the
# package dracut, which makes an initramfs of its own for each kernel that is installed.
PACKAGES = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "dash", "dracut-core", "dracut-network", "cpio", "zstd"),
    *("iproute2", "iputils-arping", "network-manager", "chrony", "ca-certificates", "curl", "openssl", "uacme"),
    *("socat", "e2fsprogs", "dmsetup"),
)
# What only some releases have: systemd's resolver as a package of its own, the client of network-legacy, switch_root in
# a package that not every system has.
MORE = {
    "bullseye": ("isc-dhcp-client",),
    "bookworm": ("systemd-resolved", "isc-dhcp-client", "procps"),
    "trixie": ("systemd-resolved", "isc-dhcp-client"),
    "forky": ("systemd-resolved", "util-linux-extra"),
}


def debian_root(suite: str) -> Path:
    """Return the root of a Debian release, made now (a minute) if it is not in the cache.

    Processes that ask at the same time wait for one to make it; what was interrupted is not taken for a root.
    """
    argv = _mmdebstrap(suite)
    digest = hashlib.sha256(json.dumps(argv).encode()).hexdigest()[:16]
    target = CACHE / f"{suite}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with locked(CACHE / f"{suite}.lock"):
        if not target.exists():
            for killed in CACHE.glob(f"unfinished-{suite}-*"):
                shutil.rmtree(killed)
            work = Path(tempfile.mkdtemp(prefix=f"unfinished-{suite}-", dir=CACHE))
            root = work / "root"
            run([*argv, root, *_sources(suite)], timeout=BUILD_TIMEOUT)
            root.rename(target)
            work.rmdir()
    return target


def package_version(root: Path, name: str) -> str:
    """Return the version of a package that is installed in a root, as dpkg has it."""
    status = (root / "var/lib/dpkg/status").read_text(encoding="utf-8")
    found = re.search(rf"^Package: {re.escape(name)}\n(?:[^\n]+\n)*?Version: (.+)$", status, re.MULTILINE)
    assert found, f"{root} has no package {name}"
    return found[1]


def _mmdebstrap(suite: str) -> list[str]:
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    packages = (*PACKAGES, *MORE[suite], f"linux-image-cloud-{architecture}")
    return [
        *("mmdebstrap", "--variant=minbase", f"--include={','.join(packages)}"),
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        # A snapshot of the archive does not grow new dates.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *((f"--keyring={KEYRING}",) if KEYRING.exists() else ()),
        suite,
    ]


def _sources(suite: str) -> list[str]:
    """Return apt source lines: without the updates of a release that no longer gets them in one piece."""
    return [line for line in host_sources("debian", suite) if suite != "bullseye" or "-security" not in line]
