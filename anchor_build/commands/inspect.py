"""`anchor-build inspect`: what is inside a package, an initramfs or an image, and how two of them differ."""

from __future__ import annotations

import stat
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from anchor_build.console import Console, printable
from anchor_build.options import json_option, stage_dir_option

if TYPE_CHECKING:
    from anchor_build.inspect.artifact import Artifact, Difference, Entry

WIDTH = 100
# What is longer is cut off unless --files asks for all.
LONG_LIST = 60
LONG_LINES = 5
MANY = 50
FILE = click.Path(path_type=Path)


@click.command("inspect", short_help="Show what is inside a package, an initramfs or an image, or compare two.")
@click.argument("file", type=FILE)
@click.argument("other", type=FILE, required=False)
@click.option("--files", is_flag=True, help="List everything that is inside, or all that differs.")
@stage_dir_option
@json_option
@click.pass_obj
def command(
    console: Console, file: Path, other: Path | None, files: bool, stage_dir: tuple[Path, ...], as_json: bool
) -> None:
    """Show what is inside FILE, an RPM, an initramfs, or a squashfs or erofs image; with OTHER, how that differs.

    What a file is, its content says, not its name. A package's payload is compared with its header. Secrets that
    are baked into an initramfs are not shown. The files of an image are listed without reading them, unless it has a
    hash tree, which is checked against all of it; for a comparison they are read, with their extended attributes.
    Exits 0, or 1 when FILE cannot be read or OTHER differs from it.

    \b
    Examples:
      anchor-build inspect initramfs.img
      anchor-build inspect anchor-dracut-module.rpm --files
      anchor-build inspect yesterday.img today.img --json
    """  # noqa: D301
    from anchor_build.inspect.artifact import check_kinds, compare, read_artifact

    first = read_artifact(file, stage_dir)
    if other is None:
        if as_json:
            console.json(as_data(file, _whole(console, file, first) if files else first, files))
        else:
            show(console, file, first, files)
        return
    second = read_artifact(other, stage_dir)
    check_kinds(first, second)
    if first.facts["sha256"] != second.facts["sha256"]:
        first, second = _whole(console, file, first), _whole(console, other, second)
    difference = compare(first, second)
    if as_json:
        console.json(difference_as_data(file, other, difference))
    else:
        show_difference(console, file, other, difference, files)
        for note in dict.fromkeys((*first.notes, *second.notes)):
            console.info(f"note: {printable(note)}")
    if not difference.same:
        sys.exit(1)


def _whole(console: Console, file: Path, artifact: Artifact) -> Artifact:
    """Read the contents of an image, which takes its time."""
    from anchor_build.inspect.artifact import add_contents

    if artifact.kind != "image":
        return artifact
    with console.step(f"read the contents of {printable(str(file))}"):
        return add_contents(file, artifact)


# --- One artifact -----------------------------------------------------------------------------------------


def as_data(file: Path, artifact: Artifact, files: bool) -> dict[str, Any]:
    """Return an artifact as JSON data, with its entries where `files` is set."""
    data = {"file": str(file), "kind": artifact.kind, **artifact.facts, "entries": len(artifact.entries)}
    if files:
        data["files"] = [{"path": entry.path, **entry.values} for entry in artifact.entries.values()]
    return {**data, "notes": list(artifact.notes)}


def show(console: Console, file: Path, artifact: Artifact, files: bool) -> None:
    """Print an artifact for people: its facts, tables of what has sizes, and its files where they are wanted."""
    click.echo(f"{printable(str(file))}: {artifact.kind}, {_size(artifact.facts['bytes'])}")
    tables = ("bytes_by_stage", "embedded")
    for name, fact in artifact.facts.items():
        if name not in tables:
            show_fact(name, fact, files)
    if sizes := artifact.facts.get("bytes_by_stage"):
        click.echo()
        console.table(["PART", "MB UNPACKED"], [[printable(part), size / 1e6] for part, size in sizes.items()])
    if images := artifact.facts.get("embedded"):
        click.echo()
        rows = [[printable(name), image["bytes"] / 1e6, image["digest"]] for name, image in images.items()]
        console.table(["CONTAINER IMAGE", "MB", "DIGEST"], rows)
    if files:
        click.echo()
        console.table(["MODE", "OWNER", "BYTES", "PATH"], [_row(entry) for entry in artifact.entries.values()])
    elif artifact.entries:
        console.info(f"{len(artifact.entries)} entries: --files lists them")
    for note in artifact.notes:
        console.info(f"note: {printable(note)}")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count} bytes"


def show_fact(name: str, fact: Any, everything: bool) -> None:
    """Print one fact: its name, and its value wrapped beside it."""
    label = f"  {name.replace('_', ' '):<18}  "
    blank = " " * len(label)
    if isinstance(fact, Mapping):
        lines = [printable(f"{key}={value}") for key, value in fact.items()]
    elif isinstance(fact, list):
        lines = _listed([printable(str(item)) for item in fact], everything)
    else:
        lines = _cut([printable(line) for line in str(fact).splitlines()], everything)
    for n, line in enumerate(lines):
        click.echo(f"{blank if n else label}{line}")


