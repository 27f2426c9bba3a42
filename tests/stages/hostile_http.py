"""A fake HTTP server that misbehaves on purpose, for what a real one cannot be made to do.

Each request is answered by the next fault of the list; the last fault answers all that follow.
"""

from __future__ import annotations

import gzip
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from contrib.serving import in_a_thread
from contrib.site.pki import Leaf

LAST_MODIFIED = "Sat, 01 Jan 2022 00:00:00 GMT"


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer; the connection ends with it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        """Answer with the next fault."""
        self.close_connection = True
        self.server.answer(self)

    def do_POST(self) -> None:
        """Take what is sent, then answer with the next fault."""
        # A connection that is closed with unread bytes is reset, and the answer may be lost.
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class's name
        """Stay silent: `Hostile.requests` is the log."""

    @property
    def offset(self) -> int:
        """Where the asked-for range begins; 0 without one."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def head(self, status: int, headers: Mapping[str, str | int]) -> None:
        """Send the status line and exactly these headers."""
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def body(self, data: bytes) -> None:
        """Send bytes; a client that has hung up is no error."""
        with suppress(OSError):
            self.wfile.write(data)


Fault = Callable[[Exchange], None]


@dataclass
class Hostile:
    """A running fake: its port, and for each request its path and headers."""

    port: int
    host: str = "127.0.0.1"
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str = "/image.squashfs", scheme: str = "http") -> str:
        """Return the URL of a path on this server."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}{path}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, faults: tuple[Fault, ...], tls: Leaf | None, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Exchange)
        self.faults = faults
        self.stopped = threading.Event()
        self.hostile = Hostile(self.server_port, host)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls.certificate, tls.key)
            # The handshake belongs to the connection's own thread: a client that refuses it must not stop the server.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def answer(self, exchange: Exchange) -> None:
        """Let the next fault answer."""
        self.hostile.requests.append((exchange.path, dict(exchange.headers)))
        self.faults[min(len(self.hostile.requests), len(self.faults)) - 1](exchange)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on this server all the time."""


@contextmanager
def hostile(*faults: Fault, tls: Leaf | None = None, host: str = "127.0.0.1", port: int = 0) -> Iterator[Hostile]:
    """Run the fake on `host` and a free port, or on `port`, with `tls` over HTTPS, until the body is left."""
    server = _Server(faults, tls, host, port)
    with in_a_thread(server):
        try:
            yield server.hostile
        finally:
            server.stopped.set()


def whole(
    data: bytes,
    *,
    etag: str | None = '"v1"',
    sent: int | None = None,
    stall: bool = False,
    reset: bool = False,
    check: bool = True,
) -> Fault:
    """Serve `data` as a good server does, ranges and If-Range included.

    With `sent` only that many bytes go out before the connection ends, with `reset` by a TCP reset, or with `stall`
    falls silent.
    Without `check` a range is served whatever If-Range asks for. Without `etag` there is a date alone.
    """

    def answer(exchange: Exchange) -> None:
        validator = etag or LAST_MODIFIED
        headers: dict[str, str | int] = {"ETag": etag} if etag else {"Last-Modified": LAST_MODIFIED}
        start = exchange.offset
        if check and exchange.headers.get("If-Range", validator) != validator:
            start = 0
        if start > 0 and start >= len(data):
            exchange.head(416, {**headers, "Content-Range": f"bytes */{len(data)}", "Content-Length": 0})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        exchange.head(206 if start else 200, {**headers, "Content-Length": len(data) - start})
        exchange.body(data[start:] if sent is None else data[start : start + sent])
        if stall:
            exchange.wfile.flush()
            exchange.server.stopped.wait(30)
        if reset:
            time.sleep(0.1)  # a reset would throw away what is still in the buffers
            # Closing with a linger time of 0 sends RST instead of FIN (socket(7), SO_LINGER).
            exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            exchange.connection.close()

    return answer


def dripping(data: bytes, *, seconds: float = 1.0) -> Fault:
    """Serve `data` one byte at a time, with `seconds` between two."""

    def answer(exchange: Exchange) -> None:
        start = exchange.offset
        part = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        exchange.head(206 if start else 200, {"ETag": '"v1"', "Content-Length": len(data) - start, **part})
        for byte in data[start:]:
            try:
                exchange.wfile.write(bytes([byte]))
            except OSError:
                return
            if exchange.server.stopped.wait(seconds):
                return

    return answer


def gzipped(data: bytes) -> Fault:
    """Serve `data` compressed on the way, though nobody asked for that."""
    return status(200, {"Content-Encoding": "gzip", "ETag": '"v1"'}, gzip.compress(data, 1))


def ignoring_ranges(data: bytes, *, sent: int | None = None) -> Fault:
    """Serve all of `data` (or its first `sent` bytes) with status 200, whatever range was asked for."""

    def answer(exchange: Exchange) -> None:
        exchange.head(200, {"ETag": '"v1"', "Content-Length": len(data)})
        exchange.body(data if sent is None else data[:sent])

    return answer


def status(code: int, headers: Mapping[str, str | int] | None = None, page: bytes = b"<h1>Sorry</h1>") -> Fault:
    """Answer with a status and an error page."""

    def answer(exchange: Exchange) -> None:
        exchange.head(code, {"Content-Length": len(page), **(headers or {})})
        exchange.body(page)

    return answer


def redirect(to: str) -> Fault:
    """Send the client somewhere else."""
    return status(302, {"Location": to})


def chunked(data: bytes, *, times: int = 1, end: bool = True, etag: str = '"v1"') -> Fault:
    """Serve `data` `times` times in chunks, without a length; without `end` the last chunk never comes."""

    def answer(exchange: Exchange) -> None:
        exchange.head(200, {"Transfer-Encoding": "chunked", "ETag": etag})
        for _ in range(times):
            exchange.body(b"%x\r\n%s\r\n" % (len(data), data))
        if end:
            exchange.body(b"0\r\n\r\n")

    return answer


def endless_headers(before: bytes, sent: list[int]) -> Fault:
    """Send `before`, and then header lines until the client hangs up; `sent` gets how many bytes of them it took."""

    def answer(exchange: Exchange) -> None:
        lines = b"".join(b"X-%d: %s\r\n" % (n, b"a" * 1000) for n in range(64))
        sent.append(0)
        with suppress(OSError):
            exchange.wfile.write(before)
            while not exchange.server.stopped.is_set():
                exchange.wfile.write(lines)
                sent[-1] += len(lines)

    return answer


def unframed(data: bytes) -> Fault:
    """Serve `data` with no sign of where it ends but the end of the connection."""

    def answer(exchange: Exchange) -> None:
        exchange.head(200, {})
        exchange.body(data)

    return answer


def raw(data: bytes) -> Fault:
    """Answer with these bytes and nothing else."""

    def answer(exchange: Exchange) -> None:
        exchange.body(data)

    return answer
