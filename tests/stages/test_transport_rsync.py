"""The rsync transport under the real download loop: a real rsync daemon, and real rsync through a real SSH server."""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from contrib.site import servers
from tests.shell.conftest import LIB, SHELLS, Shell
from tests.shell.downloads import DATA, DIGEST, OTHER, Downloader, limits, loop
from tests.stages import disk_node
from tests.stages.hostile_rsync import ERROR, INFO, endless, hostile_daemon

pytestmark = pytest.mark.slow

STAGE = LIB.parent / "dracut-modules/transport-rsync/stage.sh"
DEFAULTS = {"attempts": 3}
RSYNC = shutil.which("rsync") or ""

SCRIPT = loop("rsync", {"rsync": True, "rsync+ssh": False}, "$STAGE")


@dataclass(frozen=True)
class Site:
    """An rsync daemon with an open and a closed module, and an SSH server; all serve the same directory."""

    directory: Path
    daemon_port: int
    ssh_port: int

    @property
    def www(self) -> Path:
        """What is served."""
        return self.directory / "www"

    def url(self, name: str = "node.squashfs", module: str = "images", user: str = "") -> str:
        """Return a URL of the daemon."""
        return f"rsync://{user}127.0.0.1:{self.daemon_port}/{module}/{name}"

    def ssh_url(self, name: str = "node.squashfs", user: str = "root@") -> str:
        """Return a URL through SSH."""
        return f"rsync+ssh://{user}127.0.0.1:{self.ssh_port}{self.www}/{name}"

    def key(self, name: str) -> str:
        """Return a private key as rd.anchor.rsync.ssh_key takes it."""
        return base64.b64encode((self.directory / name).read_bytes()).decode()

    @property
    def host_key(self) -> str:
        """The SSH server's public key as text."""
        return (self.directory / "host.pub").read_text().strip()


def _make_keys(directory: Path) -> None:
    for name in ("trusted", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    made = ["dropbearkey", "-t", "ed25519", "-f", str(directory / "host")]
    lines = subprocess.run(made, capture_output=True, text=True, check=True).stdout.splitlines()
    (directory / "host.pub").write_text(next(line for line in lines if line.startswith("ssh-ed25519 ")))
    home = directory / "home"
    (home / ".ssh").mkdir(parents=True)
    home.chmod(0o700)
    shutil.copy(directory / "trusted.pub", home / ".ssh/authorized_keys")
    (home / ".ssh/authorized_keys").chmod(0o600)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("site")
    site = Site(directory, servers.free_port(), servers.free_port())
    _make_keys(directory)
    site.www.mkdir()
    (site.www / "node.squashfs").write_bytes(DATA)
    (site.www / "latest").symlink_to("node.squashfs")
    (site.www / "directory").mkdir()
    with (site.www / "huge").open("wb") as huge:
        huge.truncate(900 << 20)
    (directory / "secrets").write_text("robot:passw0rd\n")
    (directory / "secrets").chmod(0o600)
    config = directory / "rsyncd.conf"
    module = f"path = {site.www}\nread only = yes\nuse chroot = no\nuid = root\ngid = root\n"
    closed = f"auth users = robot\nsecrets file = {directory}/secrets\n"
    full = f"max connections = 1\nlock file = {directory}/lock\n"
    config.write_text(f"[images]\n{module}[closed]\n{module}{closed}[full]\n{module}{full}")
    # dropbear knows no other place for its users' keys than their home.
    ssh = f"mount --bind {directory}/home /root && "
    ssh += f"exec dropbear -F -E -s -r {directory}/host -p 127.0.0.1:{site.ssh_port}"
    commands = [
        [RSYNC, "--daemon", "--no-detach", f"--config={config}", f"--port={site.daemon_port}", "--address=127.0.0.1"],
        ["unshare", "--mount", "--", "sh", "-c", ssh],
    ]
    with ExitStack() as stack, (directory / "servers.log").open("w") as log:
        for argv in commands:
            child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            stack.callback(child.wait, 10)
            stack.callback(child.terminate)
        for port in (site.daemon_port, site.ssh_port):
            _wait_for(port)
        yield site


def _wait_for(port: int) -> None:
    end = time.monotonic() + 10
    probe = ["socat", "-u", "OPEN:/dev/null", f"TCP:127.0.0.1:{port}"]
    while subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        assert time.monotonic() < end
        time.sleep(0.05)


@dataclass(frozen=True)
class Node(Downloader):
    """A node that trusts the site's SSH server and holds its trusted key."""

    site: Site

    def run(
        self, script: str, *words: str, env: Mapping[str, str] | None = None, **parameters: int
    ) -> subprocess.CompletedProcess[str]:
        """Run shell text with the transport loaded."""
        environment = limits({**DEFAULTS, **parameters}) | {
            "STAGE": str(STAGE),
            "anchor_rsync_host_key": self.site.host_key,
        }
        environment |= {"anchor_rsync_ssh_key": self.site.key("trusted"), "anchor_rsync_password": ""}
        return self.shell.run(SCRIPT + script, *words, env={**environment, **(env or {})})

    def fetch(
        self, url: str, sha256: str = "", *, env: Mapping[str, str] | None = None, setup: str = "", **parameters: int
    ) -> subprocess.CompletedProcess[str]:
        """Download after the shell text `setup`; the result's stderr is what the console shows."""
        done = self.run(setup + 'anchor_fetch "$@"', url, str(self.image), sha256, env=env, **parameters)
        assert not list(self.image.parent.glob("*.fetch"))
        return done


def prepared(shell: Shell, site: Site) -> Node:
    node = Node(shell, site)
    node.make_directories()
    return node


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, site: Site) -> Node:
    return prepared(Shell(request.param, tmp_path), site)


