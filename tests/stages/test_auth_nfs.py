"""auth nfs: what it takes from an export and when, with real keys. tests/stages/nfs_node.py says what stands in."""

from __future__ import annotations

from pathlib import Path

import pytest

from contrib.site import pki
from tests.shell.conftest import SHELLS
from tests.stages.nfs_node import Node, make_node, root_only

pytestmark = root_only

EXPORT = "nfs4:nfs.example:/nodes/1"
FILES = "node.crt:/client.cert,node.key:/client.key"
BASE = "ro,nosuid,nodev,noexec,soft,timeo=30,retrans=2,retry=0,sec=sys,nolock,noac,lookupcache=none"


def filled(node: Node, leaf: pki.Leaf) -> Node:
    (node.export / "node.crt").write_bytes(leaf.certificate.read_bytes())
    (node.export / "node.key").write_bytes(leaf.key.read_bytes())
    return node


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, leaf: pki.Leaf) -> Node:
    return filled(make_node(request.param, tmp_path, "auth-nfs"), leaf)


@pytest.fixture
def dash(tmp_path: Path, leaf: pki.Leaf) -> Node:
    return filled(make_node("dash", tmp_path, "auth-nfs"), leaf)


def authenticate(node: Node, export: str = EXPORT, files: str = FILES, timeout: int = 4) -> tuple[int, str]:
    done = node.run("anchor_nfs_run", nfs_export=export, nfs_files=files, nfs_timeout=timeout)
    assert done.stdout == ""
    assert not (node.shell.root / "run/anchor/nfs-files").exists()
    return done.returncode, done.stderr


def test_whole_files_are_taken(node: Node, leaf: pki.Leaf) -> None:
    (node.export / "token").write_text("anything\n")
    status, said = authenticate(node, files=f"{FILES},token:/run/anchor/credentials/site.token")
    assert (status, said) == (0, "anchor: credentials from nfs.example:/nodes/1\n")
    assert {path.name: path.stat().st_mode & 0o777 for path in node.credentials.iterdir()} == {
        "client.crt": 0o600,
        "client.key": 0o600,
        "site.token": 0o600,
    }
    assert (node.credentials / "client.key").read_bytes() == leaf.key.read_bytes()
    assert (node.credentials / "client.crt").read_bytes() == leaf.certificate.read_bytes()
    place = node.shell.root / "run/anchor/nfs"
    assert node.mounts() == [f"-t nfs4 -o {BASE},vers=4.2 nfs.example:/nodes/1 {place}"]
    assert [node.noted(f"note-{name}") for name in ("server", "path", "version")] == ["nfs.example", "/nodes/1", "4.2"]
    assert (node.shell.root / "etc/netconfig").read_text().startswith("udp tpi_clts v inet udp - -\ntcp ")


def test_a_half_copied_key_is_waited_for(node: Node, leaf: pki.Leaf) -> None:
    whole = leaf.key.read_text()
    (node.export / "node.key").write_text(whole[:100])
    node.mount_does(f"[ \"$call\" -lt 2 ] || printf '%s' '{whole}' >'{node.export}/node.key'")
    status, said = authenticate(node, timeout=20)
    assert status == 0, said
    assert "client.key is not whole: it ends inside of a PEM block; waiting for it" in said
    assert whole.splitlines()[1] not in said
    assert node.noted("number-attempts") == "2"
    assert (node.credentials / "client.key").read_text() == whole


def test_what_never_becomes_whole_is_a_clear_failure(node: Node, leaf: pki.Leaf, other: pki.Leaf) -> None:
    (node.export / "node.key").write_bytes(other.key.read_bytes())
    status, said = authenticate(node, timeout=2)
    wrong = "the key client.key does not belong to the certificate client.crt"
    assert status == 1
    assert f"error: nfs.example:/nodes/1: {wrong} (attempts: " in said
    assert node.noted("hint") == "put a certificate and the key that it was issued for there, both as PEM"
    assert list(node.credentials.iterdir()) == []


def test_a_file_that_grows_is_not_taken(dash: Node) -> None:
    grow = dash.export / "token"
    grow.write_text("begun\n")
    # Each look of the node's at the file comes after one more write.
    script = f"stat() {{ command stat \"$@\"; printf 'more\\n' >>'{grow}'; }}\n"
    dash.mount_does("")
    files = f"{FILES},token:/run/anchor/credentials/token"
    body = script + 'timeout() { shift 3; "$@"; }\nanchor_nfs_run'
    done = dash.run(body, nfs_export=EXPORT, nfs_files=files, nfs_timeout=2)
    assert done.returncode == 1
    assert "token changed while it was copied" in done.stderr
    assert list(dash.credentials.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ("node.crt:/client.cert,node.key:/etc/shadow", "whose destination is not allowed"),
        ("node.crt:/ca.pem", "whose destination is not allowed"),
        ("node.crt:/run/anchor/credentials/../x", "whose destination is not allowed"),
        ("node.crt:/run/anchor/credentials/.x", "whose destination is not allowed"),
        ("node.crt:/run/anchor/credentials/$(reboot)", "whose destination is not allowed"),
        ("../node.crt:/client.cert,node.key:/client.key", "whose destination is not allowed"),
        ("node.crt", "no source:destination"),
        (":/client.cert", "no source:destination"),
        ("node.crt:/client.cert", "a certificate without its key"),
        ("node.key:/client.key", "a certificate without its key"),
        ("a:/client.cert,b:/client.crt,c:/client.key", "has two files for client.crt"),
    ],
)
def test_a_list_that_asks_for_too_much(dash: Node, files: str, reason: str) -> None:
    status, said = authenticate(dash, files=files)
    assert status == 1
    assert reason in said
    assert dash.mounts() == []


