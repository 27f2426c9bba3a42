"""anchor-net.sh: waiting for an address in a network namespace, and reading what the network managers left."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.shell.conftest import Shell

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

LOAD = """
for lib in report types cmdline net; do . "$LIB/anchor-$lib.sh"; done
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
mkdir -p "$anchor_step_dir" "$ANCHOR_ROOT/etc" && cd "$ANCHOR_ROOT" || exit 9
"""
NTP = """anchor_net_ntp && printf '%s\\n' "$anchor_net_ntp"
"""
# A cable: two ends, the near one called eth0.
CABLE = "ip link add eth0 type veth peer name far && ip link set far up && ip link set lo up || exit 9\n"
ADDRESS = CABLE + "ip link set eth0 up && ip addr add 10.1.2.3/24 dev eth0 || exit 9\n"

# Recorded from systemd-networkd 252 against dnsmasq.
LINK = """# This is private data. Do not parse.
ADMIN_STATE=configured
OPER_STATE=routable
NETWORK_FILE=/run/systemd/network/eth0.network
DNS=10.77.0.1 10.77.0.2 fd77::1 fd77::1
NTP=10.77.0.1 10.77.0.9 fd77::1
SIP=
DOMAINS=static.example cluster.example
ROUTE_DOMAINS=
LLMNR=yes
"""
LEASE = """# This is private data. Do not parse.
ADDRESS=10.77.0.55
NETMASK=255.255.255.0
ROUTER=10.77.0.1
LIFETIME=3600
DNS=10.77.0.1 10.77.0.2
NTP=10.77.0.1 10.77.0.9
DOMAINNAME=cluster.example
DOMAIN_SEARCH_LIST=a.example b.example
HOSTNAME=node07
CLIENTID=ff27a68c8d00020000ab110033bdebf95e192c
"""
# As dracut's dhclient-script.sh writes it: lines of the shell's `set`.
DHCPOPTS = """new_domain_name='cluster.example'
new_domain_name_servers='10.77.0.1 10.77.0.2'
new_host_name='node07'
new_ip_address='10.77.0.55'
new_ntp_servers='10.77.0.1 10.77.0.9'
new_routers='10.77.0.1'
"""
DHCLIENT = """lease {
  interface "eth0";
  fixed-address 10.77.0.50;
  option domain-name-servers 10.9.9.9;
  option host-name "old";
}
lease {
  interface "eth0";
  fixed-address 10.77.0.55;
  option subnet-mask 255.255.255.0;
  option domain-name-servers 10.77.0.1,10.77.0.2;
  option ntp-servers 10.77.0.1,10.77.0.9;
  option host-name "node07";
  option domain-name "cluster.example";
  renew 6 2030/01/05 10:00:00;
}
"""
RESOLV = "search cluster.example\nnameserver 10.77.0.1\nnameserver 10.77.0.2\n"
SOURCES = {
    "networkd link": {"run/systemd/netif/links/2": LINK},
    "networkd lease": {"run/systemd/netif/leases/2": LEASE},
    "NetworkManager lease": {"var/lib/NetworkManager/internal-0f-eth0.lease": LEASE},
    "dhclient options": {"tmp/dhclient.eth0.dhcpopts": DHCPOPTS},
    "dhclient options from bash": {"tmp/dhclient.eth0.dhcpopts": DHCPOPTS.replace("'node07'", "node07")},
    "dhclient lease": {"tmp/dhclient.eth0.lease": DHCLIENT},
    "dracut resolv.conf": {"tmp/net.eth0.resolv.conf": RESOLV},
    "NetworkManager resolv.conf": {"run/NetworkManager/resolv.conf": RESOLV},
}
WITHOUT_NTP = {"dracut resolv.conf", "NetworkManager resolv.conf"}
WITHOUT_NAME = {*WITHOUT_NTP, "networkd link"}


# For what takes its time: one shell is enough.
dash_only = pytest.mark.parametrize("shell", ["dash"], indirect=True)


def write(root: Path, files: dict[str, str]) -> None:
    """Put files below a node root."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def run(
    shell: Shell, script: str, timeout: str = "5", unshare: tuple[str, ...] = ("--net",)
) -> subprocess.CompletedProcess[str]:
    """Run `script` in a network of its own."""
    return shell.run(LOAD + script, env={"anchor_network_timeout": timeout}, unshare=unshare)