@pytest.fixture
def dash(tmp_path: Path, site: Site) -> Node:
    """One shell only, for what takes its time and is the same in all."""
    return prepared(Shell("dash", tmp_path), site)


def stand_in(directory: Path, script: str) -> dict[str, str]:
    """Return an environment whose rsync is a script; $1... are the arguments, $last the last one."""
    directory.mkdir()
    wrapper = directory / "rsync"
    wrapper.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$*" >>{directory}/calls\nfor last; do :; done\n'
        f'case $* in *--list-only*) listing=1 ;; *) listing= ;; esac\n{script}\nexec {RSYNC} "$@"\n'
    )
    wrapper.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


# Ends rsync when about half of the file is there.
CUT = f'timeout 1.5 {RSYNC} --bwlimit=1000 "$@"'


def test_an_image_comes_from_a_daemon_when_its_digest_is_known(node: Node, site: Site) -> None:
    assert node.got(node.fetch(site.url(), DIGEST))
    assert node.attempts() == 1


def test_an_image_comes_over_ssh(node: Node, site: Site) -> None:
    assert node.got(node.fetch(site.ssh_url("latest")))
    assert node.attempts() == 1


def test_a_daemon_without_a_digest_is_refused_before_a_connection(dash: Node, site: Site, tmp_path: Path) -> None:
    done = dash.fetch(site.url(), env=stand_in(tmp_path / "bin", "exit 1"))
    assert done.returncode == 1
    assert "without a digest" in done.stderr
    assert not (tmp_path / "bin/calls").exists()


def test_a_broken_transfer_goes_on_where_it_stopped(node: Node, site: Site, tmp_path: Path) -> None:
    once = tmp_path / "bin/once"
    script = f"""[ -n "$listing" ] || [ -e {once} ] || {{ : >{once}; {CUT}; exit 9; }}
[ -n "$listing" ] || stat -c %s "$last" >{tmp_path}/bin/offset"""
    env = stand_in(tmp_path / "bin", script)
    url = site.ssh_url() if node.shell.name == "dash" else site.url()
    done = node.fetch(url, DIGEST, env=env)
    assert node.got(done)
    # On a busy machine, the daemon's answer may come too late once.
    assert node.attempts() in {2, 3}
    assert 100_000 < int((tmp_path / "bin/offset").read_text()) < len(DATA)


def test_another_version_is_not_mixed_in(dash: Node, site: Site, tmp_path: Path) -> None:
    served = site.www / "changing"
    served.write_bytes(DATA)
    new = tmp_path / "new"
    new.write_bytes(OTHER)
    os.utime(new, (1, 1))
    cut = f"{CUT}; cp -p {new} {served}.new; mv {served}.new {served}; exit 12"
    script = f'[ -n "$listing" ] || [ -e {tmp_path}/bin/once ] || {{ : >{tmp_path}/bin/once; {cut}; }}'
    # Without a digest: where one is known, it is what tells that the pieces do not belong together.
    done = dash.fetch(site.ssh_url("changing"), "", env=stand_in(tmp_path / "bin", script))
    assert dash.got(done, OTHER)
    assert "of another version" in done.stderr
    assert dash.attempts() == 3