@pytest.mark.parametrize(
    ("options", "passed"),
    [
        ("port=2050,timeo=7,retrans=1,rsize=65536", ",port=2050,timeo=7,retrans=1,rsize=65536"),
        ("ro,nolock,nosuid,intr,_netdev", ""),
        ("hard,rw", ""),
        ("proto=tcp6,mountproto=udp", ",proto=tcp6,mountproto=udp"),
    ],
)
def test_options_from_a_closed_list(dash: Node, options: str, passed: str) -> None:
    status, said = authenticate(dash, f"{EXPORT}:{options}")
    assert status == 0, said
    assert dash.mounts()[0].split()[3] == f"{BASE}{passed},vers=4.2"
    assert ("has no effect" in said) == ("hard" in options)


@pytest.mark.parametrize(
    "options",
    [
        "suid",
        "dev",
        "exec",
        "context=x",
        "sec=krb5p",
        "fsc",
        "port=0",
        "port=99999",
        "port=1e3",
        "timeo=0",
        "vers=2",
        "vers=3",
        "addr=10.0.0.1",
        "clientaddr=10.0.0.1",
        "remount",
        "bind",
        "x-systemd.automount",
        "retrans=99",
    ],
)
def test_any_other_option_is_refused(dash: Node, options: str) -> None:
    status, said = authenticate(dash, f"{EXPORT}:{options}")
    assert status == 1
    assert f"the NFS option {options.partition('=')[0]}" in said
    assert dash.mounts() == []


def test_older_versions_are_tried_where_the_server_has_no_newer(node: Node) -> None:
    not_there = "mount.nfs4: Protocol not supported"
    node.mount_says("".join(f"{version}|{not_there}\n" for version in ("4.2", "4.1", "4.0")))
    assert authenticate(node, "nfs:[fd00::1]:/nodes/1")[0] == 0
    tried = [line.split("vers=")[1].split()[0] for line in node.mounts()]
    assert tried == ["4.2", "4.1", "4.0", "3,proto=tcp,mountproto=tcp"]
    assert node.mounts()[-1].startswith("-t nfs -o ")
    assert node.mounts()[-1].split()[-2] == "[fd00::1]:/nodes/1"
    assert node.noted("note-version") == "3"


def test_nfs4_means_no_older_one(dash: Node) -> None:
    dash.mount_says("any|mount.nfs4: Protocol not supported\n")
    status, said = authenticate(dash, timeout=1)
    assert status == 1
    assert "cannot mount nfs.example:/nodes/1: Protocol not supported" in said
    assert not [line for line in dash.mounts() if "vers=3" in line]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("mount.nfs4: access denied by server while mounting x", "see which nodes may mount the export"),
        ("mount.nfs4: mounting x failed, reason given by server: No such file or directory", "check the path"),
        ("mount.nfs4: No such device", "build the initramfs with an nfs stage"),
    ],
)
def test_what_will_not_pass_fails_at_once(dash: Node, text: str, hint: str) -> None:
    dash.mount_says(f"any|{text}\n")
    status, said = authenticate(dash, timeout=60)
    assert status == 1
    assert text.removeprefix("mount.nfs4: ") in said
    assert hint in said
    assert len(dash.mounts()) == 1


def test_a_mount_that_hangs_is_ended(dash: Node) -> None:
    dash.mount_does("sleep 30")
    status, said = authenticate(dash, timeout=1)
    assert status == 1
    assert "cannot mount nfs.example:/nodes/1: no answer within 1 s (attempts: 1, time limit: 1 s)" in said


def test_links_lead_nowhere_outside(dash: Node, leaf: pki.Leaf) -> None:
    outside = dash.export.with_name("outside.key")
    outside.write_bytes(leaf.key.read_bytes())
    (dash.export / "inside.key").write_bytes(leaf.key.read_bytes())
    (dash.export / "node.key").unlink()
    (dash.export / "node.key").symlink_to("inside.key")
    assert authenticate(dash)[0] == 0
    (dash.export / "node.key").unlink()
    (dash.export / "node.key").symlink_to(outside)
    status, said = authenticate(dash, timeout=60)
    assert status == 1
    assert "nfs.example:/nodes/1/node.key is a link that leads out of the export" in said


def test_a_step_that_is_killed_leaves_nothing_mounted(node: Node) -> None:
    (node.export / "node.key").write_text("")
    script = 'anchor_nfs_run & until [ -s "$EXPORT.mounts" ]; do sleep 0.1; done; sleep 0.3\n'
    script += 'kill -TERM $(pgrep -P "$!") "$!"; wait "$!"; sleep 2'
    done = node.run(script, nfs_export=EXPORT, nfs_files=FILES, nfs_timeout=30)
    assert done.stdout == ""
    assert len(node.mounts()) == 1
    assert not (node.shell.root / "run/anchor/nfs-files").exists()
