"""Signatures of manifests, made and verified by openssl: ECDSA P-256 or RSA, over SHA-256."""

from __future__ import annotations

import base64
import binascii
import getpass
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import read_bounded
from anchor_build.manifest import split_manifest
from anchor_build.run import Completed, run

PUBLIC_KEY = re.compile(r"-----BEGIN PUBLIC KEY-----\n.*?\n-----END PUBLIC KEY-----\n?", re.DOTALL)
# What an encrypted private key has in its first lines: PKCS #8 (RFC 7468) and openssl's older form (RFC 1421).
ENCRYPTED = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")
MIN_RSA_BITS = 2048
MAKE_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 makes a key pair"
# A token that waits for somebody's finger or PIN pad.
SIGN_TIMEOUT = 300.0


@dataclass(frozen=True)
class PublicKey:
    """One public key in PEM, and its fingerprint: the SHA-256 of its DER form, as nodes report it."""

    pem: str
    fingerprint: str


@dataclass(frozen=True)
class SigningKey:
    """A private key that has been tried: a file or a PKCS#11 URI, its passphrase or PIN if any, its public half."""

    name: str
    secret: str | None = field(repr=False)
    public: PublicKey


def open_key(name: str, pass_file: Path | None = None) -> SigningKey:
    """Return a key that can sign, after it has signed something.

    `name` is the file of a private key in PEM, or a PKCS#11 URI (RFC 7512), for which openssl's engine `pkcs11` is
    used. Its passphrase or PIN is the first line of `pass_file`; without one it is asked for at the terminal, once.

    Raises AnchorError for a key that is not there, that openssl cannot use, or that nodes would not take.
    """
    secret = _secret(name, pass_file)
    done = _openssl(["pkey", *_key_options(name, "-in"), "-pubout"], secret)
    found = PUBLIC_KEY.search(done.stdout)
    if done.status != 0 or found is None:
        raise _failure(done, secret)
    key = SigningKey(name, secret, _public_key(found[0], f"--sign-key {name}"))
    sign_text("", key)
    return key


def _key_options(name: str, option: str) -> list[str]:
    """Return how a key is named to openssl: `pkey` takes the kind of key with -inform, `dgst` with -keyform."""
    if not name.startswith("pkcs11:"):
        return [option, name]
    return ["-engine", "pkcs11", "-inform" if option == "-in" else "-keyform", "engine", option, name]


