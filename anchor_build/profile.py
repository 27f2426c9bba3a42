"""Profiles: named, inheritable descriptions of a build in an anchor.toml, as defaults of the commands' options.

A key is the long name of an option of `initramfs`; nothing else says what keys there are. Another command takes those
of its options that mean the same everywhere (options.SharedOption).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click

from anchor_build.console import Console, printable
from anchor_build.errors import UsageError
from anchor_build.options import SetOption, SharedOption, add_settings
from anchor_build.settings import FileSetting

FILE = Path("anchor.toml")
SYSTEM_FILE = Path("/etc/anchor-build/anchor.toml")
DEFAULT = "default"
INHERITS = "inherits"
# The command whose options are the keys, and the one of them that says how to print, not what to build.
BUILD = "initramfs"
NO_KEY = "as_json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_DOTS = 16
_USED = f"{__name__}.used"

Value = bool | str | tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """A profile with all that it inherits; `values` go by key, paths in them are relative to the working directory."""

    name: str
    values: Mapping[str, Value]


@dataclass(frozen=True)
class ProfileFile:
    """The profiles of one file, and the SHA-256 of its bytes."""

    path: Path
    sha256: str
    profiles: Mapping[str, Profile]


class Defaults(Mapping[str, Any]):
    """A command's default_map (click), for the options called `names`.

    `read` is called when the first of them is asked for, but not by help, which works beside a broken file.
    """

    def __init__(self, names: Sequence[str], read: Callable[[], Mapping[str, Value]]) -> None:
        self.names = tuple(names)
        self.read = read

    @cached_property
    def _values(self) -> Mapping[str, Value]:
        return self.read()

    def __getitem__(self, name: str) -> Value:
        # click asks for defaults while it writes help, too, and marks that so.
        if name not in self.names or click.get_current_context().resilient_parsing:
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


# --- On the command line ----------------------------------------------------------------------------------


def keys_of(name: str, command: click.Command) -> dict[str, click.Option]:
    """Return the options of the command `name` that a profile can give, by key."""
    options = [param for param in command.params if isinstance(param, click.Option) and param.name != NO_KEY]
    if name != BUILD:
        options = [option for option in options if isinstance(option, SharedOption)]
    return {_key(option): option for option in options}


def _key(option: click.Option) -> str:
    return next(opt.removeprefix("--") for opt in option.opts if opt.startswith("--"))


def all_keys() -> dict[str, click.Option]:
    """Return every key that a profile may have, with its option."""
    from anchor_build.commands import initramfs

    return keys_of(BUILD, initramfs.command)


def use(root: click.Context, command: click.Command, name: str | None, config: Path | None) -> None:
    """Let a profile give the defaults of the command that is about to run below `root`.

    Raises UsageError when the command line asks for a profile and the command takes nothing from one.
    """
    called = str(root.invoked_subcommand)
    keys = keys_of(called, command)
    source = click.core.ParameterSource.COMMANDLINE
    asked = [option for option in ("profile", "config") if root.get_parameter_source(option) is source]
    if not keys:
        if asked:
            raise UsageError(f"--{asked[0]}: {called} takes nothing from a profile", "leave it out")
        return

    def read() -> dict[str, Value]:
        found = find_file(config)
        if found is None:
            if name is not None:
                raise UsageError(f"--profile {name}: there is no {FILE} here, and no {SYSTEM_FILE}", "see --config")
            return {}
        file = read_file(found)
        profile = choose(file, name, required="config" in asked)
        taken = {key: value for key, value in profile.values.items() if key in keys} if profile else {}
        if profile and taken:
            console: Console = root.obj
            console.info(f"profile {profile.name} of {file.path}: {', '.join(taken)}")
            root.meta[_USED] = {f"profile {profile.name}": file.sha256}
        return {str(keys[key].name): value for key, value in taken.items()}

    root.default_map = {called: Defaults([str(option.name) for option in keys.values()], read)}


def used_profile() -> dict[str, str]:
    """Return the profile that gave something to the running command, as `profile NAME`, with its file's SHA-256."""
    return dict(click.get_current_context().meta.get(_USED, {}))


