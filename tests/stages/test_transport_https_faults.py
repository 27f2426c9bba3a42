"""The https transport under the real download loop, against a server that misbehaves in every way we know."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from contrib.site import pki, servers
from tests.shell.conftest import other_clock
from tests.shell.downloads import DATA, DIGEST, OTHER
from tests.stages import hostile_http as fake
from tests.stages import https_node
from tests.stages.hostile_http import hostile
from tests.stages.https_node import Node, Site, tells_refused_headers

# Every test is a server that misbehaves, and most are waited for.
pytestmark = pytest.mark.slow

# Fixtures
site, node, dash = https_node.site, https_node.node, https_node.dash


def test_only_the_rest_is_asked_for_again(node: Node) -> None:
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA, sent=500_000), fake.whole(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        asked = [(headers.get("Range"), headers.get("If-Range")) for _, headers in server.requests]
        assert asked == [(None, None), ("bytes=1000000-", '"v1"'), ("bytes=1500000-", '"v1"')]


def test_a_date_serves_where_there_is_no_etag(node: Node) -> None:
    with hostile(fake.whole(DATA, etag=None, sent=1_000_000), fake.whole(DATA, etag=None)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        assert server.requests[1][1]["If-Range"] == fake.LAST_MODIFIED


def test_a_server_that_ignores_ranges_starts_anew(node: Node) -> None:
    with hostile(fake.ignoring_ranges(DATA, sent=1_000_000), fake.ignoring_ranges(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        assert [headers.get("Range") for _, headers in server.requests] == [None, "bytes=1000000-", None]


def test_an_answer_as_long_as_what_is_there_is_not_taken_for_the_rest(node: Node) -> None:
    # curl itself takes 200 with a length equal to the resume offset for "already downloaded".
    short = OTHER[:1_000_000]
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(short, etag='"v2"')) as server:
        assert node.got(node.fetch(server.url(), hashlib.sha256(short).hexdigest()), short)


@pytest.mark.parametrize("check", [True, False])
def test_a_file_that_changes_half_way_is_never_mixed(node: Node, check: bool) -> None:
    # With check=False the server serves the range of the new file although If-Range names the old one.
    new = fake.whole(OTHER, etag='"v2"', check=check)
    with hostile(fake.whole(DATA, sent=1_000_000), new) as server:
        done = node.fetch(server.url(), hashlib.sha256(OTHER).hexdigest())
        assert node.got(done, OTHER)
        assert "the file changed on the server" in done.stderr


@pytest.mark.parametrize(
    "etag", ['W/"weak"', "bare", '"a\\"b"', '"sp ace"', "", '""', '"' + "x" * 3000 + '"', '"a"\turl="file:///x"']
)
def test_what_is_no_strong_etag_is_not_sent_back(dash: Node, etag: str) -> None:
    with hostile(fake.whole(DATA, etag=etag or " ", sent=1_000_000), fake.whole(DATA, check=False)) as server:
        assert dash.got(dash.fetch(server.url(), DIGEST))
        assert [headers.get("If-Range") for _, headers in server.requests][1:] in ([None], [etag, None])


@tells_refused_headers
def test_a_busy_server_names_its_time(dash: Node) -> None:
    begun = time.monotonic()
    with hostile(fake.status(503, {"Retry-After": 1}), fake.whole(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST)
        assert dash.got(done)
    assert "answered with status 503; next in 1.0 s" in done.stderr
    assert time.monotonic() - begun >= 1


@pytest.mark.parametrize("retry_after", ["soon", "-1", "1e9", "Fri, 31 Dec 1999 23:59:59 GMT", "$(id)", "0x10"])
def test_a_nonsensical_wish_is_ignored(dash: Node, retry_after: str) -> None:
    with hostile(fake.status(429, {"Retry-After": retry_after}), fake.whole(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST)
        assert dash.got(done)
    assert "status 429; next in 0.0 s" in done.stderr


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_may_pass_are_tried_again(dash: Node, code: int) -> None:
    with hostile(fake.status(code), fake.whole(DATA)) as server:
        assert dash.got(dash.fetch(server.url(), DIGEST))


@pytest.mark.parametrize("code", [204, 304, 400, 401, 403, 404, 405, 407, 410, 451, 501, 505])
def test_statuses_that_will_not_pass_are_final(dash: Node, code: int) -> None:
    with hostile(fake.status(code, page=b""), fake.whole(DATA)) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST), f"answered with status {code}", "hint: ")
        assert len(server.requests) == 1


def test_an_error_between_two_parts_keeps_what_is_there(node: Node) -> None:
    with hostile(fake.whole(DATA, sent=1_000_000), fake.status(502), fake.whole(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        assert [headers.get("Range") for _, headers in server.requests] == [None, *["bytes=1000000-"] * 2]


def test_a_stall_is_broken_off_and_resumed(dash: Node) -> None:
    # curl looks at the mean of the last seconds: after a larger part it would take longer to call it slow.
    with hostile(fake.whole(DATA, sent=500, stall=True), fake.whole(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST, stall=1)
        assert dash.got(done)
        assert "Operation too slow" in done.stderr
        assert server.requests[1][1]["Range"] == "bytes=500-"


def test_chunks_without_a_length_arrive_whole(node: Node) -> None:
    with hostile(fake.chunked(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))


def test_chunks_that_end_too_early_are_resumed(node: Node) -> None:
    # All of the file is there, but only the answer to a second request can tell.
    with hostile(fake.chunked(DATA, end=False), fake.whole(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        assert server.requests[1][1]["Range"] == f"bytes={len(DATA)}-"


def test_an_unannounced_size_is_limited_too(node: Node) -> None:
    (node.shell.root / "proc/meminfo").write_text(f"MemAvailable: {5 << 10} kB\n")
    with hostile(fake.chunked(DATA, times=20)) as server:
        assert node.failed(node.fetch(server.url(), DIGEST), "too large: it needs more, and 4.0 MiB fit")


def test_an_end_that_nobody_announced_is_worth_a_warning(dash: Node) -> None:
    with hostile(fake.unframed(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST)
        assert dash.got(done)
        assert "warning: the server did not say how long" in done.stderr


@pytest.mark.parametrize("length", [len(DATA) - 1, "banana", "-5", "99999999999999999999999"])
def test_a_false_length_never_passes(dash: Node, length: str | int) -> None:
    with hostile(fake.status(200, {"Content-Length": length}, DATA)) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST, attempts=2), "error: ")


def test_a_length_that_is_never_reached_ends_the_attempts(dash: Node) -> None:
    with hostile(fake.ignoring_ranges(DATA, sent=1_000_000)) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST, attempts=3), "after attempt 3 of 3")


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"\0\xff" * 500, b"HTTP/1.1 999\r\n\r\n", b""])
def test_what_is_not_http_never_passes(dash: Node, answer: bytes) -> None:
    with hostile(fake.raw(answer)) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST, attempts=2), "error: ")


def test_redirects_are_followed_but_not_for_ever(node: Node) -> None:
    with hostile(fake.redirect("/b"), fake.redirect("/c"), fake.whole(DATA)) as server:
        assert node.got(node.fetch(server.url(), DIGEST))
        assert [path for path, _ in server.requests] == ["/image.squashfs", "/b", "/c"]
    with hostile(fake.redirect("/b")) as server:
        assert node.failed(node.fetch(server.url(), DIGEST), "redirects more than 5 times")
        assert len(server.requests) == 6


@pytest.mark.parametrize("to", ["http://127.0.0.1:{port}/plain", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_https_leads_to_https_only(dash: Node, site: Site, to: str) -> None:
    tls = pki.issue(site.authority, site.directory, "fake")
    with hostile(fake.whole(DATA)) as plain, hostile(fake.redirect(to.format(port=plain.port)), tls=tls) as server:
        done = dash.fetch(server.url(scheme="https"), DIGEST)
        assert dash.failed(done, "redirects to a protocol that is not allowed", "https:// only")
        assert plain.requests == []
        assert len(server.requests) == 1


@pytest.mark.parametrize("percent", [1, 50, 99])
def test_a_reset_is_resumed(dash: Node, percent: int) -> None:
    sent = len(DATA) * percent // 100
    with hostile(fake.whole(DATA, sent=sent, reset=True), fake.whole(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST)
        assert dash.got(done)
        assert "the transfer from 127.0.0.1:" in done.stderr
        assert server.requests[1][1]["Range"] == f"bytes={sent}-"


def test_one_byte_a_second_is_too_slow(dash: Node) -> None:
    with hostile(fake.dripping(DATA)) as server:
        begun = time.monotonic()
        done = dash.fetch(server.url(), DIGEST, stall=1, attempts=2)
        assert dash.failed(done, "after attempt 2 of 2", "is too slow or silent", "rd.anchor.fetch.connect_timeout")
        assert time.monotonic() - begun < 20


def test_a_truncated_file_with_a_length_to_match_is_not_the_file(node: Node) -> None:
    with hostile(fake.whole(DATA[:1_000_000])) as server:
        assert node.failed(node.fetch(server.url(), DIGEST), "is not what it should be: its SHA-256 digest is")
        done = node.fetch(server.url(), DIGEST, size=len(DATA))
        assert node.failed(done, f"it has 1000000 bytes, expected {len(DATA)}")


def test_garbage_of_the_right_length_is_not_the_file(dash: Node) -> None:
    with hostile(fake.whole(OTHER)) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST, size=len(DATA)), "its SHA-256 digest is")
        assert len(server.requests) == 1


def test_an_error_page_with_status_200_is_not_the_file(dash: Node) -> None:
    with hostile(fake.status(200, page=b"<html>Please log in</html>")) as server:
        assert dash.failed(dash.fetch(server.url(), DIGEST, size=len(DATA)), "it has 26 bytes, expected 3000000")
        assert dash.failed(dash.fetch(server.url(), DIGEST), "its SHA-256 digest is")


def test_gzip_on_the_way_is_not_the_file(dash: Node) -> None:
    with hostile(fake.gzipped(DATA)) as server:
        done = dash.fetch(server.url(), DIGEST)
        assert dash.failed(done, "comes in an encoding (gzip)", "its SHA-256 digest is")
        assert "gzip" not in server.requests[0][1].get("Accept-Encoding", "")


@pytest.mark.parametrize("before", ["", "Transfer-Encoding: chunked\r\n\r\n0\r\n"])
def test_headers_without_an_end_are_not_kept(node: Node, before: str) -> None:
    """Of headers and of trailers; no version of curl before 8.3 limits the one, and not even 7.88 the other."""
    sent: list[int] = []
    with hostile(fake.endless_headers(f"HTTP/1.1 200 OK\r\n{before}".encode(), sent)) as server:
        done = node.fetch(server.url(), DIGEST, attempts=2)
        assert node.failed(done, "the transfer from 127.0.0.1", "headers", attempts=2)
    # What the two sockets hold is some megabytes.
    assert max(sent) < 32 << 20


def test_a_server_that_comes_back_is_waited_for(dash: Node) -> None:
    port = servers.free_port()
    with ExitStack() as stack:
        late = threading.Timer(0.8, lambda: stack.enter_context(hostile(fake.whole(DATA), port=port)))
        late.start()
        stack.callback(late.join)
        done = dash.fetch(f"http://127.0.0.1:{port}/x", DIGEST, env={"RANDOM_NUMBER": "700"})
        assert dash.got(done)
    assert "no connection: " in done.stderr


def test_a_server_that_goes_away_and_comes_back_is_resumed(dash: Node) -> None:
    port = servers.free_port()
    with ExitStack() as stack:
        broken = threading.Event()

        def breaks(exchange: fake.Exchange) -> None:
            fake.whole(DATA, sent=1_000_000)(exchange)
            broken.set()

        def come_back() -> None:
            broken.wait(20)
            first.close()
            time.sleep(0.9)
            second.append(stack.enter_context(hostile(fake.whole(DATA), port=port)))

        second: list[fake.Hostile] = []
        first = stack.enter_context(ExitStack())
        first.enter_context(hostile(breaks, port=port))
        worker = threading.Thread(target=come_back)
        worker.start()
        stack.callback(worker.join)
        done = dash.fetch(f"http://127.0.0.1:{port}/x", DIGEST, env={"RANDOM_NUMBER": "600"})
        assert dash.got(done)
        assert second[0].requests[-1][1]["Range"] == "bytes=1000000-"
    assert "no connection: " in done.stderr


def test_ipv6_alone_is_enough(dash: Node, site: Site) -> None:
    tls = pki.issue(site.authority, site.directory, "six", addresses=["::1"])
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA), tls=tls, host="::1") as server:
        assert dash.got(dash.fetch(server.url(scheme="https"), DIGEST))
        assert len(server.requests) == 2


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is missing")
@pytest.mark.parametrize(
    ("clock", "message"), [("2099-01-01", "has expired: the clock says 2099-"), ("1970-01-02", "is not yet valid: the")]
)
def test_a_wrong_clock_is_named_with_the_certificate(
    dash: Node, site: Site, tmp_path: Path, clock: str, message: str
) -> None:
    path = other_clock(tmp_path / "bin", f"@{clock} 00:00:00", "curl", "date")
    done = dash.fetch(site.url(), DIGEST, env={"PATH": path}, connect_timeout=20)
    assert dash.failed(done, message, f"the clock says {clock[:4]}-", "rd.anchor.clock.ntp=")
    assert dash.attempts() == 1


# A network of its own, in which a name server begins to answer only after a while.
NAMES = """
ip link set lo up || exit 9
printf 'nameserver 127.0.0.1\noptions timeout:1 attempts:1\n' >"$ANCHOR_ROOT/resolv.conf"
printf 'hosts: dns\n' >"$ANCHOR_ROOT/nsswitch.conf"
mount --bind "$ANCHOR_ROOT/resolv.conf" /etc/resolv.conf || exit 9
mount --bind "$ANCHOR_ROOT/nsswitch.conf" /etc/nsswitch.conf || exit 9
{ sleep 1; exec dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts --user=root --pid-file= \
    --listen-address=127.0.0.1 --address=/store.example/127.0.0.1; } >/dev/null 2>&1 &
(cd "$WWW" && exec python3 -m http.server --bind 127.0.0.1 8000) >/dev/null 2>&1 &
"""


@pytest.mark.skipif(shutil.which("dnsmasq") is None, reason="dnsmasq is missing")
def test_names_that_resolve_only_later_are_waited_for(dash: Node, site: Site) -> None:
    done = dash.fetch(
        "http://store.example:8000/node.squashfs",
        DIGEST,
        setup=NAMES,
        env={"WWW": str(site.directory / "www"), "RANDOM_NUMBER": "900"},
        unshare=("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    )
    assert dash.got(done)
    assert "the name is not known: " in done.stderr
