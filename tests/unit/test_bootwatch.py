"""The fate of a node, told from what its two serial ports wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from anchor_build import bootwatch
from anchor_build.bootwatch import BootResult, Until, Watcher, failure_text, observe
from anchor_build.events import Event

BOOT = '{"event":"boot","version":"0.2","kernel":"6.1"}\r\n'
BEGIN = '{"event":"begin","step":"auth","stage":"acme","at_ms":9120}\r\n'
SWITCH = '{"event":"switch_root","at_ms":19200}\r\n'
READY = '{"event":"ready","at_ms":23000,"boot":{"anchor":"0.2"}}\r\n'
FAILED = (
    '{"event":"failed","step":"auth","stage":"acme","error":"no account","hint":"make one","on_failure":"shell"}\r\n'
)
Look = Callable[..., BootResult]


class Recorder(Watcher):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lines: list[str] = []
        self.ticks = 0

    def event(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)

    def console_line(self, line: str) -> None:
        """Keep it."""
        self.lines.append(line)

    def tick(self) -> None:
        """Count it."""
        self.ticks += 1


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Observe a machine that has written this much, and goes on running unless it has a status."""
    monkeypatch.setattr(bootwatch, "SETTLE_S", 0.2)

    def observed(
        events: str = "",
        console: str = "",
        *,
        status: int | None = None,
        said: str = "",
        until: Until = "multi-user",
        timeout: float = 0.3,
        watcher: Watcher | None = None,
    ) -> BootResult:
        files = [tmp_path / name for name in ("console", "events", "qemu.log")]
        for path, text in zip(files, (console, events, said), strict=True):
            path.write_text(text)
        return observe(lambda: status, *files, until=until, timeout=timeout, watcher=watcher)

    return observed


@pytest.mark.parametrize(
    ("events", "until", "outcome"),
    [
        (BOOT + SWITCH + READY, "multi-user", "reached"),
        (BOOT + SWITCH, "switch-root", "reached"),
        (BOOT + READY, "switch-root", "reached"),
        (BOOT + SWITCH, "multi-user", "timeout"),
        (BOOT + FAILED, "multi-user", "failed"),
        (BOOT + FAILED + READY, "multi-user", "failed"),
        ("\x00\xff{{{\n" + BOOT + "junk" + READY, "multi-user", "reached"),
        ("", "multi-user", "timeout"),
    ],
)
def test_what_the_node_reports_decides(look: Look, events: str, until: Until, outcome: str) -> None:
    result = look(events, until=until)
    assert result.outcome == outcome
    assert result.ok == (outcome == "reached")
    assert (result.boot_json == {"anchor": "0.2"}) == (READY in events)


@pytest.mark.parametrize(
    ("line", "outcome", "reason"),
    [
        (
            "[    1.2] Kernel panic - not syncing: VFS: Unable to mount root fs",
            "panic",
            "the kernel stopped: Kernel panic - not syncing: VFS: Unable to mount root fs",
        ),
        ("Entering emergency mode. Exit the shell to continue.", "emergency", "emergency shell: Entering"),
        ("Dropping to debug shell.", "emergency", "emergency shell: Dropping"),
        ("You are in emergency mode. After logging in,", "emergency", "emergency shell: You are"),
        ("Press Enter for maintenance", "emergency", "emergency shell: Press"),
        ("\x1b[0;1;31mEntering \x1b[0memergency mode.", "emergency", "emergency shell: Entering emergency mode."),
        ("a service reports: emergency", "timeout", "the node did not report multi-user within 0.3 s"),
    ],
)
def test_what_the_console_shows_decides_next(look: Look, line: str, outcome: str, reason: str) -> None:
    result = look(BOOT, f"[ 0.1] starting\r\n{line}\r\n", timeout=0.3)
    assert result.outcome == outcome
    assert reason in result.reason


