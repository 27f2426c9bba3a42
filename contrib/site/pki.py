"""Certificates for a site on one machine, made with openssl: EC P-256, PEM, keys for their owner only."""

from __future__ import annotations

import ipaddress
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build.errors import UsageError
from anchor_build.run import run

# 10.0.2.2 is what a guest on QEMU's user network calls its host's loopback interface.
LOOPBACK = ("localhost", "127.0.0.1", "10.0.2.2")

# `openssl ca` is the one subcommand that sets both ends of the validity in every OpenSSL since 1.1.
CONFIG = """\
[ca]
default_ca = site
[site]
database = {work}/index.txt
new_certs_dir = {work}
serial = {work}/serial
default_md = sha256
policy = policy
unique_subject = no
[policy]
commonName = supplied
[req]
distinguished_name = subject
[subject]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
{names}
"""


@dataclass(frozen=True)
class Authority:
    """A self-signed certification authority."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Leaf:
    """A certificate that an authority issued, and its private key."""

    certificate: Path
    key: Path


def make_authority(directory: Path, name: str = "anchor demo CA") -> Authority:
    """Make a CA called `name` in `directory` (created if missing): ca.crt and ca.key, valid for ten years."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Authority(directory / "ca.crt", directory / "ca.key")
    with tempfile.TemporaryDirectory() as work:
        config = _write_config(Path(work))
        _make_key(made.key)
        validity = ("-days", "3650", "-extensions", "authority")
        subject = ("-subj", _subject(name))
        _openssl(
            "req",
            "-new",
            "-x509",
            "-config",
            config,
            *validity,
            *subject,
            "-key",
            made.key,
            "-out",
            made.certificate,
        )
    return made


def issue(
    authority: Authority,
    directory: Path,
    name: str,
    *,
    addresses: Sequence[str] = LOOPBACK,
    client: bool = False,
    not_before: str | None = None,
    not_after: str | None = None,
) -> Leaf:
    """Issue NAME.crt and NAME.key in `directory`: for servers, or with `client` for clients.

    `addresses` are the DNS names and IP addresses of the certificate; an empty list leaves the extension
    out. `not_before` and `not_after` are times as OpenSSL writes them (YYYYMMDDHHMMSSZ); the default is
    from yesterday for a year, so that a node whose clock is a little slow still accepts it.

    Raises UsageError for a name that cannot be a file's name.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r}: not a name for a certificate", "use letters, digits, dots and hyphens")
    directory.mkdir(parents=True, exist_ok=True)
    made = Leaf(directory / f"{name}.crt", directory / f"{name}.key")
    with tempfile.TemporaryDirectory() as temporary:
        request = Path(temporary) / "request.pem"
        _make_key(made.key)
        config = _write_config(Path(temporary))
        _openssl("req", "-new", "-config", config, "-subj", _subject(name), "-key", made.key, "-out", request)
        signed = sign(
            authority,
            request,
            name,
            addresses=addresses,
            client=client,
            not_before=not_before,
            not_after=not_after,
        )
        made.certificate.write_text(signed, encoding="ascii")
    return made


def sign(
    authority: Authority,
    request: Path,
    name: str,
    *,
    addresses: Sequence[str] = (),
    client: bool = False,
    not_before: str | None = None,
    not_after: str | None = None,
) -> str:
    """Return a certificate (PEM) for the key of a request (PKCS #10), whose signature is checked.

    Nothing else of the request counts: name and `addresses` are the caller's. The rest is as in `issue`. Raises
    AnchorError for a request that openssl does not accept.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        config = _write_config(work, usage="clientAuth" if client else "serverAuth", addresses=addresses)
        signed = work / "signed.pem"
        issuer = ("-cert", authority.certificate, "-keyfile", authority.key)
        start, end = not_before or _days_from_now(-1), not_after or _days_from_now(365)
        _openssl(
            *("ca", "-batch", "-notext", "-rand_serial", "-config", config, "-extensions", "leaf"),
            *("-subj", _subject(name), *issuer, "-startdate", start, "-enddate", end, "-in", request, "-out", signed),
        )
        return signed.read_text(encoding="ascii")


def _write_config(work: Path, *, usage: str = "serverAuth", addresses: Sequence[str] = ()) -> Path:
    names = f"subjectAltName = {', '.join(map(_alternative_name, addresses))}" if addresses else ""
    (work / "index.txt").touch()
    config = work / "openssl.cnf"
    config.write_text(CONFIG.format(work=work, usage=usage, names=names), encoding="utf-8")
    return config


def _openssl(*words: str | Path) -> None:
    run(["openssl", *words])


def _make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)


def _subject(name: str) -> str:
    escaped = re.sub(r"([\\/+=,])", r"\\\1", name)
    return f"/CN={escaped}"


def _alternative_name(address: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(address)}"
    except ValueError:
        return f"DNS:{address}"


def _days_from_now(days: int) -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y%m%d%H%M%SZ")