def _secret(name: str, pass_file: Path | None) -> str | None:
    """Return the passphrase or PIN, None where there is none."""
    token = name.startswith("pkcs11:")
    if token and "pin-value=" in name:
        raise AnchorError(
            "--sign-key: the URI holds a PIN, and every process can read arguments",
            "leave pin-value out, and give the PIN with --sign-pass-file or at the terminal",
        )
    if not token and not Path(name).is_file():
        raise AnchorError(f"--sign-key {name}: there is no such file")
    try:
        if pass_file is not None:
            return read_bounded(pass_file).decode("utf-8").partition("\n")[0].rstrip("\r")
        encrypted = not token and any(mark in read_bounded(Path(name))[:4096] for mark in ENCRYPTED)
    except OSError as error:
        raise AnchorError(f"{error.filename}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AnchorError(f"--sign-pass-file {pass_file}: is not text in UTF-8") from None
    if not (token or encrypted) or "pin-source=" in name:
        return None
    if not _at_terminal():
        if token:
            return None  # it may be one that needs no PIN
        raise AnchorError(
            f"--sign-key {name}: has a passphrase, and there is no terminal to ask for it", "give --sign-pass-file FILE"
        )
    # Asked here and not by openssl, which is started several times and would ask each time.
    asked = getpass.getpass(f"PIN of {name} (empty for none): " if token else f"Passphrase of {name}: ")
    return None if token and not asked else asked


def _at_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _openssl(words: Sequence[str | Path], secret: str | None) -> Completed:
    """Run openssl with a key; it has no terminal, so that it asks nobody."""
    command, *options = words
    passed = ["-passin", "stdin"] if secret is not None else []
    input_text = None if secret is None else f"{secret}\n"
    return run(["openssl", command, *passed, *options], input_text=input_text, check=False, timeout=SIGN_TIMEOUT)


def sign_text(text: str, key: SigningKey) -> str:
    """Return `text`, which is ASCII, with a line that holds its signature. Raises AnchorError when openssl fails."""
    with tempfile.TemporaryDirectory(prefix="anchor-sign-") as name:
        body, signature = Path(name, "body"), Path(name, "signature")
        body.write_text(text, encoding="ascii")
        words: list[str | Path] = ["dgst", "-sha256", *_key_options(key.name, "-sign"), "-out", signature, body]
        done = _openssl(words, key.secret)
        data = signature.read_bytes() if done.status == 0 and signature.exists() else b""
    if not data:
        raise _failure(done, key.secret)
    signed = f"{text}signature {base64.b64encode(data).decode()}\n"
    verify_signature(signed.encode(), [key.public])
    return signed


def trust_warnings(*, signed: bool, ends: bool) -> list[str]:
    """Return what to say of a manifest that is not signed, or is for ever."""
    if not signed:
        return ["the manifest is not signed (--sign-key): only the server vouches for it"]
    return [] if ends else ["the manifest does not expire (--valid-for): whoever keeps it can serve it for ever"]


def _failure(done: Completed, secret: str | None) -> ProcessError:
    return ProcessError(done.argv, done.status, done.stderr[-2000:], _hint(done.stderr, secret))


def _hint(output: str, secret: str | None) -> str:
    """Return what to do about what openssl said, in the words of openssl 1.1 and 3 and of its engine."""
    if not output or "is not a valid PKCS#11 URI" in output:
        return "is it pkcs11:token=...;object=...? openssl's PKCS#11 engine crashes at a URI that is none"
    if "invalid engine" in output or "could not load the shared library" in output:
        return "install openssl's PKCS#11 engine: libengine-pkcs11-openssl (deb) or openssl-pkcs11 (rpm)"
    if "PIN incorrect" in output or "PIN locked" in output:
        return "is the PIN right? Most tokens are locked after a few wrong ones"
    if "No PIN code was entered" in output:
        return "the token wants its PIN: give --sign-pass-file FILE, or start it at a terminal"
    if "No matching initialized token" in output or "object not found" in output:
        return "`pkcs11-tool --list-objects --login` shows what the token holds"
    if "setting context" in output or "not supported for this operation" in output:
        return f"the key has to be ECDSA P-256, or RSA of at least {MIN_RSA_BITS} bits"
    return "is it a private key, in PEM" + ("?" if secret is None else ", and is the passphrase right?")


def read_public_keys(paths: Sequence[Path]) -> tuple[PublicKey, ...]:
    """Read the keys that nodes are to believe: public keys in PEM, one or more to a file.

    Raises AnchorError for a private key, for what openssl cannot read, and for keys that are too weak.
    """
    found: list[PublicKey] = []
    for path in paths:
        try:
            text = read_bounded(path).decode("ascii")
        except OSError as error:
            raise AnchorError(f"--manifest-key {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            text = ""
        if "PRIVATE KEY-----" in text:
            raise AnchorError(
                f"--manifest-key {path}: holds a private key",
                "nodes need its public half: openssl pkey -in KEY -pubout -out manifest.pub",
            )
        blocks = PUBLIC_KEY.findall(text)
        if not blocks:
            raise AnchorError(f"--manifest-key {path}: holds no public key in PEM form")
        found += [_public_key(block, f"--manifest-key {path}") for block in blocks]
    return tuple(dict.fromkeys(found))


def _public_key(text: str, what: str) -> PublicKey:
    pem = text.rstrip("\n") + "\n"
    done = run(["openssl", "pkey", "-pubin", "-noout", "-text"], input_text=pem, check=False)
    try:
        der = base64.b64decode("".join(pem.splitlines()[1:-1]))
    except binascii.Error:
        der = b""
    if done.status != 0 or not der:
        raise AnchorError(f"{what}: openssl cannot read it", "is it whole?")
    bits = re.search(r"Public-Key: \((\d+) bit", done.stdout)
    size = int(bits[1]) if bits else 0
    is_rsa = "Modulus:" in done.stdout
    if not ("P-256" in done.stdout or (is_rsa and size >= MIN_RSA_BITS)):
        raise AnchorError(f"{what}: is neither ECDSA P-256 nor RSA of at least {MIN_RSA_BITS} bits", MAKE_KEY)
    return PublicKey(pem, hashlib.sha256(der).hexdigest())


def verify_signature(data: bytes, keys: Sequence[PublicKey]) -> PublicKey:
    """Return the key that signed a manifest; raises AnchorError when there is none, or no signature."""
    body, signature = split_manifest(data)
    if not signature:
        raise AnchorError("the manifest is not signed", "sign it: anchor-build image --sign-key KEY")
    with tempfile.TemporaryDirectory(prefix="anchor-verify-") as name:
        work = Path(name)
        (work / "body").write_bytes(body)
        (work / "signature").write_bytes(signature)
        for key in keys:
            (work / "key").write_text(key.pem, encoding="ascii")
            argv = ["openssl", "dgst", "-sha256", "-verify", f"{work}/key", "-signature", f"{work}/signature"]
            argv.append(f"{work}/body")
            if run(argv, check=False).status == 0:
                return key
    raise AnchorError(
        "none of the given keys signed the manifest", "is --manifest-key the public half of the key that signs?"
    )
