"""An OCI registry on the loopback interface: Debian's docker-registry, with a token service that it believes."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import secrets
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from anchor_build.errors import AnchorError
from anchor_build.run import run
from contrib.site import pki, servers

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
SERVICE = "registry of the site"
ISSUER = "token service of the site"
# The one user that may pull where the registry asks who it is. docker-registry wants bcrypt, which Python lacks.
USER, PASSWORD = "node17", "s3cret/of node17"
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuuMRyCkvM7xe.ixlPHBd/bOQPJZPbTbUG\n"

Auth = Literal["", "basic", "token"]


@dataclass(frozen=True)
class Registry:
    """A running registry. Its storage is open to another one that runs without authentication, to push by."""

    scheme: str
    port: int
    storage: Path
    log: Path
    tokens: TokenService | None = None

    @property
    def host(self) -> str:
        """What stands before the name in a reference."""
        return f"127.0.0.1:{self.port}"

    def put_blob(self, name: str, content: bytes) -> dict[str, Any]:
        """Upload a blob, where no authentication is asked for; return its descriptor without a media type."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        started = self._request("POST", f"/v2/{name}/blobs/uploads/", b"", {})
        place = urlsplit(started.headers["Location"])
        path = f"{place.path}?{place.query}&digest={digest}"
        self._request("PUT", path, content, {"Content-Type": "application/octet-stream"})
        return {"digest": digest, "size": len(content)}

    def put_manifest(self, name: str, tag: str, document: dict[str, Any], media_type: str = MANIFEST) -> str:
        """Upload a manifest or index under a tag; return its digest with 64 digits."""
        content = json.dumps(document).encode()
        self._request("PUT", f"/v2/{name}/manifests/{tag}", content, {"Content-Type": media_type})
        return hashlib.sha256(content).hexdigest()

    def _request(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise AnchorError(f"the registry answered {method} {path} with {response.status}: {text!r}")
        return response


@contextmanager
def registry(
    directory: Path,
    *,
    storage: Path,
    leaf: pki.Leaf | None = None,
    client_ca: Path | None = None,
    auth: Auth = "",
    authority: pki.Authority | None = None,
    read_only: bool = False,
    room: int = 0,
) -> Iterator[Registry]:
    """Run a registry below `directory` over `storage`, which several may share.

    `leaf` makes it HTTPS, `client_ca` refuses clients without a certificate of that CA. With `auth` only USER may pull;
    "token" starts a token service with `leaf`, whose tokens are signed by a certificate of `authority`. With `room` the
    storage is a tmpfs of so many bytes that this registry alone sees, which needs root.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage.mkdir(parents=True, exist_ok=True)
    port = servers.free_port()
    settings: dict[str, Any] = {"addr": f"127.0.0.1:{port}", "secret": secrets.token_hex(8)}
    if leaf:
        settings["tls"] = {"certificate": str(leaf.certificate.resolve()), "key": str(leaf.key.resolve())}
        if client_ca:
            settings["tls"]["clientcas"] = [str(client_ca.resolve())]
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "info", "accesslog": {"disabled": False}},
        "storage": {
            "filesystem": {"rootdirectory": str(storage.resolve())},
            "maintenance": {"uploadpurging": {"enabled": False}, "readonly": {"enabled": read_only}},
        },
        "http": settings,
    }
    with ExitStack() as stack:
        service = None
        if auth == "basic":
            passwords = directory / "htpasswd"
            passwords.write_text(HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "site", "path": str(passwords.resolve())}}
        elif auth == "token":
            if leaf is None or authority is None:
                raise AnchorError("a token service needs a certificate and an authority")
            service = stack.enter_context(token_service(directory, leaf, authority))
            config["auth"] = {
                "token": {
                    "realm": service.url,
                    "service": SERVICE,
                    "issuer": ISSUER,
                    "rootcertbundle": str(authority.certificate.resolve()),
                }
            }
        file = directory / "registry.json"  # YAML includes JSON
        file.write_text(json.dumps(config, indent=2))
        log = directory / "registry.log"
        argv = ["docker-registry", "serve", str(file.resolve())]
        if room:
            script = 'mount -t tmpfs -o "size=$1" registry "$2" && shift 2 && exec "$@"'
            argv = ["unshare", "--mount", "sh", "-c", script, "sh", str(room), str(storage.resolve()), *argv]
        child = stack.enter_context(servers.running(argv, log))
        servers.wait_for([child], lambda: servers.accepts(port), log)
        yield Registry("https" if leaf else "http", port, storage, log, service)


class TokenService(ThreadingHTTPServer):
    """Gives tokens of the Distribution project's protocol to USER: JWTs with an ES256 signature and its certificate."""

    daemon_threads = True

    def __init__(self, leaf: pki.Leaf, signer: pki.Leaf) -> None:
        super().__init__(("127.0.0.1", 0), TokenRequest)
        self.signer = signer
        self.valid_s = 300
        self.asked: list[str] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.certificate, leaf.key)
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        """The realm that the registry names."""
        return f"https://127.0.0.1:{self.server_address[1]}/token"

    def token(self, service: str, scope: str) -> str:
        """Return a token for `scope` (repository:NAME:ACTIONS)."""
        kind, name, actions = scope.split(":")
        now = int(time.time())
        pem = self.signer.certificate.read_text()
        header = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(ssl.PEM_cert_to_DER_cert(pem)).decode()]}
        claims = {"iss": ISSUER, "sub": USER, "aud": service, "nbf": now - 60, "iat": now, "exp": now + self.valid_s}
        claims |= {"jti": secrets.token_hex(8), "access": [{"type": kind, "name": name, "actions": actions.split(",")}]}
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        return f"{signed}.{_base64url(self._sign(signed))}"

    def _sign(self, text: str) -> bytes:
        """Return r and s of ECDSA with SHA-256, 32 bytes each (RFC 7518, 3.4); openssl gives two DER integers."""
        out = run(["openssl", "dgst", "-sha256", "-hex", "-sign", self.signer.key], input_text=text).stdout
        der = bytes.fromhex(out.rsplit("= ", 1)[-1].strip())
        r_end = 4 + der[3]
        r, s = der[4:r_end], der[r_end + 2 :]
        return b"".join(part.lstrip(b"\0").rjust(32, b"\0") for part in (r, s))


class TokenRequest(BaseHTTPRequestHandler):
    """One question for a token: `GET /token?service=SERVICE&scope=SCOPE`."""

    server: TokenService
    timeout = 20

    def do_GET(self) -> None:
        """Answer one request."""
        query = parse_qs(urlsplit(self.path).query)
        self.server.asked.append(self.path)
        wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") != wanted or query.get("service") != [SERVICE]:
            self._answer(401, {"details": "incorrect username or password"})
        else:
            self._answer(
                200, {"token": self.server.token(SERVICE, query["scope"][0]), "expires_in": self.server.valid_s}
            )

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - the base class's name
        """Keep quiet."""


@contextmanager
def token_service(directory: Path, leaf: pki.Leaf, authority: pki.Authority) -> Iterator[TokenService]:
    """Run a token service in a thread, until the body is left."""
    server = TokenService(leaf, pki.issue(authority, directory, "tokens"))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
