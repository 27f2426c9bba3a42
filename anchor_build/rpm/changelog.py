"""Reads CHANGELOG.md (keepachangelog.com) for what packages say about their changes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from anchor_build.errors import AnchorError

RELEASE = re.compile(r"## \[?([0-9][^\]\s]*)\]? - (unreleased|[0-9]{4}-[0-9]{2}-[0-9]{2})", re.IGNORECASE)
RPM_TEXT_WIDTH = 76  # within rpmlint's limit
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class Release:
    """One version's changes, each as `Section: text`; `day` is None while it is not released."""

    version: str
    day: date | None
    changes: tuple[str, ...]


def read_changelog(file: Path) -> tuple[Release, ...]:
    """Read the releases of a changelog, the newest first.

    Raises AnchorError for a file that cannot be read, a heading that names no version and date, and when there is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AnchorError(f"{file}: cannot be read: {error}") from None
    releases = []
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        found = RELEASE.fullmatch(heading.strip())
        if found is None:
            raise AnchorError(f"{file}: {heading}: is not of the form: ## VERSION - YYYY-MM-DD, or unreleased")
        releases.append(Release(found[1], _day(file, found[2]), tuple(_changes(body))))
    if not releases:
        raise AnchorError(f"{file}: names no version")
    return tuple(releases)


def _day(file: Path, text: str) -> date | None:
    if text.lower() == "unreleased":
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise AnchorError(f"{file}: {text}: {error}") from None


def _changes(body: str) -> list[str]:
    """Return the bullets as plain lines: continuation lines joined, section in front, marks of Markdown removed."""
    section, changes = "", []
    open_ = False
    for line in body.splitlines():
        if line.startswith("### "):
            section, open_ = line[4:].strip(), False
        elif line.startswith("- "):
            changes.append(f"{section}: {line[2:].strip()}" if section else line[2:].strip())
            open_ = True
        elif open_ and line.startswith("  ") and line.strip():
            changes[-1] += f" {line.strip()}"
        else:
            open_ = False
    return [LINK.sub(r"\1", change).replace("`", "") for change in changes]


def day_of(seconds: int) -> date:
    """Return the day (UTC) of a time in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).date()


def rpm_entries(releases: Sequence[Release], version: str, release: str, time: int) -> list[str]:
    """Return the entries of %changelog of a package that is built now, the newest first.

    `time` is in seconds since the epoch. What is not released yet counts as this package's own changes.
    """
    now = f"{version}-{release}"
    today = day_of(time)
    newest = releases[0]
    entries = []
    if newest.day is not None and newest.version != version:
        entries.append(_rpm_entry(today, now, (f"Built from the tree after {newest.version}",)))
    for one in releases:
        if one.day is None:
            entries.append(_rpm_entry(today, now, one.changes))
        else:
            entries.append(_rpm_entry(one.day, f"{one.version}-1", one.changes))
    return entries


def _rpm_entry(day: date, version: str, changes: Sequence[str]) -> str:
    # %a and %b of the C locale, which rpm wants whatever the caller's is
    weekday = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")[day.weekday()]
    month = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")[day.month - 1]
    head = f"* {weekday} {month} {day.day:02d} {day.year} anchor-build - {version}"
    lines = [
        textwrap.fill(text, RPM_TEXT_WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for text in changes
    ]
    return "\n".join([head, *lines])
