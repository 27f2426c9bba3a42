"""Signatures of manifests: real openssl, keys in files and in a PKCS#11 token."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.manifest import manifest_text, parse_manifest, read_public_keys, sign_text, verify_signature
from tests.unit.test_manifest import MANIFEST


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def make_key(top: Path, name: str, *options: str) -> tuple[str, Path]:
    key, public = top / f"{name}.key", top / f"{name}.pub"
    openssl("genpkey", *(options or ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")), "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    return str(key), public


RSA = ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")


@pytest.mark.parametrize("options", [(), RSA], ids=["ecdsa", "rsa"])
def test_a_signature_is_made_and_verified(tmp_path: Path, options: tuple[str, ...]) -> None:
    key, public = make_key(tmp_path, "k", *options)
    text = manifest_text(MANIFEST)
    signed = sign_text(text, key)
    assert signed.startswith(text + "signature ")
    assert parse_manifest(signed.encode()) == MANIFEST
    (mine,) = read_public_keys([public])
    assert verify_signature(signed.encode(), [mine]) == mine
    other = read_public_keys([make_key(tmp_path, "other")[1]])
    assert verify_signature(signed.encode(), [*other, mine]) == mine, "any of several keys counts"
    for wrong in (signed.replace("size 5", "size 6"), signed.replace("x-note text\n", "")):
        with pytest.raises(AnchorError, match="none of the given keys signed"):
            verify_signature(wrong.encode(), [mine])
    with pytest.raises(AnchorError, match="none of the given keys signed"):
        verify_signature(signed.encode(), other)
    with pytest.raises(AnchorError, match="is not signed"):
        verify_signature(text.encode(), [mine])


def test_a_passphrase_comes_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("secret 1\n")
    key, public = make_key(tmp_path, "plain")
    openssl("pkey", "-in", key, "-aes256", "-passout", f"file:{tmp_path}/pass", "-out", tmp_path / "k")
    signed = sign_text("anchor-manifest 1\n", str(tmp_path / "k"), tmp_path / "pass")
    assert verify_signature(signed.encode(), read_public_keys([public]))
    (tmp_path / "wrong").write_text("other\n")
    with pytest.raises(ProcessError) as caught:
        sign_text("text\n", str(tmp_path / "k"), tmp_path / "wrong")
    assert "passphrase" in caught.value.hint
    assert "other" not in caught.value.message


def test_openssl_asks_for_a_passphrase_at_the_terminal(tmp_path: Path) -> None:
    key, _ = make_key(tmp_path, "plain")
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret1", "-out", tmp_path / "k")
    script = f"from anchor_build.manifest import sign_text; print(sign_text('x\\n', {str(tmp_path / 'k')!r}))"
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script])  # noqa: S606 - pty.fork() leaves the start to us
    said = b""
    while b"pass phrase" not in said:
        said += os.read(terminal, 1000)
    while termios.tcgetattr(terminal)[3] & termios.ECHO:
        time.sleep(0.01)
    os.write(terminal, b"secret1\n")
    try:
        while part := os.read(terminal, 1000):
            said += part
    except OSError:
        pass  # the terminal of a process that has ended
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said
    assert b"signature M" in said
    assert b"secret1" not in said


def test_a_key_that_cannot_sign_is_explained(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="there is no such file"):
        sign_text("x\n", str(tmp_path / "none"))
    key, _ = make_key(tmp_path, "ed", "-algorithm", "ED25519")
    with pytest.raises(ProcessError) as caught:
        sign_text("x\n", key)
    assert "ECDSA P-256 or RSA" in caught.value.hint
    (tmp_path / "garbage").write_text("no key\n")
    with pytest.raises(ProcessError) as caught:
        sign_text("x\n", str(tmp_path / "garbage"))
    assert "private key, in PEM" in caught.value.hint
    with pytest.raises(AnchorError, match="holds a PIN"):
        sign_text("x\n", "pkcs11:token=t;object=o?pin-value=1234")


def test_public_keys_are_looked_at(tmp_path: Path) -> None:
    key, public = make_key(tmp_path, "k")
    with pytest.raises(AnchorError, match="holds a private key") as caught:
        read_public_keys([Path(key)])
    assert "-pubout" in caught.value.hint
    for name, options in {
        "weak": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
        "ed": ("-algorithm", "ED25519"),
    }.items():
        with pytest.raises(AnchorError, match=r"neither ECDSA P-256 nor RSA"):
            read_public_keys([make_key(tmp_path, name, *options)[1]])
    (tmp_path / "both").write_text("rotation\n" + public.read_text() + make_key(tmp_path, "next")[1].read_text())
    two = read_public_keys([tmp_path / "both", public])
    assert len(two) == 2, "the same key twice counts once"
    (tmp_path / "cut").write_text(public.read_text()[:80] + "\n-----END PUBLIC KEY-----\n")
    with pytest.raises(AnchorError, match="cannot read it"):
        read_public_keys([tmp_path / "cut"])
    (tmp_path / "none").write_bytes(b"\xff\n")
    with pytest.raises(AnchorError, match="holds no public key"):
        read_public_keys([tmp_path / "none"])
    with pytest.raises(AnchorError, match="No such file"):
        read_public_keys([tmp_path / "away"])


@pytest.mark.skipif(shutil.which("softhsm2-util") is None, reason="softhsm2-util is missing")
def test_a_key_in_a_token_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "conf").write_text(f"directories.tokendir = {tmp_path}/tokens\nlog.level = ERROR\n")
    (tmp_path / "pin").write_text("1234\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "conf"))
    key, public = make_key(tmp_path, "k")
    for words in (
        ("--init-token", "--free", "--label", "site", "--so-pin", "5678", "--pin", "1234"),
        ("--import", key, "--token", "site", "--label", "manifest", "--id", "01", "--pin", "1234"),
    ):
        subprocess.run(["softhsm2-util", *words], check=True, capture_output=True, timeout=60)
    uri = "pkcs11:token=site;object=manifest;type=private"
    signed = sign_text(manifest_text(MANIFEST), uri, tmp_path / "pin")
    assert verify_signature(signed.encode(), read_public_keys([public]))
    (tmp_path / "pin").write_text("0000\n")
    with pytest.raises(ProcessError):
        sign_text("x\n", uri, tmp_path / "pin")
