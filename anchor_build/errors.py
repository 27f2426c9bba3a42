"""The errors that a user can cause or mend; every other exception is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence


class AnchorError(Exception):
    """An expected failure: what failed and where, and what to do about it.

    `exit_status` is what the command line exits with: 1, or 2 for wrong usage.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(AnchorError):
    """The request itself is wrong: an unknown stage, a misspelt parameter, options that exclude each other."""

    exit_status = 2


class InvalidFilesError(AnchorError):
    """Every problem found in the user's files at once, each as ``file: key: reason``."""

    def __init__(self, problems: Sequence[str], hint: str = "") -> None:
        super().__init__("\n".join(problems), hint)
        self.problems = tuple(problems)


class ProcessError(AnchorError):
    """A child process failed: its command, its status and the end of its output."""

    def __init__(self, argv: Sequence[str], status: int, tail: str, hint: str = "") -> None:
        import shlex

        outcome = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        text = f"{argv[0]} {outcome}\n  command: {shlex.join(argv)}"
        if tail:
            text += "\n" + "\n".join(f"  | {line}" for line in tail.splitlines())
        super().__init__(text, hint)
        self.argv = tuple(argv)
        self.status = status
        self.tail = tail
