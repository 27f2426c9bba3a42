"""What a kernel command line is checked for: a build to come, or an initramfs by its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build import dracut
from anchor_build.errors import AnchorError
from anchor_build.network import expected_back_end
from anchor_build.plan import Plan, make_plan
from anchor_build.registry import load_registry
from anchor_build.root import open_root
from anchor_build.settings import HIDDEN, Setting
from anchor_build.stage import KINDS

# What stands in a check for a secret that a report does not tell.
STAND_IN = "secret"
REPORT_HINT = "name an initramfs that has its report, FILE.json, beside it, or the report itself"


@dataclass(frozen=True)
class Target:
    """The stages of a node's initramfs, what is baked in, and the back end of its network, or "" if it is not known.

    `problems` say why there can be no such initramfs.
    """

    plan: Plan
    baked: tuple[Setting, ...] = ()
    signed: bool = False
    back_end: str = ""
    problems: tuple[str, ...] = ()


def planned(
    plan: Plan, baked: Sequence[Setting], *, signed: bool, sysroot: Path | None, network: str, systemd: bool
) -> Target:
    """Return what a build would have; with `sysroot`, by the dracut of that system, where / is this host.

    Raises AnchorError when there is no such system, or no dracut in it.
    """
    if sysroot is not None:
        installed = dracut.find_dracut(open_root(sysroot, to_run=False))
        problem = dracut.network_problem(installed, network, systemd=systemd)
        back_end = network or expected_back_end(installed, systemd=systemd)
        return Target(plan, tuple(baked), signed, back_end, (problem,) if problem else ())
    problem = dracut.NEEDS_SYSTEMD.format(network) if network == dracut.BACK_ENDS[0] and not systemd else ""
    return Target(plan, tuple(baked), signed, network, (problem,) if problem else ())


def built(file: Path, stage_dirs: Sequence[Path]) -> Target:
    """Return what an initramfs has, by its report, or the one beside it.

    Raises AnchorError when that cannot be read, is none, or names what this anchor-build does not know.
    """
    report, path = _read_report(file)
    names: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for stage in report["stages"]:
        kind, _, name = str(stage).partition("-")
        if name:
            names.setdefault(kind, []).append(name)
    plan = make_plan(load_registry(tuple(stage_dirs)), **{kind: names[kind] for kind in KINDS})
    params = {param.key: param for _, param in plan.params}
    unknown = [
        f"{path}: settings: {key}: is not a parameter of these stages"
        for key in report["settings"]
        if key not in params
    ]
    if unknown:
        raise AnchorError("\n".join(unknown), f"anchor-build {report['anchor_build']} made it: build it again")
    baked = tuple(
        Setting(params[key], str(value).replace(HIDDEN, STAND_IN)) for key, value in sorted(report["settings"].items())
    )
    return Target(plan, baked, bool(report["manifest_keys"]), str(report.get("network") or ""))


def _read_report(file: Path) -> tuple[dict[str, Any], Path]:
    path = file
    try:
        with file.open("rb") as start:
            if start.read(1) != b"{":
                path = file.with_name(file.name + ".json")
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnchorError(f"--initramfs {path}: {error.strerror}", REPORT_HINT) from None
    except ValueError:
        report = None
    wanted = {"stages": list, "settings": dict, "manifest_keys": list, "anchor_build": str}
    if not isinstance(report, dict) or not all(isinstance(report.get(key), kind) for key, kind in wanted.items()):
        raise AnchorError(f"--initramfs {path}: is not the report of an initramfs", REPORT_HINT)
    return report, path
