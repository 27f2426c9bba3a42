"""Makes the tree of a distribution: Debian and its kin with mmdebstrap, the RPM family with dnf --installroot."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build.errors import AnchorError, UsageError
from anchor_build.run import run, which

DEB = ("debian", "ubuntu")
NAME = re.compile(r"([a-z][a-z0-9-]*):([A-Za-z0-9][A-Za-z0-9._-]*)")
BUILD_TIMEOUT = 3600.0
# What dnf leaves behind that differs each time and that no node reads.
DNF_LEFTOVERS = (
    "var/cache/dnf",
    "var/cache/libdnf5",
    "var/lib/dnf/history.sqlite*",
    "var/log/dnf*",
    "var/log/hawkey.log",
)


@dataclass(frozen=True)
class Distribution:
    """A distribution such as debian:bookworm, what to install, and from where (URLs, or apt source lines).

    `key` holds the public keys that sign its packages; without it those that this host trusts count.
    """

    name: str
    packages: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()
    key: Path | None = None

    @property
    def release(self) -> tuple[str, str]:
        """Its name and its version; raises UsageError where they are not both given."""
        found = NAME.fullmatch(self.name)
        if found is None:
            raise UsageError(f"--distribution {self.name}: is not a name and a version such as debian:bookworm")
        return found[1], found[2]


def build_tree(distribution: Distribution, tree: Path, work: Path, unpack: Callable[[Path, Path], None]) -> Path:
    """Install the distribution into `tree`, an empty directory; return where it is. Raises AnchorError."""
    family, _ = distribution.release
    log = work / "distribution.log"
    program = "mmdebstrap" if family in DEB else "dnf"
    if which(program) is None:
        raise AnchorError(f"{program} is missing: install {program}")
    hint = "are the mirrors and the names of the packages right, and is the network there?"
    if family in DEB:
        # By way of a tar: mmdebstrap makes it reproducible.
        archive = work / "distribution.tar"
        run(mmdebstrap_arguments(distribution, archive), log=log, timeout=BUILD_TIMEOUT, hint=hint)
        unpack(archive, tree)
        archive.unlink()
        return tree
    if distribution.mirrors and distribution.key is None:
        hint += " Packages from --mirror need the key that signed them: --mirror-key FILE"
    run(dnf_arguments(distribution, tree), log=log, timeout=BUILD_TIMEOUT, hint=hint)
    for pattern in DNF_LEFTOVERS:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tree


def mmdebstrap_arguments(distribution: Distribution, archive: Path) -> list[str]:
    """Return the command that writes a Debian root as a tar."""
    _, suite = distribution.release
    include = [f"--include={','.join(distribution.packages)}"] if distribution.packages else []
    keyring = [f"--keyring={distribution.key.resolve()}"] if distribution.key else []
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        *keyring,
        *include,
        suite,
        str(archive),
        *distribution.mirrors,
    ]


def dnf_arguments(distribution: Distribution, tree: Path) -> list[str]:
    """Return the command that installs an RPM distribution; without mirrors it uses this host's repositories."""
    family, version = distribution.release
    argv = ["dnf", "--assumeyes", f"--installroot={tree.resolve()}", f"--releasever={version}"]
    argv += ["--setopt=install_weak_deps=False", "--setopt=keepcache=False"]
    if distribution.mirrors:
        argv += ["--setopt=reposdir=/dev/null"]
        for n, url in enumerate(distribution.mirrors):
            argv += [f"--repofrompath=anchor{n},{url}", f"--setopt=anchor{n}.gpgcheck=1"]
            if distribution.key:
                argv.append(f"--setopt=anchor{n}.gpgkey=file://{distribution.key.resolve()}")
    return [*argv, "install", *(distribution.packages or (f"{family}-release", "systemd", "kernel-modules"))]


def known_sources(values: Sequence[str]) -> tuple[str, ...]:
    """Return mirrors as given; raises UsageError for what would be taken as an option."""
    for value in values:
        if value.startswith("-") or not value.strip():
            raise UsageError(f"--mirror {value}: is not a URL")
    return tuple(values)
