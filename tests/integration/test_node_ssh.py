"""A node that boots by an entry for Anchor 0.1.5: an operator sends its key by scp, and the image comes by rsync."""

from __future__ import annotations

import http.server
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from anchor_build import qemu
from contrib.site import pki, servers
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site, booted

pytestmark = [pytest.mark.boot, pytest.mark.slow]

MAC = "52:54:00:12:34:56"  # QEMU's first card


@contextmanager
def rsync_daemon(directory: Path, served: Path) -> Iterator[int]:
    """Serve a directory as the module `images` on loopback; yields the port."""
    config, port = directory / "rsyncd.conf", servers.free_port()
    config.write_text(f"[images]\npath = {served}\nread only = yes\nuse chroot = no\nuid = root\ngid = root\n")
    argv = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={port}", "--address=127.0.0.1"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as daemon:
        try:
            yield port
        finally:
            daemon.terminate()


@contextmanager
def notified(told: queue.Queue[str]) -> Iterator[int]:
    """Be the service that nodes tell of themselves; yields the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.put(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *words: object) -> None:  # noqa: A002 - the base class chose the name
            """Stay quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def run(*argv: str | Path) -> str:
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def send(site: Site, directory: Path, port: int, told: queue.Queue[str], facts: dict[str, str]) -> None:
    """Do what an operator does: wait to be told, compare the host key, send key and certificate."""
    path = told.get(timeout=LIMIT_S)
    facts.update({name: values[0] for name, values in parse_qs(urlsplit(path).query).items()})
    known = directory / "known_hosts"
    known.write_text(run("ssh-keyscan", "-t", "ed25519", "-p", str(port), "127.0.0.1"))
    facts["seen"] = run("ssh-keygen", "-l", "-f", known).split()[1]
    options = ["-F", "none", "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes"]
    options += ["-o", "BatchMode=yes", "-i", str(site.login_key), "-P", str(port)]
    run("scp", "-O", *options, directory / "client.cert", directory / "client.key", "root@127.0.0.1:/")


def test_an_operator_sends_the_key_and_the_image_comes_by_rsync(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    trusted = site.login_key.with_suffix(".pub")
    initrd = build_initramfs(
        *("--auth", "ssh", "--auth", "none", "--transport", "rsync", "--image", "squashfs"),
        *("--set", f"rd.anchor.ssh.auth_key=@{trusted}"),
    )
    leaf = pki.issue(site.authority, tmp_path, "node1", client=True)
    leaf.certificate.rename(tmp_path / "client.cert")
    leaf.key.rename(tmp_path / "client.key")
    key = (tmp_path / "client.key").read_text()
    told: queue.Queue[str] = queue.Queue()
    facts: dict[str, str] = {}
    port = servers.free_port()
    with notified(told) as service, rsync_daemon(tmp_path, site.root_image.squashfs.parent) as images:
        append = (
            f"root=anchor dropbear_notify_url=http://10.0.2.2:{service}/here dropbear_sleep_time=2 "
            f"BOOTIF=01-{MAC.replace(':', '-')} squashfs_rsync=1 rd.anchor.on_failure=poweroff "
            f"squashfs_server=rsync://10.0.2.2:{images}/images/{site.root_image.squashfs.name} {site.digest}"
        )
        machine = replace(site.machine(initrd, append), forwards=(qemu.Forward(22, port),))
        operator = threading.Thread(target=send, args=(site, tmp_path, port, told, facts), daemon=True)
        operator.start()
        with booted(site, machine, tmp_path) as node:
            operator.join(10)
            steps = {step["step"]: step for step in node.report["steps"]}
            assert steps["auth"]["stage"] == "ssh"
            assert steps["auth"]["fingerprint"] == facts["fingerprint"] == facts["seen"]
            assert (facts["mac"], facts["addr"], facts["domain"]) == (MAC, "10.0.2.15", "node1.demo.example")
            assert steps["image"]["sha256"] == site.root_image.sha256
            assert node.host.file("/run/anchor/credentials/client.key").content_string == key
            assert node.host.file("/run/anchor/credentials/client.key").mode == 0o600
            assert not node.host.file("/run/anchor/ssh").exists
            used = int(node.host.check_output("df --output=used -B1 /run/anchor/image | tail -n 1"))
            assert used < site.root_image.squashfs.stat().st_size * 1.02
            logs = node.host.check_output("journalctl -b --no-pager -q; cat /run/anchor/boot.log")
            assert "sent /client.key" in logs
            assert not [line for line in key.splitlines()[1:-1] if line in logs]
