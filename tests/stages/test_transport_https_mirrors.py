"""Mirrors of one file under the real download loop, with real curl: dead, wrong, hostile and half-way ones.

Random numbers are 0, so the mirrors are asked in the order in which they are given.
"""

from __future__ import annotations

import hashlib

import pytest

from contrib.site import pki, servers
from tests.shell.downloads import DATA, DIGEST, OTHER
from tests.stages import hostile_http as fake
from tests.stages import https_node
from tests.stages.hostile_http import hostile
from tests.stages.https_node import Node, Site

# Fixtures
site, node, dash = https_node.site, https_node.node, https_node.dash


def dead() -> str:
    """Return a URL where nothing listens."""
    return f"http://127.0.0.1:{servers.free_port()}/node.squashfs"


def ranges(server: fake.Hostile) -> list[tuple[str | None, str | None]]:
    """Return what each request asked to resume: Range and If-Range."""
    return [(headers.get("Range"), headers.get("If-Range")) for _, headers in server.requests]


def test_a_dead_first_mirror_costs_no_round(node: Node, site: Site) -> None:
    done = node.fetch(f"{dead()} {site.url()}", DIGEST, attempts=1)
    assert node.got(done)
    assert "no connection: " in done.stderr
    assert "trying another mirror" in done.stderr
    assert len(site.log()) == 1


def test_when_all_mirrors_are_dead_each_is_named(node: Node) -> None:
    first, second = dead(), dead()
    done = node.fetch(f"{first} {second}", DIGEST, attempts=2)
    assert node.failed(done, "gave up on all 2 mirrors after attempt 2 of 2", f"{first}: no conn", f"{second}: no conn")


def test_a_mirror_without_the_file_is_dropped(node: Node, site: Site) -> None:
    with hostile(fake.status(404)) as empty, hostile(fake.whole(DATA)) as full:
        assert node.got(node.fetch(f"{empty.url()} {full.url()}", DIGEST))
        assert len(empty.requests) == len(full.requests) == 1


def test_a_mirror_with_an_untrusted_certificate_is_dropped(dash: Node, site: Site) -> None:
    tls = pki.issue(site.stranger, site.directory, "strange")
    with hostile(fake.whole(DATA), tls=tls) as strange:
        done = dash.fetch(f"{strange.url(scheme='https')} {site.url()}", DIGEST)
        assert dash.got(done)
        assert strange.requests == []
    assert "warning: not from this mirror: " in done.stderr
    assert "is not trusted" in done.stderr


def test_a_digest_joins_what_two_mirrors_sent(node: Node) -> None:
    # The second names its version in another way, and is not asked for the first one's.
    with (
        hostile(fake.whole(DATA, sent=1_000_000), fake.status(503)) as first,
        hostile(fake.whole(DATA, etag='"other"', sent=500_000), fake.whole(DATA, etag='"other"')) as second,
    ):
        assert node.got(node.fetch(f"{first.url()} {second.url()}", DIGEST))
        assert ranges(first) == [(None, None), ("bytes=1500000-", None)]
        assert ranges(second) == [("bytes=1000000-", None), ("bytes=1500000-", '"other"')]


def test_without_a_digest_nothing_is_joined(node: Node, site: Site) -> None:
    tls = pki.issue(site.authority, site.directory, "fake")
    with (
        hostile(fake.whole(OTHER, sent=1_000_000), fake.status(503), tls=tls) as first,
        hostile(fake.whole(DATA), tls=tls) as second,
    ):
        assert node.got(node.fetch(f"{first.url(scheme='https')} {second.url(scheme='https')}"))
        assert ranges(first) == [(None, None), ("bytes=1000000-", '"v1"')]
        assert ranges(second) == [(None, None)]


