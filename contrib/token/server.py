"""The token server: HTTPS, one POST for one certificate; doc/token.md has the protocol."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from anchor_build.errors import AnchorError
from anchor_build.events import printable
from anchor_build.run import run
from contrib.serving import in_a_thread
from contrib.site import pki
from contrib.token import store

REQUEST_MAX = 16384  # bytes; a request with a key of RSA 4096 has 1.7 KB
CLIENT_TIMEOUT = 20.0  # seconds that a client may be silent
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
CURVES = ("prime256v1", "secp384r1")


@dataclass(frozen=True)
class Settings:
    """What the server needs: its own certificate, the CA that signs the nodes', and the directory of tokens.

    `window_s` is how long the same key gets the same answer again, `days` how long certificates are good, `chain` a
    file of certificates that follow the node's own, where the CA is not the root.
    """

    tokens: Path
    authority: pki.Authority
    leaf: pki.Leaf
    address: str = "127.0.0.1"
    port: int = 0
    window_s: float = 600
    days: int = 30
    chain: Path | None = None


class RefusedError(Exception):
    """An answer other than 200: a status of the protocol, and one line for people."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Server(ThreadingHTTPServer):
    """The listening server. One exchange at a time: a token is used once, whatever comes at the same moment."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, settings: Settings) -> None:
        self.address_family = socket.AF_INET6 if ":" in settings.address else socket.AF_INET
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.leaf.certificate, settings.leaf.key)
        super().__init__((settings.address, settings.port), Exchange)
        self.settings = settings
        self.lock = threading.Lock()
        # The handshake belongs to the connection's own thread: a silent client must not stop the server.
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        """Where tokens are exchanged."""
        host = str(self.server_address[0])
        return f"https://{f'[{host}]' if ':' in host else host}:{self.server_port}/"

    def exchange(self, text: str, request: bytes) -> str:
        """Return the answer to a token and a request; raises RefusedError."""
        settings = self.settings
        with self.lock:
            token = store.load(settings.tokens, text) if store.TOKEN.fullmatch(text) else None
            if token is None:
                raise RefusedError(401, "this token is not known here")
            key = public_key(request)
            now = time.time()
            if token.used:
                if key != token.key:
                    raise RefusedError(409, f"the token of {token.name} has been used with another key")
                if now > token.used + settings.window_s:
                    raise RefusedError(410, f"the token of {token.name} was used too long ago to be answered again")
                return token.answer
            if now > token.expires:
                raise RefusedError(410, f"the token of {token.name} has expired")
            answer = certify(settings, token, request)
            store.save(settings.tokens, text, store.used(token, key, answer))
            return answer

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients, which hang up all the time; a bug keeps its traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type] # socketserver's own words for both


class Exchange(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = CLIENT_TIMEOUT

    def do_POST(self) -> None:
        """Exchange a token for a certificate."""
        self.close_connection = True
        body = self.body()
        if body is None:
            self.answer(400, "text/plain", f"a request has a length of at most {REQUEST_MAX} bytes\n")
            return
        try:
            scheme, _, token = self.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                raise RefusedError(401, "there is no bearer token")
            granted = self.server.exchange(token, body)
        except (OSError, ValueError, AnchorError) as error:
            # Of the server's own files and programs; the token has not been used up, and the node comes again.
            self.log_message("failed: %s", error)
            self.answer(500, "text/plain", "the token server has a problem of its own\n")
        except RefusedError as error:
            self.log_message("refused: %s", error)
            self.answer(error.status, "text/plain", f"{error}\n")
        else:
            self.answer(200, "application/pem-certificate-chain", granted)

    def body(self) -> bytes | None:
        """Return the request's body, None where it is too large or of unknown length."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,6}", length) or int(length) > REQUEST_MAX:
            return None
        return self.rfile.read(int(length))

    def answer(self, status: int, kind: str, text: str) -> None:
        """Send an answer that no cache keeps."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - the base class's name
        """Log without headers: the token is in one. What clients sent may be hostile."""
        super().log_message("%s", printable(format % words))


def public_key(request: bytes) -> str:
    """Return the digest of the public key in a request (PKCS #10, PEM).

    Raises RefusedError for what is no request, and for keys that are too weak or of another kind than nodes make.
    """
    if not request.isascii():
        raise RefusedError(400, "the request is not PEM")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "request.pem"
        file.write_bytes(request)
        done = run(["openssl", "req", "-in", file, "-noout", "-pubkey", "-verify"], timeout=20, check=False)
    if done.status != 0:
        raise RefusedError(400, "the request is not one, or its signature is wrong")
    text = run(["openssl", "pkey", "-pubin", "-noout", "-text"], input_text=done.stdout, timeout=20).stdout
    bits = re.search(r"Public-Key: \(([0-9]+) bit", text)
    is_rsa = "Modulus:" in text and bits is not None and MIN_RSA_BITS <= int(bits[1]) <= MAX_RSA_BITS
    if not (is_rsa or any(f"ASN1 OID: {curve}\n" in text for curve in CURVES)):
        raise RefusedError(400, f"its key is neither ECDSA P-256 or P-384 nor RSA of {MIN_RSA_BITS} bits or more")
    return hashlib.sha256(done.stdout.encode()).hexdigest()


def certify(settings: Settings, token: store.Token, request: bytes) -> str:
    """Return S3 credentials, if the token has some, and the chain for a request."""
    end = (datetime.now(UTC) + timedelta(days=settings.days)).strftime("%Y%m%d%H%M%SZ")
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "request.pem"
        file.write_bytes(request)
        # The request has been looked at: what fails now is the CA.
        certificate = pki.sign(settings.authority, file, token.name, addresses=[token.name], client=True, not_after=end)
    before = Path(token.s3).read_text(encoding="utf-8").rstrip("\n") + "\n" if token.s3 else ""
    return before + certificate + (settings.chain.read_text(encoding="utf-8") if settings.chain else "")


@contextmanager
def serving(settings: Settings) -> Iterator[Server]:
    """Run the server in a thread until the body is left."""
    server = Server(settings)
    with in_a_thread(server):
        yield server
