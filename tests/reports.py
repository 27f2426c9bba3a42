"""The receiver of contrib/reports, run by tests of several directories."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrib.reports.receiver import Fleet, Node, Receiver
from contrib.serving import in_a_thread


@dataclass(frozen=True)
class Served:
    """A running receiver: its URL, its file and what it knows."""

    url: str
    file: Path
    fleet: Fleet

    def events(self) -> list[dict[str, Any]]:
        """Return what it has kept."""
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def node(self) -> Node:
        """Return the one node that it knows."""
        [node] = self.fleet.nodes.values()
        return node


@contextmanager
def receiver(directory: Path, context: ssl.SSLContext | None = None) -> Iterator[Served]:
    """Run a receiver on a free port of 127.0.0.1, over TLS with a context."""
    file, fleet = directory / "reports.jsonl", Fleet()
    server = Receiver(("127.0.0.1", 0), file, fleet, context)
    with in_a_thread(server):
        scheme = "https" if context else "http"
        yield Served(f"{scheme}://127.0.0.1:{server.server_address[1]}/report", file, fleet)