@pytest.mark.parametrize(
    ("reason", "option"),
    [
        ("VFS: Unable to mount root fs on unknown-block(0,0)", "--initrd"),
        ("System is deadlocked on memory", "--memory"),
        ("Attempted to kill init! exitcode=0x00000100", ""),
    ],
)
def test_what_to_do_about_a_panic(look: Look, reason: str, option: str) -> None:
    hint = look(BOOT, f"[ 0.1] Kernel panic - not syncing: {reason}\r\n", timeout=0.3).hint
    assert option in hint
    assert bool(hint) == bool(option)


def test_a_report_that_follows_the_emergency_shell_is_waited_for(look: Look, tmp_path: Path) -> None:
    def report() -> None:
        with (tmp_path / "events").open("a") as events:
            events.write(FAILED)

    timer = threading.Timer(0.1, report)
    timer.start()
    result = look(BOOT, "Entering emergency mode.\n", timeout=5)
    timer.join()
    assert result.outcome == "failed"
    assert result.reason == "the node reported that step auth (acme) failed: no account"
    assert result.hint == "make one"


@pytest.mark.parametrize(
    ("status", "said", "reason", "hint"),
    [
        (0, "", "the node powered off or rebooted before it reported success", "--memory"),
        (1, "a\nport in use\n", "QEMU ended with status 1: port in use", ""),
        (1, "too old to load a ram disk", "QEMU ended with status 1: too old to load a ram disk", "--kernel"),
        (-11, "", "QEMU was killed by signal 11", ""),
    ],
)
def test_a_machine_that_ends_early(look: Look, status: int, said: str, reason: str, hint: str) -> None:
    result = look("", status=status, said=said)
    assert (result.outcome, result.reason) == ("ended", reason)
    assert hint in result.hint
    assert bool(result.hint) == bool(hint)
    assert look(BOOT, status=status, said=said).hint == ("" if status == 0 else result.hint)


def test_only_what_ended_at_once_is_said_to(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, words in ((600.0, "it did so at once: "), (0.0, "it did so without a word: ")):
        monkeypatch.setattr(bootwatch, "AT_ONCE_S", limit)
        assert look("", status=0).hint == f"{words}is --memory enough for kernel and initramfs?"


def test_success_counts_although_the_machine_has_ended(look: Look) -> None:
    assert look(READY, status=0).ok


def test_a_flood_is_ended_and_never_held(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootwatch, "FLOOD_BYTES", 1 << 20)
    result = look(BOOT, "x" * (3 << 20), timeout=20)
    assert result.outcome == "flood"
    assert sum(map(len, result.console_tail)) < bootwatch.CONSOLE_LINE * bootwatch.CONSOLE_TAIL


def test_the_message_has_all_that_helps(look: Look) -> None:
    console = "".join(f"line {n}\r\n" for n in range(30)) + "\x1b[31mred\x1b[0m\x07\r\n\r\n"
    result = look(BOOT + BEGIN + "hello\x1b[2J\n", console + "login: ")
    text = failure_text(result)
    assert "last report: step auth (acme) began at 9.1 s" in text
    assert "not a JSON object: hello" in text
    assert result.console_tail[0] == "line 17"
    assert text.splitlines()[-2:] == ["  | red?", "  | login:"]
    assert "\x1b" not in text


def test_silence_is_told_as_such(look: Look) -> None:
    text = failure_text(look())
    assert "last report: nothing" in text
    assert "the console stayed empty" in text


def test_the_watcher_is_told_in_order(look: Look) -> None:
    recorder = Recorder()
    look(BOOT + BEGIN, "one\r\n\r\ntwo\n", watcher=recorder)
    assert [type(event).__name__ for event in recorder.events] == ["Boot", "Begin"]
    assert recorder.lines == ["one", "two"]
    assert recorder.ticks > 1


def test_files_that_do_not_exist_yet_are_waited_for(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("console", "events", "qemu.log")]
    assert observe(lambda: None, *files, until="multi-user", timeout=0.1).outcome == "timeout"
