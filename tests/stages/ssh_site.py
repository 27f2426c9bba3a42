"""A site for what speaks SSH: a network of its own, keys, and a node that runs the ssh stage in there.

The node's server listens on all addresses and dropbear reads the machine's own account files, so the node lives in
network, mount and process namespaces. This file, run as a program in there, is the service that nodes notify.
"""

from __future__ import annotations

import http.server
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from contrib.site import pki
from tests.shell.conftest import SHELLS

TOP = Path(__file__).resolve().parents[2]
STAGE = TOP / "dracut-modules" / "auth-ssh"
PORT = 2222
ADDRESS, ADDRESS6, MAC = "192.0.2.7", "2001:db8::7", "02:00:00:00:00:07"
DEFAULTS = {
    **{"wait_files": "/client.cert,/client.key", "port": str(PORT), "timeout": "20"},
    **{"notify_url": "", "notify_interval": "1", "bootif": ""},
}

# What a node's boot does around a stage. The account files are the node's own, for dropbear knows no other place.
PROLOGUE = """
for file in etc/passwd etc/shadow etc/shells root; do mount --bind "$ANCHOR_ROOT/$file" "/$file" || exit 99; done
LC_ALL=C; export LC_ALL
for lib in report types fetch credentials; do . "$top/lib/anchor-$lib.sh"; done
. "$top/dracut-modules/auth-ssh/anchor-ssh.sh"
. "$top/dracut-modules/auth-ssh/stage.sh"
anchor_step_dir="$ANCHOR_ROOT/step"
anchor_net_hostname() { printf 'node1.example.org\\n'; }
(set -x; anchor_ssh_run) </dev/null
"""

NETWORK = f"""
ip link set lo up && ip link add eth0 address {MAC} type veth peer name far &&
ip address add {ADDRESS}/24 dev eth0 && ip address add {ADDRESS6}/64 nodad dev eth0 &&
ip link set eth0 up && ip link set far up && echo ready && exec sleep 600
"""


