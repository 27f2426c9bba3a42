"""The https transport under the real download loop: nginx with mutual TLS, certificates, connections, proxies."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from contrib.site import pki, servers
from tests.shell.downloads import DATA, DIGEST
from tests.stages import hostile_http as fake
from tests.stages import https_node
from tests.stages.hostile_http import hostile
from tests.stages.https_node import CURL, Node, Site, tells_refused_headers

# Fixtures
site, node, dash = https_node.site, https_node.node, https_node.dash


def recording_curl(directory: Path, first_call: str = "") -> str:
    """Return a PATH whose curl keeps its arguments and its configuration, then is the real one.

    `first_call` are further options for the first call.
    """
    directory.mkdir()
    wrapper = directory / "curl"
    wrapper.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" >>{directory}/arguments
for word; do
    case $last in --config) stat -c %a "$word" >>{directory}/modes; cat "$word" >>{directory}/config ;; esac
    last=$word
done
[ -e {directory}/called ] || {{ : >{directory}/called; exec {CURL} "$@" {first_call}; }}
exec {CURL} "$@"
"""
    )
    wrapper.chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


def test_an_image_comes_over_mutual_tls(node: Node, site: Site) -> None:
    assert node.got(node.fetch(site.url(), DIGEST))
    (line,) = site.log()
    assert line.startswith("200 ")
    assert line.endswith('"-" "CN=node17" GET /node.squashfs')
    assert node.attempts() == 1


@pytest.mark.parametrize(
    ("processor", "first", "told"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu aes ssse3", "AES_128_GCM", False),
        ("model name\t: A CPU\nflags\t\t: fpu ssse3", "CHACHA20", False),
        ("Features\t: fp asimd aes", "AES_128_GCM", False),
        ("Features\t: fp asimd", "CHACHA20", False),
        ("model name\t: QEMU TCG CPU version 2.5+\nflags\t\t: fpu aes ssse3", "CHACHA20", True),
        ("isa\t: rv64", "AES_128_GCM", False),
    ],
)
def test_the_cipher_is_one_that_the_processor_is_good_at(
    dash: Node, site: Site, tmp_path: Path, processor: str, first: str, told: bool
) -> None:
    (dash.shell.root / "proc").mkdir(exist_ok=True)
    (dash.shell.root / "proc/cpuinfo").write_text(f"processor\t: 0\n{processor}\nprocessor\t: 1\n")
    path = recording_curl(tmp_path / "bin")
    wrapper = tmp_path / "bin/curl"
    wrapper.write_text(
        wrapper.read_text().replace("#!/bin/sh", f'#!/bin/sh\necho "$OPENSSL_ia32cap" >{tmp_path}/told', 1)
    )
    assert dash.got(dash.fetch(site.url(), DIGEST, env={"PATH": path}))
    arguments = (tmp_path / "bin/arguments").read_text().splitlines()
    assert arguments[arguments.index("--tls13-ciphers") + 1].startswith(f"TLS_{first}")
    assert bool((tmp_path / "told").read_text().strip()) is told


def test_plain_http_is_fine_with_a_digest(node: Node, site: Site) -> None:
    assert node.got(node.fetch(f"http://127.0.0.1:{site.store.http_port}/node.squashfs", DIGEST))


def test_plain_http_without_a_digest_is_refused_before_a_connection(dash: Node) -> None:
    with hostile(fake.whole(DATA)) as server:
        assert dash.failed(dash.fetch(server.url()), "without a digest", "rd.anchor.<image>.sha256=")
        assert server.requests == []


def test_a_wrong_digest_is_not_tried_again(node: Node, site: Site) -> None:
    wrong = "0" * 64
    assert node.failed(node.fetch(site.url(), wrong), f"is {DIGEST}, expected {wrong}")
    assert node.attempts() == 1


