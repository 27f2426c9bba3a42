"""The one door to processes: words stay words, nothing hangs, nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.run import run, start, stop, which

pytestmark = pytest.mark.usefixtures("processes")


def gone(pid: int) -> bool:
    """Whether a process has ended, or is about to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)


def test_words_reach_the_program_as_they_are() -> None:
    words = ["a b", "$(id)", "*", "'\"", ""]
    assert run(["printf", "<%s>", *words]).stdout == "".join(f"<{word}>" for word in words)


def test_the_environment_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    lines = run(["env"], env={"MINE": "1"}).stdout.splitlines()
    assert {"LC_ALL=C.UTF-8", "MINE=1"} <= set(lines)
    assert not [line for line in lines if line.startswith(("LC_MESSAGES=", "LANGUAGE="))]


def test_the_umask_of_a_child(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run(["touch", "mine"], cwd=tmp_path)
        run(["touch", "ours"], cwd=tmp_path, umask=0o022)
    finally:
        os.umask(before)
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o644


def test_standard_input_is_closed_unless_given() -> None:
    assert run(["cat"], timeout=10).stdout == ""
    assert run(["cat"], input_text="typed").stdout == "typed"


def test_a_tied_child_ends_with_the_one_that_is_killed() -> None:
    """A Python process starts two children, says their ids, and is killed."""
    script = "import sys, time; from anchor_build.run import start\n"
    script += "print(*(start(['sleep', '60'], tied=tied).pid for tied in (True, False)), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        tied, free = map(int, parent.stdout.readline().split())
        deadline = time.monotonic() + 10
        # setpriv becomes sleep only after it has tied itself.
        while "sleep" not in Path(f"/proc/{tied}/cmdline").read_text().split("\0")[0] and time.monotonic() < deadline:
            time.sleep(0.01)
        parent.kill()
    while Path(f"/proc/{tied}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        assert not Path(f"/proc/{tied}").exists()
        assert Path(f"/proc/{free}").exists()
    finally:
        os.kill(free, signal.SIGKILL)


def test_a_failure_shows_the_command_its_status_and_the_end_of_its_output() -> None:
    with pytest.raises(ProcessError) as caught:
        run(["sh", "-c", "seq 100; echo oh >&2; exit 3"], hint="try again")
    message = caught.value.message
    assert message.startswith("sh exited with status 3\n  command: sh -c 'seq 100; echo oh >&2; exit 3'\n")
    assert message.endswith("  | 100\n  | oh")
    assert "  | 71\n" not in message
    assert (caught.value.status, caught.value.hint) == (3, "try again")


def test_a_child_killed_by_a_signal() -> None:
    with pytest.raises(ProcessError, match="was killed by signal 9"):
        run(["sh", "-c", "kill -9 $$"])


def test_a_status_that_is_wanted() -> None:
    assert run(["sh", "-c", "exit 3"], check=False).status == 3


def test_output_to_a_log_or_an_open_file(tmp_path: Path) -> None:
    log, sink = tmp_path / "log", tmp_path / "sink"
    assert run(["sh", "-c", "echo out; echo err >&2"], log=log).stdout == "out\nerr\n"
    with pytest.raises(ProcessError, match=r"\| err"):
        run(["sh", "-c", "echo err >&2; false"], log=log)
    with sink.open("wb") as file:
        assert run(["printf", "\\377"], stdout=file).stdout == ""
    assert sink.read_bytes() == b"\xff"


def test_output_that_is_not_utf8() -> None:
    assert run(["printf", "a\\377b"]).stdout == "a\ufffdb"


def test_a_program_that_is_missing_or_may_not_run(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="no-such-program: program not found"):
        run(["no-such-program"])
    (tmp_path / "data").touch()
    with pytest.raises(AnchorError, match="data: may not be executed"):
        run([tmp_path / "data"])


def test_a_time_limit_ends_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 100 & echo $! >{tmp_path}/pid; wait"
    started = time.monotonic()
    with pytest.raises(AnchorError, match=r"did not finish within 0\.5 s"):
        run(["sh", "-c", script], timeout=0.5)
    assert time.monotonic() - started < 20
    assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_ctrl_c_ends_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 100 & echo $! >{tmp_path}/pid; wait"

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run(["sh", "-c", script], timeout=20)
    assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_child_that_ignores_the_polite_signal() -> None:
    child = start(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"])
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    stop(child, grace=0.3)
    assert child.returncode == -signal.SIGKILL


def test_programs_of_the_system_are_found_without_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sh").write_text("#!/bin/sh\necho wrong\n")
    (tmp_path / "sh").chmod(0o755)
    found = which("sh")
    assert found is not None
    assert found.is_absolute()
    assert which("no-such-program") is None
    assert run(["sh", "-c", "echo right"]).stdout == "right\n"


def test_a_program_may_write_no_more_than_the_limit(tmp_path: Path) -> None:
    with (tmp_path / "output").open("wb") as output, pytest.raises(ProcessError) as caught:
        # It waits, so that the limit is there before its first byte.
        run(["sh", "-c", "sleep 0.2; exec cat /dev/zero"], stdout=output, file_limit=5000, timeout=20)
    assert caught.value.status == -signal.SIGXFSZ
    assert (tmp_path / "output").stat().st_size == 5000
