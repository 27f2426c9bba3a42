"""A fake rsync daemon that misbehaves on purpose, for what a real one cannot be made to do.

It speaks as much of protocol 29 (rsync's clientserver.c and io.c) as a client needs to listen to it.
"""

from __future__ import annotations

import socketserver
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat

from contrib.serving import in_a_thread

# io.h of rsync: what a frame is, besides data.
ERROR, INFO = 1, 2
MPLEX_BASE = 7


def frame(code: int, text: bytes) -> bytes:
    """Return a message to the client, which prints it: an error to its stderr, information to its stdout."""
    return struct.pack("<I", (MPLEX_BASE + code) << 24 | len(text)) + text


@contextmanager
def hostile_daemon(frames: Callable[[], Iterator[bytes]]) -> Iterator[int]:
    """Run the fake on a free port, which is given, until the body is left; every client gets `frames` for a list."""

    class Client(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                self.wfile.write(b"@RSYNCD: 29.0\n")
                self.rfile.readline()
                self.rfile.readline()  # the module
                self.wfile.write(b"@RSYNCD: OK\n")
                while self.rfile.readline().strip():
                    pass
                self.wfile.write(struct.pack("<I", 1))  # the seed of checksums
                for each in frames():
                    self.wfile.write(each)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Client) as server, in_a_thread(server):
        yield server.server_address[1]


def endless(code: int) -> Callable[[], Iterator[bytes]]:
    """Return messages without an end."""
    return lambda: repeat(frame(code, b"A" * 4000 + b"\n") * 16)
