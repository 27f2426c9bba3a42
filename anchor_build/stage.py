"""A stage: one pluggable unit of the boot, declared once in its directory's stage.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_build import paramtypes
from anchor_build.errors import InvalidFilesError

API = 1
KINDS = ("auth", "transport", "image")
# Stands where a family of distributions has no package of a program.
NO_PACKAGE = "-"
PREFIX = "rd.anchor."
DECLARATION = "stage.toml"
SCRIPT = "stage.sh"
# What render.py puts into every module: no file or library of a stage may have one of these names.
RENDERED = ("module-setup.sh", "params.sh", SCRIPT)

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# Two underscores in a row mark what is private to the shell functions.
PARAM_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
CORE_PARAM_NAME = re.compile(rf"{PARAM_NAME.pattern}(\.{PARAM_NAME.pattern})?")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")
PROGRAM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*|-")
PACKAGE_VERSION = re.compile(r"[0-9][0-9.]*")
# "NAME < VERSION", as in a spec file
RPM_RELATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]* (?:<|<=|=) [0-9][A-Za-z0-9.+~^_]*")
MODULE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
DRACUT_MODULE = re.compile(r"[a-z0-9][a-z0-9_-]*\??")
DRIVER = re.compile(r"=?[A-Za-z0-9][A-Za-z0-9_/-]*\??")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FILE_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+*-]*")
TARGET = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._+-]*)+")
MODE = re.compile(r"0[0-7]{3}")
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")


def is_promised(driver: str) -> bool:
    """Whether a declared driver must be there: not a whole directory (=drivers/net), nor one with a ?."""
    return not driver.startswith("=") and not driver.endswith("?")


def shell_word(name: str) -> str:
    """Turn a stage's or parameter's name into the form it has in shell variables and functions."""
    return re.sub(r"[.-]", "_", name)


@dataclass(frozen=True)
class Param:
    """One typed kernel command-line option; `default` is already normalised, None when there is none.

    What comes from a `source` is trusted whatever carries it if one of the parameters `digest` is given. With one of
    `digest_schemes` the reference that it holds needs a digest, which may be in the parameter `digest_in`.
    """

    name: str
    key: str
    variable: str
    type: str
    help: str
    required: bool = False
    default: str | None = None
    alias: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    source: bool = False
    digest: tuple[str, ...] = ()
    digest_schemes: tuple[str, ...] = ()
    digest_in: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling that a command line may use, the present one first."""
        return (self.key, *self.alias)


@dataclass(frozen=True)
class Binary:
    """A program that a stage needs on the node, and the packages that have it (`-` where there is none).

    `suse` is empty where SUSE's package has the name that `rpm` says. An `optional` one is taken where it is there. One
    that is there `without` a dracut module is needed only in an initramfs that does not have that module. `since` is
    the packages' version that has it first, where older ones are about.
    """

    name: str
    rpm: str
    deb: str
    suse: str = ""
    optional: bool = False
    since: str = ""
    without: str = ""

    @property
    def remark(self) -> str:
        """What restricts the need of it, to follow its name; empty where it is always needed."""
        return " (optional)" if self.optional else f" (without {self.without})" if self.without else ""

    @property
    def where(self) -> str:
        """What to install, by family: `iproute2 (deb), iproute (rpm) or iproute2 (suse)`."""
        named = {"deb": self.deb, "rpm": self.rpm, "suse": self.suse}
        known = [f"{name} ({family})" for family, name in named.items() if name not in ("", NO_PACKAGE)]
        text = " or ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known) or "it yourself"
        return f"{text}, version {self.since} or later" if self.since else text


@dataclass(frozen=True)
class Unused:
    """Libraries that a program or library, `by`, is linked with or opens, and that no stage makes it use (trim.py).

    All are shell patterns for names of files: `libcurl*.so.*`, `librtmp.so.*`. `unless` is a module of dracut, beside
    which they are used; and they are by whatever asks for one of the symbols `used_by`.
    """

    by: str
    libraries: tuple[str, ...]
    unless: str = ""
    used_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageFile:
    """A file of the stage's directory that is installed on the node; `mode` is octal text such as 0644."""

    source: str
    target: str
    mode: str


