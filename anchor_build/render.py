"""Turn a plan into dracut modules: pure text, derived from each stage's declaration."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_build import __version__, paramtypes
from anchor_build.errors import AnchorError
from anchor_build.plan import DEFAULTS, Plan, chooses_absent
from anchor_build.registry import data_directory, find_lib
from anchor_build.settings import SYSTEM_BUNDLES
from anchor_build.stage import (
    DECLARATION,
    Param,
    Stage,
    digest_holders,
    is_promised,
    missing_of,
    shell_word,
    unprotected,
)

if TYPE_CHECKING:
    import jinja2

# dracut runs modules by number; 50 to 59 are for third parties. The core comes first.
CORE_NUMBER = 50
KIND_NUMBERS = {"auth": 51, "transport": 52, "image": 53}

NODE_LIB = "/usr/lib/anchor/lib"
NODE_STAGES = "/usr/lib/anchor/stages"
# dracut's hooks that the core has a script in, and when that runs among others.
HOOKS = {"cmdline": 20, "pre-mount": 50, "cleanup": 90}
NETWORK_FILE = ("anchor.network", "/etc/systemd/network/zz-anchor.network")
CORE_FILES = (*(f"hook-{hook}.sh" for hook in HOOKS), NETWORK_FILE[0])


@dataclass(frozen=True)
class RenderedFile:
    """One file of a module; `mode` is its permission bits."""

    content: bytes
    mode: int


@dataclass(frozen=True)
class RenderedModule:
    """A dracut module directory: its name such as 51anchor-auth-acme, and its files by name."""

    name: str
    stage: Stage
    files: Mapping[str, RenderedFile]


def module_directory(stage: Stage) -> str:
    """Return the name of a stage's module directory, number included."""
    return f"{CORE_NUMBER if stage.is_core else KIND_NUMBERS[stage.kind]}{stage.module}"


def stage_directory(stage: Stage) -> str:
    """Return where a stage's shell functions are on the node; the number makes globbing yield the order of choice."""
    return f"{NODE_STAGES}/{stage.kind}/{stage.order:02d}-{stage.name}"


def installed_files(stage: Stage) -> tuple[tuple[str, str, int], ...]:
    """Return what a stage's module installs on the node: file in the module, path on the node, permission bits."""
    where = stage_directory(stage)
    found = [(lib, f"{NODE_LIB}/{lib}", 0o644) for lib in stage.libs]
    found += [(file.source, file.target, int(file.mode, 8)) for file in stage.files]
    found.append(("params.sh", f"{where}/params.sh", 0o644))
    found.append(
        ("version", "/etc/anchor/version", 0o644) if stage.is_core else ("stage.sh", f"{where}/stage.sh", 0o644)
    )
    return tuple(found)


def render_plan(plan: Plan, version: str = __version__) -> tuple[RenderedModule, ...]:
    """Render the core and every stage of a plan; `version` is what the node finds in /etc/anchor/version.

    Raises AnchorError when a file that a declaration names does not exist.
    """
    return tuple(render_module(stage, plan.choosers if stage.is_core else {}, version) for stage in plan.all)


def render_module(
    stage: Stage, choosers: Mapping[str, str] | None = None, version: str = __version__
) -> RenderedModule:
    """Render one stage's dracut module; the core's needs `choosers` (see Plan.choosers), and has the version."""
    environment = _environment()
    context = _context(stage, choosers or {})
    files = {
        "module-setup.sh": _text(environment.get_template("module-setup.sh.j2").render(context), 0o755),
        "params.sh": _text(environment.get_template("params.sh.j2").render(context), 0o644),
    }
    for lib in stage.libs:
        path = find_lib(stage, lib)
        if path is None:
            raise AnchorError(f"{stage.directory / DECLARATION}: stage.libs: {lib} has vanished")
        files[lib] = RenderedFile(path.read_bytes(), 0o644)
    for file in stage.files:
        files[file.source] = RenderedFile((stage.directory / file.source).read_bytes(), int(file.mode, 8))
    if stage.is_core:
        files["version"] = _text(f"{version}\n", 0o644)
        for name in CORE_FILES:
            mode = 0o755 if name.startswith("hook-") else 0o644
            files[name] = RenderedFile((stage.directory / name).read_bytes(), mode)
    else:
        files["stage.sh"] = RenderedFile(stage.script.read_bytes(), 0o644)
    return RenderedModule(module_directory(stage), stage, files)


