"""Reads a finished initramfs back: is everything inside that the stages promise, and whose bytes are they."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from anchor_build.cpio import Initramfs, Member
from anchor_build.dracut import NETWORKD
from anchor_build.elf import needed_libraries
from anchor_build.embed import FILE as IMAGES
from anchor_build.kernel import Kernel
from anchor_build.plan import Plan
from anchor_build.render import HOOKS, NETWORK_FILE, RenderedModule, installed_files
from anchor_build.stage import Stage, is_promised

PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin", "bin", "sbin")
HOOK_TREES = ("lib/dracut/hooks", "usr/lib/dracut/hooks", "var/lib/dracut/hooks")


def missing(
    initramfs: Initramfs,
    plan: Plan,
    modules: tuple[RenderedModule, ...],
    kernel: Kernel,
    site: Mapping[str, bytes],
    extra_drivers: Sequence[str] = (),
) -> list[str]:
    """Return one line for each promised thing that is not inside, or not as promised.

    `site` holds the prepared files of /etc/anchor by name; `extra_drivers` are those of --add-drivers.
    """
    problems: list[str] = []
    drivers = {
        _driver_name(path) for path in initramfs.members if ".ko" in path.rpartition("/")[2]
    } | kernel.builtin_names()
    included = included_modules(initramfs)
    for driver in extra_drivers:
        if is_promised(driver) and driver.replace("-", "_") not in drivers:
            problems.append(f"--add-drivers: the driver {driver} is not inside")
    for stage, module in zip(plan.all, modules, strict=True):
        for binary in stage.binaries:
            wanted = not binary.optional and (not binary.without or binary.without not in included)
            if wanted and find_program(initramfs, binary.name) is None:
                problems.append(f"{stage.id}: the program {binary.name} is not inside")
        for driver in stage.drivers:
            if is_promised(driver) and driver.replace("-", "_") not in drivers:
                problems.append(f"{stage.id}: the driver {driver} is not inside")
        for source, target, mode in installed_files(stage):
            problems += _compare(initramfs, stage.id, target, module.files[source].content, mode)
    for name, content in site.items():
        problems += _compare(initramfs, "anchor", f"/etc/anchor/{name}", content, site_mode(name))
    if any(initramfs.resolve(str(path)) for path in NETWORKD):
        # With another network module there is no such file: its own way is ip= and rd.neednet.
        source, target = NETWORK_FILE
        problems += _compare(initramfs, "anchor", target, modules[0].files[source].content, 0o644)
    for hook, number in HOOKS.items():
        source = f"hook-{hook}.sh"
        name = f"{number}-{source}"
        tree = next((tree for tree in HOOK_TREES if initramfs.resolve(f"{tree}/{hook}/{name}")), None)
        if tree is None:
            problems.append(f"anchor: the {hook} hook is not inside")
        else:
            content = modules[0].files[source].content
            problems += _compare(initramfs, "anchor", f"/{tree}/{hook}/{name}", content, None)
    return problems


def site_mode(name: str) -> int:
    """Return the permission bits of a file in /etc/anchor: the parameters may hold secrets."""
    return 0o600 if name == "params" else 0o644


def _compare(initramfs: Initramfs, owner: str, target: str, content: bytes, mode: int | None) -> list[str]:
    member = initramfs.resolve(target)
    if member is None:
        return [f"{owner}: {target} is not inside"]
    if member.content != content:
        return [f"{owner}: {target} is inside with other content"]
    if mode is not None and member.mode & 0o7777 != mode:
        return [f"{owner}: {target} has mode {member.mode & 0o7777:04o} instead of {mode:04o}"]
    return []


def included_modules(initramfs: Initramfs) -> list[str]:
    """Return the names of the dracut modules that an initramfs has, as dracut wrote them down in it."""
    # In /lib, which is a link to /usr/lib in most systems.
    found = (initramfs.resolve(f"{top}/dracut/modules.txt") for top in ("lib", "usr/lib"))
    member = next(filter(None, found), None)
    return member.content.decode("utf-8", "replace").split() if member is not None else []


def find_program(initramfs: Initramfs, name: str) -> Member | None:
    """Return a program's file, found as PATH would find it."""
    found = (initramfs.resolve(f"{directory}/{name}") for directory in PROGRAM_DIRECTORIES)
    return next((member for member in found if member is not None and member.is_file), None)