@pytest.mark.parametrize(("verified", "status"), [("1", 0), ("", 3)])
def test_what_another_transport_began_is_continued_only_under_a_digest(
    dash: Node, site: Site, verified: str, status: int
) -> None:
    file = dash.image
    file.write_bytes(DATA[:1_000_000])
    script = f"""
anchor_fetch_left=10 anchor_fetch_room=much anchor_fetch_verified={verified}
anchor_rsync_run "$@"
"""
    done = dash.run(script, site.ssh_url(), str(file), "9000000")
    assert done.returncode == status, done.stderr
    assert file.read_bytes() == (DATA if status == 0 else DATA[:1_000_000])


def test_a_server_cannot_change_what_the_digest_has_passed(node: Node, site: Site, tmp_path: Path) -> None:
    """A stand-in does what rsync does for a hostile server: it writes again what was there already."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(DATA)
    bad.write_bytes(b"x" * 1_000_000)
    stamp = time.strftime("%Y/%m/%d-%H:%M:%S", time.localtime((site.www / "node.squashfs").stat().st_mtime))
    script = f"""[ -n "$listing" ] || {{
    head -c 1000000 {good} >"$last"; sleep 0.5
    dd if={bad} of="$last" conv=notrunc status=none; tail -c +1000001 {good} >>"$last"
    echo "{len(DATA)} {stamp}"; exit 0
}}"""
    assert node.got(node.fetch(site.url(), DIGEST, env=stand_in(tmp_path / "bin", script)))


def test_the_image_is_in_memory_once(dash: Node, site: Site, tmp_path: Path) -> None:
    """What has been copied from rsync's own file takes no more room."""
    # Until rsync, which takes the place of its shell, has ended.
    loop = f'while sleep 0.05 && kill -0 $$; do du -sk "${{last%/*}}" >>{tmp_path}/used; done'
    watch = f'({loop}) 2>/dev/null & exec {RSYNC} --bwlimit=3000 "$@"'
    done = dash.fetch(
        site.url(), DIGEST, env=stand_in(tmp_path / "bin", f'[ -n "$listing" ] || {{ {watch}; }}'), timeout=10
    )
    assert dash.got(done)
    sizes = [int(line.split()[0]) for line in (tmp_path / "used").read_text().splitlines()]
    assert len(sizes) >= 5
    assert max(sizes) < len(DATA) / 1024 / 2


def test_an_image_that_does_not_fit_is_refused_with_numbers(dash: Node, site: Site) -> None:
    (dash.shell.root / "proc/meminfo").write_text(f"MemAvailable: {500 << 10} kB\n")
    done = dash.fetch(site.ssh_url("huge"), reserve=64 << 20)
    assert dash.failed(done, "needs 900.0 MiB, and 436.0 MiB fit", "(500.0 MiB of memory available, of which 64.0 MiB")


def test_a_server_that_sends_more_than_it_listed_is_stopped(dash: Node, site: Site, tmp_path: Path) -> None:
    script = '[ -n "$listing" ] || { head -c 99000000 /dev/zero >"$last" || exit 11; }'
    (dash.shell.root / "proc/meminfo").write_text(f"MemAvailable: {40 << 10} kB\n")
    done = dash.fetch(site.url(), DIGEST, env=stand_in(tmp_path / "bin", script))
    assert dash.failed(done, "cannot write the download", attempts=1)


@pytest.mark.parametrize("code", [ERROR, INFO])
def test_a_server_that_never_stops_talking_is_not_listened_to(dash: Node, code: int) -> None:
    """What it says goes to files in the node's memory, and there is no end of it."""
    (dash.shell.root / "proc/meminfo").write_text(f"MemAvailable: {400 << 10} kB\n")
    sizes: list[int] = []

    def frames() -> Iterator[bytes]:
        for said in endless(code)():
            if len(sizes) < 100:
                files = dash.image.parent.glob("*.fetch/*.rsync/*")
                sizes.append(sum(file.stat().st_size for file in files if file.is_file()))
            yield said

    with hostile_daemon(frames) as port:
        done = dash.fetch(f"rsync://127.0.0.1:{port}/images/x", DIGEST, attempts=1, timeout=30 if code == ERROR else 8)
    # rsync ends where it cannot write an error; information that nobody takes it goes on to throw away.
    why = "the transfer from 127.0.0.1 broke" if code == ERROR else "the time for this download is up"
    assert dash.failed(done, why, attempts=1)
    assert sizes
    assert max(sizes) <= 65536 + 1024
    assert max(map(len, done.stderr.splitlines())) < 600


