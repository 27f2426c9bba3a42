"""The token stage against the token server of contrib/token, under each shell that a node may have."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from contrib.site import pki
from contrib.token import __main__ as command
from contrib.token import store
from contrib.token.server import Server, Settings, serving
from tests.shell.conftest import SHELLS, TOP, Shell
from tests.stages import hostile_http as fake
from tests.stages.hostile_http import hostile
from tests.stages.https_node import CURL
from tests.stages.test_transport_https import recording_curl

STAGE = TOP / "dracut-modules/auth-token"
NAME = "node17.example.org"
OTHER_TOKEN = "0123456789abcdef"  # noqa: S105 - nobody's

SCRIPT = r"""
for lib in report http fetch fetch-mirrors fetch-digest fetch-room credentials; do . "$LIB/anchor-$lib.sh"; done
. "$STAGE/anchor-token.sh"
. "$STAGE/stage.sh"
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10
anchor_net_hostname() { printf 'node17.example.org\n'; }
modprobe() { :; }
"""


@dataclass(frozen=True)
class Site:
    """A CA, and a token server that it signed and that signs with it."""

    directory: Path
    authority: pki.Authority
    server: Server

    @property
    def url(self) -> str:
        """Where tokens are exchanged."""
        return f"https://127.0.0.1:{self.server.server_port}/join"

    def token(self, lifetime_s: float = 60, s3: str = "") -> str:
        """Make a token for the node's name."""
        return store.issue(self.server.settings.tokens, NAME, lifetime_s, s3)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("token")
    authority = pki.make_authority(directory / "ca")
    leaf = pki.issue(authority, directory, "token-server")
    with serving(Settings(directory / "tokens", authority, leaf)) as server:
        yield Site(directory, authority, server)


