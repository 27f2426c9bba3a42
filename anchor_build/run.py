"""The one module that starts processes: argument lists, never a shell, stdin closed, a fixed locale."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from anchor_build.errors import AnchorError, ProcessError

TAIL_LINES = 30
# Distributions keep administrators' programs out of a user's PATH; dracut and its tools live there.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Completed:
    """A finished process: its exit status and what it wrote."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


def which(program: str) -> Path | None:
    """Find `program` on the caller's PATH, then in the system's own directories."""
    found = shutil.which(program, path=_search_path())
    return Path(found) if found else None


def _search_path() -> str:
    # An empty PATH must not come to mean the current directory.
    return f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}".lstrip(":")


def _is_passed_on(key: str) -> bool:
    return (key.isupper() and not key.startswith("LC_")) or key.endswith("_proxy")


def environment(extra: Mapping[str, str] | None = None, *, only: bool = False) -> dict[str, str]:
    """Return the environment of a child: ours, with a locale that keeps messages and sorting stable; or `extra` only.

    Variables in lower case, but for http_proxy and its like, stay behind: dracut takes settings such as
    kernel_cmdline and omit_drivers from them.
    """
    if only:
        return dict(extra or {})
    env = {key: value for key, value in os.environ.items() if _is_passed_on(key)}
    env.pop("LANGUAGE", None)
    env["LC_ALL"] = "C.UTF-8"
    env["PATH"] = _search_path()
    env.update(extra or {})
    return env


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    only_env: bool = False,
    cwd: Path | None = None,
    input_text: str | None = None,
    log: Path | None = None,
    stdout: IO[bytes] | None = None,
    check: bool = True,
    timeout: float | None = None,
    hint: str = "",
    umask: int = -1,
    file_limit: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Completed:
    """Run a program to its end and return what it wrote.

    Standard input is empty, or `input_text`. With `log`, standard output and error go to that file together (and
    `stdout` is its text); with `stdout`, standard output goes to that open file and is not returned. The child has its
    own process group, which is ended when `timeout` (seconds) passes or the caller is interrupted.

    `env` is added to our environment, or with `only_env` takes its place.

    A `umask` replaces the caller's. A child that writes a file larger than `file_limit` bytes is killed. `watch` gets
    its process id.

    Raises ProcessError when `check` is set and the status is not 0, and AnchorError when the program is
    missing or the time is up.
    """
    words = [str(word) for word in argv]
    child = start(
        words,
        env=env,
        only_env=only_env,
        cwd=cwd,
        log=log,
        stdin=subprocess.PIPE if input_text is not None else subprocess.DEVNULL,
        stdout=stdout,
        umask=umask,
    )
    if watch is not None:
        watch(child.pid)
    if file_limit is not None:
        with suppress(ProcessLookupError):  # it has ended already
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        out, err = child.communicate(input_text, timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(child)
        raise AnchorError(f"{words[0]} did not finish within {timeout:g} s", hint) from None
    except BaseException:
        stop(child)
        raise
    if log is not None:
        out = log.read_text(encoding="utf-8", errors="replace")
    if check and child.returncode != 0:
        tail = "\n".join(((out or "") + (err or "")).splitlines()[-TAIL_LINES:])
        raise ProcessError(words, child.returncode, tail, hint)
    return Completed(tuple(words), child.returncode, out or "", err or "")


def start(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    only_env: bool = False,
    cwd: Path | None = None,
    log: Path | None = None,
    stdin: IO[bytes] | int = subprocess.DEVNULL,
    stdout: IO[bytes] | None = None,
    umask: int = -1,
    tied: bool = False,
) -> subprocess.Popen[str]:
    """Start a program in a process group of its own; the caller waits for it or ends it with `stop`.

    A `tied` one also ends when the thread that started it does, even if that is killed (prctl's PR_SET_PDEATHSIG,
    by util-linux's setpriv, which the program takes the place of); where there is no setpriv it is not.

    Raises AnchorError when the program cannot be started.
    """
    words = [str(word) for word in argv]
    if tied and which(words[0]) and (setpriv := which("setpriv")):
        words = [str(setpriv), "--pdeathsig", "TERM", "--", *words]
    sink = log.open("wb") if log is not None else None
    try:
        return subprocess.Popen(
            words,
            env=environment(env, only=only_env),
            cwd=cwd,
            stdin=stdin,
            stdout=sink or stdout or subprocess.PIPE,
            stderr=subprocess.STDOUT if sink is not None else subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            umask=umask,
        )
    except FileNotFoundError:
        raise AnchorError(
            f"{words[0]}: program not found", "`anchor-build doctor` names the package that has it"
        ) from None
    except PermissionError:
        raise AnchorError(f"{words[0]}: may not be executed") from None
    except OSError as error:
        raise AnchorError(f"{words[0]}: cannot be started: {error.strerror}") from None
    finally:
        if sink is not None:
            sink.close()


def stop(child: subprocess.Popen[str], grace: float = 5.0) -> None:
    """End a process started by `start` together with its children: politely, then after `grace` seconds not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(timeout=grace)
            break
        except subprocess.TimeoutExpired:
            continue
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            stream.close()
    if child.poll() is None:
        child.wait(timeout=grace)
