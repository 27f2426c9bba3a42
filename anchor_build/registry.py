"""Where stages come from: built in, from Python packages by entry point, and from --stage-dir. One loader for all."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from anchor_build.errors import InvalidFilesError, UsageError
from anchor_build.stage import DECLARATION, KINDS, Stage, load_stage

ENTRY_POINT_GROUP = "anchor_build.stages"
CORE = "anchor"


def data_directory() -> Path:
    """Return the directory that holds dracut-modules/ and lib/: inside an installed package, or the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "data"
    return installed if installed.is_dir() else package.parent


@dataclass(frozen=True)
class Registry:
    """All stages that can be used, in the order of KINDS and of selection, and the core."""

    core: Stage
    stages: tuple[Stage, ...]

    def of_kind(self, kind: str) -> tuple[Stage, ...]:
        """Return the stages of one kind."""
        return tuple(stage for stage in self.stages if stage.kind == kind)

    def find(self, kind: str, name: str) -> Stage:
        """Return one stage; raises UsageError with the nearest name when there is none."""
        import difflib

        names = [stage.name for stage in self.of_kind(kind)]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else "a stage of your own is added with --stage-dir DIR"
            raise UsageError(f"--{kind} {name}: no such stage; there are: {', '.join(names)}", hint)
        return next(stage for stage in self.of_kind(kind) if stage.name == name)


def load_registry(stage_dirs: Sequence[Path] = ()) -> Registry:
    """Load every stage.

    A `--stage-dir` is a stage's own directory or a directory of such directories. Raises InvalidFilesError
    with the problems of all stages at once.
    """
    problems: list[str] = []
    found: list[Stage] = []
    builtin = data_directory() / "dracut-modules"
    sources = [(path, "built in") for path in _directories(builtin)]
    sources += _entry_point_directories(problems)
    for top in stage_dirs:
        directories = [top] if (top / DECLARATION).is_file() else _directories(top)
        if not directories:
            problems.append(f"{top}: holds no {DECLARATION}, nor a directory that does")
        sources += [(path, f"--stage-dir {top}") for path in directories]
    for path, origin in sources:
        try:
            found.append(load_stage(path, origin))
        except InvalidFilesError as error:
            problems += error.problems
    problems += _clashes(found)
    if problems:
        raise InvalidFilesError(problems, "doc/stages.md describes what a stage's directory holds")
    core = next(stage for stage in found if stage.is_core)
    ordered = sorted(
        (stage for stage in found if not stage.is_core), key=lambda s: (KINDS.index(s.kind), s.order, s.name)
    )
    return Registry(core, tuple(ordered))


def _directories(top: Path) -> list[Path]:
    if not top.is_dir():
        return []
    return sorted(path for path in top.iterdir() if (path / DECLARATION).is_file())


def _entry_point_directories(problems: list[str]) -> list[tuple[Path, str]]:
    found = []
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            top = Path(str(importlib.resources.files(point.value)))
        except (ImportError, TypeError) as error:
            problems.append(f"entry point {point.name} = {point.value}: cannot be loaded: {error}")
            continue
        directories = _directories(top)
        if not directories:
            problems.append(f"entry point {point.name} = {point.value}: {top} holds no stage directory")
        found += [(path, f"entry point {point.name}") for path in directories]
    return found


def _clashes(stages: Sequence[Stage]) -> list[str]:
    problems = []
    by_id: dict[str, Stage] = {}
    by_param: dict[str, Stage] = {}
    for stage in stages:
        other = by_id.setdefault(stage.id, stage)
        if other is not stage:
            problems.append(f"{stage.directory}: stage.name: {stage.id} is already defined in {other.directory}")
            continue
        if stage.is_core and stage.name != CORE:
            problems.append(f"{stage.directory}: stage.kind: there is one core only")
        for spelling in (name for param in stage.params for name in param.names):
            owner = by_param.setdefault(spelling, stage)
            if owner is not stage:
                problems.append(f"{stage.directory}: param: {spelling} is already declared in {owner.directory}")
    return problems
