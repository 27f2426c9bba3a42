"""The manifest: which image a node boots and where it is, as signed text; lib/anchor-manifest.sh reads it on the node.

Lines of `key value`, the first one `anchor-manifest 1`, the last one `signature BASE64` over all bytes before it. The
keys are described in doc/images.md. Both halves accept and refuse the same (tests/vectors/manifest.json).
"""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from anchor_build.errors import AnchorError, ProcessError, UsageError
from anchor_build.paramtypes import InvalidValueError, check_value
from anchor_build.run import run, run_at_terminal

MAGIC = "anchor-manifest"
VERSION = 1
MAX_BYTES = 65536
SUFFIX = ".manifest"

LINE = re.compile(r"[ -~]+")
RELEASE = re.compile(r"[A-Za-z0-9._+~-]+")
BASE64 = re.compile(r"[A-Za-z0-9+/=]+")
PUBLIC_KEY = re.compile(r"-----BEGIN PUBLIC KEY-----\n.*?\n-----END PUBLIC KEY-----\n?", re.DOTALL)
# key -> its type and the type's options; each may be there once.
SINGLE: dict[str, tuple[str, dict[str, object]]] = {
    "image": ("name", {}),
    "format": ("name", {}),
    "file": ("name", {}),
    "sha256": ("sha256", {}),
    "size": ("int", {"min": 1}),
    "unpacked": ("int", {"min": 0}),
    "created": ("int", {"min": 0}),
    "expires": ("int", {"min": 0}),
}
REQUIRED = ("image", "sha256", "size", "created")
MIN_RSA_BITS = 2048


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: sizes in bytes, times in seconds since the epoch; None where it says nothing."""

    image: str
    sha256: str
    size: int
    created: int
    format: str = ""
    file: str = ""
    unpacked: int | None = None
    expires: int | None = None
    mirrors: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = field(default=())


def manifest_text(manifest: Manifest) -> str:
    """Return the text of a manifest without a signature."""
    lines: list[tuple[str, object]] = [
        (MAGIC, VERSION),
        ("image", manifest.image),
        ("format", manifest.format),
        ("file", manifest.file),
        ("sha256", manifest.sha256),
        ("size", manifest.size),
        ("unpacked", manifest.unpacked),
        ("created", manifest.created),
        ("expires", manifest.expires),
        *(("kernel", release) for release in manifest.kernels),
        *(("mirror", url) for url in manifest.mirrors),
        *(("peer", url) for url in manifest.peers),
        *manifest.notes,
    ]
    text = "".join(f"{key} {value}\n" for key, value in lines if value not in (None, ""))
    parse_manifest(text.encode())
    return text


def split_manifest(data: bytes) -> tuple[bytes, bytes]:
    """Return the bytes that the signature covers, and the signature (empty for an unsigned manifest).

    Raises AnchorError for what is no manifest at all.
    """
    if len(data) > MAX_BYTES:
        raise _refuse(f"it has {len(data)} bytes, and {MAX_BYTES} are allowed")
    if data and not data.endswith(b"\n"):
        raise _refuse("its last line has no end: it was cut off")
    lines = data.decode("latin-1").split("\n")[:-1]
    if not all(LINE.fullmatch(line) for line in lines):
        raise _refuse("it has a line that is not printable ASCII")
    signed = [n for n, line in enumerate(lines) if line.startswith("signature ")]
    if not signed:
        return data, b""
    if signed[0] != len(lines) - 1:
        raise _refuse("something follows its signature")
    value = lines[-1].removeprefix("signature ")
    try:
        signature = base64.b64decode(value, validate=True)
    except binascii.Error:
        signature = b""
    if not signature or not BASE64.fullmatch(value):
        raise _refuse("its signature is not base64")
    return data[: len(data) - len(lines[-1]) - 1], signature


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest, whoever signed it; raises AnchorError with the line and the reason."""
    body, _ = split_manifest(data)
    lines = body.decode("ascii").split("\n")[:-1]
    if not lines or lines[0] != f"{MAGIC} {VERSION}":
        newer = lines and lines[0].startswith(f"{MAGIC} ")
        raise _refuse("its format is newer" if newer else f'it does not begin with "{MAGIC} {VERSION}"')
    single: dict[str, str] = {}
    many: dict[str, list[str]] = {"mirror": [], "peer": [], "kernel": []}
    notes = []
    for number, line in enumerate(lines[1:], start=2):
        key, _, value = line.partition(" ")
        try:
            if key in single:
                raise InvalidValueError("is there twice")
            if key in SINGLE:
                single[key] = check_value(SINGLE[key][0], value, SINGLE[key][1])
            elif key in many:
                if key == "kernel" and not RELEASE.fullmatch(value):
                    raise InvalidValueError("is not a kernel release")
                many[key].append(value if key == "kernel" else check_value("url", value, {}))
            elif key.startswith("x-") and key != "x-":
                notes.append((key, value))
            else:
                raise InvalidValueError("is not a known key")
        except InvalidValueError as error:
            raise _refuse(f"line {number}: {key} {error}") from None
    for key in REQUIRED:
        if key not in single:
            raise _refuse(f"it has no {key}")
    return Manifest(
        image=single["image"],
        sha256=single["sha256"],
        size=int(single["size"]),
        created=int(single["created"]),
        format=single.get("format", ""),
        file=single.get("file", ""),
        unpacked=int(single["unpacked"]) if "unpacked" in single else None,
        expires=int(single["expires"]) if "expires" in single else None,
        mirrors=tuple(many["mirror"]),
        peers=tuple(many["peer"]),
        kernels=tuple(many["kernel"]),
        notes=tuple(notes),
    )


