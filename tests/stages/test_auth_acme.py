"""The acme stage against real ACME servers, under each shell that a node may have."""

from __future__ import annotations

import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from contrib.site import pki, servers
from tests.stages.acme_site import KEY_ID, MAC_KEY, NAME, SHELLS, Node, Result, Site, make_node, running_site

# Each test runs a real order against pebble, a second or more each.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("site")) as running:
        yield running


@pytest.fixture
def node(site: Site, tmp_path: Path) -> Node:
    return make_node(site, tmp_path / "node")


def _openssl(*words: str | Path) -> str:
    return subprocess.run(["openssl", *words], capture_output=True, text=True, check=True).stdout


def _check_credentials(node: Node, result: Result, kind: str = "Public-Key: (256 bit)") -> None:
    """Expect a whole, verified pair of files with the right modes, and nothing else left behind."""
    assert result.status == 0, result.log
    directory = result.credentials
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [directory, *directory.iterdir()]}
    files = dict.fromkeys(("client.crt", "client.key", "acme-account.key"), 0o600)
    assert modes == {"credentials": 0o700, **files}
    certificate, key = directory / "client.crt", directory / "client.key"
    assert certificate.read_text().count("BEGIN CERTIFICATE") >= 2, "the chain is missing"
    root = node.site.urls["plain root"]
    _openssl("verify", "-CAfile", root, "-untrusted", certificate, "-verify_hostname", NAME, certificate)
    public = _openssl("x509", "-in", certificate, "-noout", "-pubkey")
    assert public == _openssl("pkey", "-in", key, "-pubout")
    assert kind in _openssl("x509", "-in", certificate, "-noout", "-text")
    _check_clean(node)


def _check_clean(node: Node) -> None:
    # What a test put in the stage's way is ended by a trap, and gone a moment later.
    until = time.monotonic() + 5
    while node.processes() and time.monotonic() < until:
        time.sleep(0.05)
    assert node.processes() == []
    assert not (node.root / "run/anchor/acme").exists()


def _check_refused(node: Node, result: Result, *words: str) -> None:
    assert result.status == 1, result.log
    told = result.note("error") + "\n" + result.note("hint")
    for word in words:
        assert word in told
    assert result.log.count("anchor: error: ") == 1
    assert not (result.credentials / "client.crt").exists()
    _check_clean(node)


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_http_challenge(node: Node, shell: str) -> None:
    result = node.run(shell=shell, domain="", hostname=NAME, email="ops@example.org")
    _check_credentials(node, result)
    facts = [result.note(f"note-{key}") for key in ("name", "server", "challenge")]
    assert facts == [NAME, node.site.urls["plain"].split("/")[2], "http-01"]
    assert result.note("number-attempts") == "1"


@pytest.mark.parametrize("passwd", ["", "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"])
def test_tls_challenge_with_and_without_a_user_to_become(node: Node, passwd: str) -> None:
    (node.root / "etc/passwd").write_text(passwd)
    result = node.run(challenge="tls-alpn-01")
    _check_credentials(node, result)


def test_tls_responder_is_ready_when_the_order_begins(node: Node) -> None:
    """Ualpn closes what comes in its first tenth of a second, so a quick server would find nobody."""
    text = """
anchor_acme_timeout=20 anchor_acme_challenge=tls-alpn-01
export ANCHOR_ACME_DIR="$ANCHOR_ROOT/run/anchor/acme"
mkdir -p "$ANCHOR_ACME_DIR"
anchor_acme__respond && anchor_acme__responds || exit 1
timeout 0.3 socat -u TCP:127.0.0.1:443 -
echo "held open: $?"
anchor_acme__responder_end
"""
    result = node.script(text)
    assert "held open: 124" in result.log
    # What was killed may take a moment to go.
    deadline = time.monotonic() + 10
    while node.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert node.processes() == []


@pytest.mark.parametrize(
    ("key_type", "kind"),
    [("ec-384", "Public-Key: (384 bit)"), ("rsa-2048", "Public-Key: (2048 bit)"), ("rsa-3072", "(3072 bit)")],
)
def test_key_types(node: Node, key_type: str, kind: str) -> None:
    _check_credentials(node, node.run(key_type=key_type), kind)


def test_repeated_run_replaces_the_credentials(node: Node) -> None:
    first = node.run()
    before = (first.credentials / "client.key").read_bytes()
    second = node.run()
    _check_credentials(node, second)
    assert (second.credentials / "client.key").read_bytes() != before


def test_account_binding_keeps_its_key_to_itself(node: Node) -> None:
    """Neither a traced boot's log nor another user of the node sees the key."""
    spy = "while :; do cat /proc/[0-9]*/cmdline; sleep 0.01; done"
    before = f"""
setpriv --reuid=65534 --regid=65534 --clear-groups sh -c '{spy}' >"$ANCHOR_ROOT/seen" 2>/dev/null &
trap 'kill $!' EXIT
sleep 0.2
"""
    server, key = node.site.urls["bound"], MAC_KEY + "=="
    result = node.run(trace=True, before=before, server=server, eab_kid=KEY_ID, eab_key=key)
    assert result.status == 0, result.log
    assert "+ anchor_acme_run" in result.log
    assert MAC_KEY not in result.log
    seen = (node.root / "seen").read_text(errors="replace")
    assert "uacme" in seen, "the spy saw nothing at all"
    assert MAC_KEY not in seen
    assert "hidepid" not in Path(f"/proc/{node.site.pid}/mounts").read_text(encoding="utf-8")


