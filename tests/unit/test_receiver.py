"""The receiver of reports: what it keeps, what it refuses, and where it says that nodes are."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from contrib.reports.receiver import MAX_BODY, Fleet, main, replay, table
from tests.conftest import TOP
from tests.reports import Served, receiver


def record(event: str, seq: int = 0, machine: str = "m1", boot_id: str = "b1", **facts: Any) -> dict[str, Any]:
    return {"node": f"{machine}.example", "machine": machine, "boot_id": boot_id, "seq": seq, "event": event, **facts}


BEGIN: dict[str, Any] = {"step": "image", "stage": "squashfs", "at_ms": 9000}
FAILED: dict[str, Any] = {"step": "image", "stage": "squashfs", "error": "no room", "hint": "", "on_failure": "reboot"}


def post(served: Served, body: bytes, **headers: str) -> tuple[int, str]:
    host, _, port = served.url.removeprefix("http://").partition("/")[0].partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("POST", "/report", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def get(served: Served, path: str) -> str:
    port = int(served.url.split(":")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in records).encode()


def test_the_table_says_which_node_hangs_where(tmp_path: Path) -> None:
    fleet = Fleet()
    fleet.take(record("begin", **BEGIN), 1000)
    fleet.take(record("failed", machine="m2", log=["one", "two\x1b[2J"], **FAILED), 1100)
    fleet.take(record("ready", machine="m3", at_ms=1, boot={}), 900)
    fleet.take(record("switch_root", machine="m4", at_ms=1), 1190)
    text = table(fleet, 1200).splitlines()
    assert text[1].split() == ["m1.example", "m1", "boots", "image", "(squashfs)", "200", "s", "1"]
    assert text[2].split()[:4] == ["m2.example", "m2", "failed:", "reboot"]
    assert text[3:6] == ["    no room", "    | one", "    | two"]
    assert [line.split()[0] for line in text[6:]] == ["m4.example", "m3.example"]


def test_a_new_boot_begins_anew_and_is_counted() -> None:
    fleet = Fleet()
    assert fleet.take(record("failed", 7, **FAILED), 1)
    assert not fleet.take(record("failed", 7, **FAILED), 2), "the same event once more"
    assert fleet.take(record("boot", 0, boot_id="b2", version="0.2"), 3)
    [node] = fleet.rows(4)
    assert (node.boots, node.seq, node.state, node.error) == (2, 0, "boots", "")


def test_what_arrives_is_kept_once_and_with_whom_it_came_from(tmp_path: Path) -> None:
    with receiver(tmp_path) as served:
        batch = lines(record("boot", 0, version="0.2"), record("begin", 1, received=1, **{**BEGIN, "from": "x"}))
        assert post(served, batch)[0] == 204
        assert post(served, batch)[0] == 204
        kept = served.events()
        shown, nodes = get(served, "/"), json.loads(get(served, "/nodes.json"))
    assert [event["event"] for event in kept] == ["boot", "begin"]
    assert {event["from"] for event in kept} == {"127.0.0.1"}
    assert all(abs(event["received"] - time.time()) < 60 for event in kept)
    assert "image (squashfs)" in shown
    assert [(node["name"], node["where"]) for node in nodes] == [("m1.example", "image (squashfs)")]
    [again] = replay((tmp_path / "reports.jsonl").read_text().splitlines()).rows(time.time())
    assert (again.where, again.seq) == ("image (squashfs)", 1)


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        b"[" * 5000,
        b'{"event":"boot","version":"1"}',
        lines(record("nothing")),
        lines(record("begin", step="../x", at_ms=1)),
        lines(record("boot", version="1", machine="m" * 81)),
        lines({**record("boot", version="1"), "seq": "1"}),
        b"\xff\xfe{}",
    ],
)
def test_what_is_no_event_is_refused_and_not_kept(tmp_path: Path, body: bytes) -> None:
    with receiver(tmp_path) as served:
        assert post(served, body)[0] == 400
        assert served.events() == []
        assert post(served, lines(record("boot", version="1")) + body)[0] == 204
        assert len(served.events()) == 1


def test_a_body_that_is_too_large_or_has_no_length_is_refused(tmp_path: Path) -> None:
    with receiver(tmp_path) as served:
        assert post(served, b"", **{"Content-Length": str(MAX_BODY + 1)})[0] == 413
        assert post(served, b"", **{"Content-Length": "-1"})[0] == 413


def test_clients_that_say_nothing_hold_nobody_up(tmp_path: Path) -> None:
    with receiver(tmp_path) as served:
        port = int(served.url.split(":")[2].partition("/")[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        started = time.monotonic()
        assert post(served, lines(record("boot", version="1")))[0] == 204
        assert time.monotonic() - started < 15
        for connection in silent:
            connection.close()


def test_a_file_is_shown_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "reports.jsonl"
    file.write_bytes(lines({**record("begin", **BEGIN), "received": time.time() - 60}) + b"garbage\n{}\n[]\n")
    assert main(["--table", str(file)]) == 0
    assert "image (squashfs)" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a file system that gets full")
def test_what_a_full_disk_does_not_take_is_taken_later(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        with receiver(tmp_path) as served:
            assert post(served, lines(record("boot", 0, version="0.2")))[0] == 204
            with suppress(OSError), (tmp_path / "ballast").open("wb", buffering=0) as ballast:
                while True:
                    ballast.write(bytes(512))
            large = record("failed", 1, log=["x" * 300] * 50, **FAILED)
            batch = lines(record("begin", 1, **BEGIN), {**large, "seq": 2})
            assert post(served, batch)[0] == 503
            kept = served.events()
            assert [event["seq"] for event in kept] == list(range(len(kept))), "whole lines only"
            assert served.node().seq == len(kept) - 1, "what is not kept is not known"
            (tmp_path / "ballast").unlink()
            assert post(served, batch)[0] == 204
            assert [event["seq"] for event in served.events()] == [0, 1, 2]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_half_a_line_of_a_killed_receiver_spoils_nothing(tmp_path: Path) -> None:
    file = tmp_path / "reports.jsonl"
    file.write_bytes(lines(record("boot", 0, version="0.2", received=1)) + b'{"node": "m1')
    argv = [sys.executable, "-m", "contrib.reports.receiver", "--listen", "127.0.0.1:0", str(file)]
    child = subprocess.Popen(argv, cwd=TOP, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        port = child.stderr.readline().rpartition(":")[2].strip()
        served = Served(f"http://127.0.0.1:{port}/report", file, Fleet())
        assert post(served, lines(record("begin", 1, **BEGIN)))[0] == 204
    finally:
        child.kill()
        child.wait(timeout=60)
        child.stderr.close()
    assert [node.seq for node in replay(file.read_text().splitlines()).rows(2)] == [1]


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--listen", "8080", str(tmp_path / "x")])
    assert ended.value.code == 2
    assert main(["--listen", "127.0.0.1:0", "--certificate", str(tmp_path / "gone"), str(tmp_path / "x")]) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err
    assert main(["--listen", "127.0.0.1:99999", str(tmp_path / "x")]) == 1
    with pytest.raises(SystemExit):
        main(["--table", str(tmp_path / "gone")])
    assert "gone: no such file" in capsys.readouterr().err