def _listed(items: list[str], everything: bool) -> list[str]:
    if any(len(item) > 60 for item in items):
        return _cut(items, everything)  # digests: one looks at them one by one
    shown = items if everything else items[:LONG_LIST]
    more = f"... {len(items) - len(shown)} more: --files shows all" if len(shown) < len(items) else ""
    if any(" " in item for item in shown):
        return [*shown, *([more] if more else [])]
    lines = textwrap.wrap(" ".join(shown), WIDTH - 22, break_long_words=False, break_on_hyphens=False)
    return [f"({len(items)}) {lines[0]}" if len(items) > 10 else lines[0], *lines[1:], *([more] if more else [])]


def _cut(lines: list[str], everything: bool) -> list[str]:
    if everything or len(lines) <= LONG_LINES:
        return lines
    return [*lines[:LONG_LINES], f"... {len(lines) - LONG_LINES} more: --files shows all"]


def _row(entry: Entry) -> list[object]:
    path = printable(entry.path) + (f" -> {printable(entry.target)}" if entry.target else "")
    return [stat.filemode(entry.mode), printable(entry.owner), entry.size, path]


# --- Two artifacts ----------------------------------------------------------------------------------------


def difference_as_data(file: Path, other: Path, difference: Difference) -> dict[str, Any]:
    """Return a difference as JSON data: each pair is [first, second]."""
    return {
        "first": str(file),
        "second": str(other),
        "same": difference.same,
        "facts": {name: list(pair) for name, pair in difference.facts.items()},
        "added": [{"path": entry.path, **entry.values} for entry in difference.added],
        "removed": [{"path": entry.path, **entry.values} for entry in difference.removed],
        "changed": {
            path: {name: list(pair) for name, pair in values.items()} for path, values in difference.changed.items()
        },
    }


def show_difference(console: Console, file: Path, other: Path, difference: Difference, files: bool) -> None:
    """Print a difference for people: facts, then entries, then a count."""
    from anchor_build.inspect.artifact import FILE_FACTS

    if difference.same:
        click.echo("no difference: the same bytes")
        return
    click.echo(f"--- {printable(str(file))}\n+++ {printable(str(other))}")
    for name, (old, new) in difference.facts.items():
        for line in _fact_lines(name.replace("_", " "), old, new):
            click.echo(printable(line))
    quiet = set() if files else set(difference.changed_in_time_only)
    lines = [f"- {_brief(entry)}" for entry in difference.removed]
    lines += [f"+ {_brief(entry)}" for entry in difference.added]
    lines += [f"~ {path}: {_changes(values)}" for path, values in difference.changed.items() if path not in quiet]
    shown = lines if files else lines[:MANY]
    for line in shown:
        click.echo(printable(line))
    if len(shown) < len(lines):
        console.info(f"... {len(lines) - len(shown)} more: --files lists all")
    if quiet:
        click.echo(f"{len(quiet)} more differ in their time only" + ("" if files else ": --files lists them"))
    counts = f"{len(difference.added)} added, {len(difference.removed)} removed, {len(difference.changed)} changed"
    click.echo(f"entries: {counts}")
    if set(difference.facts) <= set(FILE_FACTS) and not (difference.added or difference.removed or difference.changed):
        click.echo("the bytes differ in nothing that is shown here: in their order, their compression or a signature")


def _fact_lines(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old or new, list):
        gone, came = set(old or ()) - set(new or ()), set(new or ()) - set(old or ())
        found = [f"- {name}: {item}" for item in sorted(gone)] + [f"+ {name}: {item}" for item in sorted(came)]
        return found or [f"~ {name}: in another order"]
    if isinstance(old or new, Mapping):
        old, new = old or {}, new or {}
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return [line for key in keys for line in _fact_lines(f"{name}: {key}", old.get(key), new.get(key))]
    if old is None or new is None:
        return [f"{'+' if old is None else '-'} {name}: {new if old is None else old}"]
    return [f"~ {name}: {old} -> {new}"]


def _brief(entry: Entry) -> str:
    return f"{entry.path} ({stat.filemode(entry.mode)} {entry.owner}, {entry.size} bytes)"


def _xattr_changes(old: str, new: str) -> str:
    before, after = ({part for part in text.split(", ") if part} for text in (old, new))
    signs = [*(f"-{part}" for part in sorted(before - after)), *(f"+{part}" for part in sorted(after - before))]
    return f"xattrs {' '.join(signs)}"


def _changes(values: Mapping[str, tuple[str, str]]) -> str:
    parts = []
    for name, (old, new) in values.items():
        # What a digest is says nothing to people, that it changed does; a time that changed with it neither.
        if name == "sha256":
            parts.append("content")
        elif name == "xattrs":
            parts.append(_xattr_changes(old, new))
        elif name != "time" or len(values) == 1:
            parts.append(f"{name} {old} -> {new}")
    return ", ".join(parts)