def test_wrong_account_binding(node: Node) -> None:
    result = node.run(server=node.site.urls["bound"], eab_kid=KEY_ID, eab_key="AAAA" + MAC_KEY[4:])
    _check_refused(node, result, NAME, "eab_kid")
    assert result.seconds < 15


def test_missing_account_binding(node: Node) -> None:
    _check_refused(node, node.run(server=node.site.urls["bound"]), "account binding", "rd.anchor.acme.eab_key=")


@pytest.mark.parametrize(
    ("kid", "key"), [("", "AAAA"), ("kid", ""), ("a:b", "AAAA"), ('a"b', "AAAA"), ("kid", "A A"), ("kid", "===")]
)
def test_malformed_account_binding(node: Node, kid: str, key: str) -> None:
    _check_refused(node, node.run(eab_kid=kid, eab_key=key), "rd.anchor.acme.eab_", "base64url")


def test_untrusted_server_fails_at_once(node: Node, tmp_path: Path) -> None:
    stranger = pki.make_authority(tmp_path / "stranger")
    shutil.copy(stranger.certificate, node.root / "etc/anchor/ca.pem")
    result = node.run(ca=stranger.certificate)
    _check_refused(node, result, "not trusted", "--ca", "clock", "127.0.0.1:")
    assert result.seconds < 15
    assert result.note("number-attempts") == "1"


def test_server_that_comes_back(node: Node) -> None:
    port = servers.free_port()
    url = node.site.urls["plain"]
    behind = url.split("/")[2]
    forward = f"timeout 90 socat TCP-LISTEN:{port},fork,reuseaddr TCP:{behind}"
    late = f"(sleep 0.5; exec {forward}) >/dev/null 2>&1 &\nlate=$!"
    server = url.replace(behind, f"127.0.0.1:{port}")
    result = node.run(server=server, timeout="60", before=late + "\ntrap 'kill $late' EXIT")
    time.sleep(0.2)
    _check_credentials(node, result)
    assert "trying again" in result.log


def test_server_that_stays_away(node: Node) -> None:
    result = node.run(server="https://127.0.0.1:1/dir", timeout="5")
    _check_refused(node, result, NAME, "127.0.0.1:1", "Couldn't connect", "attempts: ", "address, route")
    assert result.seconds < 20


def test_server_that_hangs(node: Node) -> None:
    port = servers.free_port()
    mute = f"timeout 15 socat TCP-LISTEN:{port},fork,reuseaddr EXEC:'sleep 15' >/dev/null 2>&1 &\nmute=$!"
    result = node.run(
        server=f"https://127.0.0.1:{port}/dir",
        timeout="5",
        before=mute + "\ntrap 'kill $mute' EXIT",
    )
    time.sleep(0.2)
    _check_refused(node, result, "fetching directory did not end within")
    assert result.seconds < 20


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone", ("HTTP status 404", "rd.anchor.acme.server=")),
        ("welcome", ("not an ACME directory", "rd.anchor.acme.server=")),
        ("other", ("not an ACME directory", "rd.anchor.acme.server=")),
        ("hostile", ("unauthorized: ?[2J$(touch /tmp/x) ?",)),
        ("verbose", (": no no no",)),
    ],
)
def test_server_that_says_no(node: Node, path: str, words: tuple[str, ...]) -> None:
    result = node.run(server=f"{node.site.urls['refusals']}/{path}/dir")
    _check_refused(node, result, *words)
    assert result.note("number-attempts") == "1"
    assert "\x1b" not in result.log
    assert max(map(len, result.log.splitlines())) < 1200


@pytest.mark.parametrize(
    ("path", "most", "word"),
    [("proxy", 30, "HTTP status 502"), ("busy", 30, "rateLimited: too many orders"), ("later", 1, "come back")],
)
def test_server_that_is_busy(node: Node, path: str, most: int, word: str) -> None:
    """It is asked again, but not when it says that there is no point before the time is up."""
    result = node.run(server=f"{node.site.urls['refusals']}/{path}/dir", timeout="6")
    _check_refused(node, result, word, "attempts: ")
    attempts = int(result.note("number-attempts"))
    assert attempts == 1 if most == 1 else 2 <= attempts <= most
    assert result.seconds < 20


def test_challenge_that_the_server_cannot_reach(node: Node) -> None:
    for challenge, port in (("http-01", "80"), ("tls-alpn-01", "443")):
        result = node.run(server=node.site.urls["blocked"], challenge=challenge, timeout="60")
        _check_refused(node, result, f"the {challenge} challenge failed", f"{NAME}:{port}")


