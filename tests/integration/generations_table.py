"""What test_generations.py boots, and the table that it leaves: python -m tests.integration.generations_table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.conftest import TOP
from tests.integration.roots import DRACUT, SHARED

RECORDS = TOP / ".cache" / "generations"
PAGE = TOP / "doc" / "generations.md"
# What each back end is booted with in every network: what runs in the initramfs, and its sh.
BACK_ENDS = {
    "systemd-networkd": ("systemd", "dash"),
    "network-manager": ("systemd", "bash"),
    "network-legacy": ("script", "dash"),
}
# The kinds of network, and whether the node proves who it is. (The site's ACME server cannot reach a node over IPv6.)
NETWORKS = {"dhcp": "acme", "static": "none", "ipv6": "none", "vlan": "acme", "bond": "none"}
# Pairs that the rule above leaves out.
MORE = (
    ("bullseye", "network-legacy", "systemd", "bash", "none", "dhcp"),
    ("bookworm", "network-legacy", "systemd", "bash", "none", "dhcp"),
    ("trixie", "network-legacy", "systemd", "bash", "none", "dhcp"),
    ("bullseye", "network-manager", "script", "dash", "none", "static"),
    ("forky", "network-manager", "script", "dash", "none", "dhcp"),
)
# What every run of the tests boots: over the back ends that no other test boots, in the root that others build in, too.
SHORT = (
    (SHARED, "network-manager", "systemd", "bash", "acme", "vlan"),
    (SHARED, "network-legacy", "script", "dash", "none", "bond"),
)


@dataclass(frozen=True)
class Combination:
    """One boot: the release that dracut, kernel and programs are of, and a value of each dimension."""

    suite: str
    back_end: str
    init: str
    shell: str
    auth: str
    network: str

    @property
    def name(self) -> str:
        """All of it in one word."""
        return "-".join((self.suite, self.back_end, self.init, self.shell, self.auth, self.network))


@dataclass(frozen=True)
class Refusal:
    """What a generation cannot do, and a part of what the build says about it."""

    suite: str
    back_end: str
    init: str
    says: str


def is_whole() -> bool:
    """Whether the whole matrix is asked for."""
    return bool(os.environ.get("ANCHOR_MATRIX"))


def combinations() -> list[Combination]:
    """Return what is to be booted: every back end of every generation in every network, or the short list."""
    if not is_whole():
        return [Combination(*values) for values in SHORT]
    refused = {(refusal.suite, refusal.back_end) for refusal in refusals() if refusal.init != "script"}
    found = [
        Combination(suite, back_end, *BACK_ENDS[back_end], auth, network)
        for network, auth in NETWORKS.items()
        for suite in DRACUT
        for back_end in BACK_ENDS
        if (suite, back_end) not in refused
    ]
    return [*found, *(Combination(*values) for values in MORE)]


def refusals() -> list[Refusal]:
    """Return what generations cannot do."""
    found = [
        Refusal(suite, "systemd-networkd", "script", "needs systemd in the initramfs")
        for suite in (DRACUT if is_whole() else (SHARED,))
    ]
    found += [
        Refusal(suite, "network-manager", "script", "with D-Bus only, which needs systemd")
        for suite in (("bookworm", "trixie") if is_whole() else (SHARED,))
    ]
    if is_whole():
        found.append(Refusal("forky", "network-legacy", "systemd", "has no module network-legacy"))
    return found


def record(
    combination: Combination,
    report: Mapping[str, Any],
    *,
    systemd: str,
    switched_ms: int,
    ready_ms: int,
    reason: str,
) -> None:
    """Keep what came of a boot."""
    facts = {key: report[key] for key in ("dracut", "kernel", "bytes")} | {"systemd": systemd}
    times = {"switched_ms": switched_ms, "ready_ms": ready_ms, "reason": reason}
    _keep(combination.name, {**asdict(combination), **facts, **times})


def record_refusal(refusal: Refusal, says: str) -> None:
    """Keep what a build said."""
    _keep(f"refused-{refusal.suite}-{refusal.back_end}-{refusal.init}", {**asdict(refusal), "said": says})


def _keep(name: str, facts: Mapping[str, Any]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    fresh = RECORDS / f"{name}.{os.getpid()}"
    fresh.write_text(json.dumps(facts), encoding="utf-8")
    fresh.replace(RECORDS / f"{name}.json")


def _read(name: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def page() -> str:
    """Return doc/generations.md, from what is kept of the last runs."""
    os.environ["ANCHOR_MATRIX"] = "1"
    rows, versions, seen = [], {}, [0, 0, 0]
    for combination in combinations():
        kept = _read(combination.name)
        values = [combination.suite, combination.back_end, combination.init, combination.shell, combination.auth]
        values.append(combination.network)
        if kept is None:
            seen[2] += 1
            values += ["not run", "", ""]
        elif kept["reason"]:
            seen[1] += 1
            values += [f"failed: {kept['reason']}".replace("|", "/").replace("\n", " ")[:120], "", ""]
        else:
            seen[0] += 1
            values += ["boots", f"{kept['switched_ms'] / 1000:.1f}", f"{kept['ready_ms'] / 1000:.1f}"]
        if kept:
            versions[combination.suite] = (kept["dracut"], kept["kernel"], kept["systemd"])
        rows.append(values)
    lines = [INTRODUCTION, _table(["release", "dracut", "kernel", "systemd"], [[k, *v] for k, v in versions.items()])]
    lines += ["", "## Boots", "", f"{seen[0]} boot, {seen[1]} failed, {seen[2]} were not run.", ""]
    heads = ["release", "network back end", "init", "sh", "auth", "network", "result", "switch_root s", "ready s"]
    lines += [_table(heads, rows), "", "## What a generation cannot do", "", REFUSED, ""]
    told = [
        [r.suite, r.back_end, r.init, (_read(f"refused-{r.suite}-{r.back_end}-{r.init}") or {}).get("said", "")]
        for r in refusals()
    ]
    lines.append(_table(["release", "network back end", "init", "what the build says"], told))
    return "\n".join(lines) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


INTRODUCTION = """\
# Generations of dracut