def test_secrets_reach_neither_arguments_nor_logs(node: Node, site: Site, tmp_path: Path) -> None:
    path = recording_curl(tmp_path / "bin")
    url = site.url("/node.squashfs?X-Signature=s3cret&k=v", user="robot:passw0rd@")
    done = node.fetch(url, DIGEST, env={"PATH": path})
    assert node.got(done)
    kept = [path for path in (node.shell.root / "run").rglob("*") if path.is_file() and path != node.image]
    said = done.stdout + done.stderr + "".join(path.read_text() for path in kept)
    for text in ((tmp_path / "bin/arguments").read_text(), said):
        assert text
        assert [secret for secret in ("s3cret", "passw0rd", "robot", "X-Signature") if secret in text] == []
    assert "s3cret" in (tmp_path / "bin/config").read_text()
    assert (tmp_path / "bin/modes").read_text() == "600\n"
    assert site.log()[0].endswith("/node.squashfs?X-Signature=s3cret&k=v")


def test_a_hostile_url_stays_text(node: Node, site: Site, tmp_path: Path) -> None:
    path = recording_curl(tmp_path / "bin")
    done = node.fetch(site.url("/$(touch${IFS}pwned)`id`;[1-3]{a,b}'%0aoutput=x"), env={"PATH": path})
    assert node.failed(done, "status 404")
    assert [line.split()[-1] for line in site.log()] == ["/$(touch${IFS}pwned)`id`;[1-3]{a,b}'%0aoutput=x"]
    assert not Path("pwned").exists()


def test_a_broken_transfer_goes_on_where_it_stopped(node: Node, site: Site, tmp_path: Path) -> None:
    path = recording_curl(tmp_path / "bin", "--limit-rate 1M --max-time 1")
    done = node.fetch(site.url(), DIGEST, env={"PATH": path})
    assert node.got(done)
    assert "attempt 1 of 4: 127.0.0.1:" in done.stderr
    assert node.attempts() == 2
    first, second = site.log()
    start = int(second.split('"')[1].removeprefix("bytes=").removesuffix("-"))
    assert first.startswith("200 ")
    assert second.startswith("206 ")
    assert start > 500_000
    # Headers are some hundred bytes.
    assert 0 < int(second.split()[1]) - (len(DATA) - start) < 1000


def test_without_a_client_certificate_the_message_says_so(node: Node, site: Site) -> None:
    (node.credentials / "client.key").unlink()
    assert node.failed(node.fetch(site.url()), "status 400", "this node has no client certificate")
    assert len(site.log()) == 1


def test_a_certificate_of_another_ca_is_named(node: Node, site: Site) -> None:
    node.enroll(pki.issue(site.stranger, site.directory, "intruder", client=True))
    assert node.failed(node.fetch(site.url()), "status 400", "showed the certificate of intruder")


def test_a_forbidden_node_is_told_its_name(node: Node, site: Site) -> None:
    tls = pki.issue(site.authority, site.directory, "fake")
    with hostile(fake.status(403), tls=tls) as server:
        assert node.failed(node.fetch(server.url(scheme="https")), "status 403", "the certificate of node17")
    assert node.rejected


def test_who_answers_in_clear_has_not_refused_a_certificate(node: Node) -> None:
    with hostile(fake.status(403)) as server:
        assert node.failed(node.fetch(server.url(), DIGEST), "status 403", "over http:// a node does not show")
    assert not node.rejected


def test_a_certificate_that_curl_cannot_use_is_not_kept(node: Node, site: Site) -> None:
    (node.credentials / "client.key").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert node.failed(node.fetch(site.url()), "the client certificate cannot be used", "see the auth step", attempts=1)
    assert node.rejected


def test_a_certificate_without_common_name_is_named_by_its_first_dns_name(node: Node, site: Site) -> None:
    leaf = site.directory / "san.crt", site.directory / "san.key"
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/",
            ),
            *("-addext", "subjectAltName=DNS:node18.example,DNS:x", "-out", str(leaf[0]), "-keyout", str(leaf[1])),
        ],
        check=True,
        capture_output=True,
    )
    node.enroll(pki.Leaf(*leaf))
    assert node.failed(node.fetch(site.url()), "status 400", "the certificate of node18.example")


def test_a_missing_file_is_final(node: Node, site: Site) -> None:
    assert node.failed(node.fetch(site.url("/nothing")), "status 404: it is not there", "check the path in the URL")
    assert len(site.log()) == 1


