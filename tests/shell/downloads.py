"""A node that downloads: the real download loop, with the transport that a test brings, and what came of it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.shell.conftest import Shell

DATA, OTHER = (hashlib.shake_256(seed).digest(3_000_000) for seed in (b"one", b"two"))
DIGEST, OTHER_DIGEST = (hashlib.sha256(data).hexdigest() for data in (DATA, OTHER))
# Of rd.anchor.fetch.*.
LIMITS = {"timeout": 20, "connect_timeout": 3, "stall": 3, "attempts": 4, "reserve": 1 << 20}


def loop(transport: str, schemes: Mapping[str, bool], *files: str) -> str:
    """Return shell text that loads the loop and `files`, which may name shell variables.

    `schemes` are those that `transport` carries, and whether they need a digest. `od` is where random numbers come
    from: 0 makes the waits as short as they can be. It is used for other things, too, with other options.
    """
    arms = "".join(f"{scheme}) anchor_transport_needs_digest={int(need)} ;; " for scheme, need in schemes.items())
    libraries = ("report", "mounts", "fetch", "fetch-mirrors", "fetch-digest", "fetch-room")
    sources = "".join(f'. "{file}"\n' for file in (*(f"$LIB/anchor-{name}.sh" for name in libraries), *files))
    return f"""{sources}
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10
anchor_stage_for_scheme() {{
    case $1 in {arms} *) return 1 ;; esac
    anchor_transport={transport}
}}
od() {{
    case $* in
        *urandom) printf '%s\\n' "${{RANDOM_NUMBER:-0}}" ;;
        *) command od "$@" ;;
    esac
}}
"""


def limits(changed: Mapping[str, int]) -> dict[str, str]:
    """Return the loop's parameters as the variables that the node's parser sets."""
    return {f"anchor_fetch_{name}": str(value) for name, value in {**LIMITS, **changed}.items()}


@dataclass(frozen=True)
class Downloader:
    """A node's root and shell."""

    shell: Shell

    @property
    def image(self) -> Path:
        """Where the download goes."""
        return self.shell.root / "run/anchor/image/node.squashfs"

    @property
    def credentials(self) -> Path:
        """What auth leaves."""
        return self.shell.root / "run/anchor/credentials"

    @property
    def rejected(self) -> bool:
        """Whether another try would get new credentials."""
        return self.credentials.with_name("credentials.rejected").exists()

    def make_directories(self) -> None:
        """Make what the core makes before a download."""
        for name in ("run/anchor/image", "run/anchor/steps/10", "run/anchor/credentials", "etc/anchor", "proc"):
            (self.shell.root / name).mkdir(parents=True)

    def attempts(self) -> int:
        """Return how many attempts the last download took."""
        return int((self.shell.root / "run/anchor/steps/10/number-attempts").read_text())

    def got(self, done: subprocess.CompletedProcess[str], data: bytes = DATA) -> bool:
        """Whether the download is whole, and nothing else lies about; shows what was said otherwise."""
        assert done.returncode == 0, done.stderr
        assert not list(self.image.parent.glob("*.fetch"))
        return self.image.read_bytes() == data

    def failed(self, done: subprocess.CompletedProcess[str], *messages: str, attempts: int | None = None) -> bool:
        """Whether the download failed, after so many attempts, with all of these on the console."""
        assert done.returncode == 1, done.stderr
        assert list(self.image.parent.iterdir()) == []
        assert [message for message in messages if message not in done.stderr] == [], done.stderr
        assert attempts is None or self.attempts() == attempts, done.stderr
        return True


def processes_of(root: Path) -> list[str]:
    """Return the command lines of all processes that were started for this node."""

    def found() -> Iterator[str]:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"ANCHOR_ROOT={root}\0".encode() in (process / "environ").read_bytes():
                    yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue

    return list(found())
