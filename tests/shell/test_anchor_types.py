"""lib/anchor-types.sh under each shell: the same answers as the vectors, and as its Python twin on random values."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchor_build.paramtypes import TYPES, InvalidValueError, check_value, shell_arguments
from tests.shell.conftest import LIB, Shell

VECTORS = Path(__file__).parents[1] / "vectors" / "types.json"

# A forked check, a touched file or a changed shell would show: there is no PATH, and the state is compared.
HARNESS = """
. "$LIB/anchor-types.sh"
check() {
    if "$@"; then printf '0|%s\\n' "$anchor_value"; else printf '%s|%s|%s\\n' "$?" "$anchor_reason" "$anchor_value"; fi
}
PATH=/nowhere
cd "$ANCHOR_ROOT" || exit 1
before=$-,$IFS,${LC_ALL-unset}
. "$1"
[ "$before" = "$-,$IFS,${LC_ALL-unset}" ] || printf 'changed: %s\\n' "$before" "$-,$IFS,${LC_ALL-unset}"
"""


@dataclass(frozen=True)
class Case:
    """A call and the line that it prints: status 0 and the value, or status 1 and the reason."""

    type: str
    options: Mapping[str, Any]
    value: str
    answer: str

    def call(self) -> str:
        """Return the call as shell text."""
        function = "anchor_type_" + self.type.replace("-", "_")
        return shlex.join(["check", function, self.value, *shell_arguments(self.type, self.options)])


def text(value: str | Sequence[str | tuple[str, int]]) -> str:
    """Return a vector's value: itself, or pieces and [piece, count] put together."""
    if isinstance(value, str):
        return value
    return "".join(piece if isinstance(piece, str) else piece[0] * piece[1] for piece in value)


def vectors() -> list[Case]:
    cases = []
    for group in json.loads(VECTORS.read_text()):
        for entry in group["accept"]:
            value, normal = (entry, entry) if isinstance(entry, str) else entry
            cases.append(Case(group["type"], group["options"], text(value), f"0|{text(normal)}"))
        for reason, values in group["refuse"].items():
            cases += [Case(group["type"], group["options"], text(value), f"1|{reason}|") for value in values]
    return cases


def mutations(count: int) -> list[Case]:
    """Return vectors with random damage, and what Python answers to them."""
    source = random.Random(4096)  # noqa: S311 - repeatable, not secret
    known = [case for case in vectors() if len(case.value) < 200]
    cases = []
    for _ in range(count):
        case = source.choice(known)
        value = case.value
        for _ in range(source.randint(1, 3)):
            at = source.randint(0, len(value))
            value = (
                value[:at]
                + source.choice("0159aFgKmsx.:/-_@[]%,? '\\\"*$é\udc81\n")
                + value[at + source.randint(0, 2) :]
            )
        try:
            answer = f"0|{check_value(case.type, value, case.options)}"
        except InvalidValueError as error:
            answer = f"1|{error}|"
        cases.append(Case(case.type, case.options, value, answer))
    return cases


def run(shell: Shell, cases: Sequence[Case], **env: str) -> None:
    script = shell.root / "calls.sh"
    script.write_text("".join(case.call() + "\n" for case in cases), errors="surrogateescape")
    result = shell.run(HARNESS, str(script), env=env)
    assert result.stderr == ""
    answers = result.stdout.removesuffix("\n").split("\n")
    wrong = [(case, answer) for case, answer in zip(cases, answers, strict=True) if answer != case.answer]
    assert wrong == []
    assert [path.name for path in shell.root.iterdir()] == ["calls.sh"]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_every_vector(shell: Shell, locale: str) -> None:
    run(shell, vectors(), LC_ALL=locale)


def test_agrees_with_python_on_damaged_values(shell: Shell) -> None:
    run(shell, mutations(1500))


def test_flags_and_separators_of_the_caller_do_not_matter(shell: Shell) -> None:
    (shell.root / "calls.sh").touch()
    script = """
    . "$LIB/anchor-types.sh"
    IFS=a,0. && set -fu && cd "$ANCHOR_ROOT" || exit 1
    anchor_type_list "/data//a,/00" path && printf '%s\\n' "$anchor_value"
    set +f
    anchor_type_url "*:10" "" a && printf '%s\\n' "$anchor_value"
    anchor_type_choice "*" "calls.sh" || printf '%s\\n' "$anchor_reason"
    case $- in *f*) printf 'f\\n' ;; esac
    printf '%s\\n' "$IFS"
    """
    result = shell.run(script)
    assert result.stdout.split("\n") == ["/data/a,/00", "is not one of: calls.sh", "a,0.", ""]
    assert result.stderr == ""


def test_the_library_and_the_table_name_the_same_types() -> None:
    functions = re.findall(r"^anchor_type_([a-z0-9]\w*)\(\)", (LIB / "anchor-types.sh").read_text(), re.MULTILINE)
    assert sorted(functions) == sorted(name.replace("-", "_") for name in TYPES)


def test_every_type_has_vectors() -> None:
    counts = {name: sum(case.type == name for case in vectors()) for name in TYPES}
    assert min(counts.values()) >= 25, counts


def test_the_library_starts_and_evaluates_nothing() -> None:
    code = re.sub(r"^\s*#.*$", "", (LIB / "anchor-types.sh").read_text(), flags=re.MULTILINE)
    assert re.findall(r"\$\((?!\()|`|\beval\b|\bread\b|<<|[^|]\|\s*[a-z]\w+ ", code) == []