@tells_refused_headers
def test_an_image_that_does_not_fit_is_refused_with_numbers(node: Node, site: Site) -> None:
    (node.shell.root / "proc/meminfo").write_text(f"MemAvailable: {500 << 10} kB\n")
    done = node.fetch(site.url("/huge"), reserve=64 << 20)
    assert node.failed(done, "needs 900.0 MiB, and 436.0 MiB fit", "(500.0 MiB of memory available, of which 64.0 MiB")
    assert int(site.log()[0].split()[1]) < 50 << 20


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            {"not_before": "20200101000000Z", "not_after": "20200201000000Z"},
            ["has expired: the clock says 20", "renew it"],
        ),
        (
            {"not_before": "20990101000000Z", "not_after": "20990201000000Z"},
            ["not yet valid: the clock says 20", "clock.ntp"],
        ),
        ({"addresses": ["store.example"]}, ["is for another name", "use a name in the URL"]),
    ],
)
def test_a_wrong_server_certificate_is_explained(
    node: Node, site: Site, options: dict[str, str], messages: list[str]
) -> None:
    tls = pki.issue(site.authority, site.directory, "wrong", **options)  # type: ignore[arg-type] # one of three types
    with hostile(fake.whole(DATA), tls=tls) as server:
        assert node.failed(node.fetch(server.url(scheme="https"), DIGEST), *messages)
        assert server.requests == []
    assert node.attempts() == 1


def test_only_the_sites_ca_is_trusted(node: Node, site: Site) -> None:
    tls = pki.issue(site.stranger, site.directory, "strange")
    with hostile(fake.whole(DATA), tls=tls) as server:
        done = node.fetch(server.url(scheme="https"), env={"SSL_CERT_FILE": str(site.stranger.certificate)})
        assert node.failed(done, "is not trusted", "/etc/anchor/ca.pem", "the clock says 20")
        assert server.requests == []


def test_the_systems_own_cas_do_not_count(dash: Node, site: Site, tmp_path: Path) -> None:
    # Debian's curl looks into /etc/ssl/certs whatever --cacert says.
    system = tmp_path / "certs"
    system.mkdir()
    shutil.copy(site.stranger.certificate, system / "stranger.pem")
    subprocess.run(["openssl", "rehash", str(system)], check=True)
    tls = pki.issue(site.stranger, site.directory, "strange")
    setup = f"mount --bind '{system}' /etc/ssl/certs || exit 9\n"
    with hostile(fake.whole(DATA), tls=tls) as server:
        done = dash.fetch(server.url(scheme="https"), setup=setup, unshare=("--mount",))
        assert dash.failed(done, "is not trusted")
        assert server.requests == []


def test_a_refused_connection_is_tried_again(node: Node) -> None:
    done = node.fetch(f"https://127.0.0.1:{servers.free_port()}/x", attempts=2)
    assert node.failed(done, "after attempt 2 of 2", "no connection: ", "firewall")


def test_an_unknown_name_is_tried_again(dash: Node) -> None:
    done = dash.fetch("https://store.invalid/x", attempts=2)
    assert dash.failed(done, "after attempt 2 of 2", "the name is not known: ", "name servers")


def test_silence_is_bounded(node: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/x"
        done = node.fetch(url, connect_timeout=1, attempts=1)
        assert node.failed(done, "is too slow or silent: ", "rd.anchor.fetch.connect_timeout")
        assert time.monotonic() - begun < 9


def test_the_deadline_cuts_an_attempt_off(dash: Node) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        done = dash.fetch(url, DIGEST, timeout=1, stall=30)
        assert dash.failed(done, "after attempt 1 of 4 and 1 s of 1 s: ")
        assert time.monotonic() - begun < 9


def test_a_proxy_is_used_and_the_environments_is_not(dash: Node) -> None:
    with hostile(fake.whole(DATA)) as proxy:
        environment = {"http_proxy": "http://127.0.0.1:1", "no_proxy": "*"}
        done = dash.fetch(
            "http://store.invalid/a", DIGEST, proxy=f"http://u:pw@127.0.0.1:{proxy.port}", env=environment
        )
        assert dash.got(done)
        assert proxy.requests[0][0] == "http://store.invalid/a"
    with hostile(fake.whole(DATA)) as server:
        assert dash.got(dash.fetch(server.url(), DIGEST, env=environment))
