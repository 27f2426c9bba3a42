"""The servers of a site on the loopback interface: an ACME server (pebble), image stores (nginx, and Swift for S3).

Each is a context manager that returns when the server answers and has ended it, by process id, when the
body is left, whichever way. By default a server also ends when the process that started it is killed;
with `outlive` it does not, and goes on when its context is let go of (`ExitStack.pop_all`) instead of left.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from anchor_build.errors import AnchorError
from anchor_build.run import run, start, stop
from contrib.site import pki

START_TIMEOUT = 15.0
# Where Debian's python3-swift is; the system's own Python imports it.
SWIFT = Path("/usr/lib/python3/dist-packages/swift")

NGINX_CONFIG = """\
daemon off;
{user}
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log info;
events {{ worker_connections 256; }}
http {{
    types {{ }}
    default_type application/octet-stream;
    sendfile on;
    etag on;
    limit_rate {rate};
    log_format store '$status $bytes_sent "$http_range" "$ssl_client_s_dn" $request_method $request_uri';
    access_log {directory}/access.log store;
    client_body_temp_path {directory}/tmp;
    proxy_temp_path {directory}/tmp;
    fastcgi_temp_path {directory}/tmp;
    uwsgi_temp_path {directory}/tmp;
    scgi_temp_path {directory}/tmp;
    server {{
        listen 127.0.0.1:{https_port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        ssl_protocols TLSv1.2 TLSv1.3;
        {client}
        root {root};
    }}
    {plain}
}}
"""


@dataclass(frozen=True)
class Acme:
    """A running ACME server; `root` is the CA of the certificates that it issues, new at every start."""

    directory_url: str
    port: int
    root: Path
    pids: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class Store:
    """A running image store; `http_port` is 0 without the plain listener.

    A line of the access log is: status, bytes sent, "range", "subject of the client's certificate",
    method and path.
    """

    https_port: int
    http_port: int
    access_log: Path
    pids: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class S3:
    """A running S3 service for one account; `domain` is for virtual-host style, `port` also for the names below it.

    A line of the access log is: client, time, "request line", status, bytes and seconds.
    """

    scheme: str
    port: int
    region: str
    domain: str
    access_key: str
    secret_key: str
    access_log: Path
    ca: Path | None = None
    pids: tuple[int, ...] = field(default=())

    @property
    def endpoint(self) -> str:
        """The URL of the service on this machine."""
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def make_bucket(self, bucket: str) -> None:
        """Make a bucket."""
        self._request(f"/{bucket}", "--request", "PUT")

    def put(self, bucket: str, key: str, file: Path) -> None:
        """Store a file as an object; `key` is text, not percent-encoded."""
        self._request(f"/{bucket}/{quote(key, safe='/~')}", "--upload-file", str(file))

    def _request(self, path: str, *options: str) -> None:
        # curl is a signer of its own, so the stage's is not checked against itself.
        words = ["curl", "--disable", "--silent", "--show-error", "--fail", "--path-as-is", "--config", "-"]
        words += ["--aws-sigv4", f"aws:amz:{self.region}:s3", "--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]
        words += ["--cacert", str(self.ca)] if self.ca else []
        user = f'user = "{self.access_key}:{self.secret_key}"\n'
        run([*words, *options, self.endpoint + path], input_text=user, timeout=60)


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free for TCP and UDP.

    It lies below the range that the kernel gives to outgoing connections, so that none takes it meanwhile.
    """
    for _ in range(100):
        port = 20000 + secrets.randbelow(12000)
        try:
            with socket.socket(type=socket.SOCK_STREAM) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
                tcp.bind(("127.0.0.1", port))
                udp.bind(("127.0.0.1", port))
        except OSError:
            continue
        return port
    raise AnchorError("no free port on 127.0.0.1 after 100 tries")


@contextmanager
def pebble(
    directory: Path,
    authority: pki.Authority,
    *,
    http_port: int,
    tls_port: int,
    eab: Mapping[str, str] | None = None,
    reject_nonces: int = 0,
    outlive: bool = False,
) -> Iterator[Acme]:
    """Run an ACME server below `directory` that finds every name at 127.0.0.1.

    It validates http-01 at `http_port` and tls-alpn-01 at `tls_port`, and serves with a certificate of
    `authority`. `eab` maps key identifiers to base64url MAC keys and makes account binding compulsory.
    `reject_nonces` is the percentage of good nonces it refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    leaf = pki.issue(authority, directory, "pebble")
    port, management, dns, dns_management = (free_port() for _ in range(4))
    config = directory / "pebble.json"
    settings: dict[str, object] = {
        "listenAddress": f"127.0.0.1:{port}",
        "managementListenAddress": f"127.0.0.1:{management}",
        "certificate": str(leaf.certificate),
        "privateKey": str(leaf.key),
        "httpPort": http_port,
        "tlsPort": tls_port,
        "externalAccountBindingRequired": eab is not None,
        "externalAccountMACKeys": dict(eab or {}),
    }
    config.write_text(json.dumps({"pebble": settings}, indent=2) + "\n", encoding="utf-8")
    dns_server = ["pebble-challtestsrv", "-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""]
    dns_server += ["-http01", "", "-https01", "", "-tlsalpn01", ""]
    dns_server += ["-dns01", f"127.0.0.1:{dns}", "-management", f"127.0.0.1:{dns_management}"]
    acme_server = ["pebble", "-config", str(config), "-dnsserver", f"127.0.0.1:{dns}"]
    environment = {"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_WFE_NONCEREJECT": str(reject_nonces)}

    def answers() -> bool:
        return bool(_get(port, "/dir", authority.certificate)) and accepts(dns_management)

    with ExitStack() as stack:
        children = [
            stack.enter_context(running(dns_server, directory / "dns.log", outlive=outlive)),
            stack.enter_context(running(acme_server, directory / "pebble.log", env=environment, outlive=outlive)),
        ]
        wait_for(children, answers, directory / "pebble.log")
        root = directory / "issuing-root.pem"
        root.write_bytes(_get(management, "/roots/0", authority.certificate))
        pids = tuple(child.pid for child in children)
        yield Acme(f"https://127.0.0.1:{port}/dir", port, root, pids)


@contextmanager
def nginx(
    directory: Path,
    *,
    root: Path,
    leaf: pki.Leaf,
    client_ca: Path | None = None,
    plain: bool = True,
    rate: int = 0,
    outlive: bool = False,
) -> Iterator[Store]:
    """Serve the files of `root` over HTTPS, and with `plain` over HTTP too; logs and state go to `directory`.

    `rate` is how many bytes each client gets in a second; 0 for as many as there can be.

    With `client_ca` the HTTPS listener answers only clients with a certificate of that CA; others get
    status 400.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tmp").mkdir(exist_ok=True)
    https_port, http_port = free_port(), free_port() if plain else 0
    client = f"ssl_client_certificate {client_ca and client_ca.resolve()}; ssl_verify_client on; ssl_verify_depth 4;"
    config = directory / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(
            user="user root;" if os.geteuid() == 0 else "",
            directory=directory.resolve(),
            https_port=https_port,
            certificate=leaf.certificate.resolve(),
            key=leaf.key.resolve(),
            client=client if client_ca else "",
            root=root.resolve(),
            rate=rate,
            plain=f"server {{ listen 127.0.0.1:{http_port}; root {root.resolve()}; }}" if plain else "",
        ),
        encoding="utf-8",
    )
    argv = ["nginx", "-e", "stderr", "-p", str(directory.resolve()), "-c", str(config.resolve())]
    ports = [port for port in (https_port, http_port) if port]
    with running(argv, directory / "nginx.stderr", outlive=outlive) as child:
        wait_for([child], lambda: all(map(accepts, ports)), directory / "nginx.stderr")
        yield Store(https_port, http_port, directory / "access.log", (child.pid,))