def note(shell: Shell, name: str) -> str:
    """Return what the step noted."""
    return (shell.root / "run/anchor/steps/10" / name).read_text().rstrip("\n")


def test_waits_for_the_first_address(shell: Shell) -> None:
    script = "{ sleep 0.4; ip link set eth0 up; ip addr add 10.1.2.3/24 dev eth0; } & anchor_net_run"
    started = time.monotonic()
    done = run(shell, CABLE + script)
    assert done.returncode == 0, done.stderr
    assert 0.4 <= time.monotonic() - started < 5
    assert (note(shell, "note-interface"), note(shell, "note-address")) == ("eth0", "10.1.2.3")


def test_address_of_an_interface_that_is_down_does_not_count(shell: Shell) -> None:
    script = (
        "ip addr add 10.1.2.3/24 dev eth0; { sleep 0.3; ip link set eth0 up; } & anchor_net_run; ip -o link show up"
    )
    done = run(shell, CABLE + script)
    assert "eth0" in done.stdout
    assert note(shell, "note-address") == "10.1.2.3"


@dash_only
def test_waits_until_an_ipv6_address_is_known_to_be_unique(shell: Shell) -> None:
    script = """
    ip link set eth0 up && ip -6 addr add fd00::7/64 dev eth0 || exit 9
    ip -o -6 addr show tentative scope global
    anchor_net_run || exit 1
    echo ready
    ip -o -6 addr show tentative scope global
    """
    done = run(shell, CABLE + script)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("ready\n")
    assert "fd00::7" in before, "the address was ready at once: nothing is tested"
    assert after == ""
    assert note(shell, "note-address") == "fd00::7"


@dash_only
@pytest.mark.parametrize(
    ("network", "hints"),
    [
        ("ip link set lo up", ["no interface but lo", "driver"]),
        (CABLE, ["eth0: not brought up, state DOWN", "far: no carrier, state", "ip="]),
        (CABLE + "ip link set eth0 up; ip link set far down", ["eth0: no carrier", "far: not brought up"]),
        (CABLE + "ip link set eth0 up", ["eth0: has a carrier, state UP", "DHCP"]),
    ],
)
def test_no_address_fails_in_time_and_says_how_each_interface_is(shell: Shell, network: str, hints: list[str]) -> None:
    started = time.monotonic()
    done = run(shell, f"{network}\nanchor_net_run", timeout="1")
    assert done.returncode == 1
    assert 1 <= time.monotonic() - started < 10
    assert note(shell, "error") == "no network interface has an address after 1 s"
    for hint in hints:
        assert hint in note(shell, "hint")


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_resolv_conf_is_written_from_what_the_manager_knows(shell: Shell, source: str) -> None:
    write(shell.root, SOURCES[source])
    done = run(shell, ADDRESS + "anchor_net_run")
    assert done.returncode == 0, done.stderr
    lines = (shell.root / "etc/resolv.conf").read_text().splitlines()
    assert lines[:2] == ["nameserver 10.77.0.1", "nameserver 10.77.0.2"]
    assert "nameserver 10.9.9.9" not in lines, "an old lease counts for nothing"
    assert len(lines) == len(set(lines))
    assert lines[-1].split()[0] == "search" and "cluster.example" in lines[-1].split()


@pytest.mark.parametrize("before", ["", "#empty\n", "search x.example\n", "dangling link"])
def test_resolv_conf_without_name_servers_is_replaced(shell: Shell, before: str) -> None:
    write(shell.root, {**SOURCES["networkd link"], "etc/resolv.conf": before})
    file = shell.root / "etc/resolv.conf"
    if before == "dangling link":
        file.unlink()
        file.symlink_to("../run/systemd/resolve/stub-resolv.conf")
    done = run(shell, ADDRESS + "anchor_net_run")
    assert done.returncode == 0, done.stderr
    assert file.read_text().startswith("nameserver 10.77.0.1\n")
    assert [entry.name for entry in file.parent.iterdir()] == ["resolv.conf"]


def test_resolv_conf_with_a_name_server_stays(shell: Shell) -> None:
    write(shell.root, {**SOURCES["networkd link"], "etc/resolv.conf": "options edns0\nnameserver 192.0.2.1"})
    done = run(shell, ADDRESS + "anchor_net_run")
    assert done.returncode == 0, done.stderr
    assert (shell.root / "etc/resolv.conf").read_text() == "options edns0\nnameserver 192.0.2.1"