@dataclass(frozen=True)
class Site:
    """The running site: `pid` is the first process of its namespaces."""

    pid: int
    directory: Path
    authority: pki.Authority
    node: pki.Leaf
    other: pki.Leaf

    def key(self, name: str, kind: str = "ed25519") -> Path:
        """Return a private SSH key; the public one is beside it."""
        path = self.directory / name
        if not path.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", f"{name} key", "-f", path], check=True)
        return path

    def enter(self, *argv: str | Path) -> list[str]:
        """Return the arguments that run a program inside the site."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "--", *map(str, argv)]

    def processes(self, *names: str) -> list[str]:
        """Return those of the named programs that run in the site; without names, all that were started in it."""
        listing = subprocess.check_output(self.enter("ps", "-eo", "pid=,stat=,comm="), text=True).splitlines()
        # The site's first process is no init: ended orphans stay as zombies (Z).
        running = [name for pid, state, name, *_ in map(str.split, listing) if pid != "1" and state[0] != "Z"]
        running.remove("ps")
        return sorted(name for name in running if not names or name in names)

    @contextmanager
    def listener(self, kind: str) -> Iterator[Listener]:
        """Run the notified service: `https`, `http`, or one that is `slow`."""
        log = self.directory / f"{kind}.log"
        log.write_text("")
        argv = [sys.executable, "-m", "tests.stages.ssh_site", kind, str(log), str(self.directory)]
        child = subprocess.Popen(self.enter(*argv), cwd=TOP, stdout=subprocess.PIPE, text=True)
        assert child.stdout
        with child, child.stdout:
            try:
                port = int(child.stdout.readline())
                scheme = "https" if kind == "https" else "http"
                yield Listener(f"{scheme}://127.0.0.1:{port}/here", log)
            finally:
                child.kill()


@dataclass(frozen=True)
class Listener:
    """A running service and the paths that it was asked for."""

    url: str
    log: Path

    def requests(self) -> list[str]:
        """Return the requested paths."""
        return self.log.read_text().splitlines()


@contextmanager
def running_site(directory: Path) -> Iterator[Site]:
    """Make the namespaces and the certificates."""
    authority = pki.make_authority(directory / "ca")
    leaves = [pki.issue(authority, directory, name, client=True) for name in ("node", "other")]
    pki.issue(authority, directory, "server")
    private = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
    child = subprocess.Popen([*private, "sh", "-c", NETWORK], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    with child, child.stdout:
        try:
            assert child.stdout.readline() == "ready\n"
            inner = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="ascii")
            yield Site(int(inner), directory, authority, *leaves)
        finally:
            child.kill()  # --kill-child ends everything in the process namespace with it


@dataclass
class Node:
    """A node inside the site; `child` is the running stage."""

    site: Site
    root: Path
    child: subprocess.Popen[str] | None = None

    @property
    def credentials(self) -> Path:
        """What auth leaves."""
        return self.root / "run/anchor/credentials"

    @contextmanager
    def running(self, shell: str = "dash", *, auth_key: str = "", **parameters: str) -> Iterator[Node]:
        """Run the stage with parameters as the boot hands them over, and have its server listening."""
        self.start(shell, auth_key=auth_key, **parameters)
        try:
            self.said("waiting for")
            yield self
        finally:
            self.stop()

    def start(self, shell: str = "dash", *, auth_key: str = "", **parameters: str) -> None:
        """Start the stage; its shell also runs what receives the files."""
        program, *options = SHELLS[shell]
        receive = self.root / "usr/lib/anchor/ssh-receive"
        receive.write_text(
            receive.read_text().replace("#!/bin/sh", f"#!{shutil.which(program)} {' '.join(options)}", 1)
        )
        trusted = auth_key or self.site.key("operator").with_suffix(".pub").read_text().strip()
        values = {
            f"anchor_ssh_{name}": value for name, value in {**DEFAULTS, "auth_key": trusted, **parameters}.items()
        }
        values |= {"top": str(TOP), "ANCHOR_ROOT": str(self.root)}
        script = self.root / "script"
        script.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()) + PROLOGUE)
        argv = self.site.enter("unshare", "--mount", "--", *SHELLS[shell], script)
        with (self.root / "console").open("w") as console:
            self.child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console, text=True, start_new_session=True
            )

    def stop(self) -> None:
        """End the stage if it still runs, as a boot that is broken off does, and see that nothing is left."""
        assert self.child
        if self.child.poll() is None:
            subprocess.run(self.site.enter("sh", "-c", "kill -TERM -1"), check=False)
            self.child.wait(10)
            # What received files cleans up after itself, and timeout ends after its child.
            end = time.monotonic() + 10
            while left := self.site.processes():
                assert time.monotonic() < end, left
                time.sleep(0.02)

    def log(self) -> str:
        """Return what the console shows."""
        return (self.root / "console").read_text(errors="replace")

    def said(self, text: str, seconds: float = 10) -> str:
        """Wait until the console shows a text."""
        end = time.monotonic() + seconds
        while text not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)
        return self.log()

    def result(self, seconds: float = 20) -> int:
        """Wait for the stage's status, and see that it took everything down."""
        assert self.child
        status = self.child.wait(seconds)
        assert self.site.processes("dropbear", "timeout", "ssh-receive", "curl") == []
        assert not (self.root / "run/anchor/ssh").exists()
        assert not (self.root / "root/.ssh/authorized_keys").exists()
        return status

    def note(self, key: str) -> str:
        """Return a fact of the step's record, or nothing."""
        path = self.root / "step" / key
        return path.read_text().strip() if path.exists() else ""

    def known_hosts(self, address: str = ADDRESS) -> Path:
        """Ask the server for its host key and return it as a known_hosts file, for tests of something else."""
        path = self.root / "known_hosts"
        scan = self.site.enter("ssh-keyscan", "-p", str(PORT), "-t", "ed25519", "-T", "5", address)
        path.write_text(subprocess.run(scan, capture_output=True, text=True, check=True).stdout)
        return path

    def options(self, key: str = "operator") -> list[str]:
        """Return the options of the operator's ssh and scp."""
        return [
            *("-F", "none", "-i", str(self.site.key(key)), "-o", f"UserKnownHostsFile={self.known_hosts()}"),
            *("-o", "StrictHostKeyChecking=yes", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes"),
            *("-o", "ConnectTimeout=5", "-o", "IdentityAgent=none"),
        ]

    def ssh(
        self, command: str, data: bytes = b"", *, key: str = "operator", options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[bytes]:
        """Run ssh as the operator does."""
        words = [*options, "-p", str(PORT), f"root@{ADDRESS}", *([command] if command else [])]
        return self.run(["ssh", *self.options(key), *words], data)

    def scp(self, *words: str | Path, options: tuple[str, ...] = ("-O",)) -> subprocess.CompletedProcess[bytes]:
        """Run scp as the operator does."""
        return self.run(["scp", *self.options(), "-P", str(PORT), *options, *map(str, words)])

    def run(self, argv: list[str], data: bytes = b"", seconds: float = 15) -> subprocess.CompletedProcess[bytes]:
        """Run a program inside the site."""
        return subprocess.run(
            self.site.enter(*argv), input=data, capture_output=True, timeout=seconds, check=False, cwd=self.root
        )

    def check_credentials(self, leaf: pki.Leaf) -> None:
        """Expect this pair in place, for root alone."""
        directory = self.credentials
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.iterdir()]}
        assert modes == {"credentials": 0o700, "client.crt": 0o600, "client.key": 0o600}
        assert (directory / "client.crt").read_bytes() == leaf.certificate.read_bytes()
        assert (directory / "client.key").read_bytes() == leaf.key.read_bytes()


def make_node(site: Site, root: Path, files: Mapping[str, str] | None = None) -> Node:
    """Make what an initramfs with the stage has, below `root`; `files` are further ones."""
    for path in ("run/anchor/credentials", "step", "etc/anchor", "usr/lib/anchor/lib", "root", "sys/class/net/eth0"):
        (root / path).mkdir(parents=True, mode=0o700)
    (root / "root").chmod(0o700)
    (root / "etc").chmod(0o755)
    shutil.copy(site.authority.certificate, root / "etc/anchor/ca.pem")
    for library in (STAGE / "anchor-ssh.sh", TOP / "lib/anchor-credentials.sh"):
        shutil.copy(library, root / "usr/lib/anchor/lib")
    target = root / "usr/lib/anchor/ssh-receive"
    shutil.copy(STAGE / "ssh-receive.sh", target)
    target.chmod(0o755)
    # As dracut leaves them: a shell that is not in the initramfs, a locked root, and no shell allowed.
    texts = {
        "etc/passwd": "root:x:0:0::/root:/bin/not-there\nnobody:x:65534:65534::/:/bin/false\n",
        "etc/shadow": "root:!unprovisioned:::::::\n",
        "etc/shells": "",
        "sys/class/net/eth0/address": f"{MAC}\n",
    }
    for name, text in {**texts, **(files or {})}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o644)
    return Node(site, root)


def serve(kind: str, log: Path, directory: Path) -> None:
    """Be the notified service until killed; its port goes to standard output."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with log.open("a") as out:
                out.write(f"{self.path}\n")
            if kind == "slow":
                time.sleep(60)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - the base class chose the name
            """Stay quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if kind == "https":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server.crt", directory / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_port, flush=True)  # noqa: T201 - the test reads it
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
