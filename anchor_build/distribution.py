"""Makes the tree of a distribution: Debian and its kin with mmdebstrap, the RPM family with dnf --installroot."""

from __future__ import annotations

import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build.errors import ProcessError, UsageError
from anchor_build.run import run, which

# family -> the components of its archive that hold what a node needs.
DEB = {"debian": "main", "ubuntu": "main universe"}
# mmdebstrap(1), VARIANTS: how much is there without --package.
VARIANTS = ("extract", "custom", "essential", "apt", "minbase", "important", "standard")
NAME = re.compile(r"([a-z][a-z0-9-]*):([A-Za-z0-9][A-Za-z0-9._-]*)")
BUILD_TIMEOUT = 3600.0
# Every distribution of the family has a package that provides this.
RPM_PACKAGES = ("system-release", "systemd", "kernel-modules")
# What dnf leaves behind that differs each time and that no node reads.
DNF_LEFTOVERS = (
    "var/cache/dnf",
    "var/cache/libdnf5",
    "var/lib/dnf/history.sqlite*",
    "var/log/dnf*",
    "var/log/hawkey.log",
)
HINT = "are the mirrors and the names of the packages right, and is the network there?"
KEY_HINT = "is --mirror-key the public key that signs these packages?"
# What dnf, apt and gpgv say, and what to do.
HINTS = (
    (r"no enabled repositories", "this host has no repositories of it: give --mirror URL and --mirror-key FILE"),
    (r"GPG|gpg|NO_PUBKEY|is not signed|not available\. Use", KEY_HINT),
)


@dataclass(frozen=True)
class Distribution:
    """A distribution such as debian:bookworm, what to install, and from where (URLs, or apt source lines).

    `key` holds the public keys that sign its packages; without it those that this host trusts count. `variant` is one
    of VARIANTS, for Debian and its kin, or empty for `minbase`.
    """

    name: str
    packages: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()
    key: Path | None = None
    variant: str = ""

    @property
    def release(self) -> tuple[str, str]:
        """Its name and its version; raises UsageError where they are not both given."""
        found = NAME.fullmatch(self.name)
        if found is None:
            raise UsageError(f"--distribution {self.name}: is not a name and a version such as debian:bookworm")
        return found[1], found[2]


def distribution_problems(distribution: Distribution) -> Iterator[str]:
    """Say what is missing before anything is installed; raises UsageError for options that do not go together."""
    family, _ = distribution.release
    program = "mmdebstrap" if family in DEB else "dnf"
    if which(program) is None:
        yield f"{program} is missing: install {program} (deb and rpm)"
    if distribution.key is not None and not distribution.key.is_file():
        yield f"--mirror-key {distribution.key}: there is no such file"
    if program == "dnf" and distribution.mirrors and distribution.key is None:
        raise UsageError(
            f"--mirror {distribution.mirrors[0]}: needs --mirror-key FILE, the public key that signs its packages",
            "a mirror's own word for its packages is not taken",
        )
    if program == "dnf" and distribution.variant:
        raise UsageError("--variant is for Debian and its kin; name packages with --package")


def build_tree(
    distribution: Distribution, tree: Path, work: Path, unpack: Callable[[Path, Path], None], epoch: int
) -> dict[str, Any]:
    """Install the distribution into `tree`, an empty directory; return what the report says of it.

    `epoch` is the time, in seconds, that its files get instead of a later one. Raises AnchorError.
    """
    family, version = distribution.release
    log = work / "distribution.log"
    env = {"SOURCE_DATE_EPOCH": str(epoch)}
    try:
        if family in DEB:
            sources = distribution.mirrors or host_sources(family, version)
            # By way of a tar: mmdebstrap makes it reproducible.
            archive = work / "distribution.tar"
            with _keyring(distribution.key) as keyring:
                argv = mmdebstrap_arguments(distribution, sources, archive, keyring)
                run(argv, env=env, log=log, timeout=BUILD_TIMEOUT)
            unpack(archive, tree)
            archive.unlink()
        else:
            sources = distribution.mirrors
            version = run(["dnf", "--version"]).stdout
            run(dnf_arguments(distribution, tree, version), env=env, log=log, timeout=BUILD_TIMEOUT)
    except ProcessError as error:
        error.hint = next((hint for pattern, hint in HINTS if re.search(pattern, error.tail)), HINT)
        raise
    _forget_this_host(tree)
    return {"sources": list(sources)}