def test_network_without_name_servers_is_fine(shell: Shell) -> None:
    done = run(shell, ADDRESS + "anchor_net_run")
    assert done.returncode == 0
    assert "nobody gave this node a name server" in done.stderr
    assert not (shell.root / "etc/resolv.conf").exists()


def test_resolv_conf_that_cannot_be_written_fails(shell: Shell) -> None:
    write(shell.root, SOURCES["networkd link"])
    done = run(shell, ADDRESS + "rm -r etc && anchor_net_run")
    assert done.returncode == 1
    assert note(shell, "error") == "cannot write /etc/resolv.conf"


def test_what_a_dhcp_server_says_stays_text(shell: Shell) -> None:
    bad = '$(touch pwned) `touch pwned` 10.0.0.1;touch 10.0.0.1"x ../../etc 10.0.0.256:53 * -x name'
    write(
        shell.root,
        {
            "run/systemd/netif/links/2": f"DNS={bad} 10.5.5.5\nNTP={bad}\nDOMAINS={bad} ok.example\n",
            "run/systemd/netif/leases/2": f"HOSTNAME={bad}\nDOMAINNAME={bad}\n",
            "tmp/dhclient.eth0.dhcpopts": "new_domain_name_servers='10.6.6.6'; touch pwned\ntouch pwned\n",
        },
    )
    done = run(shell, ADDRESS + "anchor_net_run; anchor_net_hostname; " + NTP)
    lines = (shell.root / "etc/resolv.conf").read_text().splitlines()
    assert lines == ["nameserver 10.5.5.5", "search name ok.example"]
    assert done.stdout.splitlines() == ["name.name", "name"]
    assert not list(shell.root.rglob("pwned"))
    assert "$" not in done.stdout and "`" not in done.stdout


def test_networkd_gets_time_to_write_down_the_name_servers(shell: Shell) -> None:
    write(shell.root, {"run/systemd/netif/links/PLACE": "ADMIN_STATE=configuring\nDNS=\n"})
    script = """
    set -- $(ip -o link show dev eth0)
    link=run/systemd/netif/links/${1%:}
    mv run/systemd/netif/links/PLACE "$link" || exit 9
    { sleep 0.5; printf 'ADMIN_STATE=configured\\nDNS=10.77.0.1\\n' >"$link"; } &
    anchor_net_run
    """
    done = run(shell, ADDRESS + script)
    assert done.returncode == 0, done.stderr
    assert (shell.root / "etc/resolv.conf").read_text() == "nameserver 10.77.0.1\n"


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_ntp_servers(shell: Shell, source: str) -> None:
    write(shell.root, SOURCES[source])
    done = run(shell, NTP, unshare=())
    if source in WITHOUT_NTP:
        assert (done.returncode, done.stdout) == (1, "")
    else:
        assert done.returncode == 0
        assert done.stdout.splitlines()[:2] == ["10.77.0.1", "10.77.0.9"]


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_name_from_dhcp_has_the_domain(shell: Shell, source: str) -> None:
    write(shell.root, SOURCES[source])
    done = run(shell, "anchor_net_hostname", unshare=())
    if source in WITHOUT_NAME:
        assert (done.returncode, done.stdout) == (1, "")
    else:
        assert (done.returncode, done.stdout) == (0, "node07.cluster.example\n")


def test_name_from_a_lease_that_only_networkctl_shows(shell: Shell) -> None:
    # Recorded from systemd 262, which writes no leases to /run.
    lease = "   Hardware Type: ETHER\n\n 1 subnet mask        255.255.255.0\n12 hostname           node07\n"
    lease += "15 domain name        cluster.example\n51 lease time         1d\n"
    write(shell.root, {"run/systemd/netif/links/2": LINK, "lease": lease})
    write(shell.root, {"bin/networkctl": f'#!/bin/sh\n[ "${{*##* }}" ] && cat {shell.root}/lease\n'})
    (shell.root / "bin/networkctl").chmod(0o755)
    done = run(shell, 'PATH="$ANCHOR_ROOT/bin:$PATH"\nanchor_net_hostname', unshare=())
    assert (done.returncode, done.stdout) == (0, "node07.cluster.example\n")


