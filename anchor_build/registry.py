"""Where stages come from: built in, from Python packages by entry point, and from --stage-dir. One loader for all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from anchor_build.errors import InvalidFilesError, UsageError
from anchor_build.stage import DECLARATION, KINDS, Stage, load_stage

ENTRY_POINT_GROUP = "anchor_build.stages"
CORE = "anchor"
# The second word of the core's shell functions and variables: a stage of such a name would replace them.
CORE_WORDS = frozenset(
    [
        "auth",
        "boot",
        "chosen",
        "clock",
        "cmdline",
        "count",
        "credentials",
        "drivers",
        "embedded",
        "event",
        "events",
        "fail",
        "fetch",
        "finish",
        "http",
        "image",
        "info",
        "json",
        "keep",
        "lib",
        "log",
        "manifest",
        "memory",
        "mount",
        "mounted",
        "net",
        "netdev",
        "network",
        "note",
        "on",
        "overlay",
        "param",
        "params",
        "pid",
        "post",
        "printable",
        "ready",
        "reason",
        "reboot",
        "recall",
        "registry",
        "reject",
        "remove",
        "report",
        "root",
        "run",
        "say",
        "stage",
        "stages",
        "step",
        "stream",
        "transport",
        "type",
        "types",
        "untraced",
        "uptime",
        "value",
        "warn",
    ]
)


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
    ordered = sorted((stage for stage in found if not stage.is_core), key=lambda s: (KINDS.index(s.kind), *s.rank))
    return Registry(core, tuple(ordered))


def _directories(top: Path) -> list[Path]:
    if not top.is_dir():
        return []
    return sorted(path for path in top.iterdir() if (path / DECLARATION).is_file())


def _entry_point_directories(problems: list[str]) -> list[tuple[Path, str]]:
    found = []
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            spec = importlib.util.find_spec(point.module)
        except (ImportError, ValueError):
            spec = None
        # Found, not imported: stages are data, and a package need not run for them.
        tops = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
        if not tops:
            problems.append(f"entry point {point.name} = {point.value}: cannot be found as a package")
            continue
        directories = [path for top in tops for path in _directories(top)]
        if not directories:
            problems.append(f"entry point {point.name} = {point.value}: {tops[0]} holds no stage directory")
        found += [(path, f"entry point {point.name}") for path in directories]
    return found


def find_lib(stage: Stage, name: str) -> Path | None:
    """Return a shell library that a stage names: the stage's own, or the project's; None if there is neither."""
    places = (stage.directory / name, data_directory() / "lib" / name)
    return next((path for path in places if path.is_file()), None)


def _clashes(stages: Sequence[Stage]) -> list[str]:
    """Say what keeps stages from living in one initramfs: names, shell functions and variables, installed files."""
    problems: list[str] = []
    owners: dict[str, Stage] = {}
    unique = []
    for stage in stages:
        other = owners.setdefault(stage.id, stage)
        if other is not stage:
            problems.append(_problem(stage, "stage.name", f"{stage.id} is already defined in {other.directory}"))
        elif stage.is_core and stage.name != CORE:
            problems.append(_problem(stage, "stage.kind", "there is one core only"))
        else:
            unique.append(stage)
    problems += _shell_clashes(unique)
    problems += _file_clashes(unique)
    return problems


def _problem(stage: Stage, key: str, reason: str) -> str:
    return f"{stage.directory / DECLARATION}: {key}: {reason}"


def _shell_clashes(stages: Sequence[Stage]) -> Iterator[str]:
    functions: dict[str, Stage] = {}
    spellings: dict[str, Stage] = {}
    variables: dict[str, str] = {}
    for stage in stages:
        if not stage.is_core and stage.name in CORE_WORDS:
            yield _problem(stage, "stage.name", f"{stage.name} is a word of the core's own functions")
        # An image stage runs beside all transports; auth stages are alone.
        if stage.kind in ("transport", "image"):
            other = functions.setdefault(stage.word, stage)
            if other is not stage:
                reason = f"anchor_{stage.word}_run is already a function of {other.directory}"
                yield _problem(stage, "stage.name", reason)
        for param in stage.params:
            taken = [(name, spellings.setdefault(name, stage)) for name in param.names]
            for name, owner in taken:
                if owner is not stage:
                    yield _problem(stage, "param", f"{name} is already declared in {owner.directory}")
            key = variables.setdefault(param.variable, param.key)
            if key != param.key:
                yield _problem(stage, "param", f"{param.key} and {key} are both ${param.variable}")


def _file_clashes(stages: Sequence[Stage]) -> Iterator[str]:
    owners: dict[str, tuple[Stage, bytes]] = {}
    for stage in stages:
        files = [(f"file: {file.target}", stage.directory / file.source) for file in stage.files]
        for lib in stage.libs:
            path = find_lib(stage, lib)
            if path is None:
                yield _problem(stage, "stage.libs", f"{lib} is neither beside it nor in lib/")
            else:
                files.append((f"stage.libs: {lib}", path))
        for target, path in files:
            content = path.read_bytes()
            owner, known = owners.setdefault(target, (stage, content))
            if content != known:
                yield f"{stage.directory / DECLARATION}: {target} is another file than that of {owner.directory}"
