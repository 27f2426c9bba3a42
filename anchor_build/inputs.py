"""Where dracut and its modules look, and everything that is said to a build: what the cache has to know."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_build import __version__, cache
from anchor_build.dracut import BASE
from anchor_build.registry import data_directory
from anchor_build.root import PROGRAM_PATH, Root

if TYPE_CHECKING:
    from anchor_build.build import InitramfsBuild

# In the system that is built in: all that is in these may be read,
TREES = (
    *(str(BASE), "/etc", "/usr/lib/firmware", "/lib/firmware", "/usr/lib/systemd", "/lib/systemd", "/usr/lib/udev"),
    *("/lib/udev", "/usr/lib/modprobe.d", "/lib/modprobe.d", "/usr/lib/depmod.d", "/lib/depmod.d", "/run/depmod.d"),
    *("/usr/lib/modules-load.d", "/usr/lib/sysctl.d", "/usr/lib/tmpfiles.d", "/usr/lib/sysusers.d", "/usr/lib/kernel"),
    *(
        "/usr/lib/environment.d",
        "/usr/lib/binfmt.d",
        "/usr/lib/dbus-1.0",
        "/usr/share/dbus-1",
        "/usr/lib/NetworkManager",
    ),
    *("/usr/lib/kbd", "/usr/lib/pcrlock.d", "/usr/lib/credstore", "/usr/lib/locale", "/usr/lib/ssl", "/run/modprobe.d"),
)
# and of these what is directly in them.
LISTS = (
    *PROGRAM_PATH.split(":"),
    *("/", "/usr", "/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/libx32", "/lib", "/lib64", "/usr/libexec"),
    *(
        "/usr/local",
        "/usr/local/bin",
        "/usr/local/sbin",
        "/usr/local/lib",
        "/usr/local/share",
        "/boot",
        "/usr/share",
        "/usr/share/locale",
    ),
    *("/usr/lib/pkgconfig", "/usr/share/pkgconfig", "/var", "/var/lib", "/var/cache", "/var/cache/ldconfig"),
    *("/usr/lib/modules", "/lib/modules"),
)
# What directories of libraries have below them.
LIBRARY_LISTS = ("", "/gconv", "/engines-3", "/engines-1.1", "/ossl-modules", "/systemd", "/security", "/pkgconfig")
CONFIGURATIONS = ("/boot/config-{}", "/usr/src/linux-{}", "/usr/src/linux-{}/.config", "/usr/src")
# Whether this is a container, and whether it was booted: the rest of /run comes and goes.
FILES = (
    "/run/systemd/container",
    "/run/systemd/system",
    "/run/host/container-manager",
    "/run/containerenv",
    "/.dockerenv",
)


def facts_of(build: InitramfsBuild) -> dict[str, Any]:
    """Return everything that is said to a build, for cache.key_of; secrets do not leave it but as a digest."""
    kernel, root, image = build.kernel, build.kernel.root, build.kernel.image
    return {
        "anchor_build": [__version__, sys.version],
        "code": str(data_directory()),
        "root": root.identity or str(root.directory),
        "kernel": [kernel.release, str(root.inside(kernel.modules)), str(image and root.inside(image))],
        "stages": [[stage.id, str(stage.directory), stage.origin] for stage in build.plan.all],
        "choosers": sorted(build.plan.choosers.items()),
        "settings": [[setting.param.key, setting.value] for setting in build.settings],
        "ca": build.ca.decode("latin-1"),
        "manifest": [[key.pem for key in build.manifest_keys], build.manifest_since],
        "drivers": [build.drivers, repr(build.driver_set)],
        "embedded": [[image.name, image.digest, image.source] for image in build.embedded],
        "network": [build.network, build.systemd],
        "compress": [build.compress, build.trim],
        "inputs": dict(build.inputs),
        "warnings": build.warnings,
        "date": os.environ.get("SOURCE_DATE_EPOCH"),
        "who": [os.geteuid(), platform.machine()],
        "path": os.environ.get("PATH"),
    }


def before_build(build: InitramfsBuild) -> cache.Inputs:
    """Return what is known to matter before dracut runs; the files that it takes are known when it has run."""
    root = build.kernel.root
    # The code that decides what dracut is told, and the stages.
    trees = {str(Path(__file__).parent)} | {str(data_directory() / name) for name in ("dracut-modules", "lib")}
    if (renderer := find_spec("jinja2")) is not None and renderer.origin is not None:
        trees.add(str(Path(renderer.origin).parent))
    trees |= {str(stage.directory) for stage in build.plan.all}
    if root.identity:
        return cache.Inputs(frozenset(trees), frozenset(), frozenset())
    trees |= {str(root.at(path)) for path in TREES}
    trees |= {str(build.kernel.modules), str(build.kernel.modules.resolve())}
    lists = {str(root.at(path)) for path in LISTS}
    lists |= {str(root.at(f"{top}{sub}")) for top in _library_directories(root) for sub in LIBRARY_LISTS}
    files = {str(root.at(path)) for path in FILES}
    files |= {str(root.at(path.format(build.kernel.release))) for path in CONFIGURATIONS}
    if root.is_host:
        files |= {f"{path}/dracut" for path in os.environ.get("PATH", "").split(":") if path.startswith("/")}
    if build.kernel.image is not None:
        files |= {str(build.kernel.image), str(build.kernel.image.resolve())}
    # The links that lead to all this.
    files |= {str(root.directory / path.lstrip("/")) for path in (*TREES, *LISTS)}
    files |= {str(root.directory / "lib/modules"), str(root.directory / "usr/lib/modules")}
    return cache.Inputs(frozenset(trees), frozenset(lists), frozenset(files))


def _library_directories(root: Root) -> list[str]:
    """Return where ld.so looks: Debian's directories by processor, and those of ld.so.conf(5)."""
    found = []
    for top in ("/usr/lib", "/lib"):
        found += [f"{top}/{path.name}" for path in root.at(top).glob("*-linux-gnu*") if path.is_dir()]
    for path in (root.at("/etc/ld.so.conf"), *root.at("/etc/ld.so.conf.d").glob("*.conf")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [line.strip() for line in lines if line.startswith("/")]
    return found


def went_in(root: Root, members: Iterable[str]) -> cache.Inputs:
    """Return the files that are in an initramfs and have the same place in the system, with their directories."""
    files: set[str] = set()
    lists: set[str] = set()
    for member in () if root.identity else members:
        path = root.at("/" + member)
        if path.exists() and not path.is_dir():
            # the link, and what it leads to
            target = path.resolve() if root.is_host else path
            # What /etc/mtab leads to is another file for each process, as new as that.
            files |= {str(root.directory / member)} | (set() if target.is_relative_to("/proc") else {str(target)})
            lists.add(str(path.parent))
    return cache.Inputs(frozenset(), frozenset(lists), frozenset(files))


class Observation:
    """What a build may read, looked at before dracut runs and afterwards; digests are taken meanwhile."""

    def __init__(self, build: InitramfsBuild) -> None:
        self.root = build.kernel.root
        self.began_ns = time.time_ns()
        self.inputs = before_build(build)
        self.found = cache.snapshot(self.inputs)
        self.known: dict[str, str] = {}
        self._thread = threading.Thread(target=self._take_digests, daemon=True)
        self._thread.start()

    def _take_digests(self) -> None:
        self.known = cache.digests(self.found, self.inputs.files)

    def finish(self, members: Iterable[str]) -> tuple[cache.Inputs, dict[str, str], dict[str, str]] | None:
        """Return the inputs, their fingerprints and digests; None if something may have changed while dracut ran."""
        self._thread.join()
        more = went_in(self.root, members)
        inputs = cache.Inputs(self.inputs.trees, self.inputs.lists | more.lists, self.inputs.files | more.files)
        found = cache.snapshot(inputs)
        if any(found.get(path) != text for path, text in self.found.items()):
            return None
        late = {path: text for path, text in found.items() if path not in self.found}
        appeared = [path for path in late if self.inputs.covers(path)]
        directories = more.lists - self.inputs.lists
        if appeared or not cache.is_settled(found, self.began_ns, directories):
            return None
        rest = {path: text for path, text in found.items() if path not in self.known}
        return inputs, found, self.known | cache.digests(rest, more.files)