@contextmanager
def swift_s3(
    directory: Path,
    *,
    leaf: pki.Leaf | None = None,
    ca: Path | None = None,
    region: str = "eu-north-1",
    domain: str = "s3.example",
    access_key: str = "AKIAROBOT",
    secret_key: str = "s3cr+t/key",  # noqa: S107 - of a server that lives as long as a test
    outlive: bool = False,
) -> Iterator[S3]:
    """Run OpenStack Swift's S3 service, which checks signatures (SigV4) and answers with S3's own error codes.

    `leaf` makes it HTTPS; `ca` is what its client then trusts. Objects are in memory: `directory` gets configuration
    and logs only. The program needs Debian's python3-swift.
    """
    directory.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = {
        "directory": str(directory.resolve()),
        "port": port,
        "certificate": str(leaf.certificate.resolve()) if leaf else "",
        "key": str(leaf.key.resolve()) if leaf else "",
        "region": region,
        "domain": domain,
        "users": {access_key: secret_key},
    }
    file = directory / "settings.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    argv = ["/usr/bin/python3", str(Path(__file__).with_name("s3_server.py")), str(file.resolve())]
    with running(argv, directory / "server.log", outlive=outlive) as child:
        wait_for([child], lambda: accepts(port), directory / "server.log")
        scheme, log = "https" if leaf else "http", directory / "requests.log"
        yield S3(scheme, port, region, domain, access_key, secret_key, log, ca, (child.pid,))


@contextmanager
def running(
    argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, outlive: bool = False
) -> Iterator[subprocess.Popen[str]]:
    child = start(argv, env=env, log=log, tied=not outlive)
    let_go = False
    try:
        yield child
    except GeneratorExit:
        let_go = outlive
        raise
    finally:
        if not let_go:
            stop(child)


def wait_for(children: Sequence[subprocess.Popen[str]], answers: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not answers():
        late = time.monotonic() > deadline
        if late or any(child.poll() is not None for child in children):
            what = f"does not answer after {START_TIMEOUT:g} s" if late else "ended at once"
            tail = log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise AnchorError(f"the server in {log.parent} {what}\n{tail}", f"its logs are in {log.parent}")
        time.sleep(0.05)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _get(port: int, path: str, ca: Path) -> bytes:
    """Return the body of a path on 127.0.0.1, or nothing while the server does not answer."""
    context = ssl.create_default_context(cafile=str(ca))
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read() if response.status == 200 else b""
    except OSError:
        return b""
    finally:
        connection.close()
