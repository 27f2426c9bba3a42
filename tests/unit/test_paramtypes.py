"""The table of parameter types: the shared vectors, and the options that stage.toml may give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from anchor_build.paramtypes import TYPES, InvalidValueError, check_options, check_value, shell_arguments

GROUPS = json.loads((Path(__file__).parents[1] / "vectors" / "types.json").read_text())

Piece = str | tuple[str, int]


def text(value: str | Sequence[Piece]) -> str:
    """Return a vector's value: itself, or pieces and [piece, count] put together."""
    if isinstance(value, str):
        return value
    return "".join(piece if isinstance(piece, str) else piece[0] * piece[1] for piece in value)


def answer(type_name: str, value: str, options: Mapping[str, object]) -> str:
    try:
        return f"ok: {check_value(type_name, value, options)}"
    except InvalidValueError as error:
        return str(error)


def wrong_answers(group: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def ask(value: str | Sequence[Piece], wanted: str) -> Iterator[tuple[str, str]]:
        got = answer(group["type"], text(value), group["options"])
        if got != wanted:
            yield text(value), got

    for entry in group["accept"]:
        value, normal = (entry, entry) if isinstance(entry, str) else entry
        yield from ask(value, f"ok: {text(normal)}")
    for reason, values in group["refuse"].items():
        for value in values:
            yield from ask(value, reason)


@pytest.mark.parametrize("group", GROUPS, ids=[f"{g['type']}-{json.dumps(g['options'])}" for g in GROUPS])
def test_vectors(group: dict[str, Any]) -> None:
    assert check_options(group["type"], group["options"]) == []
    assert list(wrong_answers(group)) == []


@pytest.mark.parametrize("group", GROUPS, ids=[f"{g['type']}-{json.dumps(g['options'])}" for g in GROUPS])
def test_a_normal_value_is_its_own_normal_form(group: dict[str, Any]) -> None:
    for entry in group["accept"]:
        normal = text(entry if isinstance(entry, str) else entry[1])
        assert answer(group["type"], normal, group["options"]) == f"ok: {normal}"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a\0b", "contains a control character"),
        ("\n", "contains a control character"),
        ("\ud800", "contains a character that has no UTF-8 form"),
        ("é" * 2049, "is longer than 4096 bytes"),
        ("\udcff" * 4097, "is longer than 4096 bytes"),
    ],
)
def test_no_type_accepts_what_is_not_text(name: str, value: str, reason: str) -> None:
    assert answer(name, value, {"choices": ["a"], "of": "host"}) == reason


def test_the_table_is_complete_and_closed() -> None:
    assert " ".join(TYPES) == (
        "string name bool int size size-or-percent duration choice host port email url path sha256 mac disk tty "
        "nfs-export secret list"
    )
    assert all(kind.name == name and kind.summary and kind.metavar for name, kind in TYPES.items())
    with pytest.raises(KeyError):
        check_value("regex", "x", {})


@pytest.mark.parametrize(
    ("type_name", "options", "words"),
    [
        ("string", {}, []),
        ("int", {}, []),
        ("int", {"min": 1, "max": 300}, ["1", "300"]),
        ("int", {"min": 0}, ["0"]),
        ("int", {"max": 300}, ["", "300"]),
        ("choice", {"choices": ["shell", "reboot"]}, ["shell reboot"]),
        ("url", {"schemes": ["https", "http"], "bare": "https"}, ["https http", "https"]),
        ("url", {"bare": "https"}, ["", "https"]),
        ("list", {"of": "host"}, ["host"]),
        ("list", {"of": "nfs-export"}, ["nfs-export"]),
        ("list", {"of": "int", "min": 1}, ["int", "1"]),
    ],
)
def test_shell_arguments(type_name: str, options: Mapping[str, object], words: list[str]) -> None:
    assert check_options(type_name, options) == []
    assert shell_arguments(type_name, options) == words


@pytest.mark.parametrize(
    ("type_name", "options", "problem"),
    [
        ("regex", {}, "type is not one of: string name bool"),
        ("string", {"min": 1}, "min is not an option of type string"),
        ("int", {"minimum": 1}, "minimum is not an option of type int"),
        ("int", {"min": 2, "max": 1}, "min is greater than max"),
        ("int", {"min": "1"}, "min must be a whole number"),
        ("int", {"min": True}, "min must be a whole number"),
        ("int", {"max": 1.5}, "max must be a whole number"),
        ("int", {"max": 10**18}, "max must be a whole number"),
        ("size", {"min": -1}, "min must be a whole number from 0"),
        ("duration", {"min": 1, "max": "5m"}, "max must be a whole number from 0"),
        ("choice", {}, "choices is not a list"),
        ("choice", {"choices": []}, "choices is not a list"),
        ("choice", {"choices": "shell"}, "choices is not a list"),
        ("choice", {"choices": ["a b"]}, "choices has an element that is not a word"),
        ("choice", {"choices": [""]}, "choices has an element that is not a word"),
        ("choice", {"choices": [1]}, "choices has an element that is not a word"),
        ("choice", {"choices": ["é"]}, "choices has an element that is not a word"),
        ("choice", {"choices": ["a", "a"]}, "choices names something twice"),
        ("url", {"schemes": []}, "schemes is not a list"),
        ("url", {"schemes": ["HTTPS"]}, "schemes has an element that is not a scheme"),
        ("url", {"schemes": ["https://"]}, "schemes has an element that is not a scheme"),
        ("url", {"schemes": ["http"], "bare": "https"}, "bare is not one of schemes"),
        ("url", {"bare": ""}, "bare is not a scheme"),
        ("url", {"bare": ["https"]}, "bare is not a scheme"),
        ("list", {}, "of does not name the type of the elements"),
        ("list", {"of": "list"}, "of does not name the type of the elements"),
        ("list", {"of": "regex"}, "of does not name the type of the elements"),
        ("list", {"of": ["host"]}, "of does not name the type of the elements"),
        ("list", {"of": "host", "min": 1}, "min is not an option of type host"),
        ("list", {"of": "choice"}, "choices is not a list"),
        ("host", {"of": "host"}, "of is not an option of type host"),
    ],
)
def test_wrong_options(type_name: str, options: Mapping[str, object], problem: str) -> None:
    assert [found[: len(problem)] for found in check_options(type_name, options)] == [problem]


def test_all_wrong_options_are_told_at_once() -> None:
    problems = check_options("url", {"schemes": [], "bare": "", "min": 1})
    assert [problem.split()[0] for problem in problems] == ["min", "schemes", "bare"]