def _driver_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


@dataclass(frozen=True)
class Contents:
    """Sizes in bytes before compression: by owner, and the largest files; `drivers` names the kernel modules."""

    by_owner: Mapping[str, int]
    largest: tuple[tuple[str, int], ...]
    files: int
    total: int
    drivers: tuple[str, ...]


def measure(initramfs: Initramfs, plan: Plan, kernel: Kernel) -> Contents:
    """Say whose the bytes are: a file belongs to the first stage that needs it, the rest to the base system."""
    depends = driver_dependencies(kernel.modules_dep.read_text(encoding="utf-8", errors="replace"))
    return measure_stages(initramfs, plan.all, depends, lambda stage: libraries(initramfs, stage))


def measure_stages(
    initramfs: Initramfs,
    stages: Sequence[Stage],
    depends: Mapping[str, tuple[str, ...]],
    libraries: Callable[[Stage], Sequence[str]],
) -> Contents:
    """Say whose the bytes are; `libraries` names the shared libraries of a stage's programs."""
    owners: dict[str, str] = {f"etc/anchor/{IMAGES}": "embedded images"}
    for stage in stages:
        for path in (*_claims(initramfs, stage, depends), *_found(initramfs, libraries(stage))):
            owners.setdefault(path, stage.id)
    sizes: dict[str, int] = {stage.id: 0 for stage in stages}
    drivers = []
    for path, member in initramfs.members.items():
        is_driver = ".ko" in path.rpartition("/")[2]
        if is_driver:
            drivers.append(_driver_name(path))
        if member.is_file:
            owner = owners.get(path, "other drivers" if is_driver else "base system")
            sizes[owner] = sizes.get(owner, 0) + member.size
    files = [(path, member.size) for path, member in initramfs.members.items() if member.is_file]
    files.sort(key=lambda item: (-item[1], item[0]))
    return Contents(sizes, tuple(files[:10]), len(files), sum(sizes.values()), tuple(sorted(drivers)))


def _claims(initramfs: Initramfs, stage: Stage, depends: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    targets = [target for _, target, _ in installed_files(stage)]
    programs = [find_program(initramfs, binary.name) for binary in stage.binaries]
    yield from _found(initramfs, targets)
    yield from (member.path for member in programs if member)
    wanted = {driver.rstrip("?").replace("-", "_") for driver in stage.drivers}
    wanted |= {name for driver in wanted for name in depends.get(driver, ())}
    yield from (path for path in initramfs.members if ".ko" in path and _driver_name(path) in wanted)


def _found(initramfs: Initramfs, paths: Sequence[str]) -> Iterator[str]:
    return (member.path for path in paths if (member := initramfs.resolve(path)))


def libraries(initramfs: Initramfs, stage: Stage) -> list[str]:
    """Return the shared libraries in the initramfs that a stage's programs need, and what those need."""
    by_name: dict[str, str] = {}
    for path in initramfs.members:
        by_name.setdefault(path.rpartition("/")[2], path)
    programs = (find_program(initramfs, binary.name) for binary in stage.binaries)
    todo = [member for member in programs if member is not None]
    found: dict[str, None] = {}
    while todo:
        for name in needed_libraries(todo.pop().content):
            library = by_name.get(name, "")
            member = initramfs.resolve(library) if library and library not in found else None
            if member is not None:
                found[library] = None
                todo.append(member)
    return sorted(found)


def driver_dependencies(modules_dep: str) -> dict[str, tuple[str, ...]]:
    """Return what each driver needs, by the text of a modules.dep."""
    pairs = (line.partition(":") for line in modules_dep.splitlines())
    return {_driver_name(name): tuple(_driver_name(path) for path in rest.split()) for name, _, rest in pairs}
