"""`./build.sh bench crowd`: 200 nodes fetch at once from a server that serves 50 and sends the others away with 503.

Each node is the real anchor_fetch with real curl in a shell of its own; the file is small, and being served takes a
second, as a download would. Prints how many requests began in each second: the waits between them are random, so that
those who were sent away together do not come back together. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from anchor_build.console import format_table
from contrib.serving import in_a_thread

TOP = Path(__file__).resolve().parents[2]
LIMIT_S = 300
FILE = b"image" * 200
PARAMETERS = {"timeout": "300", "connect_timeout": "30", "stall": "30", "attempts": "20", "reserve": "1048576"}
NODE = """
for lib in report fetch fetch-mirrors fetch-digest fetch-room http; do . "$LIB/anchor-$lib.sh" || exit 9; done
. "$STAGES/transport-https/stage.sh" || exit 9
anchor_stage_for_scheme() { anchor_transport=https anchor_transport_needs_digest=1; }
read -r go <"$GO"
mkdir -p "$ANCHOR_ROOT/run/anchor/credentials" && anchor_fetch "$URL" "$ANCHOR_ROOT/image" "$DIGEST" 2>/dev/null
"""


class Busy(ThreadingHTTPServer):
    """A server that has room for `limit` clients, and tells others to come back."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, limit: int, seconds: float, retry_after: int) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.room = threading.Semaphore(limit)
        self.seconds = seconds
        self.retry_after = retry_after
        self.lock = threading.Lock()
        self.log: list[tuple[float, int]] = []


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Busy

    def do_GET(self) -> None:
        """Serve the file slowly, or answer 503."""
        began = time.monotonic()
        self.close_connection = True
        room = self.server.room.acquire(blocking=False)
        with self.server.lock:
            self.server.log.append((began, 200 if room else 503))
        if not room:
            self.send_response(503)
            if self.server.retry_after:
                self.send_header("Retry-After", str(self.server.retry_after))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(FILE)))
            self.end_headers()
            time.sleep(self.server.seconds)
            self.wfile.write(FILE)
        finally:
            self.server.room.release()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class's name
        """Stay silent: `Busy.log` is the log."""


@contextmanager
def serving(limit: int, seconds: float, retry_after: int) -> Iterator[Busy]:
    """Run the server until the body is left."""
    server = Busy(limit, seconds, retry_after)
    with in_a_thread(server):
        yield server


def main(arguments: list[str]) -> None:
    """Let the nodes go, and print the histogram."""
    parser = argparse.ArgumentParser(prog="build.sh bench crowd", description=__doc__)
    parser.add_argument("--nodes", type=int, default=200, help="how many fetch at once")
    parser.add_argument("--limit", type=int, default=50, help="how many the server serves at once")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long it serves each")
    parser.add_argument("--retry-after", type=int, default=0, help="what its 503 asks for; 0 for nothing")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anchor-bench-", dir="/dev/shm")))
        server = stack.enter_context(serving(options.limit, options.seconds, options.retry_after))
        env = {
            "PATH": os.environ["PATH"],
            "LIB": str(TOP / "lib"),
            "STAGES": str(TOP / "dracut-modules"),
            "URL": f"http://127.0.0.1:{server.server_port}/image",
            "GO": str(work / "go"),
            "DIGEST": hashlib.sha256(FILE).hexdigest(),
            "anchor_https_proxy": "",
            **{f"anchor_fetch_{key}": value for key, value in PARAMETERS.items()},
        }
        os.mkfifo(work / "go")
        nodes = [
            subprocess.Popen(["sh", "-c", NODE], env=env | {"ANCHOR_ROOT": str(work / str(number))})
            for number in range(options.nodes)
        ]
        # All of them wait in open(2) until somebody opens the other end.
        time.sleep(options.nodes / 50)
        began = time.monotonic()
        with (work / "go").open("w") as go:
            go.write("go\n" * options.nodes)
        done = [node.wait(timeout=LIMIT_S) for node in nodes].count(0)
        took = time.monotonic() - began
        log = server.log
    first = min(at for at, _ in log)
    counts = Counter((int(at - first), status) for at, status in log)
    seconds = range(max(second for second, _ in counts) + 1)
    rows = [
        [str(n), str(counts[n, 200]), str(counts[n, 503]), "#" * ((counts[n, 200] + counts[n, 503] + 1) // 2)]
        for n in seconds
    ]
    print(f"{done} of {options.nodes} nodes have the file after {took:.1f} s, in {len(log)} requests")  # noqa: T201 - the result
    print(format_table(["second", "served", "503", "requests, two to a #"], rows))  # noqa: T201 - the result
