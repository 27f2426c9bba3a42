"""Takes what nodes post to rd.anchor.report=, keeps it as JSON lines, and says which node hangs where.

An example of a receiver, complete but small: one process, one file, no state but that. A node posts its events as
JSON lines (application/x-ndjson), several in one request; each has `node` (its name), `machine` (what stays when the
name changes), `boot_id` (one of its boots) and `seq` (the number of the event in that boot); the answer is status 204.
An event may come twice; the second one is not kept. GET / shows the table, GET /nodes.json the same for programs.

    python -m contrib.reports.receiver --listen 0.0.0.0:8443 --certificate crt.pem --key key.pem reports.jsonl
    python -m contrib.reports.receiver --table reports.jsonl

Whoever reaches the port can report anything: nothing should act on reports alone. With --client-ca only nodes with
a certificate are heard, which they have once their auth step is done; what happened before comes with that.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from anchor_build.events import (
    Begin,
    Boot,
    End,
    Event,
    Failed,
    Finished,
    InvalidLineError,
    Ready,
    SwitchRoot,
    parse_line,
    printable,
)

MAX_BODY = 1 << 20  # bytes of one request
MAX_NODES = 100_000
MAX_NAME = 80  # characters
TIMEOUT_S = 10.0  # for a client that says nothing


@dataclass
class Node:
    """What is known of a node: its present boot, where that is, and when (seconds since the epoch) it last spoke."""

    machine: str
    name: str = ""
    boot: str = ""
    seq: int = -1
    state: str = "boots"
    where: str = ""
    since: float = 0.0
    heard: float = 0.0
    boots: int = 0
    error: str = ""
    log: tuple[str, ...] = ()


@dataclass
class Fleet:
    """All nodes by machine; a lock, because requests come in threads."""

    nodes: dict[str, Node] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, record: dict[str, Any], now: float, keep: Callable[[], None] = lambda: None) -> bool:
        """Note one event; False for one that was there before.

        `keep` writes it down and may raise: then it is not noted either, and counts as new when it comes again. Raises
        InvalidLineError for what is no event, lacks its identity, or is of a node too many.
        """
        names = [record.get(key) for key in ("machine", "node", "boot_id")]
        seq = record.get("seq")
        if not all(isinstance(name, str) and len(name) <= MAX_NAME for name in names) or type(seq) is not int:
            raise InvalidLineError("machine, node, boot_id or seq is missing")
        machine, name, boot = (printable(str(text)) for text in names)
        event = parse_line(json.dumps(record).encode())
        with self.lock:
            if machine not in self.nodes and len(self.nodes) >= MAX_NODES:
                raise InvalidLineError(f"more than {MAX_NODES} nodes")
            node = self.nodes.get(machine, Node(machine))
            if seq <= (node.seq if node.boot == boot else -1):
                return False
            keep()
            self.nodes[machine] = node
            if node.boot != boot:
                node.boot, node.seq, node.boots, node.error, node.log = boot, -1, node.boots + 1, "", ()
                node.state, node.where, node.since = "boots", "", now
            node.seq, node.name, node.heard = seq, name or node.name, now
            _advance(node, event, record, now)
        return True

    def rows(self, now: float) -> list[Node]:
        """Return the nodes, those first that have been at the same place longest, and ready ones last."""
        with self.lock:
            return sorted(self.nodes.values(), key=lambda node: (node.state == "ready", node.since, node.name))


def _advance(node: Node, event: Event, record: dict[str, Any], now: float) -> None:
    """Move a node to where an event says that it is."""
    state, where = "boots", ""
    match event:
        case Begin():
            where = event.step + (f" ({event.stage})" if event.stage else "")
        case Failed():
            state, where = f"failed: {event.on_failure}", event.step + (f" ({event.stage})" if event.stage else "")
            node.error = event.error
            log = record.get("log")
            node.log = tuple(printable(str(line), 300) for line in log[:50]) if isinstance(log, list) else ()
        case End():
            where = f"after {event.step}"
        case SwitchRoot():
            state, where, node.error, node.log = "starts", "switch_root", "", ()
        case Finished():
            state, where, node.error, node.log = "ready", event.action, "", ()
        case Ready():
            state = "ready"
        case Boot():
            where = "start"
    node.state, node.where, node.since = state, where, now


def table(fleet: Fleet, now: float) -> str:
    """Return what is known as text: a line for each node, and below a failed one why and the end of its boot.log."""
    lines = [f"{'NODE':<32} {'MACHINE':<36} {'STATE':<16} {'WHERE':<24} {'FOR':>8} BOOTS"]
    for node in fleet.rows(now):
        name = node.name or "(no name yet)"
        lines.append(
            f"{name:<32} {node.machine:<36} {node.state:<16} {node.where:<24} {now - node.since:>6.0f} s {node.boots}"
        )
        lines += [f"    {node.error}"] if node.error else []
        lines += [f"    | {line}" for line in node.log]
    return "\n".join(lines) + "\n"


def replay(lines: Iterable[str]) -> Fleet:
    """Return what a file of kept events says; lines that are none are passed over."""
    fleet = Fleet()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            fleet.take(record, float(record["received"]))
    return fleet


class Receiver(ThreadingHTTPServer):
    """The server; `log` gets each event as one line. TLS is shaken hands in the client's own thread."""

    daemon_threads = True
    request_queue_size = 512  # a fleet comes at once

    def __init__(self, address: tuple[str, int], log: Path, fleet: Fleet, context: ssl.SSLContext | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.fleet = fleet
        self.context = context
        self.log = log.open("ab", buffering=0)  # first, for a port that is taken closes it
        super().__init__(address, Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection without waiting for what its client says."""
        connection, address = self.socket.accept()
        connection.settimeout(TIMEOUT_S)
        if self.context is not None:
            connection = self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what a client did wrong; a bug keeps its traceback."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            print(f"{client_address[0]}: {printable(str(error), 200)}", file=sys.stderr)  # noqa: T201 - a program
        else:
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Close the log, too."""
        super().server_close()
        self.log.close()

    def keep(self, record: dict[str, Any]) -> None:
        """Append an event to the log, whole or not at all; one at a time, as Fleet.take calls it."""
        line = json.dumps(record).encode() + b"\n"
        size = os.fstat(self.log.fileno()).st_size
        try:
            while line:
                line = line[self.log.write(line) or 0 :]
        except OSError:
            os.ftruncate(self.log.fileno(), size)
            raise


class Handler(BaseHTTPRequestHandler):
    """One client."""

    server: Receiver
    protocol_version = "HTTP/1.1"
    timeout = TIMEOUT_S

    def do_POST(self) -> None:
        """Take events."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY:
            self.close_connection = True
            self._answer(413, f"at most {MAX_BODY} bytes, with their length\n")
            return
        body = self.rfile.read(int(length))
        now, wrong = time.time(), 0
        lines = [line for line in body.split(b"\n") if line]
        for line in lines:
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise InvalidLineError("no object")
                kept = {**record, "received": round(now, 3), "from": self.client_address[0]}
                self.server.fleet.take(record, now, functools.partial(self.server.keep, kept))
            except (ValueError, RecursionError):
                wrong += 1
            except OSError as error:
                # The node keeps what was not taken, and comes again.
                print(f"error: {self.server.log.name}: {error.strerror}", file=sys.stderr)  # noqa: T201 - a program
                self._answer(503, "the events cannot be kept\n")
                return
        # One wrong line among right ones must not make the node come again with all of them.
        self._answer(400 if wrong == len(lines) else 204, "")

    def do_GET(self) -> None:
        """Show the table."""
        now = time.time()
        if self.path == "/nodes.json":
            nodes = [{**node.__dict__, "for_seconds": round(now - node.since)} for node in self.server.fleet.rows(now)]
            self._answer(200, json.dumps(nodes, indent=2) + "\n", "application/json")
        elif self.path == "/":
            self._answer(200, table(self.server.fleet, now))
        else:
            self._answer(404, "/ and /nodes.json are here\n")

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - http.server's name
        """Say nothing of each request: the events are the log."""

    def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def tls(certificate: Path, key: Path | None, client_ca: Path | None) -> ssl.SSLContext:
    """Return the server's side of TLS; with `client_ca`, clients without a certificate of it are turned away."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for path in filter(None, (certificate, key, client_ca)):
        path.open("rb").close()  # ssl's errors name no file
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted, or show a table; return the status to exit with."""
    parser = argparse.ArgumentParser(
        prog="python3 -m contrib.reports.receiver",
        description="Receive the reports of booting nodes, and say which hangs where.",
    )
    parser.add_argument("file", type=Path, help="the events as JSON lines; appended to")
    parser.add_argument("--table", action="store_true", help="show what the file says, and end")
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="ADDRESS:PORT", help="where to listen")
    parser.add_argument("--certificate", type=Path, help="the server's certificate with its chain; without it, no TLS")
    parser.add_argument("--key", type=Path, help="its key, if that is not in the same file")
    parser.add_argument("--client-ca", type=Path, help="hear only nodes with a certificate of this CA")
    options = parser.parse_args(argv)
    address, _, port = options.listen.rpartition(":")
    if not address or not port.isdecimal() or (options.client_ca and not options.certificate):
        parser.error("--listen is ADDRESS:PORT, and --client-ca needs --certificate")
    if options.table and not options.file.exists():
        parser.error(f"{options.file}: no such file")
    try:
        kept = options.file.read_text(encoding="utf-8", errors="replace") if options.file.exists() else ""
        fleet = replay(kept.splitlines())
        if options.table:
            sys.stdout.write(table(fleet, time.time()))
            return 0
        context = tls(options.certificate, options.key, options.client_ca) if options.certificate else None
        if kept and not kept.endswith("\n"):
            # Of a receiver that was killed: the next event must not become part of it.
            with options.file.open("a", encoding="utf-8") as log:
                log.write("\n")
        with (
            Receiver((address.strip("[]"), int(port)), options.file, fleet, context) as server,
            suppress(KeyboardInterrupt),
        ):
            sys.stderr.write(f"listening on {address}:{server.server_address[1]}\n")
            server.serve_forever()
    except (OSError, OverflowError) as error:  # a port that is none
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
