"""anchor_fetch_stream over the https transport: what broke off goes on unnoticed, and the digest decides."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

import pytest

from tests.shell.downloads import DATA, DIGEST, OTHER, limits
from tests.stages import hostile_http as fake
from tests.stages import https_node
from tests.stages.hostile_http import hostile
from tests.stages.https_node import SCRIPT, STAGE, Node

site, node, dash = https_node.site, https_node.node, https_node.dash

STREAM = SCRIPT.replace(
    'anchor_fetch "$@"',
    """
. "$LIB/anchor-stream.sh"
into() {
    printf 'begun\\n' >>"$ANCHOR_ROOT/begun"
    [ -z "$LEAVES" ] || return 0
    cat >"$ANCHOR_ROOT/out"
    [ -z "$REFUSES" ] || anchor_fail "the reader says no" "ask the reader"
}
anchor_fetch_stream "$@" into
""",
)


def stream(
    node: Node, url: str, *, sha256: str = DIGEST, size: int = len(DATA), env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Give a download to a reader that writes it to `out`."""
    environment = limits({}) | {"STAGE": str(STAGE), "anchor_https_proxy": "", **(env or {})}
    done = node.shell.run(STREAM, url, str(node.image), sha256, str(size), env=environment, timeout=60)
    assert not list(node.image.parent.iterdir())
    return done


def begun(node: Node) -> int:
    """Return how often the reader began."""
    return len((node.shell.root / "begun").read_text().splitlines())


def got(node: Node, done: subprocess.CompletedProcess[str]) -> bool:
    """Whether the reader got all of it."""
    assert done.returncode == 0, done.stderr
    return (node.shell.root / "out").read_bytes() == DATA


def test_what_broke_off_goes_on_in_the_same_stream(node: Node) -> None:
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA, sent=500_000), fake.whole(DATA)) as server:
        assert got(node, stream(node, server.url()))
        assert [headers.get("Range") for _, headers in server.requests] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert begun(node) == 1


def test_the_page_of_a_redirect_is_not_counted(dash: Node) -> None:
    with hostile(fake.whole(DATA, sent=1_000_000), fake.whole(DATA)) as server:
        with hostile(fake.redirect(server.url())) as first:
            assert got(dash, stream(dash, first.url()))
        assert [headers.get("Range") for _, headers in server.requests] == [None, "bytes=1000000-"]


def test_a_server_that_ignores_ranges_begins_a_new_stream(dash: Node) -> None:
    with hostile(fake.ignoring_ranges(DATA, sent=1_000_000), fake.ignoring_ranges(DATA)) as server:
        assert got(dash, stream(dash, server.url()))
    assert begun(dash) == 2


def test_another_mirror_makes_good_what_one_sent_wrong(dash: Node) -> None:
    with hostile(fake.whole(OTHER)) as wrong, hostile(fake.whole(DATA)) as right:
        assert got(dash, stream(dash, f"{wrong.url()} {right.url()}"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fake.whole(OTHER), "is not what it should be: its SHA-256 digest is"),
        (fake.whole(DATA + b"x"), "is another file"),
        (fake.chunked(DATA, times=100), "is another file"),
        (fake.chunked(DATA[:-1]), "it has 2999999 bytes, expected 3000000"),
        (fake.status(404), "it is not there"),
    ],
)
def test_what_is_not_the_file_is_refused(dash: Node, fault: fake.Fault, message: str) -> None:
    with hostile(fault) as server:
        done = stream(dash, server.url())
    assert done.returncode == 1
    assert message in done.stderr


def test_an_endless_redirect_ends(dash: Node) -> None:
    with hostile(fake.redirect("/again")) as server:
        done = stream(dash, server.url())
    assert done.returncode == 1
    assert "redirects more than 5 times" in done.stderr


def test_a_reader_that_refuses_is_believed_where_the_digest_is_right(node: Node) -> None:
    with hostile(fake.whole(DATA)) as server:
        done = stream(node, server.url(), env={"REFUSES": "1"})
        assert (done.returncode, begun(node)) == (1, 1)
        assert "the reader says no" in done.stderr
        assert "ask the reader" in done.stderr


def test_a_reader_that_leaves_early_is_no_failure_of_the_download(dash: Node) -> None:
    with hostile(fake.whole(DATA)) as server:
        assert stream(dash, server.url(), env={"LEAVES": "1"}).returncode == 0
