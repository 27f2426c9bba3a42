"""What a person sees: results on stdout, steps on stderr, colour and rewriting only on a terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from anchor_build.console import Console, Events, Progress, format_table


class Terminal(io.StringIO):
    """Says that it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal that shows colours. No fixture, because pytest puts its own back."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def test_a_step_says_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().step("boil water"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "  done  boil water  0.0 s\n"


def test_a_failed_step_is_shown_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="cold"), Console(-1).step("boil water"):
        raise ValueError("cold")
    assert capsys.readouterr().err == "failed  boil water  0.0 s\n"
    with Console(-1).step("boil water"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("verbosity", "expected"), [(-1, ""), (0, "info\n"), (1, "info\ndetail\n")])
def test_verbosity(capsys: pytest.CaptureFixture[str], verbosity: int, expected: str) -> None:
    console = Console(verbosity)
    console.info("info")
    console.detail("detail")
    assert capsys.readouterr().err == expected
    console.warn("look")
    console.error("broken", "mend it")
    assert capsys.readouterr().err == "warning: look\nerror: broken\nhint: mend it\n"


def test_colour_and_a_live_time_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr("anchor_build.console.TICK_S", 0.01)
    with Console().step("boil water"):
        deadline = time.monotonic() + 5
        while "   ...  boil water  0 s" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    text = terminal.getvalue()
    assert "   ...  boil water  0 s" in text
    assert "\x1b[32m" in text.splitlines()[-1]


def test_a_live_line_fits_into_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setattr("anchor_build.console.TICK_S", 0.01)
    monkeypatch.setenv("COLUMNS", "60")
    with Console().step("fetch " + "x" * 90, lambda: "1.0 of 2.0 MB"):
        deadline = time.monotonic() + 5
        while "of 2.0 MB" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    line = terminal.getvalue().split("\r\x1b[K")[1]
    assert line.startswith("   ...  fetch xxx") and line.endswith("\u2026  0 s  1.0 of 2.0 MB") and len(line) < 60


def test_where_no_line_can_be_rewritten_there_is_a_new_one_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anchor_build.console.LINE_S", 0.01)
    asked = []

    def progress() -> str:
        asked.append(1)
        return "1.0 of 2.0 MB"

    with Console().step("fetch", progress):
        deadline = time.monotonic() + 5
        while len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "   ...  fetch  0 s  1.0 of 2.0 MB\n" in capsys.readouterr().err
    with Console(-1).step("fetch", lambda: "unseen"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_events_are_lines_of_json_whatever_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anchor_build.console.EVENT_S", 0.01)
    file = io.BytesIO()
    console = Console(-1, Events(file))
    with console.step("fetch", lambda: Progress("1.0 of 2.0 MB", bytes=1_000_000, total_bytes=2_000_000)):
        deadline = time.monotonic() + 5
        while b"progress" not in file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    with pytest.raises(ValueError, match="cold"), console.step("boil water"):
        raise ValueError("cold")
    console.warn("look")
    events = [json.loads(line) for line in file.getvalue().splitlines()]
    assert [event.pop("at_ms") >= 0 for event in events] == [True] * len(events)
    assert events.pop(2).pop("duration_ms") >= 0
    assert [{key: event[key] for key in event if key != "duration_ms"} for event in events] == [
        {"event": "begin", "step": "fetch"},
        {
            "event": "progress",
            "step": "fetch",
            "text": "1.0 of 2.0 MB",
            "bytes": 1_000_000,
            "total_bytes": 2_000_000,
        },
        {"event": "begin", "step": "boil water"},
        {"event": "end", "step": "boil water", "result": "failed"},
        {"event": "warning", "text": "look"},
    ]
    assert capsys.readouterr().out == ""


def test_a_reader_of_events_may_go(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("ab", buffering=0) as file, Console(-1, Events(file)).step("boil water"):
        pass
    assert capsys.readouterr().err == "warning: no further events (--events): No space left on device\n"


def test_a_reader_of_events_that_does_not_read_is_not_waited_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchor_build.console.READER_S", 0.05)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with os.fdopen(writer, "wb", buffering=0) as file, os.fdopen(reader, "rb") as pipe:
        console = Console(-1, Events(file))
        console.event("warning", text="x" * 100_000)
        console.event("done")
        assert len(pipe.read()) < 100_000
    assert capsys.readouterr().err == "warning: no further events (--events): nobody reads them\n"


def test_a_slow_reader_of_events_gets_them_whole() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got = bytearray()
    with os.fdopen(reader, "rb") as pipe:
        with os.fdopen(writer, "wb", buffering=0) as file:
            thread = threading.Thread(target=lambda: got.extend(pipe.read()))
            thread.start()
            assert Events(file).write("warning", text="x" * 300_000) == ""
        thread.join()
    assert json.loads(got)["text"] == "x" * 300_000


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_who_wants_no_colour_gets_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    terminal = make_terminal(monkeypatch)
    monkeypatch.setenv(variable, "dumb")
    console = Console()
    if variable == "NO_COLOR":
        assert console.paint("x", "red") == "x"
        with console.step("boil water"):
            pass
        console.error("broken", "mend it")
        assert "\x1b[3" not in terminal.getvalue()
    else:
        assert not console.live


def test_a_table_is_aligned_and_only_numbers_stand_right() -> None:
    assert format_table(["NAME", "MB"], [["a", 1.5], ["long name", 120.25]]).splitlines() == [
        "NAME           MB",
        "---------  ------",
        "a            1.50",
        "long name  120.25",
    ]
    assert format_table(["A", "B"], []) == "A  B\n-  -"


def test_a_table_on_a_terminal_wraps_its_prose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "/a/path/that/is/longer/than/there/is/room/and/stays/whole"
    rows = [["a", "", 7], ["b", "one two three four five six seven", 8], ["c", f"see {long}", 9]]
    assert format_table(["K", "TEXT", "N"], rows[:2], prose=1, width=24).splitlines() == [
        "K  TEXT                         N",
        "-  ---------------------------  -",
        "a                               7",
        "b  one two three four five six  8",
        "   seven",
    ]
    assert format_table(["K", "TEXT", "N"], rows[2:], prose=1, width=24).splitlines()[-1].strip() == long
    monkeypatch.setenv("COLUMNS", "24")
    Console().table(["K", "TEXT", "N"], rows, prose=1)
    assert "five six seven" in capsys.readouterr().out, "a pipe gets each row on one line"
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    Console().table(["K", "TEXT", "N"], rows[:2], prose=1)
    assert "   seven\n" in screen.getvalue()


def test_json_goes_to_stdout_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"umläut": "\udcff", "list": ["\x1b[2J"]}
    Console(-1).json(value)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == value
    assert "\x1b" not in captured.out
    assert captured.err == ""
