"""Join tokens on disk: each is one file, named by the token's digest, so that a copy of the store gives no token away.

What happened to a token is written whole and renamed into place before anybody is told, so a server that is killed
forgets nothing. One server works on a store at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Token:
    """What the store knows of a token: times in seconds since 1970; `key` and `answer` once it has been used.

    `key` is the digest of the public key that it was used with, `s3` an optional file of S3 credentials.
    """

    name: str
    expires: float
    s3: str = ""
    key: str = ""
    used: float = 0.0
    answer: str = ""


def issue(directory: Path, name: str, lifetime_s: float, s3: str = "") -> str:
    """Make a token of 256 random bits for a node's name, and return it: nobody can read it later."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = secrets.token_urlsafe(32)
    save(directory, text, Token(name, time.time() + lifetime_s, s3))
    return text


def load(directory: Path, text: str) -> Token | None:
    """Return what is known of a token, or None; raises OSError and ValueError when that cannot be read."""
    try:
        return Token(**json.loads(_file(directory, text).read_text(encoding="utf-8")))
    except FileNotFoundError:
        # Without the directory nobody can say which tokens there are.
        directory.stat()
        return None
    except TypeError as error:
        raise ValueError(f"{_file(directory, text)}: {error}") from None


def save(directory: Path, text: str, token: Token) -> None:
    """Write a token down, whole or not at all, for this user only."""
    file = _file(directory, text)
    beside = file.with_suffix(".new")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        json.dump(asdict(token), out)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(file)


def used(token: Token, key: str, answer: str) -> Token:
    """Return the token after its use with a key."""
    return replace(token, key=key, used=time.time(), answer=answer)


def _file(directory: Path, text: str) -> Path:
    return directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