def place_modules(modules: tuple[RenderedModule, ...], directory: Path) -> None:
    """Write module directories below `directory`, all of them or none; it is made if it is not there.

    Raises OSError when that cannot be done, FileExistsError for a module that is there.
    """
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    placed: list[Path] = []
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".modules-", dir=directory) as name:
            write_modules(modules, Path(name))
            for module in modules:
                target = directory / module.name
                target.mkdir()  # a rename would take the place of an empty directory that is there
                placed.append(target)
                (Path(name) / module.name).rename(target)
    except BaseException:
        for target in placed:
            shutil.rmtree(target, ignore_errors=True)
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


def write_modules(modules: tuple[RenderedModule, ...], directory: Path) -> None:
    """Write module directories below `directory`, which exists."""
    for module in modules:
        target = directory / module.name
        target.mkdir()
        target.chmod(0o755)
        for name, file in module.files.items():
            path = target / name
            path.write_bytes(file.content)
            path.chmod(file.mode)


def module_digest(module: RenderedModule) -> str:
    """Return the SHA-256 over names, modes and contents of a module's files, as hexadecimal text."""
    digest = hashlib.sha256()
    for name, file in sorted(module.files.items()):
        digest.update(f"{name}\0{file.mode:o}\0{len(file.content)}\0".encode() + file.content)
    return digest.hexdigest()


def _text(text: str, mode: int) -> RenderedFile:
    return RenderedFile(text.encode(), mode)


def _context(stage: Stage, choosers: Mapping[str, str]) -> dict[str, Any]:
    core = data_directory() / "dracut-modules" / "anchor"
    return {
        "stage": stage,
        "word": f"{stage.kind}_{stage.word}",
        "required": [param for param in stage.params if param.required],
        "places": stage.places,
        "missing": missing_of(stage),
        "digest_holders": [(*holder, unprotected(holder[1])) for holder in digest_holders(stage)],
        "sources": [param for param in stage.params if param.source],
        "promised_drivers": [driver for driver in stage.drivers if is_promised(driver)],
        "choosers": [(name, chooses_absent(asked)) for name, asked in sorted(choosers.items())],
        "transport": f"anchor-transport-{DEFAULTS['transport']}" if stage.fetches else "",
        "needed": [*(() if stage.is_core else ("anchor",)), *stage.dracut],
        "installed": [(source, target) for source, target, _ in installed_files(stage)],
        "brings_sysctl": any("/sysctl.d/" in file.target for file in stage.files),
        "hooks": HOOKS,
        "ca_bundles": [str(path) for path in SYSTEM_BUNDLES],
        "network_file": NETWORK_FILE,
        "core_install": (core / "install-core.sh").read_text(encoding="utf-8").rstrip() if stage.is_core else "",
    }


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # here, since a build that is in the cache renders nothing

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(data_directory() / "dracut-modules" / "anchor"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # ${#array[@]} is shell
        comment_end_string="#>",
        autoescape=False,  # noqa: S701 - the output is shell, and every value goes through the sh filter
    )
    environment.filters["sh"] = _quote
    environment.filters["word"] = shell_word
    environment.filters["type_arguments"] = _type_arguments
    environment.filters["digest_arguments"] = _digest_arguments
    return environment


def _quote(text: str) -> str:
    """Quote for the shell, always with quotes, so that an empty value is visible."""
    return "'" + text.replace("'", "'\\''") + "'"


def _type_arguments(param: Param) -> str:
    """Return what follows the value in a call of the type's check, with a leading space if anything does."""
    return "".join(f" {_quote(word)}" for word in paramtypes.shell_arguments(param.type, param.options))


def _digest_arguments(param: Param) -> str:
    """Return value and key of each digest for anchor_param_source, with a leading space if there is any."""
    prefix, _, _ = param.variable.rpartition(shell_word(param.name))
    before = param.key.removesuffix(param.name)
    return "".join(f' "${prefix}{shell_word(digest)}" {before}{digest}' for digest in param.digest)