def choose(file: ProfileFile, name: str | None, *, required: bool = False) -> Profile | None:
    """Return the profile called `name`, without a name the default one, or None where the file has none.

    Raises UsageError when there is no such profile, and when there is no default one and `required` is true.
    """
    wanted = DEFAULT if name is None else name
    if wanted in file.profiles or (name is None and not required):
        return file.profiles.get(wanted)
    there = ", ".join(file.profiles) or "none"
    if name is None:
        raise UsageError(f"{file.path}: has no profile {DEFAULT}", f"choose one with --profile; there are: {there}")
    text = f"--profile {printable(name)}: is not in {file.path}; there are: {there}"
    raise UsageError(text, _near(name, file.profiles))


def complete(config: Path | None, incomplete: str) -> list[str]:
    """Return the names in the file that begin with `incomplete`; a file with mistakes completes nothing."""
    try:
        found = find_file(config)
        names = read_file(found).profiles if found else ()
    except UsageError:
        return []
    return [name for name in names if name.startswith(incomplete)]


# --- The file ---------------------------------------------------------------------------------------------


def find_file(config: Path | None) -> Path | None:
    """Return the file to read: `config`, else the one of the working directory, else the system's; None without any.

    Raises UsageError for a file in the working directory that somebody else wrote or may write.
    """
    if config is not None:
        return config
    for path in (FILE, SYSTEM_FILE):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
        if path is FILE:
            _check_owner(path)
        return path
    return None


