"""anchor-post.sh: events reach a real receiver over TLS, in their order, and nobody waits for a server that is none."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest

from contrib.reports.receiver import Handler, tls
from contrib.serving import in_a_thread
from contrib.site import pki
from tests.reports import receiver
from tests.shell.conftest import Shell

LOAD = """
. "$LIB/anchor-report.sh"
. "$LIB/anchor-post.sh"
mkdir -p "$ANCHOR_RUN/steps" "$ANCHOR_RUN/credentials"
anchor_boot_set node node17.example
"""
# A boot of one step, and its end.
STEP = """
anchor_step_begin image squashfs
anchor_note_number bytes 12
anchor_step_end ok
"""
HAND_OFF = """
anchor_event '{"event":"switch_root","at_ms":9000}'
anchor_post_wait 5000
anchor_post_end
wait
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[pki.Authority, pki.Leaf, pki.Leaf]:
    """Make a CA, the receiver's certificate and a node's."""
    directory = tmp_path_factory.mktemp("site")
    authority = pki.make_authority(directory / "ca")
    server, node = pki.issue(authority, directory, "receiver"), pki.issue(authority, directory, "node17", client=True)
    return authority, server, node


@pytest.fixture
def trusting(shell: Shell, site: tuple[pki.Authority, pki.Leaf, pki.Leaf]) -> Shell:
    """Return a node with the site's CA and a firmware's UUID."""
    for name in ("etc/anchor", "sys/class/dmi/id"):
        (shell.root / name).mkdir(parents=True)
    shutil.copy(site[0].certificate, shell.root / "etc/anchor/ca.pem")
    (shell.root / "sys/class/dmi/id/product_uuid").write_text("4c4c4544-0042-3510-8051-b3c04f564d31\n")
    return shell


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_boot_arrives_in_order_with_who_and_which(
    trusting: Shell, site: tuple[pki.Authority, pki.Leaf, pki.Leaf], tmp_path: Path
) -> None:
    with receiver(tmp_path, tls(site[1].certificate, site[1].key, None)) as served:
        script = LOAD + "anchor_report=$1; anchor_post_open;" + STEP + "anchor_post_start" + STEP + HAND_OFF
        done = trusting.run(script, served.url)
    assert (done.returncode, done.stderr) == (0, "")
    events = served.events()
    assert [event["event"] for event in events] == ["begin", "end", "begin", "end", "switch_root"]
    assert [event["seq"] for event in events] == list(range(5))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert {(event["node"], event["boot_id"]) for event in events} == {("node17.example", boot)}
    assert {event["machine"] for event in events} == {"4c4c4544-0042-3510-8051-b3c04f564d31"}
    end = events[1]
    assert (end["step"], end["stage"], end["result"], end["bytes"]) == ("image", "squashfs", "ok", 12)
    assert end["duration_ms"] >= 0
    assert (served.node().state, served.node().where) == ("starts", "switch_root")


