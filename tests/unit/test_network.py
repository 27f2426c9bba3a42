"""What a command line asks of the network that what brings it up cannot do, and what that is where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchor_build import dracut, network
from anchor_build.cmdline import split
from anchor_build.dracut import Dracut
from anchor_build.root import Root


def said(line: str, back_end: str = "") -> list[tuple[bool, str]]:
    return [(remark.is_error, remark.text) for remark in network.remarks(split(line), back_end)]


@pytest.mark.parametrize("name", ["eth0.7", "eth0.0007", "vlan4094", "vlan0100"])
def test_a_vlan_is_called_by_its_number(name: str) -> None:
    assert said(f"vlan={name}:eth0") == []


@pytest.mark.parametrize("name", ["trunk", "eth0.0", "vlan4095", "", "v" + "9" * 5000])
@pytest.mark.parametrize("back_end", ["", *dracut.BACK_ENDS])
def test_a_vlan_without_a_number_is_an_error(name: str, back_end: str) -> None:
    ((is_error, text),) = said(f"vlan={name}:eth0", back_end)
    assert is_error
    assert text.startswith(f"vlan={name}: does not end with the number of a VLAN, 1 to 4094")


# As the generators of systemd 247 to 262 answered.
ASKED = {
    "team=team0:eth0,eth1": (True, "team=team0: systemd-networkd is not told about teams"),
    "ip=ibft": (True, "ip=ibft: systemd-networkd does not read the firmware's table"),
    "ip=10.0.0.2::10.0.0.1:24:n:eth0:ibft": (True, "systemd-networkd does not read the firmware's table"),
    "bond=bond0:eth0,eth1:mode=1,queue_size=5": (False, "is not told about the option queue_size; it is left out"),
    "rd.net.timeout.dhcp=3": (False, "rd.net.timeout.dhcp: systemd-networkd does not know it"),
}


@pytest.mark.parametrize("line", ASKED)
def test_what_networkd_is_not_told(line: str) -> None:
    ((is_error, text),) = said(line, "systemd-networkd")
    assert (is_error, ASKED[line][1] in text) == (ASKED[line][0], True)
    assert said(line, "network-manager") == said(line) == []


@pytest.mark.parametrize(
    "line", ["ip=dhcp", "ip=eth0:auto6", "bond=bond0:eth0,eth1:mode=active-backup,miimon=100:9000", "bond=bond0:eth0"]
)
def test_what_networkd_is_told(line: str) -> None:
    assert said(line, "systemd-networkd") == []


DBUS = "depends() {\n    echo dbus bash\n    return 0\n}\n"
# As dracut has it from 110 on.
DBUS_BESIDE_SYSTEMD = "depends() {\n    if dracut_module_included systemd; then\n        echo dbus\n    fi\n}\n"
PROGRAMS = {
    "systemd-networkd": "usr/lib/systemd/systemd-networkd",
    "network-manager": "usr/libexec/nm-initrd-generator",
    "network-legacy": "usr/sbin/dhclient",
}


def system(top: Path, *back_ends: str, manager: str = DBUS) -> Dracut:
    """Lay out a system with these."""
    for name in back_ends:
        script = top / f"usr/lib/dracut/modules.d/35{name}/module-setup.sh"
        script.parent.mkdir(parents=True)
        script.write_text(manager if name == "network-manager" else "", encoding="utf-8")
        (top / PROGRAMS[name]).parent.mkdir(parents=True, exist_ok=True)
        (top / PROGRAMS[name]).touch()
    return Dracut(Path("/usr/bin/dracut"), dracut.BASE, "059", Root(top))


@pytest.mark.parametrize(
    ("back_ends", "manager", "systemd", "expected"),
    [
        (dracut.BACK_ENDS, DBUS, True, "systemd-networkd"),
        (dracut.BACK_ENDS, DBUS, False, "network-legacy"),
        (dracut.BACK_ENDS, DBUS_BESIDE_SYSTEMD, False, "network-manager"),
        (dracut.BACK_ENDS[1:], DBUS, True, "network-manager"),
        (dracut.BACK_ENDS[:1], DBUS, False, ""),
        ((), DBUS, True, ""),
    ],
)
def test_what_brings_up_the_network_where_nobody_says(
    tmp_path: Path, back_ends: tuple[str, ...], manager: str, systemd: bool, expected: str
) -> None:
    assert network.expected_back_end(system(tmp_path, *back_ends, manager=manager), systemd=systemd) == expected


def test_networkmanager_that_needs_dbus_needs_systemd(tmp_path: Path) -> None:
    found = system(tmp_path, *dracut.BACK_ENDS)
    said = dracut.network_problem(found, "network-manager", systemd=False)
    assert said.startswith(f"--network network-manager: dracut 059 in {tmp_path} has it with D-Bus only, which needs")
    assert said.endswith("leave out --no-systemd; it has network-legacy")
    assert dracut.network_problem(found, "network-manager", systemd=True) == ""