@contextmanager
def _keyring(key: Path | None) -> Iterator[Path | None]:
    """Yield a directory with the key as apt reads it: without privileges, and the form by the name."""
    if key is None:
        yield None
        return
    data = key.read_bytes()
    with tempfile.TemporaryDirectory(prefix="anchor-keyring-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        copy = directory / ("mirror.asc" if data.startswith(b"-----BEGIN PGP") else "mirror.gpg")
        copy.write_bytes(data)
        copy.chmod(0o644)
        yield directory


def _forget_this_host(tree: Path) -> None:
    """Remove what was taken from this host, or is of one machine: the image is for many."""
    for name in ("etc/hostname", "etc/resolv.conf"):
        # mmdebstrap copies them (its manual, SOURCE_DATE_EPOCH).
        copy, own = tree / name, Path("/", name)
        if copy.is_file() and not copy.is_symlink() and own.is_file() and copy.read_bytes() == own.read_bytes():
            copy.unlink()
    machine = tree / "etc/machine-id"
    if machine.is_file() and not machine.is_symlink() and machine.stat().st_size:
        # Empty, each boot gets one (machine-id(5)); missing, it would be taken for the first boot.
        machine.write_bytes(b"")
    for pattern in DNF_LEFTOVERS:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def host_sources(family: str, suite: str) -> tuple[str, ...]:
    """Return apt source lines for `suite` on the mirrors that this host uses; none where it is not of that family."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return ()
    codename = system.get("VERSION_CODENAME", "")
    if system.get("ID") != family or not codename or which("apt-get") is None:
        return ()
    # This needs no lists, unlike `apt-get indextargets`, and reads both formats of source files.
    listed = run(["apt-get", "update", "--print-uris"]).stdout
    found = set(re.findall(rf"^'(\S+)/dists/{codename}(-updates|-security|)/InRelease'", listed, re.MULTILINE))
    # Other vendors name their suites after the distribution's, too, but only its own mirrors have these two.
    own = {uri for uri, part in found if part}
    if not any(part == "" for uri, part in found if uri in own):
        return ()
    parts = ("",) if suite in ("sid", "unstable") else ("", "-updates", "-security")
    return tuple(
        f"deb {uri} {suite}{part} {DEB[family]}" for uri, part in sorted(found) if uri in own and part in parts
    )


def mmdebstrap_arguments(
    distribution: Distribution, sources: Sequence[str], archive: Path, keyring: Path | None
) -> list[str]:
    """Return the command that writes a Debian root as a tar; without sources it uses mmdebstrap's own."""
    _, suite = distribution.release
    include = [f"--include={','.join(distribution.packages)}"] if distribution.packages else []
    keys = [f"--keyring={keyring}"] if keyring else []
    variant = f"--variant={distribution.variant or 'minbase'}"
    return ["mmdebstrap", "--mode=root", variant, *keys, *include, suite, str(archive), *sources]


def dnf_arguments(distribution: Distribution, tree: Path, dnf_version: str) -> list[str]:
    """Return the command that installs an RPM distribution; without mirrors it uses this host's repositories.

    `dnf_version` is what `dnf --version` says: dnf5 looks for repositories in the tree unless it is told otherwise
    (dnf5-installroot(7)).
    """
    _, version = distribution.release
    argv = ["dnf", "--assumeyes", f"--installroot={tree.resolve()}", f"--releasever={version}"]
    argv += ["--use-host-config"] if dnf_version.startswith("dnf5") else []
    argv += ["--setopt=install_weak_deps=False", "--setopt=keepcache=False"]
    if distribution.mirrors:
        argv += ["--setopt=reposdir=/dev/null"]
        for n, url in enumerate(distribution.mirrors):
            argv += [f"--repofrompath=anchor{n},{url}", f"--setopt=anchor{n}.gpgcheck=1"]
            if distribution.key:
                argv.append(f"--setopt=anchor{n}.gpgkey=file://{distribution.key.resolve()}")
    return [*argv, "install", *(distribution.packages or RPM_PACKAGES)]


def known_sources(values: Sequence[str]) -> tuple[str, ...]:
    """Return mirrors as given; raises UsageError for what would be taken as an option."""
    for value in values:
        if value.startswith("-") or not value.strip():
            raise UsageError(f"--mirror {value}: is not a URL")
    return tuple(values)


def known_packages(values: Sequence[str]) -> tuple[str, ...]:
    """Return the names in lists of packages, separated by commas or blanks; raises UsageError for an option."""
    names = tuple(name for value in values for name in re.split(r"[,\s]+", value) if name)
    for name in names:
        if name.startswith("-"):
            raise UsageError(f"--package {name}: is not the name of a package")
    return names