@pytest.mark.parametrize(
    ("cmdline", "name"),
    [
        ("ip=10.0.0.5::10.0.0.1:255.255.255.0:node05:eth0:none", "node05"),
        ("ip=10.0.0.5::10.0.0.1:24:Node05.Example.ORG:eth0:none:10.0.0.1", "node05.example.org"),
        ("ip=[fd00::5]::[fd00::1]:64:node05:eth0:none", "node05"),
        ("ip=[fd00::5]:[fd00::2]:[fd00::1]:64:node05:eth0:off", "node05"),
        ("ip=::::node05::dhcp", "node05"),
        ("ip=::::node05:eth0:dhcp ip=::::node06:eth1:dhcp", "node06"),
        ("systemd.hostname=node08", "node08"),
        ("systemd.hostname=node08 ip=::::node05:eth0:dhcp", "node05"),
        ("ip=::::bad_$(reboot):eth0:dhcp systemd.hostname=node08", "node08"),
        ("ip=dhcp", "node07.cluster.example"),
        ("ip=eth0:dhcp:1500:02:00:00:00:00:07", "node07.cluster.example"),
        ("ip=10.0.0.5::10.0.0.1:24::eth0:none", "node07.cluster.example"),
        ("ip=10.0.0.5 ip= ip=: systemd.hostname=", "node07.cluster.example"),
    ],
)
def test_name_on_the_command_line_comes_before_dhcp(shell: Shell, cmdline: str, name: str) -> None:
    write(shell.root, {**SOURCES["networkd lease"], "proc/cmdline": f"root=anchor {cmdline} quiet\n"})
    done = run(shell, "anchor_net_hostname", unshare=())
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("node09\n", "node09"),
        ("node09.example\n", "node09.example"),
        *((text, None) for text in ["(none)\n", "localhost\n", "localhost.localdomain\n", "\n", "a b\n"]),
    ],
)
def test_name_of_the_kernel_comes_last(shell: Shell, kernel: str, name: str | None) -> None:
    write(shell.root, {"proc/sys/kernel/hostname": kernel})
    done = run(shell, "anchor_net_hostname", unshare=())
    assert (done.returncode, done.stdout) == ((0, f"{name}\n") if name else (1, ""))


NETWORKD = """
mount -t tmpfs none /run && mount -t sysfs -o ro none /sys || exit 9
mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/netif/lldp run/systemd
chown -R systemd-network:systemd-network /run/systemd/netif && mount --bind /run/systemd run/systemd || exit 9
unshare --net sleep 60 &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link set lo up
ip link add eth0 address 02:00:00:00:00:07 type veth peer name far netns $! || exit 9
nsenter -t $! -n sh -c 'ip addr add 10.77.0.1/24 dev far && ip link set far up' || exit 9
nsenter -t $! -n dnsmasq --keep-in-foreground --conf-file=/dev/null --port=0 --interface=far --leasefile-ro \\
    --dhcp-authoritative --dhcp-range=10.77.0.50,10.77.0.60 --dhcp-host=02:00:00:00:00:07,10.77.0.55,node07 \\
    --dhcp-option=option:dns-server,10.77.0.1 --dhcp-option=option:ntp-server,10.77.0.9 \\
    --dhcp-option=option:domain-name,cluster.example >dnsmasq.log 2>&1 &
printf '[Match]\\nName=eth0\\n[Network]\\nDHCP=ipv4\\n' >/run/systemd/network/eth0.network
/lib/systemd/systemd-networkd >networkd.log 2>&1 &
anchor_net_run || exit 1
anchor_net_hostname && anchor_net_ntp && printf '%s\\n' "$anchor_net_ntp"
"""


@pytest.mark.skipif(
    not Path("/lib/systemd/systemd-networkd").exists() or shutil.which("dnsmasq") is None,
    reason="needs systemd-networkd and dnsmasq",
)
def test_real_networkd_with_a_real_dhcp_server(shell: Shell) -> None:
    unshare = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    done = run(shell, NETWORKD, timeout="20", unshare=unshare)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "node07.cluster.example\n10.77.0.9\n"
    assert note(shell, "note-address") == "10.77.0.55"
    assert (shell.root / "etc/resolv.conf").read_text() == "nameserver 10.77.0.1\nsearch cluster.example\n"
