"""doc/faults.md against the tests: every row names tests that exist, and every test of faults has a row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PAGE = TOP / "doc/faults.md"
# What is in these files is about faults and nothing else.
FILES = (
    "tests/stages/test_transport_https_faults.py",
    "tests/stages/test_transport_https_mirrors.py",
    "tests/integration/test_faults_booted.py",
)


def rows() -> dict[str, list[str]]:
    """Return the tests of each row, by its fault."""
    found: dict[str, list[str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "fault":
            assert len(cells) == 3, line
            assert cells[0] not in found, line
            found[cells[0]] = re.findall(r"`([^`]+)`", cells[2])
    return found


def named_in(file: str) -> set[str]:
    """Return the tests in a file, as pytest names them."""
    tree = ast.parse((TOP / file).read_text(encoding="utf-8"))
    return {
        f"{file}::{node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_names_tests_that_exist() -> None:
    missing = []
    for fault, tests in rows().items():
        assert tests, fault
        missing += [test for test in tests if test not in named_in(test.partition("::")[0])]
    assert missing == []


def test_every_test_of_faults_has_a_row() -> None:
    named = {test for tests in rows().values() for test in tests}
    assert sorted(test for file in FILES for test in named_in(file) if test not in named) == []


def test_there_are_enough_of_them() -> None:
    faults = rows()
    assert len(faults) >= 30
    booted = [fault for fault, tests in faults.items() if any(test.startswith("tests/integration/") for test in tests)]
    assert len(booted) >= 10