def test_the_certificate_that_auth_left_opens_the_door(
    trusting: Shell, site: tuple[pki.Authority, pki.Leaf, pki.Leaf], tmp_path: Path
) -> None:
    authority, server, node = site
    with receiver(tmp_path, tls(server.certificate, server.key, authority.certificate)) as served:
        enroll = f'cp "{node.certificate}" "$ANCHOR_RUN/credentials/client.crt";'
        enroll += f'cp "{node.key}" "$ANCHOR_RUN/credentials/client.key"\n'
        wait = 'until [ -s "$ANCHOR_REPORT/error" ]; do sleep 0.05; done; cat "$ANCHOR_REPORT/error"\n'
        # The hand-off does not wait where the last request failed: the sender's own next try is what counts here.
        again = 'until [ ! -s "$ANCHOR_REPORT/error" ]; do sleep 0.05; done\n'
        script = LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start" + STEP + wait + enroll + again
        done = trusting.run(script + HAND_OFF, served.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "curl" in done.stdout
    assert [event["event"] for event in served.events()] == ["begin", "end", "switch_root"]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_receiver_that_is_not_there_costs_nothing(trusting: Shell, scheme: str) -> None:
    script = LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start" + STEP * 20
    script += 'until [ -s "$ANCHOR_REPORT/error" ]; do sleep 0.05; done\n'
    started = time.monotonic()
    done = trusting.run(script + HAND_OFF, f"{scheme}://127.0.0.1:{free_port()}/")
    assert time.monotonic() - started < 15
    assert done.returncode == 0
    assert "warning: not all reports were taken: curl: (7) Failed to connect" in done.stderr


def test_a_receiver_that_never_answers_holds_up_the_end_for_its_limit_only(trusting: Shell) -> None:
    script = LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start" + STEP
    script += "anchor_uptime_ms; start=$anchor_uptime_ms; anchor_post_wait 400; anchor_uptime_ms\n"
    script += 'printf "%s" $((anchor_uptime_ms - start)); anchor_post_end; kill "$anchor_post__pid"'
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = trusting.run(script, f"http://127.0.0.1:{listener.getsockname()[1]}/")
    assert 400 <= int(done.stdout) < 1500
    assert "warning: not all reports were taken" in done.stderr


def test_a_receiver_that_is_slow_gets_the_end_all_the_same(trusting: Shell) -> None:
    class Slow(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.7)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class's name
            """Say nothing."""

    taken = 'until [ "$(cat "$ANCHOR_REPORT/sent")" = 2 ]; do sleep 0.05; done\n'
    # At the end a request may be under way, and the last event comes with the one after it.
    script = LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start" + STEP + taken + STEP
    script += HAND_OFF.replace("5000", "500")
    with http.server.HTTPServer(("127.0.0.1", 0), Slow) as server, in_a_thread(server):
        done = trusting.run(script, f"http://127.0.0.1:{server.server_address[1]}/")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("status", [301, 404, 503])
def test_only_2xx_means_taken(trusting: Shell, tmp_path: Path, status: int) -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(f"HTTP/1.1 {status} No\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n".encode())

    script = LOAD + 'anchor_report=$1; anchor_post_open; anchor_event \'{"event":"boot","version":"1"}\'\n'
    script += 'anchor_post_once; printf "%s " $?; cat "$ANCHOR_REPORT/error"'
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        done = trusting.run(script, f"http://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()
    assert done.stdout == f"1 the server answered with status {status}\n"
    assert not (trusting.root / "run/anchor/report/sent").exists()


def test_the_newest_events_are_kept_when_nobody_takes_them(trusting: Shell, tmp_path: Path) -> None:
    script = LOAD + "anchor_report=$1; anchor_post_open; n=0\n"
    script += 'while [ $n -lt 250 ]; do anchor_event "{\\"event\\":\\"begin\\",\\"step\\":\\"s$n\\",\\"at_ms\\":$n}"'
    script += "; n=$((n + 1)); done; anchor_post_start" + HAND_OFF
    with receiver(tmp_path) as served:
        done = trusting.run(script, served.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert [event["seq"] for event in served.events()] == list(range(151, 251))
    assert len(list((trusting.root / "run/anchor/report").iterdir())) < 110


def test_queueing_starts_no_program(trusting: Shell) -> None:
    """With a PATH that leads nowhere an event is queued all the same."""
    script = LOAD + "anchor_report=http://127.0.0.1:9/; anchor_post_open; PATH=/nowhere\n"
    script += 'anchor_event \'{"event":"boot","version":"1"}\''
    assert trusting.run(script).stderr == ""
    assert (trusting.root / "run/anchor/report/0").read_text() == '0\n{"event":"boot","version":"1"}\n'


def test_a_url_with_a_password_stays_out_of_sight(trusting: Shell, tmp_path: Path) -> None:
    """Neither an argument of curl's, nor a trace under rd.debug, nor a readable file shows it."""
    script = LOAD + 'anchor_report=$1; set -x; anchor_post_open; anchor_event "{}"; anchor_post_once; set +x\n'
    script += 'stat -c %a "$ANCHOR_REPORT" "$ANCHOR_REPORT/request"'
    tool = tmp_path / "curl"
    tool.write_text(f'#!/bin/sh\nprintf "%s " "$@" >"{tmp_path}/arguments"\nexit 7\n')
    tool.chmod(0o755)
    done = trusting.run("PATH=$2:$PATH;" + script, "https://user:hunter2@127.0.0.1/", str(tmp_path))
    assert done.stdout == "700\n600\n"
    assert "hunter2" not in done.stderr.replace("anchor_report=https://user:hunter2@127.0.0.1/", "")
    assert "--config" in (tmp_path / "arguments").read_text()
    assert "hunter2" not in (tmp_path / "arguments").read_text()


@pytest.mark.parametrize("url", ['http://x/"\nurl=', "http://x/ y", "http://x/\\", "http://x/ü"])
def test_a_url_that_would_break_out_of_curls_configuration_is_refused(trusting: Shell, url: str) -> None:
    done = trusting.run(LOAD + 'anchor_report=$1; anchor_post_open; anchor_event "{}"; printf "%s" $?', url)
    assert done.stdout == "0"
    assert "nothing is reported" in done.stderr
    assert not (trusting.root / "run/anchor/report").exists()


@pytest.mark.parametrize(
    ("uuid", "cards", "machine"),
    [
        ("4C4C4544-0042-3510-8051-B3C04F564D31", (), "4C4C4544-0042-3510-8051-B3C04F564D31"),
        ("00000000-0000-0000-0000-000000000000", ("eth0",), "52:54:00:00:00:01"),
        ("ffffffff-ffff-ffff-ffff-ffffffffffff", ("eth0", "eth1"), "52:54:00:00:00:01"),
        ("Not Settable", ("eth0",), "52:54:00:00:00:01"),
        ("", ("eth0",), "52:54:00:00:00:01"),
        ("", (), "unknown"),
    ],
)
def test_what_a_machine_is_called(shell: Shell, uuid: str, cards: tuple[str, ...], machine: str) -> None:
    dmi, net = shell.root / "sys/class/dmi/id", shell.root / "sys/class/net"
    dmi.mkdir(parents=True)
    (net / "br0").mkdir(parents=True)
    (net / "br0/address").write_text("aa:bb:cc:dd:ee:ff\n")
    if uuid:
        (dmi / "product_uuid").write_text(f"{uuid}\n")
    for number, card in enumerate(cards, 1):
        (net / card / "device").mkdir(parents=True)
        (net / card / "address").write_text(f"52:54:00:00:00:0{number}\n")
    done = shell.run(LOAD + 'anchor_post__identity; printf "{%s}" "$anchor_post__identity"')
    assert json.loads(done.stdout)["machine"] == machine


def test_the_sender_is_started_once_and_again_when_it_has_gone(trusting: Shell) -> None:
    script = (
        LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start; first=$anchor_post__pid; anchor_post_start\n"
    )
    script += '[ "$first" = "$anchor_post__pid" ] && printf "one "; kill "$first"; wait "$first" 2>/dev/null\n'
    script += 'anchor_post_start; [ "$first" != "$anchor_post__pid" ] && printf "two"; kill "$anchor_post__pid"'
    assert trusting.run(script, f"http://127.0.0.1:{free_port()}/").stdout == "one two"


def test_what_is_left_is_posted_from_the_booted_root(trusting: Shell, tmp_path: Path) -> None:
    before = LOAD + "anchor_report=$1; anchor_post_open; anchor_boot_set result ok" + STEP
    before += 'cp "$ANCHOR_ROOT/etc/anchor/ca.pem" "$ANCHOR_REPORT/"; rm -rf "$ANCHOR_ROOT/etc"'
    after = '. "$LIB/anchor-report.sh"; . "$LIB/anchor-post.sh"; . "$LIB/anchor-ready.sh"; anchor_ready'
    with receiver(tmp_path) as served:
        assert trusting.run(before, served.url).stderr == ""
        done = trusting.run(after)
    assert (done.returncode, done.stderr) == (0, "")
    assert [event["event"] for event in served.events()] == ["begin", "end", "ready"]
    assert served.events()[-1]["boot"]["result"] == "ok"
    assert served.node().state == "ready"


def test_a_booted_root_without_curl_is_no_failure(trusting: Shell) -> None:
    before = LOAD + "anchor_report=http://127.0.0.1:9/; anchor_post_open"
    after = '. "$LIB/anchor-report.sh"; . "$LIB/anchor-post.sh"; . "$LIB/anchor-ready.sh"; PATH=$1; anchor_ready'
    assert trusting.run(before).stderr == ""
    (trusting.root / "bin").mkdir()
    (trusting.root / "bin/mv").symlink_to(str(shutil.which("mv")))
    done = trusting.run(after, str(trusting.root / "bin"))
    assert (done.returncode, done.stderr) == (0, "")


def test_many_events_at_once_are_few_requests(trusting: Shell, tmp_path: Path) -> None:
    """What piles up during a request goes with the next one: counted at the server."""
    requests: list[int] = []
    with receiver(tmp_path) as served:
        take = Handler.do_POST

        def count(self: Handler) -> None:
            before = len(served.events())
            time.sleep(0.1)
            take(self)
            requests.append(len(served.events()) - before)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Handler, "do_POST", count)
            done = trusting.run(
                LOAD + "anchor_report=$1; anchor_post_open; anchor_post_start" + STEP * 20 + HAND_OFF, served.url
            )
    assert done.stderr == ""
    assert sum(requests) == 41
    assert len(requests) < 12


def test_a_full_pipe_holds_nobody_up(trusting: Shell) -> None:
    """Nobody has emptied it for more events than it has room for wakes: 64 KiB, as pipe(7) says."""
    script = LOAD + "anchor_report=http://127.0.0.1:9/; anchor_post_open\n"
    script += 'exec 9<>"$ANCHOR_REPORT/wake"; head -c 65536 /dev/zero >&9\n'
    script += 'printf "65000\\n" >"$ANCHOR_REPORT/next"; printf "0\\n" >"$ANCHOR_REPORT/sent"\n'
    script += 'anchor_event "{}"; cat "$ANCHOR_REPORT/next"'
    assert trusting.run(script, timeout=20).stdout == "65001\n"


def test_the_sender_does_not_begin_again_once_it_was_ended(trusting: Shell, tmp_path: Path) -> None:
    tool = tmp_path / "curl"
    tool.write_text(f'#!/bin/sh\nprintf "x" >>"{tmp_path}/calls"\nexit 7\n')
    tool.chmod(0o755)
    script = "PATH=$1:$PATH;" + LOAD + "anchor_report=http://127.0.0.1:9/; anchor_post_open; anchor_event '{}'\n"
    # Its pause after a failure lasts until it was ended.
    script += 'sleep() { until [ -e "$ANCHOR_REPORT/stop" ]; do command sleep 0.05; done; }\nanchor_post_start\n'
    script += 'until [ -s "$ANCHOR_REPORT/error" ]; do command sleep 0.05; done; command sleep 0.3\n'
    script += 'anchor_post_end; wait "$anchor_post__pid"; printf "%s" $?'
    assert trusting.run(script, str(tmp_path)).stdout == "0"
    assert (tmp_path / "calls").read_text() == "x"
