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
from anchor_build.manifest import manifest_text, parse_manifest
from anchor_build.signing import open_key, read_public_keys, sign_text, verify_signature
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
    signed = sign_text(text, open_key(key))
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
    signed = sign_text("anchor-manifest 1\n", open_key(str(tmp_path / "k"), tmp_path / "pass"))
    assert verify_signature(signed.encode(), read_public_keys([public]))
    (tmp_path / "wrong").write_text("other\n")
    with pytest.raises(ProcessError) as caught:
        open_key(str(tmp_path / "k"), tmp_path / "wrong")
    assert "passphrase" in caught.value.hint
    assert "other" not in caught.value.message
    (tmp_path / "wrong").write_bytes(b"\xff\n")
    with pytest.raises(AnchorError, match="is not text in UTF-8"):
        open_key(str(tmp_path / "k"), tmp_path / "wrong")
    with pytest.raises(AnchorError, match="absent: No such file"):
        open_key(str(tmp_path / "k"), tmp_path / "absent")


def at_a_terminal(argv: list[str], answer: str) -> tuple[int, str]:
    """Run a command at a terminal, and type `answer` when it asks; return its status and what the terminal showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(argv[0], argv)  # noqa: S606 - pty.fork() leaves the start to us
    said = b""
    while b"Passphrase of" not in said:
        said += os.read(terminal, 1000)
    while termios.tcgetattr(terminal)[3] & termios.ECHO:
        time.sleep(0.01)
    os.write(terminal, f"{answer}\n".encode())
    try:
        while part := os.read(terminal, 1000):
            said += part
    except OSError:
        pass  # the terminal of a process that has ended
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()


def test_a_passphrase_is_asked_for_once_and_before_the_work(tmp_path: Path) -> None:
    key, _ = make_key(tmp_path, "plain")
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret1", "-out", tmp_path / "k")
    image = tmp_path / "node.squashfs"
    image.write_bytes(b"hsqs".ljust(40, b"\0") + (96).to_bytes(8, "little") + bytes(4048))  # 96 bytes are used
    argv = [sys.executable, "-m", "anchor_build", "image", str(image), "--sign-key", str(tmp_path / "k")]
    status, said = at_a_terminal(argv, "secret1")
    assert status == 0, said
    assert said.count("Passphrase of") == 1
    assert said.index("Passphrase of") < said.index("take the digest")
    assert "secret1" not in said
    assert "signature M" in (tmp_path / "node.squashfs.manifest").read_text()
    status, said = at_a_terminal(argv, "other")
    assert (status, "is the passphrase right?" in said) == (1, True), said


def test_without_a_terminal_nobody_is_asked(tmp_path: Path) -> None:
    key, _ = make_key(tmp_path, "plain")
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret1", "-out", tmp_path / "k")
    script = f"from anchor_build.signing import open_key; open_key({str(tmp_path / 'k')!r})"
    reader, writer = os.pipe()  # an input that says nothing and does not end
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stdin=reader,
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 1
    assert "has a passphrase, and there is no terminal to ask for it" in done.stderr


def test_a_key_that_cannot_sign_is_explained(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match="there is no such file"):
        open_key(str(tmp_path / "none"))
    (tmp_path / "garbage").write_text("no key\n")
    with pytest.raises(ProcessError) as caught:
        open_key(str(tmp_path / "garbage"))
    assert "private key, in PEM" in caught.value.hint
    with pytest.raises(AnchorError, match="holds a PIN"):
        open_key("pkcs11:token=t;object=o?pin-value=1234")


REFUSED = {
    "weak": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
    "p384": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
    "ed": ("-algorithm", "ED25519"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_nodes_do_not_take_are_refused(tmp_path: Path, name: str) -> None:
    key, public = make_key(tmp_path, name, *REFUSED[name])
    with pytest.raises(AnchorError, match=f"--sign-key {key}: is neither ECDSA P-256 nor RSA of at least 2048 bits"):
        open_key(key)
    with pytest.raises(AnchorError, match=f"--manifest-key {public}: is neither ECDSA P-256 nor RSA of at least 2048"):
        read_public_keys([public])


def test_public_keys_are_looked_at(tmp_path: Path) -> None:
    key, public = make_key(tmp_path, "k")
    with pytest.raises(AnchorError, match="holds a private key") as caught:
        read_public_keys([Path(key)])
    assert "-pubout" in caught.value.hint
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
    signed = sign_text(manifest_text(MANIFEST), open_key(uri, tmp_path / "pin"))
    assert verify_signature(signed.encode(), read_public_keys([public]))
    for pin, named, hint in (
        ("0000", uri, "is the PIN right"),
        ("1234", uri.replace("manifest", "absent"), "what the token holds"),
        ("1234", uri.replace("site", "absent"), "what the token holds"),
        ("1234", "pkcs11:site/manifest", "is it pkcs11:token="),
    ):
        (tmp_path / "pin").write_text(f"{pin}\n")
        with pytest.raises(ProcessError) as caught:
            open_key(named, tmp_path / "pin")
        assert hint in caught.value.hint
    monkeypatch.setattr("anchor_build.signing._at_terminal", lambda: False)
    with pytest.raises(ProcessError) as caught:
        open_key(uri)
    assert "--sign-pass-file" in caught.value.hint