def test_port_in_use(node: Node) -> None:
    taken = "timeout 15 socat TCP-LISTEN:80,fork,reuseaddr - >/dev/null 2>&1 &\ntaken=$!\nsleep 0.3"
    result = node.run(before=taken + "\ntrap 'kill $taken' EXIT")
    time.sleep(0.2)
    _check_refused(node, result, "port 80 is already in use")


def test_name_that_is_missing_or_not_full(node: Node) -> None:
    _check_refused(node, node.run(domain=""), "no name", "rd.anchor.acme.domain=")
    _check_refused(node, node.run(domain="", hostname="node1"), "has no domain", "rd.anchor.acme.domain=")


def test_identifier_that_the_server_rejects(node: Node) -> None:
    result = node.run(domain="bad_name.example.org")
    _check_refused(node, result, "bad_name.example.org", "rd.anchor.acme.domain=")
    assert result.seconds < 15


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_hostile_values_stay_text(node: Node, shell: str) -> None:
    mark = node.root / "mark"
    for domain in (f"$(touch {mark}).example.org", f"a;touch {mark};.b", "../../x.example.org", '-x."', "a.b\nc"):
        _check_refused(node, node.run(shell=shell, domain=domain))
    for email in ('a@b.c"],"x":["y', "back\\slash@b.c"):
        _check_refused(node, node.run(shell=shell, email=email), "rd.anchor.acme.email")
    node.run(shell=shell, email=f"-e$(touch {mark})`touch {mark}`@b.c", timeout="5")
    assert not mark.exists()


REQUESTS = {
    "asked": "GET /.well-known/acme-challenge/good HTTP/1.1\r\nHost: node\r\n\r\n",
    "outside": "GET /.well-known/acme-challenge/../../secret HTTP/1.1\r\n\r\n",
    "noise": "\x00\x01\xff\x1b]0;x\x07%s%n\\x$(touch secret)\r\n\r\n",
    "long": "GET /" + "a" * 3000,
}


def test_responder_gives_its_answer_and_nothing_else(node: Node) -> None:
    requests = "".join(
        "printf '%b' '" + "".join(f"\\0{ord(c):03o}" for c in text) + "' | socat -t 5 - TCP4:127.0.0.1:80; echo\n"
        for text in REQUESTS.values()
    )
    text = f"""
anchor_acme_timeout=20 anchor_acme_challenge=http-01 anchor_acme__hex=0050
export ANCHOR_ACME_DIR="$ANCHOR_ROOT/run/anchor/acme"
mkdir -p "$ANCHOR_ACME_DIR"; echo secret >"$ANCHOR_ACME_DIR/secret"
anchor_acme__respond_http
anchor_acme__responds || exit 1
echo "early: $(socat -t 5 /dev/null TCP4:127.0.0.1:80 2>&1)"
hook="$ANCHOR_ROOT/usr/lib/anchor/acme-challenge"
ANCHOR_ACME_CHALLENGE=http-01 "$hook" begin http-01 node good good.thumbprint || exit 1
{requests}
anchor_acme__responder_end
"""
    result = node.script(text)
    assert result.status == 0, result.log
    assert result.log.count("HTTP/1.1 200 OK") == result.log.count("Content-Length: 15") == len(REQUESTS)
    assert result.log.count("good.thumbprint") == len(REQUESTS)
    assert "secret" not in result.log
    assert "early: \n" in result.log


def test_responder_is_bounded_in_size_and_time(node: Node) -> None:
    text = """
anchor_acme_timeout=20 anchor_acme_challenge=http-01 anchor_acme__hex=0050
export ANCHOR_ACME_DIR="$ANCHOR_ROOT/run/anchor/acme"
mkdir -p "$ANCHOR_ACME_DIR"; printf 'HTTP/1.1 200 OK\\r\\n\\r\\ngood.thumbprint' >"$ANCHOR_ACME_DIR/answer"
anchor_acme__respond_http
anchor_acme__responds || exit 1
for to in TCP4:127.0.0.1:80 'TCP6:[::1]:80'; do
    printf 'GET /.well-known/acme-challenge/good HTTP/1.1\\r\\n\\r\\n' | socat -t 5 - "$to"; echo
done
{ printf 'GET /'; head -c 200000 /dev/zero | tr '\\0' a; } | socat -t 5 - TCP:127.0.0.1:80 2>/dev/null
anchor_uptime_ms; before=$anchor_uptime_ms
mkfifo "$ANCHOR_ACME_DIR/hold"; exec 9<>"$ANCHOR_ACME_DIR/hold"
timeout 12 socat - TCP:127.0.0.1:80 <"$ANCHOR_ACME_DIR/hold"
anchor_uptime_ms; echo "silent client: $((anchor_uptime_ms - before))"
anchor_acme__responder_end
"""
    result = node.script(text)
    assert result.status == 0, result.log
    # Who sends too much may find the connection reset before it has read its answer.
    assert result.log.count("HTTP/1.1 200 OK") >= 2
    assert int(result.log.split("silent client: ")[1].split()[0]) < 8000