def _refuse(reason: str) -> AnchorError:
    return AnchorError(f"not a manifest: {reason}")


def read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """Read a manifest's file; return what it says and its bytes. Raises AnchorError with the file's name."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return parse_manifest(data), data
    except OSError as error:
        raise AnchorError(f"{path}: {error.strerror}") from None
    except AnchorError as error:
        raise AnchorError(f"{path}: {error.message}", "`anchor-build image` makes manifests") from None


def read_since(text: str) -> int:
    """Return the seconds since the epoch that --manifest-since means: a number, a date or a manifest's creation.

    Raises UsageError for what is neither.
    """
    if re.fullmatch(r"[0-9]{1,12}", text):
        return int(text)
    if Path(text).is_file():
        return read_manifest(Path(text))[0].created
    try:
        time = datetime.fromisoformat(text)
        return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())
    except ValueError:
        raise UsageError(
            f"--manifest-since {text}: is neither a time nor the file of a manifest",
            "write it as 2026-01-31T12:00:00Z (UTC where no zone is given), or as seconds since the epoch",
        ) from None


def sign_text(text: str, key: str, pass_file: Path | None = None) -> str:
    """Return `text` with a line that holds its signature, made by openssl.

    `key` is the file of a private key, ECDSA P-256 or RSA, or a PKCS#11 URI (RFC 7512), for which openssl's engine
    `pkcs11` is used. openssl asks for a passphrase or PIN at the terminal, or reads it from `pass_file`. Raises
    AnchorError.
    """
    with tempfile.TemporaryDirectory(prefix="anchor-sign-") as name:
        body, signature = Path(name, "body"), Path(name, "signature")
        body.write_text(text, encoding="ascii")
        argv: list[str | Path] = ["openssl", "dgst", "-sha256", *_key_arguments(key)]
        if pass_file is not None:
            argv += ["-passin", f"file:{pass_file}"]
        # The key is read by openssl alone.
        done = run_at_terminal([*argv, "-out", signature, body])
        data = signature.read_bytes() if done.status == 0 and signature.exists() else b""
        if not data:
            raise ProcessError(done.argv, done.status, done.stderr[-2000:], _sign_hint(done.stderr, pass_file))
    return f"{text}signature {base64.b64encode(data).decode()}\n"


def _key_arguments(key: str) -> list[str]:
    if not key.startswith("pkcs11:"):
        if not Path(key).is_file():
            raise AnchorError(f"--sign-key {key}: there is no such file")
        return ["-sign", key]
    if "pin-value=" in key:
        raise AnchorError(
            "--sign-key: the URI holds a PIN, and every process can read arguments",
            "leave pin-value out, and give the PIN with --sign-pass-file or at the terminal",
        )
    return ["-engine", "pkcs11", "-keyform", "engine", "-sign", key]


def _sign_hint(output: str, pass_file: Path | None) -> str:
    if "invalid engine" in output or "could not load the shared library" in output:
        return "install openssl's PKCS#11 engine: libengine-pkcs11-openssl (deb) or openssl-pkcs11 (rpm)"
    if "setting context" in output or "not supported for this operation" in output:
        return "the key has to be ECDSA P-256 or RSA"
    if pass_file is None:
        return "is it a private key, in PEM? For a passphrase without a terminal there is --sign-pass-file"
    return "is it a private key, in PEM, and is the passphrase right?"


@dataclass(frozen=True)
class PublicKey:
    """One public key in PEM, and its fingerprint: the SHA-256 of its DER form, as nodes report it."""

    pem: str
    fingerprint: str


def read_public_keys(paths: Sequence[Path]) -> tuple[PublicKey, ...]:
    """Read the keys that nodes are to believe: public keys in PEM, one or more to a file.

    Raises AnchorError for a private key, for what openssl cannot read, and for keys that are too weak.
    """
    found: list[PublicKey] = []
    for path in paths:
        try:
            text = path.read_text(encoding="ascii")
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
        found += [_public_key(block.rstrip("\n") + "\n", path) for block in blocks]
    return tuple(dict.fromkeys(found))


def _public_key(pem: str, path: Path) -> PublicKey:
    import hashlib

    done = run(["openssl", "pkey", "-pubin", "-noout", "-text"], input_text=pem, check=False)
    if done.status != 0:
        raise AnchorError(f"--manifest-key {path}: openssl cannot read it", "is it whole?")
    bits = re.search(r"RSA Public-Key: \((\d+) bit|^Public-Key: \((\d+) bit", done.stdout, re.MULTILINE)
    size = int(bits[1] or bits[2]) if bits else 0
    is_rsa = "Modulus:" in done.stdout
    if not ("P-256" in done.stdout or (is_rsa and size >= MIN_RSA_BITS)):
        raise AnchorError(
            f"--manifest-key {path}: is neither ECDSA P-256 nor RSA of at least {MIN_RSA_BITS} bits",
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 makes a key pair",
        )
    der = base64.b64decode("".join(pem.splitlines()[1:-1]))
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
