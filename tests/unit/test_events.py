"""The events port: what is an event, what is refused, and that nothing hostile reaches a terminal."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest

from anchor_build import events
from anchor_build.events import (
    Begin,
    Boot,
    End,
    Event,
    EventReader,
    Failed,
    Finished,
    InvalidLineError,
    LineSplitter,
    Ready,
    SwitchRoot,
    parse_line,
    printable,
)

END: dict[str, Any] = {
    "event": "end",
    "step": "image",
    "stage": "squashfs",
    "result": "ok",
    "start_ms": 9,
    "duration_ms": 5,
}
FAILED = {
    "event": "failed",
    "step": "auth",
    "stage": "acme",
    "error": "no",
    "hint": "try",
    "on_failure": "shell",
}


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('{"event":"boot","version":"0.2","kernel":"6.1"}', Boot("0.2", "6.1")),
        ('{"event":"boot","version":"0.2"}', Boot("0.2", "")),
        ('{"event":"begin","step":"auth","stage":"acme","at_ms":9120}', Begin("auth", "acme", 9120)),
        ('{"event":"begin","step":"network","stage":"","at_ms":0}', Begin("network", "", 0)),
        (json.dumps(END), End("image", "squashfs", True, 9, 5)),
        (json.dumps(END | {"result": "failed"}), End("image", "squashfs", False, 9, 5)),
        (
            json.dumps(END | {"bytes": 12, "sha256": "ab"}),
            End("image", "squashfs", True, 9, 5, {"bytes": 12, "sha256": "ab"}),
        ),
        (json.dumps(FAILED), Failed("auth", "acme", "no", "try", "shell")),
        ('{"event":"switch_root","at_ms":19200}', SwitchRoot(19200)),
        ('{"event":"finished","action":"reboot","at_ms":5}', Finished(5, "reboot")),
        ('{"event":"finished","action":"kexec","at_ms":5}', Finished(5, "kexec")),
        ('{"event":"ready","at_ms":7,"boot":{"steps":[1,null,true]}}', Ready(7, {"steps": [1, None, True]})),
        ('{"event":"switch_root","at_ms":1,"later":"addition"}', SwitchRoot(1)),
        ('login: {"event":"switch_root","at_ms":1}', SwitchRoot(1)),
    ],
)
def test_each_event_is_parsed(line: str, event: Event) -> None:
    assert parse_line(line.encode()) == event


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "not a JSON object"),
        (b"SeaBIOS (version 1.16)", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"event":"ready"', "not a JSON object"),
        (b'{"event":"switch_root","at_ms":1} x', "not a JSON object"),
        (b'{"event":"switch_root","at_ms":NaN}', "not a JSON object"),
        (b'{"event":"ready","at_ms":1,"boot":{"a":1e999}}', "not a JSON object"),
        (b'{"event":"ready","at_ms":1,"boot":' + b"[" * 200_000, "not a JSON object"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not a JSON object"),
        (b"{}", "no known event"),
        (b'{"event":"reboot"}', "no known event"),
        (b'{"event":["boot"]}', "no known event"),
        (b'{"event":"boot","version":1}', "version is not a string"),
        (b'{"event":"begin","step":"a b","stage":"","at_ms":1}', "step is not a name"),
        (b'{"event":"begin","step":"a","stage":"../x","at_ms":1}', "stage is not a name"),
        (b'{"event":"begin","step":"a","stage":""}', "at_ms is not a number of milliseconds"),
        (b'{"event":"switch_root","at_ms":true}', "at_ms is not a number of milliseconds"),
        (b'{"event":"switch_root","at_ms":-1}', "at_ms is not a number of milliseconds"),
        (b'{"event":"switch_root","at_ms":1.5}', "at_ms is not a number of milliseconds"),
        (b'{"event":"ready","at_ms":1,"boot":[]}', "boot is not an object"),
        (json.dumps(END | {"result": "perhaps"}).encode(), "result is none of ok, failed"),
        (json.dumps(END | {"result": ["ok"]}).encode(), "result is none of ok, failed"),
        (json.dumps(END | {"x": {}}).encode(), "a note is neither a string nor a whole number"),
        (b'{"event":"finished","action":"sh","at_ms":5}', "action is none of reboot, poweroff, kexec"),
        (json.dumps(FAILED | {"on_failure": "sh"}).encode(), "on_failure is none of shell, reboot, poweroff"),
    ],
)
def test_everything_else_is_refused_with_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(InvalidLineError) as refused:
        parse_line(line)
    assert str(refused.value) == reason


def test_reader_takes_events_out_of_noise_however_the_bytes_are_cut() -> None:
    stream = b'\xff\xfe\r\n\r\n{"event":"boot","version":"1"}\r\nnoise\n{"event":"switch_root","at_ms":2}\n'
    expected = [Boot("1", ""), SwitchRoot(2)]
    for size in (1, 7, len(stream)):
        reader = EventReader()
        found = [e for i in range(0, len(stream), size) for e in reader.feed(stream[i : i + size])]
        assert found == expected
        assert reader.rejected_count == 2
        assert reader.rejected[1] == "not a JSON object: noise"


def test_an_unfinished_line_is_no_event_yet() -> None:
    reader = EventReader()
    assert reader.feed(b'{"event":"switch_root","at_ms":2}') == []
    assert reader.feed(b"\r\n") == [SwitchRoot(2)]


def test_reader_bounds_lines_events_and_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENTS", 3)
    reader = EventReader()
    good = b'{"event":"switch_root","at_ms":2}\n'
    for _ in range(40):
        reader.feed(b"x" * (1 << 16))
    assert reader.feed(b"\n" + good) == [SwitchRoot(2)]
    assert reader.rejected == ["a line of more than 1048576 bytes"]
    assert len(reader.feed(good * 9)) == 2
    reader.feed(b"junk\n" * 1000)
    assert reader.rejected_count == 1 + 7 + 1000
    assert len(reader.rejected) == events.MAX_REJECTED


def test_splitter_never_holds_more_than_its_limit() -> None:
    splitter = LineSplitter(limit=4)
    assert splitter.feed(b"abcd\nabcde") == [b"abcd"]
    assert splitter.rest == b""
    assert splitter.feed(b"fgh\nok\r\n") == [None, b"ok"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünï ☃", "plain ünï ☃"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]0;title\x1b\\x", "x"),
        ("\x1bP1;2qdata\x1b\\x", "x"),
        ("\x1b]52;c;ZXZpbA== and the rest", ""),
        ("\x1b[2J\x1b[?25l\x1b(Bx\x1bcy", "xy"),
        ("a\rb\x07c\x7f\x9b31m\u202e\u2028\ud800", "a?b?c??31m???"),
        ("a\tb", "a b"),
        ("x" * 9000, "x" * 4096),
        ("\x1b\x1b[31mx", "x"),
    ],
)
def test_printable_leaves_nothing_that_drives_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_event_carries_a_control_character() -> None:
    hostile = "a\x1b[2J\x07\x9b0m\u202eb"
    parsed: list[Event] = [
        parse_line(json.dumps(value).encode())
        for value in (
            {"event": "boot", "version": hostile, "kernel": hostile},
            END | {hostile: hostile},
            FAILED | {"error": hostile, "hint": hostile},
            {"event": "ready", "at_ms": 1, "boot": {hostile: [{"x": hostile}]}},
        )
    ]
    assert len(parsed) == 4
    text = "".join(f"{vars(event)!s}" for event in parsed).replace("\\", "")
    assert text.count("a??0m?b") == 8
    assert not [char for char in text if unicodedata.category(char) in {"Cc", "Cf"}]
    assert "x1b" not in text
