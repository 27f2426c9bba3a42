"""A site for the acme stage: ACME servers, and a node that runs the stage.

The stage answers challenges on ports 80 and 443, so the servers and the node live in network, mount and process
namespaces of their own. This file, run as a program in there, is the servers (`serve`).
"""

from __future__ import annotations

import http.server
import json
import select
import shlex
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from contrib.site import pki, servers

TOP = Path(__file__).resolve().parents[2]
STAGE = TOP / "dracut-modules" / "auth-acme"
SHELLS = {"dash": ["dash"], "busybox": ["busybox", "sh"], "bash": ["bash", "--posix"]}
BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))
KEY_ID, MAC_KEY = "kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
NAME = "node1.example.org"

# What a node's boot does around a stage, with the facts of the step in $root/step.
PROLOGUE = """
mount --bind "$ca" "$bundle" || exit 99
LC_ALL=C; export LC_ALL
. "$top/lib/anchor-report.sh"
. "$top/dracut-modules/auth-acme/anchor-acme.sh"
. "$top/dracut-modules/auth-acme/stage.sh"
anchor_step_dir="$ANCHOR_ROOT/step"
anchor_net_hostname() { [ -n "$hostname" ] && printf '%s\\n' "$hostname"; }
"""


class Refusals(http.server.BaseHTTPRequestHandler):
    """An ACME server that says no: the first part of the path chooses how."""

    def do_GET(self) -> None:
        """Answer as the path says."""
        status, kind, body = {
            "gone": (404, "text/html", "<h1>Not here</h1>"),
            "proxy": (502, "text/html", "<h1>Bad gateway</h1>"),
            "welcome": (200, "text/html", "<h1>It works!</h1>"),
            "other": (200, "application/json", '{"hello": "world"}'),
            "busy": (429, "application/problem+json", self.problem("rateLimited", "too many orders")),
            "later": (429, "application/problem+json", self.problem("rateLimited", "come back tomorrow")),
            "hostile": (403, "application/problem+json", self.problem("unauthorized", "\x1b[2J$(touch /tmp/x) \x07")),
            "verbose": (403, "application/problem+json", self.problem("b\\u00e4d" * 20000, "no " * 50000)),
        }[self.path.split("/")[1]]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status == 429:
            self.send_header("Retry-After", "1" if self.path.startswith("/busy") else "99")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def problem(self, kind: str, detail: str) -> str:
        """Return an ACME problem document."""
        return f'{{"type": "urn:ietf:params:acme:error:{kind}", "detail": "{detail}"}}'

    def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - the base class chose the name
        """Stay quiet."""


def serve(directory: Path, authority: pki.Authority) -> None:
    """Run the site until standard input ends; its URLs go to standard output as one line of JSON."""
    with ExitStack() as stack:
        urls = {}
        for name, port, tls_port, binding in (
            ("plain", 80, 443, None),
            ("blocked", 81, 444, None),
            ("bound", 80, 443, {KEY_ID: MAC_KEY}),
        ):
            server = servers.pebble(directory / name, authority, http_port=port, tls_port=tls_port, eab=binding)
            running = stack.enter_context(server)
            urls[name], urls[f"{name} root"] = running.directory_url, str(running.root)
        refusals = http.server.ThreadingHTTPServer(("127.0.0.1", servers.free_port()), Refusals)
        leaf = pki.issue(authority, directory, "refusals")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(leaf.certificate, leaf.key)
        refusals.socket = context.wrap_socket(refusals.socket, server_side=True)
        threading.Thread(target=refusals.serve_forever, daemon=True).start()
        urls["refusals"] = f"https://127.0.0.1:{refusals.server_port}"
        print(json.dumps(urls), flush=True)  # noqa: T201 - the test reads it
        sys.stdin.read()


@dataclass(frozen=True)
class Site:
    """The running site: `pid` is the first process of its namespaces."""

    pid: int
    authority: pki.Authority
    urls: Mapping[str, str]


