"""A server in a thread, for programs that do something else meanwhile: tests, the benchmark, the demo."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseServer

POLL_S = 0.02


@contextmanager
def in_a_thread(server: BaseServer) -> Iterator[None]:
    """Let a server answer until the body is left, then close it."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_S})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