def test_a_mirror_that_ignores_ranges_does_not_cost_what_is_there(node: Node) -> None:
    with (
        hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA)) as first,
        hostile(fake.ignoring_ranges(DATA)) as second,
    ):
        assert node.got(node.fetch(f"{first.url()} {second.url()}", DIGEST))
        assert ranges(first) == [(None, None), ("bytes=1000000-", '"v1"')]
        assert ranges(second) == [("bytes=1000000-", None)]


def test_when_the_only_mirror_left_ignores_ranges_it_starts_from_zero(node: Node) -> None:
    with (
        hostile(fake.whole(DATA, sent=1_000_000), fake.status(410)) as first,
        hostile(fake.ignoring_ranges(DATA)) as second,
    ):
        assert node.got(node.fetch(f"{first.url()} {second.url()}", DIGEST))
        assert ranges(second) == [("bytes=1000000-", None), ("bytes=1000000-", None), (None, None)]


def test_a_hostile_mirror_cannot_spoil_what_another_began(node: Node) -> None:
    with (
        hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA)) as good,
        hostile(fake.whole(OTHER)) as bad,
    ):
        done = node.fetch(f"{good.url()} {bad.url()}", DIGEST)
        assert node.got(done)
        assert "the 2 parts that came from" in done.stderr
        # Each is asked alone, and for all of it.
        assert ranges(good)[-1] == (None, None)


def test_a_mirror_that_lies_about_the_end_is_no_end(node: Node) -> None:
    # It says that what is there is already all of it.
    half = DATA[:1_000_000]
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA)) as good, hostile(fake.whole(half)) as bad:
        assert node.got(node.fetch(f"{good.url()} {bad.url()}", DIGEST))


def test_only_hostile_mirrors_are_a_failure_that_names_them(dash: Node) -> None:
    with hostile(fake.whole(OTHER)) as one, hostile(fake.whole(OTHER, sent=1_000_000), fake.whole(OTHER)) as two:
        done = dash.fetch(f"{one.url()} {two.url()}", DIGEST)
        assert dash.failed(done, "none of the 2 mirrors has the file", one.url(), two.url(), DIGEST)


@pytest.mark.parametrize("times", [1, 20])
def test_a_file_that_outgrows_its_size_is_refused_at_once(node: Node, site: Site, times: int) -> None:
    with hostile(fake.chunked(DATA + OTHER, times=times)) as endless:
        done = node.fetch(f"{endless.url()} {site.url()}", DIGEST, size=len(DATA))
        assert node.got(done)
        assert f"is another file: it has more bytes, and should have {len(DATA)}" in done.stderr


def test_a_size_that_does_not_fit_is_refused_before_a_connection(node: Node) -> None:
    (node.shell.root / "proc/meminfo").write_text(f"MemAvailable: {100 << 10} kB\n")
    with hostile(fake.whole(DATA)) as server:
        done = node.fetch(f"{server.url()} {dead()}", DIGEST, size=90 << 20, reserve=64 << 20)
        assert node.failed(
            done, "it needs 90.0 MiB, and 36.0 MiB fit (100.0 MiB of memory available, of which 64.0 MiB"
        )
        assert server.requests == []


def test_a_size_that_is_no_multiple_of_a_block_is_reached(node: Node) -> None:
    odd = DATA[:1_000_001]
    with hostile(fake.whole(odd, sent=700_000), fake.whole(odd)) as server:
        assert node.got(node.fetch(server.url(), hashlib.sha256(odd).hexdigest(), size=len(odd)), odd)


def test_secrets_of_mirrors_are_in_no_message(dash: Node) -> None:
    with hostile(fake.status(404)) as server:
        address = server.url("/x?key=s3cret").replace("//", "//robot:passw0rd@")
        done = dash.fetch(f"{address} {dead()}?key=s3cret", DIGEST, attempts=2)
        assert dash.failed(done, "gave up on all 2 mirrors")
    assert [word for word in ("s3cret", "passw0rd", "robot") if word in done.stderr + done.stdout] == []
