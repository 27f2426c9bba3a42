"""The demo's site with its real servers: they answer, keep strangers out, and are gone afterwards."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Mapping
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError, UsageError
from anchor_build.run import run
from contrib.site import image, kept, pki, servers

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pki.Authority:
    return pki.make_authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("www")
    (directory / "image").write_bytes(bytes(range(256)) * 8)
    return directory


def get(
    port: int,
    path: str,
    *,
    ca: Path | None = None,
    leaf: pki.Leaf | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    """Ask 127.0.0.1 with Python's own client; over TLS when `ca` is given."""
    if ca:
        context = ssl.create_default_context(cafile=str(ca))
        if leaf:
            context.load_cert_chain(leaf.certificate, leaf.key)
        made: http.client.HTTPConnection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    else:
        made = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        made.request("GET", path, headers=dict(headers or {}))
        response = made.getresponse()
        return response.status, dict(response.headers), response.read()
    finally:
        made.close()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def text_of(certificate: Path) -> str:
    return run(["openssl", "x509", "-in", certificate, "-noout", "-text"]).stdout


# --- certificates


def test_leaf_is_for_its_addresses_and_verifies(authority: pki.Authority, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store", addresses=["store.example", "192.0.2.7", "2001:db8::1"])
    assert run(["openssl", "verify", "-CAfile", authority.certificate, leaf.certificate]).stdout.endswith("OK\n")
    text = text_of(leaf.certificate)
    assert "DNS:store.example, IP Address:192.0.2.7, IP Address:2001:DB8:0:0:0:0:0:1" in text
    assert "TLS Web Server Authentication" in text
    assert "NIST CURVE: P-256" in text
    assert leaf.key.stat().st_mode & 0o777 == 0o600


def test_validity_can_lie_in_the_past(authority: pki.Authority, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "old", not_before="20200101000000Z", not_after="20210101000000Z")
    done = run(["openssl", "verify", "-CAfile", authority.certificate, leaf.certificate], check=False)
    assert done.status != 0
    assert "certificate has expired" in done.stderr + done.stdout


def test_name_that_is_no_file_name_is_refused(authority: pki.Authority, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a name for a certificate"):
        pki.issue(authority, tmp_path, "../store")


# --- the image store


def test_store_answers_holders_of_a_certificate_only(authority: pki.Authority, content: Path, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    node = pki.issue(authority, tmp_path, "node1", client=True)
    stranger = pki.issue(pki.make_authority(tmp_path / "other"), tmp_path / "other", "node1", client=True)
    ca = authority.certificate
    with servers.nginx(tmp_path / "nginx", root=content, leaf=leaf, client_ca=ca) as store:
        assert get(store.https_port, "/image", ca=ca)[0] == 400
        assert get(store.https_port, "/image", ca=ca, leaf=stranger)[0] == 400
        status, headers, body = get(store.https_port, "/image", ca=ca, leaf=node)
        assert (status, body) == (200, (content / "image").read_bytes())
        assert get(store.https_port, "/missing", ca=ca, leaf=node)[0] == 404
        part = {"Range": "bytes=256-", "If-Range": headers["ETag"]}
        status, _, body = get(store.https_port, "/image", ca=ca, leaf=node, headers=part)
        assert (status, len(body)) == (206, 7 * 256)
        assert get(store.http_port, "/image")[0] == 200
    lines = store.access_log.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("206 ")
    assert lines[4].endswith('"bytes=256-" "CN=node1" GET /image')
    assert not is_open(store.https_port)
    assert not is_open(store.http_port)


def test_store_without_client_ca_or_plain_listener(authority: pki.Authority, content: Path, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    with servers.nginx(tmp_path / "nginx", root=content, leaf=leaf, plain=False) as store:
        assert store.http_port == 0
        assert get(store.https_port, "/image", ca=authority.certificate)[0] == 200


def test_servers_end_when_the_body_fails(authority: pki.Authority, content: Path, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    with (
        pytest.raises(KeyboardInterrupt),
        servers.nginx(tmp_path / "nginx", root=content, leaf=leaf) as store,
    ):
        raise KeyboardInterrupt
    assert not is_open(store.https_port)


def test_server_that_cannot_start_says_why(content: Path, tmp_path: Path) -> None:
    missing = pki.Leaf(tmp_path / "no.crt", tmp_path / "no.key")
    with (
        pytest.raises(AnchorError, match=r"ended at once\n.*no\.crt"),
        servers.nginx(tmp_path / "nginx", root=content, leaf=missing),
    ):
        pytest.fail("nginx started without a certificate")


# --- the ACME server


def test_acme_server_answers_and_is_gone_afterwards(authority: pki.Authority, tmp_path: Path) -> None:
    with servers.pebble(tmp_path / "acme", authority, http_port=5002, tls_port=5001) as acme:
        status, _, body = get(acme.port, "/dir", ca=authority.certificate)
        assert status == 200
        assert json.loads(body)["newOrder"].startswith(f"https://127.0.0.1:{acme.port}/")
        assert acme.directory_url == f"https://127.0.0.1:{acme.port}/dir"
        assert "CN = Pebble Root CA" in text_of(acme.root)
    assert not is_open(acme.port)
    assert not any(Path(f"/proc/{pid}").exists() for pid in acme.pids)


def test_acme_server_can_demand_account_binding(authority: pki.Authority, tmp_path: Path) -> None:
    eab = {"kid-1": "a2V5LWtleS1rZXkta2V5LWtleS1rZXk"}
    with servers.pebble(tmp_path / "acme", authority, http_port=5002, tls_port=5001, eab=eab) as acme:
        meta = json.loads(get(acme.port, "/dir", ca=authority.certificate)[2])["meta"]
        assert meta["externalAccountRequired"] is True


# --- processes


def test_free_ports_differ_and_are_free() -> None:
    ports = {servers.free_port() for _ in range(20)}
    assert len(ports) > 15
    assert not any(is_open(port) for port in ports)


def start_store(directory: Path, content: Path, leaf: pki.Leaf, *, outlive: bool) -> subprocess.Popen[str]:
    """Start a process of its own that runs a store and prints its port and process id."""
    script = f"""
        import time
        from pathlib import Path
        from contrib.site import pki, servers
        leaf = pki.Leaf(Path({str(leaf.certificate)!r}), Path({str(leaf.key)!r}))
        paths = Path({str(directory)!r}), Path({str(content)!r})
        with servers.nginx(paths[0], root=paths[1], leaf=leaf, outlive={outlive}) as store:
            print(store.https_port, store.pids[0], flush=True)
            time.sleep(60)
    """
    argv = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)


def test_server_ends_when_its_starter_is_killed(authority: pki.Authority, content: Path, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    with start_store(tmp_path / "nginx", content, leaf, outlive=False) as starter:
        assert starter.stdout
        port = int(starter.stdout.readline().split()[0])
        assert is_open(port)
        starter.kill()
    deadline = time.monotonic() + 5
    while is_open(port) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_open(port)


def test_kept_server_outlives_its_starter_until_it_is_stopped(
    authority: pki.Authority, content: Path, tmp_path: Path
) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    with start_store(tmp_path / "nginx", content, leaf, outlive=True) as starter:
        assert starter.stdout
        port, pid = map(int, starter.stdout.readline().split())
        kept.write_kept(tmp_path, [pid])
        starter.kill()
    assert is_open(port)
    assert kept.stop_kept(tmp_path) == 1
    assert not is_open(port)
    assert kept.read_kept(tmp_path) == []


def test_letting_go_of_a_kept_server_leaves_it_running(authority: pki.Authority, content: Path, tmp_path: Path) -> None:
    leaf = pki.issue(authority, tmp_path, "store")
    with ExitStack() as stack:
        store = stack.enter_context(servers.nginx(tmp_path / "nginx", root=content, leaf=leaf, outlive=True))
        kept.write_kept(tmp_path, store.pids)
        with pytest.warns(ResourceWarning, match="still running"):
            stack.pop_all()
    assert is_open(store.https_port)
    assert kept.stop_kept(tmp_path) == 1
    os.waitpid(store.pids[0], 0)


def test_only_the_recorded_process_is_stopped(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        kept.write_kept(tmp_path, [other.pid])
        recorded = json.loads((tmp_path / kept.FILE).read_text(encoding="utf-8"))
        recorded[0]["started"] += 1  # as if the id had been given to another process since
        (tmp_path / kept.FILE).write_text(json.dumps(recorded), encoding="utf-8")
        assert kept.stop_kept(tmp_path) == 0
        assert other.poll() is None
        other.send_signal(signal.SIGKILL)


# --- the image


def test_image_files_do_not_depend_on_the_checkout() -> None:
    with tarfile.open(fileobj=BytesIO(image.image_files("ssh-ed25519 AAAA someone\n"))) as tar:
        members = {member.name: member for member in tar.getmembers()}
        keys = tar.extractfile("root/.ssh/authorized_keys")
        assert keys
        assert keys.read() == b"ssh-ed25519 AAAA someone\n"
    assert {(member.uid, member.gid, member.mtime) for member in members.values()} == {(0, 0, image.IMAGE_TIME)}
    assert members["root/.ssh"].mode == 0o700
    assert members["root/.ssh/authorized_keys"].mode == 0o600
    assert members["usr/local/sbin/site-names"].mode == 0o755


@pytest.mark.slow
def test_image_holds_what_a_node_needs(tmp_path: Path) -> None:
    key = image.login_key(image.CACHE)
    made = image.build_image(image.CACHE, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8"))
    assert image.build_image(image.CACHE, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8")) == made
    assert made.squashfs.stat().st_size < 84e6
    assert made.kernel.stat().st_size > 1e6
    assert made.modules.parts[-3:] == ("lib", "modules", made.release)
    listing = run(["unsquashfs", "-lln", made.squashfs]).stdout
    owned = {line.split()[-1]: line.split()[:2] for line in listing.splitlines() if line}
    assert owned["squashfs-root"] == ["drwxr-xr-x", "0/0"]
    assert owned["squashfs-root/root/.ssh/authorized_keys"] == ["-rw-------", "0/0"]
    assert f"squashfs-root/usr/lib/modules/{made.release}/modules.dep" in owned
    assert "squashfs-root/mnt" in owned
    assert not [name for name in owned if name.startswith("squashfs-root/var/cache/")]


SITE_NAMES = Path(__file__).parents[2] / "contrib" / "site" / "root" / "usr" / "local" / "sbin" / "site-names"


@pytest.mark.parametrize("lease", [True, False])
def test_names_come_from_the_lease_or_from_a_link_that_needs_none(tmp_path: Path, lease: bool) -> None:
    for name in ("etc", "proc/sys/kernel", "run/systemd/netif/leases", "run/systemd/netif/links", "run/anchor/steps"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/hostname").write_text("localhost\n")
    (tmp_path / "run/anchor/steps/node").write_text("node6.example\n")
    netif = tmp_path / "run/systemd/netif"
    (netif / "links/1").write_text("ADMIN_STATE=unmanaged\n")
    (netif / "links/2").write_text("ADMIN_STATE=configured\nDNS=fd07::3\n")
    if lease:
        (netif / "leases/2").write_text("HOSTNAME=node4.example\nDNS=10.0.2.3\n")
    done = subprocess.run(["sh", SITE_NAMES], env={**os.environ, "SITE_ROOT": str(tmp_path)}, timeout=60, check=False)
    assert done.returncode == 0
    name, server = ("node4.example", "10.0.2.3") if lease else ("node6.example", "fd07::3")
    assert (tmp_path / "proc/sys/kernel/hostname").read_text() == f"{name}\n"
    assert (tmp_path / "etc/resolv.conf").read_text() == f"nameserver {server}\n"
