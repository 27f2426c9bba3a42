"""install-core.sh: what an initramfs of plain dracut takes from the host's /etc/anchor, and what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.shell.conftest import TOP

SCRIPT = """
derror() { printf '%s\\n' "$*"; }
. "$1"
check_site "$2"
"""
CERTIFICATE = "# the site's\n-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
PUBLIC = "-----BEGIN PUBLIC KEY-----\nMFkw\n-----END PUBLIC KEY-----\n"
PRIVATE = "-----BEGIN PRIVATE KEY-----\nMIGH\n-----END PRIVATE KEY-----\n"


def check(directory: Path, **files: str) -> list[str]:
    """Have `check_site` look at these files, by their names with - for _; return what it says."""
    for name, text in files.items():
        name = name.replace("_", "-").replace("-pem", ".pem").replace("-pub", ".pub")
        (directory / name).write_text(text, encoding="utf-8")
    # Of the module's files this one is bash, as dracut is.
    argv = ["bash", "-c", SCRIPT, "bash", str(TOP / "dracut-modules/anchor/install-core.sh"), str(directory)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode == (1 if done.stdout else 0)
    return [line.replace(f"anchor: {directory}/", "") for line in done.stdout.splitlines()]


def test_what_is_right_or_not_there(tmp_path: Path) -> None:
    assert check(tmp_path) == []
    right = {"ca_pem": CERTIFICATE * 2, "manifest_pub": PUBLIC, "build_time": "1790000000\n", "manifest_since": "0\n"}
    assert check(tmp_path, **right) == []


def test_everything_wrong_at_once(tmp_path: Path) -> None:
    wrong = {"ca_pem": "<html>", "manifest_pub": CERTIFICATE, "build_time": "", "manifest_since": "2026-11-21\n"}
    assert check(tmp_path, **wrong) == [
        "ca.pem: holds no certificate in PEM form",
        "manifest.pub: holds no public key in PEM form",
        "build-time: is not a number of seconds since the epoch",
        "manifest-since: is not a number of seconds since the epoch",
    ]


@pytest.mark.parametrize("name", ["ca_pem", "manifest_pub"])
def test_a_private_key_does_not_go_to_every_node(tmp_path: Path, name: str) -> None:
    [said] = check(tmp_path, **{name: CERTIFICATE + PUBLIC + PRIVATE})
    assert "holds a private key" in said
