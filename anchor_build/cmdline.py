"""The kernel command line as names and values, by the kernel's own rules.

They are those of next_arg in the kernel's lib/cmdline.c: white space ends a word, except between double quotes;
the value follows the first ``=`` (a leading one belongs to the name); a quote at the start of the word or of
the value is taken off together with one at the very end; nothing escapes a quote; a word ``--`` without a value
ends the line. One difference: byte 0xA0, white space to the kernel, would cut UTF-8 letters apart.

lib/anchor-cmdline.sh is the node's half; tests/vectors/cmdline.json holds the two together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Bytes; x86 cuts a longer line without a word (COMMAND_LINE_SIZE, with its final NUL).
COMMAND_LINE_MAX = 2047

RAW_WORD = re.compile(r'(?:[^ \t\n\v\f\r"]+|"[^"]*(?:"|\Z))+')


@dataclass(frozen=True)
class Word:
    """One word of a command line; `value` is None for a word without ``=``."""

    name: str
    value: str | None


def split(line: str) -> list[Word]:
    """Return the words of `line`, up to a bare ``--``."""
    words = []
    for raw in RAW_WORD.findall(line):
        word = _take_apart(raw)
        if word == Word("--", None):
            break
        words.append(word)
    return words


def _take_apart(raw: str) -> Word:
    quoted = raw.startswith('"')
    text = raw.removeprefix('"')
    equals = text.find("=", 1)
    if equals < 0:
        return Word(text.removesuffix('"') if quoted else text, None)
    value = text[equals + 1 :]
    quoted = quoted or value.startswith('"')
    value = value.removeprefix('"')
    return Word(text[:equals], value.removesuffix('"') if quoted else value)