def test_what_rsync_started_does_not_hold_the_node_up(node: Node) -> None:
    """Killed, rsync leaves its ssh, which has the pipes of what rsync says."""
    left = node.shell.root / "left"
    script = f'sleep 60 &\necho "$!" >{left}\nkill -KILL "$$"'
    began = time.monotonic()
    done = node.fetch("rsync://h/m/x", DIGEST, env=stand_in(node.shell.root / "bin", script), attempts=1, timeout=1)
    took = time.monotonic() - began
    subprocess.run(["kill", left.read_text().strip()], check=True)
    assert node.failed(done, "the time for this download is up", attempts=1)
    assert took < 40


@pytest.mark.parametrize("number", ["099,999,999,999", "09"])
def test_a_listing_with_zeros_before_its_number_is_a_number(node: Node, number: str) -> None:
    """A shell would take it for octal, and end at an 8 or 9."""
    (node.shell.root / "proc/meminfo").write_text(f"MemAvailable: {400 << 10} kB\n")
    line = f"-rw-r--r-- {number} 2026/01/02 03:04:05 x"
    listing = f'[ -n "$listing" ] || exit 12; echo "{line}"; exit 0'
    done = node.fetch("rsync://h/m/x", DIGEST, env=stand_in(node.shell.root / "bin", listing), attempts=1)
    assert node.failed(done, "needs 95367.4 MiB" if "," in number else "the transfer from h broke", attempts=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ("is not there", "check the path in the URL")),
        ("directory", ("is not a single file",)),
        ("../etc/passwd", ("names no file",)),
        ("*", ("names no file",)),
        ("$(touch${IFS}/pwned)", ("names no file",)),
        ("a;reboot", ("names no file",)),
        ("x?y", ("names no file",)),
        ("%2e%2e", ("names no file",)),
        ("", ("names no file",)),
    ],
)
def test_a_path_that_is_no_file_is_final(dash: Node, site: Site, name: str, words: tuple[str, ...]) -> None:
    for url in (site.url(name), site.ssh_url(name)):
        assert dash.failed(dash.fetch(url, DIGEST), *words, attempts=1)
    assert not Path("/pwned").exists()


@pytest.mark.parametrize(
    "place", ["-oProxyCommand=id", "-e@host", "a`id`", "h;id", "u%20v@host", "[::1%25lo]", "host:99999999", "$(id)"]
)
def test_a_hostile_place_stays_text(dash: Node, site: Site, tmp_path: Path, place: str) -> None:
    env = stand_in(tmp_path / "bin", "exit 1")
    for scheme in ("rsync", "rsync+ssh"):
        done = dash.fetch(f"{scheme}://{place}/images/x", DIGEST, env=env)
        assert done.returncode == 1
        assert "cannot be used" in done.stderr or "names no file" in done.stderr
    assert not (tmp_path / "bin/calls").exists()


def test_an_unknown_module_is_final(dash: Node, site: Site) -> None:
    assert dash.failed(dash.fetch(site.url(module="nothing"), DIGEST), "no such module", "nothing", attempts=1)


def test_a_daemon_with_too_many_clients_is_tried_again(dash: Node, site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.daemon_port), timeout=5) as other, other.makefile("rb") as said:
        other.sendall(b"@RSYNCD: 31.0\nfull\n")
        while b"@RSYNCD: OK" not in (line := said.readline()):
            assert line
        done = dash.fetch(site.url(module="full"), DIGEST)
    assert dash.failed(done, "too many clients: max connections (1) reached", attempts=3)


def test_a_password_opens_a_module_and_shows_nowhere(node: Node, site: Site, tmp_path: Path) -> None:
    assert node.failed(
        node.fetch(site.url(module="closed", user="robot@"), DIGEST), "does not let this node in", attempts=1
    )
    env = stand_in(tmp_path / "bin", "")
    for url, password in (
        (site.url(module="closed", user="robot@"), "passw0rd"),
        (site.url(module="closed", user="robot:passw0rd@"), ""),
    ):
        done = node.fetch(url, DIGEST, env={**env, "anchor_rsync_password": password}, setup="set -x\n")
        assert node.got(done)
        assert not password or password not in done.stderr
        kept = [path for path in (node.shell.root / "run").rglob("*") if path.is_file() and path != node.image]
        assert "passw0rd" not in (tmp_path / "bin/calls").read_text() + "".join(path.read_text() for path in kept)


