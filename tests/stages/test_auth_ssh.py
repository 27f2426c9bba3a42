"""The ssh stage with a real dropbear, and OpenSSH's ssh and scp as the operator's tools."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.conftest import TOP
from tests.shell.conftest import SHELLS
from tests.stages.ssh_site import ADDRESS, ADDRESS6, MAC, PORT, Node, Site, make_node, running_site

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture
def node(site: Site, tmp_path: Path) -> Node:
    return make_node(site, tmp_path / "node")


def _fingerprint(known_hosts: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-l", "-f", known_hosts], capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_files_come_one_by_one(node: Node, site: Site, shell: str) -> None:
    with node.running(shell):
        assert node.ssh("").stdout.startswith(b"this node waits for: /client.cert, /client.key\n")
        done = node.ssh("put client.key", site.node.key.read_bytes())
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert node.ssh("status").stdout.startswith(b"this node waits for: /client.cert\n")
        assert node.ssh("cat > /client.cert", site.node.certificate.read_bytes()).returncode == 0
        assert node.result() == 0, node.log()
    node.check_credentials(site.node)
    assert f"{ADDRESS} sent /client.key" in node.log()


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_scp_brings_both_at_once_as_for_anchor_0_1_5(node: Node, site: Site, tmp_path: Path, shell: str) -> None:
    for name, source in (("client.cert", site.node.certificate), ("client.key", site.node.key)):
        (tmp_path / name).write_bytes(source.read_bytes())
    with node.running(shell):
        done = node.scp("-p", tmp_path / "client.cert", tmp_path / "client.key", f"root@{ADDRESS}:/")
        assert (done.returncode, done.stderr) == (0, b"")
        assert node.result() == 0, node.log()
    node.check_credentials(site.node)


def test_scp_to_the_files_own_paths(node: Node, site: Site) -> None:
    with node.running():
        for path, source in (("/client.key", site.node.key), ("/client.cert", site.node.certificate)):
            assert node.scp(source, f"root@{ADDRESS}:{path}").returncode == 0
        assert node.result() == 0, node.log()
    node.check_credentials(site.node)


def test_scp_over_sftp_is_told_what_to_do(node: Node, site: Site) -> None:
    with node.running():
        done = node.scp(site.node.key, f"root@{ADDRESS}:/client.key", options=())
        assert done.returncode != 0
        assert b"scp -O" in done.stderr


def test_the_host_key_is_new_and_its_fingerprint_is_shown(node: Node, site: Site) -> None:
    seen = []
    for _ in range(2):
        with node.running():
            seen.append(_fingerprint(node.known_hosts()))
            assert f"host key {seen[-1]}\n" in node.log()
            assert node.note("note-fingerprint") == seen[-1]
    assert seen[0] != seen[1]
    assert site.processes("dropbear", "timeout") == []


@pytest.mark.parametrize("kind", ["ecdsa"])
def test_other_kinds_of_trusted_keys_and_a_file_of_them(site: Site, tmp_path: Path, kind: str) -> None:
    lines = [site.key(name, kind).with_suffix(".pub").read_text() for name in ("other-" + kind, kind)]
    node = make_node(site, tmp_path / "node", {"trusted.pub": "# operators\n\n" + "".join(lines)})
    with node.running(auth_key="/trusted.pub"):
        assert node.ssh("status", key=kind).returncode == 0


def test_only_the_trusted_key_gets_in_and_no_password(node: Node, site: Site) -> None:
    with node.running():
        stranger = node.ssh("status", key="stranger")
        assert stranger.returncode == 255
        assert b"Permission denied (publickey)" in stranger.stderr
        # Whatever is asked for, the server offers no password and no keyboard-interactive.
        options = ("-o", "PreferredAuthentications=none,password,keyboard-interactive", "-o", "BatchMode=no")
        assert b"Permission denied (publickey)" in node.ssh("status", options=options).stderr


REQUESTS = [
    "sh",
    "cat /etc/passwd",
    "cat > /etc/passwd",
    "put ../../etc/passwd",
    "put client.key; id >/pwned",
    "put $(id>/pwned)",
    "put `id`",
    "put *",
    "cat > /client.key/../x",
    "scp -f /client.key",
    "scp -t /etc",
    "put client.key -1",
    "put client.key 99999999999999999999",
    "put",
    "rsync --server . /",
    "env",
]


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_the_trusted_key_can_do_nothing_else(node: Node, site: Site, shell: str) -> None:
    before = sorted(node.root.rglob("*"))
    with node.running(shell):
        for request in REQUESTS if shell == "dash" else REQUESTS[3:8]:
            done = node.ssh(request, b"C0644 3 x\nabc\0")
            assert done.returncode == 1, request
            assert b"anchor: " in done.stderr + done.stdout
        assert b"uid=" not in node.ssh("", b"id\n", options=("-tt",)).stdout
    added = {str(path.relative_to(node.root)) for path in set(node.root.rglob("*")) - set(before)}
    assert {name for name in added if "ssh" not in name} <= {
        "script",
        "console",
        "known_hosts",
        "run/anchor/boot.log",
    } | {f"step/{name}" for name in ("note-fingerprint", "error", "hint")}
    assert (node.root / "etc/passwd").read_text().startswith("root:x:0:0::/root:/bin/sh\n")


def test_nothing_is_forwarded(node: Node, site: Site) -> None:
    with node.running():
        local = node.run(["ssh", *node.options(), "-p", str(PORT), "-W", f"127.0.0.1:{PORT}", f"root@{ADDRESS}"])
        assert local.returncode == 255
        assert b"SSH-2.0" not in local.stdout
        remote = node.ssh("status", options=("-R", "4444:127.0.0.1:22", "-o", "ExitOnForwardFailure=yes"))
        assert b"remote port forwarding failed" in remote.stderr


def test_a_file_is_taken_only_when_it_is_whole(node: Node, site: Site) -> None:
    key, cert = site.node.key.read_bytes(), site.node.certificate.read_bytes()
    with node.running():
        for data, reason in ((key[:-20], b"is not whole"), (b"", b"is missing or empty"), (cert, b"no private key")):
            done = node.ssh("put client.key", data)
            assert done.returncode == 1
            assert reason in done.stderr
        assert b"is not whole" in node.ssh("put client.cert", cert + cert[:100]).stderr
        assert b"10 of 99 bytes" in node.ssh("put client.key 99", b"0123456789").stderr
        # Zeros before a size make no other number of it.
        assert b"10 of 99 bytes" in node.ssh("put client.key 0000099", b"0123456789").stderr
        assert b"12 of 11 bytes" in node.ssh("put client.key 11", b"0123456789abcdef").stderr
        assert b"too large" in node.ssh("put client.key", b"x" * 1_100_000).stderr
        encrypted = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nx\n-----END ENCRYPTED PRIVATE KEY-----\n"
        assert b"is encrypted" in node.ssh("put client.key", encrypted).stderr
        assert b"/client.cert, /client.key" in node.ssh("status").stdout
        assert not list(node.credentials.iterdir())
        node.said("that was refused: it is not whole")


@pytest.mark.parametrize(
    "place", ["/etc/anchor/manifest.pub", "/run/anchor/credentials/../boot.json", "/client.pem", ""]
)
@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_files_for_other_places_are_refused(shell: str, place: str) -> None:
    script = f". {TOP}/lib/anchor-credentials.sh; . {TOP}/dracut-modules/auth-ssh/stage.sh\n"
    script += 'anchor_ssh__target /client.key && ! anchor_ssh__target "$1"'
    done = subprocess.run([*SHELLS[shell], "-c", script, "sh", place], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_sender_that_dies_in_the_middle_leaves_nothing(node: Node, site: Site) -> None:
    with node.running(wait_files="/run/anchor/credentials/munge.key"):
        argv = site.enter(
            "ssh", *node.options(), "-p", str(PORT), f"root@{ADDRESS}", "scp -t /run/anchor/credentials/munge.key"
        )
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as sender:
            assert sender.stdin and sender.stdout
            assert sender.stdout.read(1) == b"\0"
            sender.stdin.write(b"C0600 1000 munge.key\n")
            assert sender.stdout.read(1) == b"\0"
            sender.stdin.write(b"x" * 500)
            time.sleep(0.2)
            sender.kill()
        node.said("refused: it is incomplete: 500 of 1000 bytes came")
        assert b"waits for: /run/anchor/credentials/munge.key" in node.ssh("").stdout
        assert b"nothing tells its size" in node.ssh("put munge.key", b"binary\0key").stderr
        assert node.ssh("put munge.key 10", b"binary\0key").returncode == 0
        assert node.result() == 0, node.log()
    target = node.credentials / "munge.key"
    assert target.read_bytes() == b"binary\0key"
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_key_and_certificate_must_belong_together(node: Node, site: Site, shell: str) -> None:
    with node.running(shell):
        assert node.ssh("put client.cert", site.node.certificate.read_bytes()).returncode == 0
        done = node.ssh("put client.key", site.other.key.read_bytes())
        assert done.returncode == 1
        assert b"do not belong together" in done.stderr
        node.said("warning: client.key and client.cert do not belong together")
        assert not list(node.credentials.iterdir())
        assert node.ssh("put client.key", site.node.key.read_bytes()).returncode == 0
        assert node.result() == 0, node.log()
    node.check_credentials(site.node)
    assert node.log().count("do not belong together") == 1


def test_the_wait_has_an_end(node: Node, site: Site) -> None:
    with node.running(timeout="2"):
        assert node.ssh("put client.key", site.node.key.read_bytes()).returncode == 0
        assert node.result() == 1
    assert node.note("error") == "nobody sent /client.cert, within 2 s"
    assert "scp -O" in node.note("hint")
    assert not list(node.credentials.iterdir())


def test_a_session_that_stays_open_is_ended_too(node: Node, site: Site) -> None:
    with node.running(timeout="1"):
        argv = site.enter("ssh", *node.options(), "-p", str(PORT), f"root@{ADDRESS}", "put client.key")
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as sender:
            assert node.result() == 1
            assert sender.wait(10) == 255


def test_a_repeated_step_uses_what_has_come(node: Node, site: Site) -> None:
    (node.credentials / "client.crt").write_bytes(site.node.certificate.read_bytes())
    (node.root / "client.key").write_bytes(site.node.key.read_bytes())  # as somebody may put into the initramfs
    node.start()
    assert node.result() == 0, node.log()
    node.check_credentials(site.node)
    # The node's boot is traced (set -x), and the key was read.
    assert "+ anchor_ssh_run" in node.log()
    assert not [line for line in site.node.key.read_text().splitlines() if line in node.log()]


def test_a_port_in_use_is_said(node: Node, site: Site) -> None:
    taken = subprocess.Popen(site.enter("socat", f"TCP6-LISTEN:{PORT},ipv6-v6only=0,reuseaddr,fork", "/dev/null"))
    time.sleep(0.3)
    try:
        node.start()
        assert node.result() == 1
    finally:
        subprocess.run(site.enter("sh", "-c", "kill -TERM -1"), check=False)
        taken.wait(5)
    assert node.note("error").startswith("the SSH server does not start")
    assert "rd.anchor.ssh.port=" in node.note("hint")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("/no/such.pub", "there is no file /no/such.pub"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "no public key"),
        ('command="sh" ssh-ed25519 AAAAC3Nz', "or one with options"),
        ("ssh-ed25519 $(touch /pwned)", "no public key"),
        ("#", "holds no public key"),
    ],
)
def test_a_trusted_key_that_is_none_is_refused(node: Node, text: str, word: str) -> None:
    node.start(auth_key=text)
    assert node.result() == 1
    assert word in node.note("error")
    assert "rd.anchor.ssh.auth_key=@FILE" in node.note("hint")


def _told(requests: list[str]) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(requests[0]).query, strict_parsing=True).items()}


@pytest.mark.parametrize("bootif", ["", f"01-{MAC.replace(':', '-')}", MAC.upper()])
def test_a_service_is_told_over_tls(node: Node, site: Site, bootif: str) -> None:
    with site.listener("https") as listener, node.running(notify_url=f"{listener.url}?site=a%20b", bootif=bootif):
        node.said("told https://127.0.0.1")
        time.sleep(1.5)
        assert len(listener.requests()) >= 2
        assert _told(listener.requests()) == {
            **{"site": "a b", "mac": MAC, "domain": "node1.example.org", "dev": "eth0"},
            **{"addr": ADDRESS, "addr6": ADDRESS6, "fingerprint": _fingerprint(node.known_hosts())},
        }
        assert re.fullmatch(r"/here\?site=a%20b(&[a-z0-9]+=[A-Za-z0-9._~%-]*){6}", listener.requests()[0])
    assert node.log().count("told ") == 1


def test_a_service_with_a_strange_certificate_is_not_told(node: Node, site: Site, tmp_path: Path) -> None:
    stranger = make_node(site, tmp_path / "stranger")
    (stranger.root / "etc/anchor/ca.pem").write_bytes(site.other.certificate.read_bytes())
    with site.listener("https") as listener, stranger.running(notify_url=listener.url):
        log = stranger.said("warning: cannot tell https://127.0.0.1")
        assert "certificate" in log
        assert listener.requests() == []
        assert stranger.ssh("status").returncode == 0


@pytest.mark.parametrize("kind", ["slow", "absent"])
def test_a_service_that_does_not_answer_holds_nothing_up(node: Node, site: Site, kind: str) -> None:
    start = time.monotonic()
    with site.listener("slow") as listener:
        url = listener.url if kind == "slow" else "http://127.0.0.1:1/"
        with node.running(notify_url=url, bootif="20-hostile-$(reboot)"):
            if kind == "absent":
                node.said("cannot tell http://127.0.0.1:1/")
            for name, source in (("client.key", site.node.key), ("client.cert", site.node.certificate)):
                assert node.ssh(f"put {name}", source.read_bytes()).returncode == 0
            assert node.result() == 0, node.log()
    assert time.monotonic() - start < 30
    assert "BOOTIF is not a MAC address" in node.log()
    assert node.log().count("cannot tell") == (kind == "absent")