@dataclass(frozen=True)
class Node:
    """A node's root."""

    shell: Shell
    site: Site
    parameters: dict[str, str] = field(default_factory=dict)

    @property
    def credentials(self) -> Path:
        """What auth leaves."""
        return self.shell.root / "run/anchor/credentials"

    @property
    def token_file(self) -> Path:
        """The stage's default for rd.anchor.token.file."""
        return self.shell.root / "etc/anchor/token"

    def run(
        self,
        *,
        trace: bool = False,
        env: dict[str, str] | None = None,
        after: str = "",
        given: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the stage, with the shell text `after` its functions; stderr is what the console shows."""
        values = {"server": self.site.url, "from": "", "token": "", "file": "/etc/anchor/token", "url": "", "name": ""}
        values |= {"key_type": "ec-256", "timeout": "10", "proxy": "", **(given or {}), **parameters}
        environment = {f"anchor_token_{name}": value for name, value in values.items()}
        environment |= {"anchor_fetch_connect_timeout": "3", "anchor_fetch_stall": "5", "STAGE": str(STAGE)}
        environment |= env or {}
        script = SCRIPT + after + ("set -x\n" if trace else "") + "(anchor_token_run)\n"
        done = self.shell.run(script, env=environment)
        assert not (self.shell.root / "run/anchor/token").exists(), "the stage left its work behind"
        return done

    def note(self, key: str) -> str:
        """Return a fact of the step."""
        return (self.shell.root / "run/anchor/steps/10" / key).read_text().strip()

    def joined(self, done: subprocess.CompletedProcess[str]) -> bool:
        """Whether the node has a certificate for its name, of its own key; shows what was said otherwise."""
        assert done.returncode == 0, done.stderr
        certificate, key = self.credentials / "client.crt", self.credentials / "client.key"
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        openssl("verify", "-CAfile", self.site.authority.certificate, "-purpose", "sslclient", certificate)
        assert f"CN = {NAME}" in openssl("x509", "-in", certificate, "-noout", "-subject")
        return openssl("x509", "-in", certificate, "-noout", "-pubkey") == openssl("pkey", "-in", key, "-pubout")

    def failed(self, done: subprocess.CompletedProcess[str], *messages: str) -> bool:
        """Whether the stage failed with all of these on the console, once, and left no credentials."""
        assert done.returncode == 1, done.stderr
        assert [message for message in messages if message not in done.stderr] == [], done.stderr
        assert done.stderr.count("anchor: error: ") == 1
        return not list(self.credentials.iterdir())


def openssl(*words: str | Path) -> str:
    return subprocess.run(["openssl", *words], capture_output=True, text=True, check=True).stdout


def prepared(shell: Shell, site: Site) -> Node:
    for name in ("run/anchor/steps/10", "run/anchor/credentials", "etc/anchor"):
        (shell.root / name).mkdir(parents=True)
    shutil.copy(site.authority.certificate, shell.root / "etc/anchor/ca.pem")
    return Node(shell, site)


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, site: Site) -> Node:
    return prepared(Shell(request.param, tmp_path), site)


@pytest.fixture
def dash(tmp_path: Path, site: Site) -> Node:
    """One shell only, for what is the same in all."""
    return prepared(Shell("dash", tmp_path), site)


# --- Where a token comes from -----------------------------------------------------------------------------


def smbios(*structures: tuple[int, bytes, list[bytes]]) -> bytes:
    """Return a table of SMBIOS structures: type, formatted area after the header, strings."""
    table = b""
    for n, (kind, body, strings) in enumerate([*structures, (127, b"", [])]):
        text = b"".join(string + b"\0" for string in strings) or b"\0"
        table += struct.pack("<BBH", kind, 4 + len(body), n) + body + text + b"\0"
    return table


def put_smbios(node: Node, table: bytes) -> None:
    file = node.shell.root / "sys/firmware/dmi/tables/DMI"
    file.parent.mkdir(parents=True)
    file.write_bytes(table)


def test_a_token_in_a_file_is_used_once_and_removed(node: Node, site: Site) -> None:
    node.token_file.write_text(site.token() + "\r\n")
    assert node.joined(node.run())
    assert not node.token_file.exists()
    assert node.note("note-from") == "file"
    assert node.note("number-attempts") == "1"
    assert sorted(path.name for path in node.credentials.iterdir()) == ["client.crt", "client.key"]


def test_a_token_in_an_smbios_oem_string(node: Node, site: Site) -> None:
    noise = [(1, bytes(range(23)), [b"Maker", f"anchor-token={OTHER_TOKEN}".encode()])]
    noise += [(16, b"\x0b" * 11, []), (11, b"\x01", [b"other=x \xff\x01%s$(id)"])]
    mine = (11, b"\x03", [b"first", b"anchor-token=" + site.token().encode(), b"anchor-token=later"])
    put_smbios(node, smbios(*noise, mine))
    assert node.joined(node.run())
    assert node.note("note-from") == "smbios"


@pytest.mark.parametrize(
    "table",
    [
        b"",
        b"\x0b",
        b"\x0b\x00\x00\x00",
        b"\x0b\x05\x00\x00\x01anchor-token=" + OTHER_TOKEN.encode(),
        smbios((127, b"", []), (11, b"\x01", [b"anchor-token=" + OTHER_TOKEN.encode()])),
        os.urandom(4096).replace(b"anchor", b""),
    ],
)
def test_a_broken_smbios_table_has_no_token(dash: Node, table: bytes) -> None:
    put_smbios(dash, table)
    assert dash.failed(dash.run(given={"from": "smbios"}), "has no join token", "anchor-token=")


def test_a_token_from_the_hypervisor(dash: Node, site: Site) -> None:
    file = dash.shell.root / "sys/firmware/qemu_fw_cfg/by_name/opt/anchor/token/raw"
    file.parent.mkdir(parents=True)
    file.write_text(site.token())
    assert dash.joined(dash.run())
    assert dash.note("note-from") == "fw-cfg"


def test_a_token_that_was_built_in(dash: Node, site: Site) -> None:
    assert dash.joined(dash.run(token=site.token()))
    assert dash.note("note-from") == "build"


def test_a_token_from_a_url(node: Node, site: Site) -> None:
    leaf = pki.issue(site.authority, site.directory, "metadata")
    with hostile(fake.status(503), fake.status(200, page=site.token().encode() + b"\n"), tls=leaf) as server:
        assert node.joined(node.run(url=server.url("/token", "https")))
        assert "Authorization" not in server.requests[0][1]
    assert node.note("note-from") == "url"


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.evil.example", "169.254.1.2.example", "[fd00::1]"])
def test_plain_http_is_for_link_local_addresses(dash: Node, host: str) -> None:
    assert dash.failed(dash.run(url=f"http://{host}/"), "refused to ask for the join token over plain HTTP")


@pytest.mark.parametrize("host", ["169.254.169.254", "u:p@[fe80::1]:80"])
def test_plain_http_comes_with_a_warning(dash: Node, host: str) -> None:
    stand_in = 'anchor_http_get() { anchor_fail "asked $2"; return 1; }\n'
    done = dash.run(url=f"http://{host}/x", after=stand_in)
    assert dash.failed(done, f"asked http://{host}/x")
    assert "over plain HTTP: whoever is on this node's link" in done.stderr


@pytest.mark.parametrize(
    "token", ["short", "x" * 513, "sixteen letters and blanks", "sixteen\x1b[2Jletters", 'a"b' * 9]
)
def test_what_is_no_token_is_not_sent(dash: Node, token: str) -> None:
    dash.token_file.write_text(token)
    done = dash.run()
    assert dash.failed(done, "the join token (file) is not one")
    assert token not in done.stderr


def test_without_a_token_the_places_are_named(dash: Node) -> None:
    assert dash.failed(dash.run(), "this node has no join token", "/etc/anchor/token", "anchor-token=", "token.url=")


# --- The exchange -----------------------------------------------------------------------------------------


def test_a_token_is_good_for_one_key(node: Node, site: Site) -> None:
    token = site.token()
    assert node.joined(node.run(token=token))
    shutil.rmtree(node.credentials)
    node.credentials.mkdir()
    assert node.failed(node.run(token=token), "status 409: this token has been used before", "somebody else has")
    assert node.note("number-attempts") == "1"


def test_a_lost_answer_is_asked_for_again(node: Node, site: Site, tmp_path: Path) -> None:
    curl = tmp_path / "bin/curl"
    curl.parent.mkdir()
    curl.write_text(
        f'#!/bin/sh\n[ -e {tmp_path}/lost ] || {{ {CURL} "$@" >{tmp_path}/lost; exit 56; }}\nexec {CURL} "$@"\n'
    )
    curl.chmod(0o755)
    assert node.joined(node.run(token=site.token(), env={"PATH": f"{curl.parent}:{os.environ['PATH']}"}))
    assert node.note("number-attempts") == "2"
    assert (tmp_path / "lost").read_text().endswith("\n200")


def test_the_same_key_is_not_answered_for_ever(dash: Node, site: Site) -> None:
    token = site.token()
    request = make_request(dash.shell.root)
    first = site.server.exchange(token, request)
    assert site.server.exchange(token, request) == first
    tokens = site.server.settings.tokens
    known = store.load(tokens, token)
    assert known is not None
    store.save(tokens, token, store.Token(known.name, known.expires, "", known.key, known.used - 601, known.answer))
    with pytest.raises(Exception, match="too long ago"):
        site.server.exchange(token, request)


def make_request(directory: Path) -> bytes:
    words = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=wish", "-keyout"]
    openssl("req", "-new", *words, directory / "key", "-out", directory / "request")
    return (directory / "request").read_bytes()


def test_two_at_the_same_moment_get_one_certificate(dash: Node, site: Site) -> None:
    from concurrent.futures import ThreadPoolExecutor

    token, requests = site.token(), []
    for n in range(4):
        (dash.shell.root / str(n)).mkdir()
        requests.append(make_request(dash.shell.root / str(n)))

    def attempt(request: bytes) -> bool:
        try:
            return bool(site.server.exchange(token, request))
        except Exception as error:
            assert "used with another key" in str(error)
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(attempt, requests)) == [False, False, False, True]


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda site: OTHER_TOKEN, ["status 401: it does not know this token"]),
        (lambda site: site.token(lifetime_s=-1), ["status 410: this token is too old"]),
    ],
)
def test_tokens_that_are_refused(dash: Node, site: Site, make: Callable[[Site], str], messages: list[str]) -> None:
    assert dash.failed(dash.run(token=make(site)), *messages)


@pytest.mark.parametrize("key_type", ["ec-384", "rsa-2048"])
def test_key_types(dash: Node, site: Site, key_type: str) -> None:
    assert dash.joined(dash.run(token=site.token(), key_type=key_type))
    bits = openssl("pkey", "-in", dash.credentials / "client.key", "-noout", "-text").splitlines()[0]
    assert key_type.rpartition("-")[2] in bits


def test_the_server_decides_about_the_name(dash: Node, site: Site) -> None:
    assert dash.joined(dash.run(token=site.token(), name="admin.example.org"))


def test_s3_credentials_come_with_the_certificate(node: Node, site: Site, tmp_path: Path) -> None:
    text = "access_key=AKIA\nsecret_key=s3cr+t\nsession_token=t/k=\n"
    (tmp_path / "given").write_text(text)
    done = node.run(token=site.token(s3=str(tmp_path / "given")))
    assert node.joined(done)
    assert (node.credentials / "s3").read_text() == text
    assert stat.S_IMODE((node.credentials / "s3").stat().st_mode) == 0o600
    assert "s3cr" not in done.stderr


def test_trouble_of_the_servers_own_does_not_use_a_token_up(dash: Node, site: Site, tmp_path: Path) -> None:
    token = site.token(s3=str(tmp_path / "given"))
    done = dash.run(token=token, timeout="2")
    assert dash.failed(done, "no answer from", "status 500")
    (tmp_path / "given").write_text("access_key=A\nsecret_key=S\n")
    assert dash.joined(dash.run(token=token))


def test_a_proxy_carries_the_exchange_and_not_the_search(dash: Node, site: Site) -> None:
    stand_in = 'anchor_http_get() { anchor_fail "asked $2 by ${5:-no proxy}"; return 1; }\n'
    proxy = "http://proxy.example:3128"
    done = dash.run(url="http://169.254.169.254/x", proxy=proxy, after=stand_in)
    assert dash.failed(done, "asked http://169.254.169.254/x by no proxy")
    assert dash.failed(dash.run(token=site.token(), proxy=proxy, after=stand_in), f"asked {site.url} by {proxy}")


def test_secrets_reach_neither_arguments_nor_a_traced_log(node: Node, site: Site, tmp_path: Path) -> None:
    path = recording_curl(tmp_path / "bin")
    token = site.token()
    done = node.run(token=token, env={"PATH": path}, trace=True)
    assert node.joined(done)
    assert "+ anchor_token_run" in done.stderr
    assert f"Bearer {token}" in (tmp_path / "bin/config").read_text()
    assert set((tmp_path / "bin/modes").read_text().split()) == {"600"}
    key = (node.credentials / "client.key").read_text().splitlines()[1]
    facts = "".join(path.read_text() for path in (node.shell.root / "run/anchor/steps").rglob("note-*"))
    for text in ((tmp_path / "bin/arguments").read_text(), done.stderr, facts):
        assert text
        assert [word for word in (token, key) if word in text] == []
    stored = "".join(path.read_text() for path in site.server.settings.tokens.iterdir())
    assert token not in stored


def test_only_the_sites_ca_is_trusted(dash: Node, site: Site) -> None:
    stranger = pki.make_authority(site.directory / "stranger", "another CA")
    leaf = pki.issue(stranger, site.directory, "stranger")
    with hostile(fake.status(200), tls=leaf) as server:
        done = dash.run(token=OTHER_TOKEN, server=server.url("/", "https"))
        assert dash.failed(done, "is not trusted", "/etc/anchor/ca.pem")
        assert server.requests == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fake.status(200, page=b"<h1>Welcome</h1>"), "is no certificate"),
        (fake.status(200, page=b""), "is no certificate"),
        (fake.status(200, page=b"-----BEGIN CERTIFICATE-----\nAAAA\n"), "is of no use"),
        (fake.status(200, page=b"1\n-----BEGIN CERTIFICATE-----\n"), "is no certificate"),
        (fake.status(200, page=b"client_key=x\n-----BEGIN CERTIFICATE-----\n"), "is no certificate"),
        (fake.status(200, page=b"access_key=x\n" * 20_000), "too large"),
        (fake.status(403), "status 403: this token may not be used"),
        (fake.status(404), "there is no token server at this URL"),
        (fake.status(302, {"Location": "https://127.0.0.1:1/"}), "no answer from"),
        (fake.redirect("http://127.0.0.1:1/"), "redirects to a protocol that is not allowed"),
        (fake.status(418), "status 418"),
    ],
)
def test_answers_that_are_no_certificate(dash: Node, site: Site, fault: fake.Fault, message: str) -> None:
    leaf = pki.issue(site.authority, site.directory, "fake")
    with hostile(fault, tls=leaf) as server:
        done = dash.run(token=OTHER_TOKEN, server=server.url("/", "https"), timeout="2")
        assert dash.failed(done, message)
        assert "\x1b" not in done.stderr


def test_a_certificate_of_another_key_is_refused(node: Node, site: Site) -> None:
    leaf = pki.issue(site.authority, site.directory, "fake")
    page = pki.issue(site.authority, site.directory, "other", client=True).certificate.read_bytes()
    with hostile(fake.status(200, page=page), tls=leaf) as server:
        done = node.run(token=OTHER_TOKEN, server=server.url("/", "https"))
        assert node.failed(done, "is of no use: the key client.key does not belong to the certificate client.crt")


def test_a_busy_server_is_waited_for_within_the_time(dash: Node, site: Site) -> None:
    leaf = pki.issue(site.authority, site.directory, "fake")
    with hostile(fake.status(429, {"Retry-After": 1}), fake.status(503), tls=leaf) as server:
        begun = time.monotonic()
        done = dash.run(token=OTHER_TOKEN, server=server.url("/", "https"), timeout="4")
        assert dash.failed(done, "no answer from", "status 503", "how many nodes boot at once")
        assert 3 < time.monotonic() - begun < 20
        keys = {headers["Content-Length"] for _, headers in server.requests}
        assert len(server.requests) >= 3
        assert len(keys) == 1


# --- The server's own command -----------------------------------------------------------------------------


def test_the_command_makes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tmp_path / "tokens"
    assert command.main(["--tokens", str(tokens), "add", NAME, "--hours", "1"]) == 0
    text = capsys.readouterr().out.strip()
    known = store.load(tokens, text)
    assert known is not None
    assert known.name == NAME
    assert 3500 < known.expires - time.time() < 3700
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tokens, *tokens.iterdir())] == [0o700, 0o600]
    for wrong in (["-evil/../name"], [NAME, "--hours", "nan"], [NAME, "--hours", "0"]):
        with pytest.raises(SystemExit):
            command.main(["--tokens", str(tokens), "add", *wrong])


def test_the_command_says_what_is_missing(tmp_path: Path, site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    leaf = site.server.settings.leaf
    (tmp_path / "file").write_text("no directory\n")
    good = {
        "--ca-cert": site.authority.certificate,
        "--ca-key": site.authority.key,
        "--cert": leaf.certificate,
        "--key": leaf.key,
    }
    for tokens, words in (
        (tmp_path / "file", ["add", NAME]),
        (tmp_path, ["add", NAME, "--s3", str(tmp_path / "none")]),
        *(
            (tmp_path, ["serve", *(str(x) for pair in (good | wrong).items() for x in pair)])
            for wrong in (
                {"--ca-cert": tmp_path / "none"},
                {"--ca-key": leaf.key},
                {"--key": site.authority.key},
                {"--cert": tmp_path / "file"},
                {"--chain": tmp_path / "none"},
                {"--address": Path("999.1.1.1")},
                {"--port": Path("99999")},
            )
        ),
    ):
        assert command.main(["--tokens", str(tokens), *words]) == 1
        assert capsys.readouterr().err.startswith("error: "), words


def ask(server: Server, token: str, request: bytes) -> tuple[int, str]:
    """Ask for a certificate as a node does, without checking the server's."""
    host = str(server.server_address[0])
    context = ssl.create_default_context(cafile=str(server.settings.authority.certificate))
    context.check_hostname = False
    connection = http.client.HTTPSConnection(host, server.server_port, timeout=20, context=context)
    try:
        connection.request("POST", "/join", request, {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def request_of(tmp_path: Path, *options: str) -> bytes:
    """Return a request with a new key."""
    openssl("genpkey", *options, "-out", tmp_path / "k")
    openssl("req", "-new", "-key", tmp_path / "k", "-subj", "/CN=x", "-out", tmp_path / "r")
    return (tmp_path / "r").read_bytes()


EC = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def test_faults_of_the_servers_own_are_not_the_nodes(tmp_path: Path, site: Site) -> None:
    authority = pki.Authority(tmp_path / "ca.crt", tmp_path / "ca.key")
    shutil.copy(site.authority.certificate, authority.certificate)
    tokens = tmp_path / "tokens"
    token = store.issue(tokens, NAME, 60)
    request = request_of(tmp_path, *EC)
    with serving(Settings(tokens, authority, site.server.settings.leaf, address="::1")) as server:
        assert server.url.startswith("https://[::1]:")
        assert ask(server, token, request)[0] == 500, "the CA has no key"
        (known,) = tokens.glob("*.json")
        text = known.read_text()
        known.write_text("[1]")
        assert ask(server, token, request)[0] == 500, "what is known of the token is damaged"
        known.write_text('{"name": "x", "more": 1}')
        assert ask(server, token, request)[0] == 500
        known.write_text(text)
        tokens.rename(tmp_path / "away")
        assert ask(server, token, request)[0] == 500, "nobody knows any token"
        (tmp_path / "away").rename(tokens)
        shutil.copy(site.authority.key, authority.key)
        assert ask(server, token, b"garbage")[0] == 400
        assert ask(server, token, request)[0] == 200


@pytest.mark.parametrize(
    "options",
    [
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:512"),
        ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
        ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:secp224r1"),
    ],
)
def test_weak_keys_get_no_certificate(tmp_path: Path, site: Site, options: tuple[str, ...]) -> None:
    token = site.token()
    status, text = ask(site.server, token, request_of(tmp_path, *options))
    assert (status, "nor RSA of 2048 bits or more" in text) == (400, True), text
    assert ask(site.server, token, request_of(tmp_path, *EC))[0] == 200, "the token is still good"
