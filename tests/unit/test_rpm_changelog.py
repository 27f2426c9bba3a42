"""CHANGELOG.md as data."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError
from anchor_build.rpm.changelog import Release, day_of, read_changelog
from tests.conftest import TOP

TEXT = """\
# Changelog

Words before it.

## [1.1.0] - unreleased

Words that are no change.

### Added

- One, with `code`
  and a [link](doc/x.md).
- Two.

Words after it.

## 1.0.0 - 2024-02-29

### Fixed

- Three.
"""


def test_releases_and_their_changes(tmp_path: Path) -> None:
    file = tmp_path / "CHANGELOG.md"
    file.write_text(TEXT)
    assert read_changelog(file) == (
        Release("1.1.0", None, ("Added: One, with code and a link.", "Added: Two.")),
        Release("1.0.0", date(2024, 2, 29), ("Fixed: Three.",)),
    )


def test_own_changelog_can_be_read() -> None:
    newest = read_changelog(TOP / "CHANGELOG.md")[0]
    assert len(newest.changes) > 10


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("## 1.0 - soon\n", "## 1.0 - soon: is not of the form"),
        ("## 1.0 - 2024-02-30\n", "2024-02-30: day is out of range"),
        ("# Changelog\n", "names no version"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "CHANGELOG.md"
    file.write_text(text)
    with pytest.raises(AnchorError, match=f"CHANGELOG.md: {reason}"):
        read_changelog(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match=r"none\.md: cannot be read"):
        read_changelog(tmp_path / "none.md")


def test_days_are_those_of_utc() -> None:
    assert (day_of(86399), day_of(86400)) == (date(1970, 1, 1), date(1970, 1, 2))
