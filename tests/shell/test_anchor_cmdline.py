"""lib/anchor-cmdline.sh under each shell: the shared vectors, the node's four sources, and the time it takes."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from anchor_build.cmdline import Word, split
from tests.shell.conftest import LIB, Shell

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "cmdline.json").read_text())

# Words are printed with \\037 between their parts and \\035 behind them: values hold spaces and newlines.
SHOW = """
. "$LIB/anchor-report.sh"
. "$LIB/anchor-cmdline.sh"
show() {
    printf '%s\\037%s\\037%s\\037%s\\035' "$#" "$1" "$2" "$3"
    return 1
}
show_source() {
    printf '%s\\037' "${anchor_cmdline_source#"$ANCHOR_ROOT"}"
    show "$@"
}
"""


def shown(words: Sequence[Word]) -> str:
    return "".join(f"3\037{word.name}\037{word.value or ''}\037{int(word.value is not None)}\035" for word in words)


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogateescape"))


def each(shell: Shell, setup: str = "") -> tuple[list[tuple[str, str, str | None]], int, str]:
    """Return (file, name, value) of each word in all sources, the status, and what was said on stderr."""
    result = shell.run(f"{SHOW}{setup}\nanchor_cmdline_each show_source")
    words = []
    for record in result.stdout.split("\035")[:-1]:
        source, count, name, value, has_value = record.split("\037")
        assert count == "3"
        words.append((source, name, value if has_value == "1" else None))
    return words, result.returncode, result.stderr


def test_every_vector(shell: Shell) -> None:
    script = shell.root / "calls.sh"
    calls = [f"anchor_cmdline_split {shlex.quote(vector['line'])} show || exit; printf '\\036'\n" for vector in VECTORS]
    script.write_text("".join(calls), errors="surrogateescape")
    before = '[ "$1,$2" = "$-,$IFS" ] || printf "changed: %s" "$-" "$IFS"'
    setup = f'{SHOW}cd "$ANCHOR_ROOT" && PATH=/nowhere && file=$1 && set -- "$-" "$IFS" && . "$file"\n{before}'
    for locale in ("C", "C.UTF-8"):
        result = shell.run(setup, str(script), env={"LC_ALL": locale})
        assert result.stderr == ""
        *records, rest = result.stdout.split("\036")
        assert rest == ""
        wanted = [shown([Word(*word) for word in vector["words"]]) for vector in VECTORS]
        wrong = [
            (vector["line"], want, got)
            for vector, want, got in zip(VECTORS, wanted, records, strict=True)
            if want != got
        ]
        assert wrong == []


def test_no_source_is_no_word(shell: Shell) -> None:
    assert each(shell) == ([], 0, "")


def test_sources_come_weakest_first(shell: Shell) -> None:
    write(
        shell.root,
        {
            "proc/cmdline": 'root=anchor a="4 5" quiet -- init\n',
            "etc/cmdline": "a=3",
            "etc/cmdline.d/20-b.conf": "a=2b\n",
            "etc/cmdline.d/10 a*.conf": "a=2a c\n\n  d=1 -- e\nf=2",
            "etc/cmdline.d/30-c.txt": "not=read",
            "etc/anchor/params": "a=1",
        },
    )
    expected = [
        ("/etc/anchor/params", "a", "1"),
        ("/etc/cmdline.d/10 a*.conf", "a", "2a"),
        ("/etc/cmdline.d/10 a*.conf", "c", None),
        ("/etc/cmdline.d/10 a*.conf", "d", "1"),
        ("/etc/cmdline.d/10 a*.conf", "f", "2"),
        ("/etc/cmdline.d/20-b.conf", "a", "2b"),
        ("/etc/cmdline", "a", "3"),
        ("/proc/cmdline", "root", "anchor"),
        ("/proc/cmdline", "a", "4 5"),
        ("/proc/cmdline", "quiet", None),
    ]
    assert each(shell) == (expected, 0, "")
    # With file name expansion off, the files are found all the same, and it stays off.
    assert each(shell, "set -f; trap 'case $- in *f*) ;; *) echo lost >&2 ;; esac' EXIT") == (expected, 0, "")


def test_baked_in_parameters_are_verbatim(shell: Shell) -> None:
    lines = ["a=1 2", 'b="c"', "d==e ", "f", "", "-- ", "g=$(touch x)`id`", "h=* \\ 'i", "=j", "k=é\udcff", "l="]
    write(shell.root, {"etc/anchor/params": "\n".join(lines)})
    words, status, stderr = each(shell, 'cd "$ANCHOR_ROOT"')
    assert (status, stderr) == (0, "")
    assert [(name, value) for _, name, value in words] == [
        ("a", "1 2"),
        ("b", '"c"'),
        ("d", "=e "),
        ("f", None),
        ("-- ", None),
        ("g", "$(touch x)`id`"),
        ("h", "* \\ 'i"),
        ("", "j"),
        ("k", "é\udcff"),
        ("l", ""),
    ]
    assert not (shell.root / "x").exists()


def test_a_quote_left_open_ends_with_its_line(shell: Shell) -> None:
    write(shell.root, {"etc/cmdline": 'a="b c\nd=e\n'})
    assert each(shell)[0] == [("/etc/cmdline", "a", "b c"), ("/etc/cmdline", "d", "e")]


def test_an_unreadable_source_is_told_and_the_rest_is_read(shell: Shell) -> None:
    write(shell.root, {"etc/cmdline": "a=1", "proc/cmdline": "b=2"})
    (shell.root / "etc/cmdline").unlink()
    # Nobody can open it for reading, not even root.
    (shell.root / "etc/cmdline").symlink_to("/sys/bus/platform/drivers_probe")
    words, status, _ = each(shell)
    assert (words, status) == ([("/proc/cmdline", "b", "2")], 1)


def test_a_callback_may_parse_a_line_of_its_own(shell: Shell) -> None:
    script = """
    outer() { [ "$1" != b ] || anchor_cmdline_split 'x="1 2" -- y' show; show "$@"; }
    anchor_cmdline_split "a b c" outer
    """
    words = [Word("a", None), Word("x", "1 2"), Word("b", None), Word("c", None)]
    assert shell.run(SHOW + script).stdout == shown(words)


def test_a_long_line_takes_milliseconds(shell: Shell) -> None:
    """8 KB took 9 ms in dash, 16 ms in busybox and 32 ms in bash; the bound leaves room for a busy machine."""
    line = " ".join(f'rd.anchor.some.param{number}="https://host/{number} x"' for number in range(190))
    start = time.monotonic()
    result = shell.run(f'{SHOW}anchor_cmdline_split "$1" show', line)
    elapsed = time.monotonic() - start
    assert len(line) >= 8000
    assert result.stdout == shown(split(line))
    assert elapsed < 2


def test_the_library_evaluates_nothing() -> None:
    code = re.sub(r"^\s*#.*$", "", (LIB / "anchor-cmdline.sh").read_text(), flags=re.MULTILINE)
    assert re.findall(r"\$\((?!\().*?\)", code) == []
    assert re.search(r"`|\beval\b|(?<!IFS= )\bread\b|\bread (?!-r )|\|\s*\w+\s*$", code) is None