Which generations of dracut boot, over which network back end, in which network. `./build.sh test --matrix` runs all of
this in QEMU and writes this page; `./build.sh test` runs two: Debian trixie over NetworkManager,
a VLAN and ACME, and over network-legacy and a bond without systemd. Each initramfs is built
with `anchor-build initramfs --sysroot` in a root of that release, and boots with that root's kernel; it boots the
demo's root image, to multi-user. dracut's network back end is chosen by `--network`, and `--no-systemd` leaves systemd
out of the initramfs.

Every back end of every generation meets every kind of network. What remains is dealt out so that every generation boots
each value of it: systemd or dracut's own script in the initramfs, dash or bash as `/bin/sh`, with and without ACME. The
times are those of the node's kernel, without KVM and with other nodes beside it: they say that it boots, not how fast.
Each row is that combination's last run, which may be older than the code; pytest's `-k` with the command above renews
some.

| network | on the node's command line |
|---|---|
| dhcp | nothing |
| static | `ip=ADDRESS::GATEWAY:NETMASK:NAME:eth0:off` |
| ipv6 | `ip=eth0:auto6`; there is no IPv4 |
| vlan | `vlan=eth0.7:eth0 ip=eth0.7:dhcp`; what has no tag is dropped |
| bond | `bond=bond0:eth0,eth1:mode=active-backup,miimon=100 ip=bond0:dhcp` |

Each row with an address is checked for it, and a bond for its mode, for an address that is one of its cards' (by the
frames that it sends), and for its ports, which it still has at multi-user.

Over systemd-networkd, the core completes what systemd's own generator makes of the command line
(`lib/anchor-netdev.sh`): the number of a VLAN, which systemd 247 leaves out, is what its name ends with; and of a
bond's options, which no version up to 262 reads, `mode`, `miimon`, `updelay`, `downdelay`, `arp_interval`,
`arp_ip_target`, `arp_validate`, `xmit_hash_policy`, `lacp_rate`, `ad_select`, `fail_over_mac`, `min_links` and
`primary` are passed on; others are named in the journal, and by `anchor-build check --initramfs`. The generator knows
neither `team=` nor `ip=ibft`.

The network that the image itself configures begins after `switch_root`. systemd-networkd takes a port out of its bond
where a file there matches the port and does not name the bond, and renews the lease of a bond or VLAN only where a file
matches that one. The demo's image has `Type=ether bond vlan` in its
[one file](../contrib/site/root/etc/systemd/network/80-dhcp.network), and leaves alone whatever has something on top of
it, which [one script](../contrib/site/root/usr/local/sbin/site-links) writes down before networkd starts.
"""
REFUSED = "A build ends with the reason, and leaves nothing."

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
