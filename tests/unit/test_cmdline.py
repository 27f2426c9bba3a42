"""The kernel's rules for its command line: the vectors that the node's library shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anchor_build.cmdline import Word, split

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "cmdline.json").read_text())


@pytest.mark.parametrize("vector", VECTORS, ids=[ascii(vector["line"])[:40] for vector in VECTORS])
def test_vectors(vector: dict[str, Any]) -> None:
    assert split(vector["line"]) == [Word(name, value) for name, value in vector["words"]]


def test_an_open_quote_in_a_long_line_takes_no_time() -> None:
    line = 'a="' + 'b c" "' * 20000 + 'd"e" "'
    words = split(line)
    assert words[0] == Word("a", "b c")
    assert len(words) == 20001
