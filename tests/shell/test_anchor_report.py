"""anchor-report.sh: whatever is reported, boot.json is JSON, nothing drives the console, and subshells lose nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.shell.conftest import LIB, SHELLS, Shell

LOAD = '. "$LIB/anchor-report.sh"; mkdir -p "$ANCHOR_RUN/steps"\n'
HOSTILE = [
    "plain text",
    "",
    'a "quoted" \\ back\\slash" \\',
    '"',
    "\\",
    '\\"' * 50,
    "line one\nline two\r\n",
    "tab\tbell\a escape\033[2J\033]0;title\a del\x7f",
    "".join(map(chr, range(1, 32))),
    "invalid \udcff\udcfe UTF-8 \udcc3",
    "8-bit control \udc9b2J \udc90",
    "ünï©ödé 漢字 🚀",
    "$(reboot) `reboot` ${x} $PATH ; & | * ? [a-z] ~ !",
    "%s %d %n %%",
    "-n",
    "-e \\n \\x41 \\u0041 \\0101",
    "trailing backslash \\",
    "</script> {} [] , : null",
    "x" * 20000,
]


def load(node: Shell) -> Any:
    return json.loads((node.root / "run/anchor/boot.json").read_bytes())


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(text)[:30] for text in HOSTILE])
def test_every_text_becomes_json(shell: Shell, text: str) -> None:
    script = LOAD + 'anchor_json "$1"; printf "%s" "$anchor_json" >"$ANCHOR_ROOT/out"'
    assert shell.run(script, text).stderr == ""
    found = json.loads((shell.root / "out").read_bytes())
    raw = text.encode("utf-8", "surrogateescape")
    assert found == "".join(chr(byte) if 32 <= byte < 127 else "?" for byte in raw)


def test_hostile_texts_in_every_place_of_a_record(shell: Shell) -> None:
    for text in HOSTILE:
        script = """
        anchor_boot_set node "$1"
        anchor_step_begin image squashfs
        (anchor_note url "$1"; anchor_note_number bytes 12; anchor_fail "$1" "$1")
        anchor_step_end failed
        """
        done = shell.run(LOAD + script, text)
        assert done.stdout == ""
        console = done.stderr.encode("utf-8", "surrogateescape")
        assert all(byte == 10 or 32 <= byte < 127 for byte in console)
    report = load(shell)
    assert len(report["steps"]) == len(HOSTILE)
    for step, text in zip(report["steps"], HOSTILE, strict=True):
        assert (step["step"], step["stage"], step["result"], step["bytes"]) == ("image", "squashfs", "failed", 12)
        assert len(step.get("error", "")) == len(text.encode("utf-8", "surrogateescape"))
    log = (shell.root / "run/anchor/boot.log").read_bytes()
    assert all(byte == 10 or 32 <= byte < 127 for byte in log)


@pytest.mark.parametrize("number", ["", "x", "1.5", "-", "0x10", "1e3", "--1", "1 2", '1,"a":2', "\n", "$(id)"])
def test_what_is_no_number_does_not_break_the_report(shell: Shell, number: str) -> None:
    script = """
    anchor_step_begin clock
    anchor_note_number step_s "$1"
    anchor_note_number after 7
    anchor_step_end ok
    """
    assert shell.run(LOAD + script, number).returncode == 0
    (step,) = load(shell)["steps"]
    assert "step_s" not in step
    assert step["after"] == 7


@pytest.mark.parametrize(
    ("number", "value"), [("0", 0), ("-5", -5), ("007", 7), ("-010", -10), ("123456789012", 123456789012)]
)
def test_numbers_are_numbers(shell: Shell, number: str, value: int) -> None:
    script = 'anchor_step_begin clock; anchor_note_number n "$1"; anchor_step_end ok'
    assert shell.run(LOAD + script, number).returncode == 0
    assert load(shell)["steps"][0]["n"] == value


def test_what_a_subshell_notes_is_in_the_record(shell: Shell) -> None:
    script = """
    anchor_boot_set anchor 1.2
    anchor_boot_set result running
    anchor_step_begin auth acme
    ( (anchor_note subject node1) ; anchor_note_number attempts 2)
    sleep 0.2
    anchor_step_end ok
    [ -z "$anchor_step_dir" ] && printf 'no step runs\\n'
    anchor_note late x
    """
    done = shell.run(LOAD + script)
    assert done.stdout == "no step runs\n"
    report = load(shell)
    assert (report["anchor"], report["result"]) == ("1.2", "running")
    (step,) = report["steps"]
    assert (step["subject"], step["attempts"], step["result"]) == ("node1", 2, "ok")
    assert "error" not in step
    assert "hint" not in step
    assert 150 <= step["duration_ms"] < 5000
    uptime = float(Path("/proc/uptime").read_text().split()[0]) * 1000
    assert uptime - 60000 < step["start_ms"] <= uptime


def test_repeated_steps_stay_in_their_order(shell: Shell) -> None:
    script = """
    n=0
    while [ $n -lt 105 ]; do
        anchor_step_begin try
        anchor_note_number n $n
        anchor_step_json "$anchor_step_dir" # as anchor_step_end does, without writing the report a hundred times
        anchor_keep "$anchor_step_dir/json" "{\\"n\\":$n}"
        n=$((n + 1))
    done
    anchor_boot_write
    """
    done = shell.run(LOAD + script)
    assert done.stderr == ""
    assert [step["n"] for step in load(shell)["steps"]] == list(range(105))


def test_fail_says_what_and_what_to_do_and_returns_1(shell: Shell) -> None:
    done = shell.run(LOAD + "anchor_fail 'the cable is out' 'put it in'; printf '%s' $?")
    assert done.stdout == "1"
    assert done.stderr == "anchor: error: the cable is out\nanchor: hint: put it in\n"
    done = shell.run(LOAD + "anchor_fail 'the cable is out'; printf '%s' $?")
    assert (done.stdout, done.stderr) == ("1", "anchor: error: the cable is out\n")


def test_a_later_failure_of_a_step_replaces_the_earlier_one(shell: Shell) -> None:
    script = """
    anchor_step_begin image squashfs
    anchor_fail first "do this"
    anchor_fail second
    anchor_step_end failed
    """
    shell.run(LOAD + script)
    (step,) = load(shell)["steps"]
    assert step["error"] == "second"
    assert "hint" not in step


def test_lines_on_the_console_and_in_the_log(shell: Shell) -> None:
    done = shell.run(LOAD + "anchor_info one two; anchor_warn 'three  four'")
    assert done.stderr == "anchor: one two\nanchor: warning: three  four\n"
    first, second = (shell.root / "run/anchor/boot.log").read_text().splitlines()
    assert first.endswith("] one two")
    assert second.endswith("] warning: three  four")
    stamp = float(first[1:].partition("]")[0])
    assert abs(stamp - float(Path("/proc/uptime").read_text().split()[0])) < 60


def test_without_a_run_directory_only_the_console_is_told(shell: Shell) -> None:
    done = shell.run('. "$LIB/anchor-report.sh"; anchor_info hello; anchor_fail oh; anchor_note a b; printf done')
    assert (done.stdout, done.stderr) == ("done", "anchor: hello\nanchor: error: oh\n")


@pytest.mark.parametrize("uptime", ["0.00 0.00", "0.07 1", "9.99 1", "12.34 5", "987654.08 1"])
def test_the_uptime_in_milliseconds(shell: Shell, uptime: str) -> None:
    fake = shell.root / "uptime"
    fake.write_text(uptime + "\n")
    library = (LIB / "anchor-report.sh").read_text().replace("/proc/uptime", str(fake))
    (shell.root / "report.sh").write_text(library)
    done = shell.run('. "$ANCHOR_ROOT/report.sh"; anchor_uptime_ms; printf "%s" "$((anchor_uptime_ms + 0))"')
    assert int(done.stdout) == round(float(uptime.split()[0]) * 1000)


def test_the_report_is_whole_at_every_moment(shell: Shell) -> None:
    """A reader that never stops sees only whole reports, because each one is renamed into place."""
    script = """
    anchor_boot_write
    printf 'go\\n'
    n=0
    while [ $n -lt 40 ]; do
        anchor_step_begin step
        anchor_note text "$1"
        anchor_step_end ok
        n=$((n + 1))
    done
    wait
    """
    argv = [*SHELLS[shell.name], "-c", LOAD + script, "x", "y" * 500]
    env = {"PATH": os.environ["PATH"], "LIB": str(LIB), "ANCHOR_ROOT": str(shell.root)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        counts = [len(load(shell)["steps"])]
        while child.poll() is None:
            counts.append(len(load(shell)["steps"]))
    assert counts == sorted(counts)
    assert len(load(shell)["steps"]) == 40
    assert not (shell.root / "run/anchor/boot.json.new").exists()


@contextmanager
def terminal() -> Iterator[tuple[str, list[bytes]]]:
    """Give a pseudo terminal: its name below /dev, and what was written to it, complete after the block."""
    reader, writer = pty.openpty()
    tty.setraw(writer)
    received: list[bytes] = []

    def listen() -> None:
        while True:
            try:
                data = os.read(reader, 65536)
            except OSError:  # all writers have gone
                return
            received.append(data)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield os.ttyname(writer).removeprefix("/dev/"), received
    finally:
        os.close(writer)
        listener.join(timeout=10)
        os.close(reader)


def test_events_go_to_the_terminal_one_line_each(shell: Shell) -> None:
    script = """
    anchor_events=$1
    anchor_step_begin image squashfs
    anchor_note url "$2"
    anchor_fail "$2" hint
    anchor_step_end failed
    anchor_event '{"event":"switch_root"}'
    """
    with terminal() as (name, received):
        done = shell.run(LOAD + script, name, 'hostile "\\ \033[2J\n\udcff')
    assert "cannot" not in done.stderr
    begin, end, last = (json.loads(line) for line in b"".join(received).splitlines())
    assert (begin["event"], begin["step"], begin["stage"]) == ("begin", "image", "squashfs")
    assert end["event"] == "end"
    assert {key: end[key] for key in end if key != "event"} == load(shell)["steps"][0]
    assert end["error"] == 'hostile "\\ ?[2J??'
    assert last == {"event": "switch_root"}


@pytest.mark.parametrize("device", ["", "no-such-device", "shm"])
def test_a_terminal_that_is_none_is_no_failure(shell: Shell, device: str) -> None:
    done = shell.run(LOAD + 'anchor_events=$1; anchor_event "{}"; printf "%s" $?', device)
    assert (done.stdout, done.stderr) == ("0", "")


def test_a_terminal_that_fails_says_nothing(shell: Shell) -> None:
    done = shell.run(LOAD + 'anchor_events=full; anchor_event "{}"; printf "%s" $?')
    assert (done.stdout, done.stderr) == ("0", "")


def test_ready_completes_the_report(shell: Shell) -> None:
    script = """
    . "$LIB/anchor-ready.sh"
    anchor_boot_set result ok
    anchor_keep "$ANCHOR_RUN/steps/events" "$1"
    anchor_boot_set switch_root_ms 1000
    anchor_ready
    """
    with terminal() as (name, received):
        done = shell.run(LOAD + script, name)
    assert done.stderr == ""
    report = load(shell)
    assert report["switch_root_ms"] == 1000
    assert report["ready_ms"] > 0
    event = json.loads(b"".join(received))
    assert event == {"event": "ready", "at_ms": report["ready_ms"], "boot": report}