@dataclass(frozen=True)
class Stage:
    """Everything that a stage.toml says; `origin` tells people where it came from."""

    kind: str
    name: str
    summary: str
    directory: Path
    origin: str
    order: int = 50
    dracut: tuple[str, ...] = ()
    drivers: tuple[str, ...] = ()
    libs: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    digest_schemes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    obsoletes: tuple[str, ...] = ()
    binaries: tuple[Binary, ...] = ()
    files: tuple[StageFile, ...] = ()
    params: tuple[Param, ...] = ()
    one_of: tuple[str, ...] = ()
    unused: tuple[Unused, ...] = ()

    @property
    def is_core(self) -> bool:
        """Whether this is the core, which every plan holds."""
        return self.kind == "core"

    @property
    def id(self) -> str:
        """`auth-acme`; the core is just `anchor`."""
        return self.name if self.is_core else f"{self.kind}-{self.name}"

    @property
    def module(self) -> str:
        """The name of its dracut module, without the number."""
        return self.name if self.is_core else f"anchor-{self.id}"

    @property
    def word(self) -> str:
        """The name as it stands in shell functions: `anchor_<word>_run`."""
        return shell_word(self.name)

    @property
    def rank(self) -> tuple[int, str]:
        """Its place among the stages of its kind: that in which the node's shell sorts <order>-<name>/."""
        return self.order, f"{self.name}/"

    @property
    def script(self) -> Path:
        """The stage's shell functions."""
        return self.directory / SCRIPT

    @property
    def places(self) -> tuple[Param, ...]:
        """The parameters of which exactly one has to be given, in the order in which a message names them."""
        params = {param.name: param for param in self.params}
        return tuple(params[name] for name in self.one_of)

    def digests_of(self, param: Param) -> tuple[Param, ...]:
        """Return the parameters any of which makes trusted what comes from where `param` says."""
        params = {other.name: other for other in self.params}
        return tuple(params[name] for name in param.digest)

    @property
    def fetches(self) -> bool:
        """Whether a transport must be beside it: one of its parameters is a URL that the node fetches."""
        return any(param.source for param in self.params)


def missing_of(stage: Stage) -> str:
    """Say, of the first of `places`, that none of them is given; empty where a stage has no such parameters."""
    if not stage.places:
        return ""
    others = [param.key for param in stage.places[1:]]
    return f"is required by the stage {stage.name}" + (f", or instead of it {' or '.join(others)}" if others else "")


def digest_holders(stage: Stage) -> tuple[tuple[Param, str, Param], ...]:
    """Return the parameters that need a digest with a scheme: which, with what scheme, and which one has the digest."""
    params = {param.name: param for param in stage.params}
    return tuple((p, scheme, params[p.digest_in or p.name]) for p in stage.params for scheme in p.digest_schemes)


def unprotected(scheme: str) -> str:
    """Say, of a reference with this scheme, that it has no digest, in the words of lib/anchor-oci.sh."""
    return f"nothing protects {scheme}://: add the manifest's digest (@sha256:...) or use https://"