@dataclass(frozen=True)
class Result:
    """One run of the stage."""

    status: int
    log: str
    seconds: float
    root: Path

    def note(self, key: str) -> str:
        """Return a fact of the step's record, or nothing."""
        path = self.root / "step" / key
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""

    @property
    def credentials(self) -> Path:
        """The directory that later stages look into."""
        return self.root / "run" / "anchor" / "credentials"


@dataclass(frozen=True)
class Node:
    """A node's root inside the site."""

    site: Site
    root: Path

    def script(self, text: str, shell: str = "dash", ca: Path | None = None, timeout: float = 90) -> Result:
        """Run shell text with the stage loaded; `ca` is what the node trusts."""
        bundle = next(path for path in BUNDLES if path.exists())
        given = {
            "ca": str(ca or self.site.authority.certificate),
            "bundle": str(bundle),
            "top": str(TOP),
            "ANCHOR_ROOT": str(self.root),
        }
        script = self.root / "script"  # not -c: the words of a command line are for everybody to see
        script.write_text(_assign(given) + PROLOGUE + text, encoding="utf-8")
        start = time.monotonic()
        done = subprocess.run(
            [*self._enter(), "unshare", "--mount", "--", *SHELLS[shell], str(script)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout + done.stderr, time.monotonic() - start, self.root)

    def run(
        self,
        *,
        shell: str = "dash",
        ca: Path | None = None,
        before: str = "",
        trace: bool = False,
        hostname: str = "",
        **parameters: str,
    ) -> Result:
        """Run the stage with parameters as the boot hands them over, defaults applied."""
        values = {
            **{"server": self.site.urls["plain"], "email": "", "domain": NAME, "challenge": "http-01"},
            **{"key_type": "ec-256", "eab_kid": "", "eab_key": "", "timeout": "20"},
            **parameters,
        }
        text = _assign({f"anchor_acme_{key}": value for key, value in values.items()})
        text += _assign({"hostname": hostname}) + before + "\n"
        return self.script(text + ("set -x\n" if trace else "") + "(anchor_acme_run)", shell, ca)

    def processes(self) -> list[str]:
        """Return the names of the responders and clients that run in the site."""
        listing = [*self._enter(), "ps", "-eo", "stat=,comm="]
        words = [line.split() for line in subprocess.check_output(listing, text=True).splitlines()]
        # The site's first process is no init: ended orphans stay as zombies (Z).
        running = [name for state, name, *_ in words if not state.startswith("Z")]
        return sorted(name for name in running if name in {"socat", "ualpn", "uacme", "timeout"})

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.site.pid), "--mount", "--net", "--pid", "--"]


def _assign(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


@contextmanager
def running_site(directory: Path) -> Iterator[Site]:
    """Run the servers below `directory` in namespaces of their own."""
    authority = pki.make_authority(directory / "ca")
    private = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    program = [
        sys.executable,
        "-m",
        "tests.stages.acme_site",
        str(directory),
        str(authority.certificate),
        str(authority.key),
    ]
    child = subprocess.Popen(
        [*private, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *map(str, program)],
        cwd=TOP,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin and child.stdout
    with child, child.stdin, child.stdout:
        try:
            assert select.select([child.stdout], [], [], 30)[0], "the site did not start"
            urls = json.loads(child.stdout.readline())
            inner = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="ascii")
            yield Site(int(inner), authority, urls)
        finally:
            child.kill()  # --kill-child ends everything in the process namespace with it


def make_node(site: Site, root: Path) -> Node:
    """Make what an initramfs with the stage has, below `root`."""
    for path in ("run/anchor", "step", "etc/anchor", "usr/lib/anchor"):
        (root / path).mkdir(parents=True)
    shutil.copy(site.authority.certificate, root / "etc/anchor/ca.pem")
    target = root / "usr/lib/anchor/acme-challenge"
    shutil.copy(STAGE / "acme-challenge.sh", target)
    target.chmod(0o755)
    return Node(site, root)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), pki.Authority(Path(sys.argv[2]), Path(sys.argv[3])))
