"""What brings up the network in an initramfs, and what it makes of the words of a kernel command line.

dracut.cmdline(7) says what the words mean. systemd-networkd gets them from systemd-network-generator(8), which knows
some of them only, and lib/anchor-netdev.sh. How each reads them was seen with systemd 247, 252, 257 and 262.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anchor_build.cmdline import Word
from anchor_build.dracut import BACK_ENDS, Dracut, network_problem

NETWORKD = BACK_ENDS[0]
# What lib/anchor-netdev.sh passes on.
BOND_OPTIONS = frozenset(
    (
        *("mode", "miimon", "updelay", "downdelay", "arp_interval", "arp_ip_target", "arp_validate"),
        *("xmit_hash_policy", "lacp_rate", "ad_select", "fail_over_mac", "min_links", "primary"),
    )
)
VLAN_MAX = 4094
OTHER = f"build it with --network {BACK_ENDS[1]}"


@dataclass(frozen=True)
class Remark:
    """What is wrong with a word; only an `is_error` one leaves the node without a network."""

    text: str
    is_error: bool = True


def expected_back_end(dracut: Dracut, *, systemd: bool = True) -> str:
    """Return which back end a build has where none is asked for; "" where it has none of BACK_ENDS.

    It is systemd-networkd (see install-core.sh), else what the scripts of dracut's module `network` take.
    """
    return next((name for name in BACK_ENDS if not network_problem(dracut, name, systemd=systemd)), "")


def remarks(words: Sequence[Word], back_end: str = "") -> Iterator[Remark]:
    """Yield what is wrong with words for the network; without `back_end`, only what is wrong with each of them."""
    for word in words:
        value = word.value or ""
        name = value.partition(":")[0]
        if word.name == "vlan" and not _vlan_number(name):
            yield Remark(
                f"vlan={name}: does not end with the number of a VLAN, 1 to {VLAN_MAX}, such as eth0.7 or vlan7"
            )
        elif back_end != NETWORKD:
            continue
        elif word.name == "team":
            yield Remark(f"team={name}: {NETWORKD} is not told about teams: use bond=, or {OTHER}")
        elif word.name == "ip" and "ibft" in value.split(":"):
            yield Remark(f"ip={value}: {NETWORKD} does not read the firmware's table (iBFT): {OTHER}")
        elif word.name == "bond":
            options = value.split(":")[2:3]
            unknown = {text.partition("=")[0] for text in ",".join(options).split(",")} - BOND_OPTIONS - {""}
            for option in sorted(unknown):
                yield Remark(f"bond={name}: {NETWORKD} is not told about the option {option}; it is left out", False)
        elif word.name.startswith(("rd.net.timeout.", "rd.net.dhcp.")):
            yield Remark(f"{word.name}: {NETWORKD} does not know it; rd.anchor.network.timeout= bounds the wait", False)


def _vlan_number(name: str) -> bool:
    # A longer number is none, whatever its value: int() refuses thousands of digits.
    found = re.search(r"(?<![0-9])0*([1-9][0-9]{0,3})\Z", name)
    return found is not None and int(found[1]) <= VLAN_MAX