def test_an_ssh_server_with_another_host_key_is_refused(dash: Node, site: Site) -> None:
    other = (site.directory / "stranger.pub").read_text().strip()
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_host_key": other})
    assert dash.failed(done, "another host key than the one that is known", "rd.anchor.rsync.host_key", attempts=1)
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_host_key": ""})
    assert dash.failed(done, "host key is not known", "--set rd.anchor.rsync.host_key=@", attempts=1)


def test_known_hosts_may_be_a_file(dash: Node, site: Site) -> None:
    (dash.shell.root / "hosts").write_text(f"[127.0.0.1]:{site.ssh_port} {site.host_key}\n")
    assert dash.got(dash.fetch(site.ssh_url(), env={"anchor_rsync_host_key": "/hosts"}))


def test_a_key_that_the_server_does_not_trust_is_final(dash: Node, site: Site) -> None:
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_ssh_key": site.key("stranger")})
    assert dash.failed(done, "does not let this node in", "rd.anchor.rsync.ssh_key", attempts=1)
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_ssh_key": "!!"})
    assert dash.failed(done, "is not a key in base64", attempts=1)
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_ssh_key": ""})
    assert dash.failed(done, "this node has no key for SSH", attempts=1)
    # Another try would find the same key built in.
    assert not dash.rejected


@pytest.mark.parametrize("key", ["stranger", "broken"])
def test_a_key_of_auth_that_is_of_no_use_is_not_kept(dash: Node, site: Site, key: str) -> None:
    text = (site.directory / "stranger").read_text()
    (dash.credentials / "client.key").write_text(text if key == "stranger" else text[:150])
    (dash.credentials / "client.key").chmod(0o600)
    done = dash.fetch(site.ssh_url(), env={"anchor_rsync_ssh_key": ""})
    assert dash.failed(done, "does not let this node in" if key == "stranger" else "key", attempts=1)
    assert dash.rejected


def test_the_nodes_own_key_opens_the_server_too(dash: Node, site: Site) -> None:
    key = dash.shell.root / "run/anchor/credentials/client.key"
    shutil.copy(site.directory / "trusted", key)
    key.chmod(0o600)
    assert dash.got(dash.fetch(site.ssh_url(), env={"anchor_rsync_ssh_key": ""}))


def test_words_of_the_environment_do_not_count(dash: Node, site: Site) -> None:
    env = {"RSYNC_PROXY": "127.0.0.1:1", "RSYNC_CONNECT_PROG": "false", "RSYNC_RSH": "false", "RSYNC_OLD_ARGS": "1"}
    assert dash.got(dash.fetch(site.url(), DIGEST, env=env))
    assert dash.got(dash.fetch(site.ssh_url(), DIGEST, env=env))


@pytest.mark.parametrize("scheme", ["rsync", "rsync+ssh"])
def test_a_refused_connection_is_tried_again(dash: Node, scheme: str) -> None:
    url = f"{scheme}://127.0.0.1:{servers.free_port()}/images/x"
    assert dash.failed(dash.fetch(url, DIGEST), "broke", "onnection refused", "gave up", attempts=3)


@pytest.mark.parametrize("scheme", ["rsync", "rsync+ssh"])
def test_a_silent_server_is_bounded(dash: Node, scheme: str) -> None:
    port = servers.free_port()
    start = time.monotonic()
    with subprocess.Popen(["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", "EXEC:sleep 60"]) as silent:
        try:
            _wait_for(port)
            done = dash.fetch(f"{scheme}://127.0.0.1:{port}/images/x", DIGEST, attempts=1, stall=1, connect_timeout=1)
        finally:
            silent.terminate()
    assert dash.failed(done, "gave up", attempts=1)
    assert time.monotonic() - start < 30


def test_the_image_of_a_disk_comes_by_rsync_where_it_fits_into_memory(site: Site, tmp_path: Path) -> None:
    (site.www / "disk.img").write_bytes(disk_node.IMAGE)
    given = {"disk_url": site.url("disk.img"), "disk_sha256": disk_node.sha256(disk_node.IMAGE)}
    given |= {"rsync_password": "", "rsync_host_key": "", "rsync_ssh_key": ""}
    for node in disk_node.prepared("dash", tmp_path):
        # rsync writes to a file of its own first, whatever takes the bytes then.
        done = node.run(**given, fetch_reserve=str(1 << 50))
        assert node.refused(done, "rsync cannot stream", "room for 0 bytes of 12.0 MiB")
        assert not any(node.file.read_bytes())
        assert node.installed(node.run(**given))