class _Table:
    """Reads one TOML table, collecting every problem as `file: key: reason` instead of stopping at the first."""

    def __init__(self, data: Mapping[str, Any], where: str, file: Path, problems: list[str]) -> None:
        self.data = dict(data)
        self.where = where
        self.file = file
        self.problems = problems

    def problem(self, key: str, reason: str) -> None:
        dotted = f"{self.where}.{key}" if key else self.where
        self.problems.append(f"{self.file}: {dotted}: {reason}")

    def text(
        self, key: str, pattern: re.Pattern[str] | None = None, *, required: bool = False, default: str = ""
    ) -> str:
        value = self.data.pop(key, None)
        if value is None:
            if required:
                self.problem(key, "is missing")
            return default
        if not isinstance(value, str) or not value.strip():
            self.problem(key, "is not a text")
            return default
        if pattern is not None and not pattern.fullmatch(value):
            self.problem(key, f"{value!r} does not match {pattern.pattern}")
        elif not value.isprintable():
            self.problem(key, "holds control characters")
        return value

    def texts(self, key: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        value = self.data.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.problem(key, "is not a list of texts")
            return ()
        for item in value:
            if not pattern.fullmatch(item):
                self.problem(key, f"{item!r} does not match {pattern.pattern}")
        if len(set(value)) != len(value):
            self.problem(key, "names something twice")
        return tuple(value)

    def text_or_texts(self, key: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
        if not isinstance(self.data.get(key), str):
            return self.texts(key, pattern)
        text = self.text(key, pattern)
        return (text,) if text else ()

    def flag(self, key: str) -> bool:
        value = self.data.pop(key, False)
        if not isinstance(value, bool):
            self.problem(key, "is not true or false")
            return False
        return value

    def number(self, key: str, default: int) -> int:
        value = self.data.pop(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 99:
            self.problem(key, "is not a whole number from 0 to 99")
            return default
        return value

    def tables(self, key: str) -> list[_Table]:
        value = self.data.pop(key, [])
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self.problem(key, "is not a list of tables")
            return []
        return [
            _Table(item, f"{self.where}.{key}[{n}]" if self.where else f"{key}[{n}]", self.file, self.problems)
            for n, item in enumerate(value)
        ]

    def refuse_rest(self) -> None:
        for key in self.data:
            self.problem(key, "is not a known key")


def load_stage(directory: Path, origin: str) -> Stage:
    """Read a stage's directory.

    Raises InvalidFilesError with every problem of the declaration and its files at once.
    """
    file = directory / DECLARATION
    problems: list[str] = []
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidFilesError([f"{file}: cannot be read: {error}"]) from None
    header_data = document.pop("stage", None)
    if not isinstance(header_data, dict):
        raise InvalidFilesError([f"{file}: stage: the [stage] table is missing"])
    top = _Table(document, "", file, problems)
    stage = _read_stage(_Table(header_data, "stage", file, problems), top, directory, origin)
    for key in top.data:
        problems.append(f"{file}: {key}: is not a known table")
    _check_files(stage, problems)
    if problems:
        raise InvalidFilesError(problems)
    return stage


def _read_stage(header: _Table, top: _Table, directory: Path, origin: str) -> Stage:
    kind = header.text("kind", required=True)
    if kind not in (*KINDS, "core"):
        header.problem("kind", f"{kind!r} is none of {', '.join(KINDS)}")
    name = header.text("name", NAME, required=True)
    api = header.data.pop("api", None)
    if type(api) is not int or api != API:
        header.problem("api", f"is not {API}, the stage interface of this anchor-build")
    stage = Stage(
        kind=kind,
        name=name,
        summary=header.text("summary", required=True),
        directory=directory,
        origin=origin,
        order=header.number("order", 50),
        dracut=header.texts("dracut", DRACUT_MODULE),
        drivers=header.texts("drivers", DRIVER),
        libs=header.texts("libs", FILE_NAME),
        schemes=header.texts("schemes", SCHEME),
        digest_schemes=header.texts("digest_schemes", SCHEME),
        conflicts=header.texts("conflicts", NAME),
        refused=header.texts("refused", ALIAS),
        obsoletes=header.texts("obsoletes", RPM_RELATION),
        one_of=header.texts("one_of", PARAM_NAME),
        binaries=tuple(_read_binary(table) for table in header.tables("binaries")),
        files=tuple(_read_file(table) for table in top.tables("file")),
        params=tuple(_read_param(table, kind, name) for table in top.tables("param")),
        unused=tuple(_read_unused(table) for table in top.tables("unused")),
    )
    if (kind == "transport") != bool(stage.schemes):
        header.problem("schemes", "names the URL schemes of a transport; a transport needs it and no other kind has it")
    if set(stage.digest_schemes) - set(stage.schemes):
        header.problem("digest_schemes", "holds a scheme that schemes does not")
    header.refuse_rest()
    _check_param_names(stage, top)
    _check_one_of(stage, header)
    return stage


def _read_binary(table: _Table) -> Binary:
    binary = Binary(
        name=table.text("name", PROGRAM, required=True),
        rpm=table.text("rpm", PACKAGE, required=True),
        deb=table.text("deb", PACKAGE, required=True),
        suse=table.text("suse", PACKAGE),
        optional=table.flag("optional"),
        since=table.text("since", PACKAGE_VERSION),
        without=table.text("without", MODULE_NAME),
    )
    if binary.optional and binary.without:
        table.problem("without", "makes no sense for an optional program")
    table.refuse_rest()
    return binary


def _read_file(table: _Table) -> StageFile:
    file = StageFile(
        source=table.text("source", FILE_NAME, required=True),
        target=table.text("target", TARGET, required=True),
        mode=table.text("mode", MODE, default="0644"),
    )
    table.refuse_rest()
    return file


def _read_unused(table: _Table) -> Unused:
    unused = Unused(
        by=table.text("by", FILE_PATTERN, required=True),
        libraries=table.texts("libraries", FILE_PATTERN),
        unless=table.text("unless", MODULE_NAME),
        used_by=table.texts("used_by", SYMBOL),
    )
    if not unused.libraries:
        table.problem("libraries", "names no library")
    table.refuse_rest()
    return unused


def _read_param(table: _Table, kind: str, stage_name: str) -> Param:
    core = kind == "core"
    name = table.text("name", CORE_PARAM_NAME if core else PARAM_NAME, required=True)
    type_name = table.text("type", required=True)
    default = table.data.pop("default", None)
    options: dict[str, Any] = {}
    if type_name not in paramtypes.TYPES:
        if type_name:
            table.problem("type", f"{type_name!r} is none of {', '.join(sorted(paramtypes.TYPES))}")
        for known in paramtypes.TYPES.values():
            for key in known.options:
                table.data.pop(key, None)
    else:
        keys = paramtypes.TYPES[type_name].options
        if type_name == "list":
            element = paramtypes.TYPES.get(str(table.data.get("of", "")))
            keys = (*keys, *(element.options if element else ()))
        options = {key: table.data.pop(key) for key in keys if key in table.data}
        reasons = paramtypes.check_options(type_name, options)
        if options.get("of") == "secret":
            reasons = ["a list of secrets would not be kept secret"]
        for reason in reasons:
            table.problem("type", reason)
        if reasons:
            default = None
    param = Param(
        name=name,
        key=f"{PREFIX}{name}" if core else f"{PREFIX}{stage_name}.{name}",
        variable=f"anchor_{shell_word(name)}" if core else f"anchor_{shell_word(stage_name)}_{shell_word(name)}",
        type=type_name,
        help=table.text("help", required=True),
        required=table.flag("required"),
        default=_read_default(table, type_name, options, default),
        alias=table.texts("alias", ALIAS),
        options=options,
        source=table.flag("source"),
        digest=table.text_or_texts("digest", PARAM_NAME),
        digest_schemes=table.texts("digest_schemes", SCHEME),
        digest_in=table.text("digest_in", PARAM_NAME) or None,
    )
    if param.digest_schemes and param.type != "url":
        table.problem("digest_schemes", "is for a parameter of type url")
    if param.digest_in and not param.digest_schemes:
        table.problem("digest_in", "makes no sense without digest_schemes")
    if param.source and "url" not in (param.type, options.get("of")):
        table.problem("source", "is for a parameter of type url, or a list of such")
    if param.required and param.default is not None:
        table.problem("default", "makes no sense for a required parameter")
    table.refuse_rest()
    return param


def _read_default(table: _Table, type_name: str, options: Mapping[str, Any], default: object) -> str | None:
    if default is None:
        return None
    if not isinstance(default, str):
        table.problem("default", "is not a text: write it as on a command line")
        return None
    if type_name == "secret":
        table.problem("default", "a secret has no default")
        return None
    try:
        return paramtypes.check_value(type_name, default, options) if type_name in paramtypes.TYPES else None
    except paramtypes.InvalidValueError as error:
        table.problem("default", str(error))
        return None


def _check_param_names(stage: Stage, top: _Table) -> None:
    seen: set[str] = set()
    names = {param.name: param for param in stage.params}
    for n, param in enumerate(stage.params):
        for spelling in param.names:
            if spelling in seen:
                top.problems.append(f"{top.file}: param[{n}]: {spelling} is declared twice")
            seen.add(spelling)
        for name in param.digest:
            if name not in names or names[name].type != "sha256":
                top.problems.append(f"{top.file}: param[{n}].digest: {name!r} names no parameter of type sha256")
        if param.digest_in and param.digest_in not in names:
            top.problems.append(f"{top.file}: param[{n}].digest_in: {param.digest_in!r} names no parameter")


def _check_one_of(stage: Stage, header: _Table) -> None:
    free = {param.name for param in stage.params if not param.required and param.default is None}
    for name in stage.one_of:
        if name not in free:
            header.problem("one_of", f"{name!r} names no parameter that is neither required nor has a default")
    # A manifest may take the place of an image stage's.
    if len(stage.one_of) == 1 and stage.kind != "image":
        header.problem("one_of", "names a single parameter: make that one required")


_TAKEN = "has the name of a file of the rendered module"


def _check_files(stage: Stage, problems: list[str]) -> None:
    declaration = stage.directory / DECLARATION
    for n, file in enumerate(stage.files):
        if file.source in RENDERED:
            problems.append(f"{declaration}: file[{n}].source: {file.source} {_TAKEN}")
        elif FILE_NAME.fullmatch(file.source) and not (stage.directory / file.source).is_file():
            problems.append(f"{declaration}: file[{n}].source: {file.source} is missing")
    problems += [f"{declaration}: stage.libs: {lib} {_TAKEN}" for lib in stage.libs if lib in RENDERED]
    if stage.is_core:
        return
    # One that calls anchor_finish has nothing to mount below an overlay.
    functions = [("run",), ("mount", "root")] if stage.kind == "image" else [("run",)]
    try:
        text = stage.script.read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"{stage.script}: cannot be read: {error.strerror}")
        return
    except UnicodeDecodeError:
        problems.append(f"{stage.script}: is not UTF-8 text")
        return
    for names in functions:
        if not re.search(rf"^anchor_{stage.word}_({'|'.join(names)})\(\)", text, re.MULTILINE):
            problems.append(f"{stage.script}: does not define anchor_{stage.word}_{names[0]}()")