def _check_owner(path: Path) -> None:
    """Refuse a file that lies about, in /tmp say: it can name stages, whose code dracut runs as whoever builds.

    It may belong to those whom git trusts (git-config, safe.directory): the user, before sudo too, and root.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    trusted = {0, os.geteuid()}
    if os.geteuid() == 0 and os.environ.get("SUDO_UID", "").isdecimal():
        trusted.add(int(os.environ["SUDO_UID"]))
    hint = f"if you trust it, name it: --config {path}"
    if found.st_uid not in trusted:
        raise UsageError(f"{path}: belongs to another user (uid {found.st_uid})", hint)
    if found.st_mode & 0o002:
        raise UsageError(f"{path}: may be written by everybody", f"chmod o-w {path}, or, {hint}")


def read_file(path: Path) -> ProfileFile:
    """Read the profiles of a file; raises UsageError with all that is wrong with it, as `file: key: reason`."""
    import tomllib

    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        document = tomllib.loads(data.decode("utf-8")) if len(data) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read: {reason}") from None
    if document is None:
        raise UsageError(f"{path}: is larger than {MAX_BYTES} bytes")
    reader = _Reader(path, all_keys())
    profiles = reader.profiles(document)
    if reader.problems:
        raise UsageError("\n".join(reader.problems), "doc/profiles.md says what a profile holds")
    return ProfileFile(path, hashlib.sha256(data).hexdigest(), profiles)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


class _Reader:
    """Reads the tables of a file and collects every problem instead of stopping at the first."""

    def __init__(self, path: Path, keys: Mapping[str, click.Option]) -> None:
        self.path = path
        self.keys = keys
        self.problems: list[str] = []
        self.own: dict[str, dict[str, Value]] = {}
        self.parents: dict[str, tuple[str, ...]] = {}

    def problem(self, key: str, reason: str) -> None:
        self.problems.append(f"{self.path}: {printable(key)}: {printable(reason)}")

    def profiles(self, document: Mapping[str, Any]) -> dict[str, Profile]:
        """Return the profiles of a document, each with all that it inherits."""
        for key in document:
            if key != "profile":
                self.problem(key, "is not a known table; there is [profile.NAME] only")
        tables = document.get("profile", {})
        if not isinstance(tables, dict):
            self.problem("profile", "is not a table: write [profile.NAME]")
            return {}
        for name, table in tables.items():
            if not NAME.fullmatch(name):
                self.problem(f"profile.{name}", "its name is not of letters, digits, `.`, `-` and `_`, at most 64")
            elif not isinstance(table, dict):
                self.problem(f"profile.{name}", f"is not a table: write [profile.{name}]")
            else:
                self._read(name, table)
        for name, parents in self.parents.items():
            for parent in parents:
                if parent not in tables:
                    near = _near(parent, tables)
                    there = f"there is no profile {parent}" + (f"; {near}" if near else "")
                    self.problem(f"profile.{name}.{INHERITS}", there)
        inherited: dict[str, dict[str, Value]] = {}
        return {name: Profile(name, self._inherit(name, (), inherited)) for name in self.own}

    def _read(self, name: str, table: Mapping[str, Any]) -> None:
        where = f"profile.{name}"
        self.parents[name] = self._texts(f"{where}.{INHERITS}", table.get(INHERITS, []))
        self.own[name] = {}
        for key, value in table.items():
            option = self.keys.get(key)
            if option is not None:
                self.own[name][key] = self._value(f"{where}.{key}", option, value)
            elif key != INHERITS:
                near = _near(key, [*self.keys, INHERITS])
                self.problem(f"{where}.{key}", "is not a known key; " + (near or f"there are: {', '.join(self.keys)}"))

    def _inherit(self, name: str, trail: tuple[str, ...], known: dict[str, dict[str, Value]]) -> dict[str, Value]:
        """Return what a profile holds with its parents: a later parent wins over an earlier, the profile over both."""
        if name in known or name not in self.own:
            return known.get(name, {})
        if name in trail:
            ring = (*trail[trail.index(name) :], name)
            self.problem(f"profile.{trail[-1]}.{INHERITS}", f"goes round in a ring: {' -> '.join(ring)}")
            return {}
        if len(trail) > MAX_DEPTH:
            self.problem(f"profile.{trail[0]}.{INHERITS}", f"goes on for more than {MAX_DEPTH} profiles")
            return {}
        values: dict[str, Value] = {}
        for layer in (*(self._inherit(parent, (*trail, name), known) for parent in self.parents[name]), self.own[name]):
            for key, value in layer.items():
                before = values.get(key)
                if isinstance(self.keys[key], SetOption) and isinstance(before, tuple) and isinstance(value, tuple):
                    values[key] = add_settings(before, value)
                else:
                    values[key] = value
        known[name] = values
        return values

    # --- Values -------------------------------------------------------------------------------------------

    def _value(self, where: str, option: click.Option, value: object) -> Value:
        """Return a value as click takes it from a default_map; what is wrong with it is a problem, and it is empty."""
        if option.is_flag:
            if not isinstance(value, bool):
                self.problem(where, "is not true or false")
            return bool(value)
        if isinstance(option, SetOption):
            return tuple(self._settings(where, value))
        if option.multiple:
            return tuple(self._placed(option, text) for text in self._texts(where, value))
        return self._placed(option, text) if (text := self._text(where, value)) else ""

    def _text(self, where: str, value: object, what: str = "a text") -> str:
        if not isinstance(value, str):
            self.problem(where, f"is not {what}")
        elif not value.strip():
            self.problem(where, "is empty")
        elif not value.isprintable():
            self.problem(where, "holds control characters")
        else:
            return value
        return ""

    def _texts(self, where: str, value: object) -> tuple[str, ...]:
        items = value if isinstance(value, list) else [value]
        texts = tuple(filter(None, (self._text(where, item, "a text or a list of texts") for item in items)))
        if len(set(texts)) != len(texts):
            self.problem(where, "names something twice")
        return texts

    def _settings(self, where: str, value: object) -> Iterator[FileSetting]:
        """Yield KEY=VALUE of a table, whose keys with dots TOML has made tables in tables, or of a list."""
        if isinstance(value, dict):
            pairs = list(_flatten(value))
        else:
            texts = self._texts(where, value)
            for text in texts:
                if "=" not in text:
                    self.problem(where, f"{text}: has no value: KEY=VALUE or KEY=@FILE")
            pairs = [(name, setting) for name, equals, setting in (text.partition("=") for text in texts) if equals]
        for name, setting in pairs:
            if isinstance(setting, bool | int) and abs(setting) < 1 << 63:
                setting = str(int(setting))
            if not isinstance(setting, str):
                self.problem(f"{where}.{name}", "is not a text, a whole number, true or false")
            elif not (name + setting).isprintable() or "=" in name:
                self.problem(f"{where}.{name}", "holds control characters or a = in its name")
            else:
                file = setting.removeprefix("@")
                text = setting if file == setting else f"@{self.path.parent / file}"
                yield FileSetting(f"{name}={text}", f"{self.path}: {where}.")

    def _placed(self, option: click.Option, text: str) -> str:
        """Return the text of a path, or of what may be one, relative to the file's directory."""
        path = self.path.parent / text
        maybe = "FILE" in (option.metavar or "").split("|") and ("/" in text or _is_file(path))
        return str(path) if isinstance(option.type, click.Path) or maybe else text


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict) and prefix.count(".") < MAX_DOTS:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
