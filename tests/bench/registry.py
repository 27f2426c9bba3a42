"""`./build.sh bench registry`: one image of three layers from a registry, booted with `oci` and with `buildah`.

The image is the site's root (268 MB unpacked), in three gzip layers as an engine would push them: the system, the
kernel's modules, and the rest. Both nodes pull it by its digest over HTTPS from a real docker-registry, and run on the
same kernel in QEMU. Seconds count from QEMU's start until the node reports switch_root. Memory is what the node uses
and could not give back, at its peak: MemTotal less the least MemAvailable that a loop beside the boot saw.
Beside that, the image step alone on this host, without an emulated processor: the node's own shell text and programs in
a mount namespace, from the same registry. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from anchor_build import qemu
from anchor_build.bootwatch import BootResult
from anchor_build.console import Console, Step, format_table
from anchor_build.errors import AnchorError
from anchor_build.events import End
from anchor_build.run import run
from contrib.site import image, pki
from contrib.site.registry import registry
from tests.stages.oci_image import push

TOP = Path(__file__).resolve().parents[2]
STAGES = ("oci", "buildah")
BOOT_LIMIT_S = 600.0
SMALL_LIMIT_S = 200.0
# MB, between which the least memory is looked for, around the peak with 2 GB: each boot may take minutes.
MEMORY_RANGE = {"oci": (192, 448), "buildah": (512, 1024)}
NAME = "nodes/site"
# Each layer has the directories that lead to its files, as an engine writes them.
LAYERS = (
    "--exclude=./usr/lib/modules --exclude=./usr/share --exclude=./usr/sbin --exclude=./var .",
    "--no-recursion ./usr ./usr/lib --recursion ./usr/lib/modules",
    "--no-recursion ./usr --recursion ./usr/share ./usr/sbin ./var",
)
ARCHIVE = """
set -e
mount -t squashfs -o loop,ro "$1" /mnt
tar -C /mnt --numeric-owner -cf - $2
"""
# A stage that looks at the memory from the auth step on. Each new least goes to the console, because a node that runs
# out of memory leaves nothing else.
PROBE_TOML = """
[stage]
kind = "auth"
name = "probe"
api = 1
summary = "Watch the node's memory."
binaries = [{ name = "sleep", rpm = "coreutils", deb = "coreutils" }]
"""
PROBE_SH = """#!/bin/sh
anchor_probe_run() {
    (
        least=999999999
        while sleep 0.3; do
            while read -r key value rest; do
                case $key in
                    MemTotal:) total=$value ;;
                    MemAvailable:) break ;;
                esac
            done </proc/meminfo
            [ "$value" -lt $((least - 256)) ] || continue
            least=$value
            printf 'probe: %s of %s kB\\n' "$least" "$total" >/dev/console
        done
    ) </dev/null >/dev/null 2>&1 &
}
"""
SEEN = re.compile(r"probe: (\d+) of (\d+) kB")


# The image step on this host.
STEP = """
for lib in report params mounts memory fetch fetch-mirrors fetch-digest fetch-room stream http oci registry; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGES/image-$NAME/stage.sh" || exit 9
LC_ALL=C anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/1000
export LC_ALL
"anchor_${NAME}_run" && "anchor_${NAME}_mount" "$ANCHOR_ROOT/run/anchor/lower"
"""
PARAMETERS = ("registry", "image", "mirrors", "policy", "lookaside", "platform", "user", "password", "proxy")
FETCH = {"timeout": 600, "connect_timeout": 10, "stall": 20, "attempts": 8, "reserve": 64 << 20}


def push_image(site: image.SiteImage, work: Path, storage: Path) -> tuple[str, list[tuple[int, int]]]:
    """Push the image; return its digest, and of each layer the bytes unpacked and compressed."""
    tars = []
    for number, what in enumerate(LAYERS):
        argv = ["unshare", "--mount", "sh", "-c", ARCHIVE, "sh", str(site.squashfs), what]
        with (work / f"{number}.tar").open("wb") as file:
            subprocess.run(argv, check=True, stdout=file, timeout=BOOT_LIMIT_S)
        tars.append((work / f"{number}.tar").read_bytes())
        (work / f"{number}.tar").unlink()
    with registry(work / "push", storage=storage) as server:
        digest = push(server, NAME, tars, ("gzip",))
    blobs = storage / "docker/registry/v2/blobs/sha256"
    manifest = json.loads((blobs / digest[:2] / digest / "data").read_bytes())
    return digest, [(len(tar), layer["size"]) for tar, layer in zip(tars, manifest["layers"], strict=True)]


def build(stage: str, site: image.SiteImage, work: Path, *auth: str) -> Path:
    """Build an initramfs with the command that a user runs."""
    output = work / f"{stage}{len(auth)}.img"
    argv: list[str | Path] = [sys.executable, "-m", "anchor_build", "-q", "initramfs", "--image", stage, *auth]
    argv += ["--ca", work / "ca/ca.crt", "--kernel", site.kernel, "--modules", site.modules]
    run([*argv, "--no-copy-kernel", "-o", output])
    return output


def boot(machine: qemu.Machine, log: Path) -> BootResult:
    """Boot until switch_root; raises AnchorError with the console's end where that does not come."""
    result = qemu.boot(machine, until="switch-root", timeout=BOOT_LIMIT_S, console=log)
    if not result.ok:
        raise AnchorError(f"{result.reason}\n" + log.read_text(errors="replace")[-2000:])
    return result


def on_host(stage: str, parameters: Mapping[str, str], ca: Path, work: Path) -> tuple[float, float]:
    """Run the image step here; return its seconds, and those of processor time of all that it started."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        root = Path(name)
        for path in ("run/anchor/steps/1000", "run/anchor/credentials", "run/anchor/lower", "etc/anchor", "proc"):
            (root / path).mkdir(parents=True)
        shutil.copy(ca, root / "etc/anchor/ca.pem")
        shutil.copy("/proc/meminfo", root / "proc/meminfo")
        env = {"PATH": os.environ["PATH"], "LIB": str(TOP / "lib"), "STAGES": str(TOP / "dracut-modules")}
        env |= {"ANCHOR_ROOT": name, "NAME": stage}
        env |= {f"anchor_fetch_{key}": str(value) for key, value in FETCH.items()}
        env |= {f"anchor_{stage}_{key}": parameters.get(key, "") for key in PARAMETERS}
        env |= {"anchor_oci_max_entries": "500000"}
        spent, began = processor_seconds(), time.monotonic()
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", STEP],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BOOT_LIMIT_S,
            check=False,
        )
        if done.returncode != 0:
            raise AnchorError(f"{stage}: {done.stderr[-2000:]}")
        return time.monotonic() - began, processor_seconds() - spent


def memory_used(log: Path) -> tuple[float, float]:
    """Return the node's memory in use before the image and at its peak, in MB, from what PROBE_SH wrote."""
    used = [(int(total) - int(least)) * 1024 / 1e6 for least, total in SEEN.findall(log.read_text(errors="replace"))]
    if not used:
        raise AnchorError("the node wrote nothing about its memory on the console")
    return used[0], max(used)


def least_memory(machine: qemu.Machine, megabytes: tuple[int, int], log: Path, step: Step) -> int | None:
    """Return the least memory in MB, to 32, between the two given ones, with which the node comes to switch_root.

    Nothing where it never does. A node that has too little may work without end: each has SMALL_LIMIT_S.
    """
    low, high = (size // 32 for size in megabytes)
    enough = None
    while low < high:
        middle = (low + high) // 2
        small = replace(machine, memory=f"{middle * 32}M")
        with step(f"boot with {small.memory}"):
            result = qemu.boot(small, until="switch-root", timeout=SMALL_LIMIT_S, console=log)
        if result.ok:
            high, enough = middle, middle * 32
        else:
            low = middle + 1
    return enough


def spread(values: list[float]) -> str:
    """Return the median with the smallest and largest value."""
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def ratio(values: dict[str, list[float]]) -> str:
    """Return the spread of oci's values to buildah's of the same round."""
    if len(values) < len(STAGES):
        return ""
    pairs = zip(values["oci"], values["buildah"], strict=True)
    found = [ours / theirs for ours, theirs in pairs]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def processor_seconds() -> float:
    """Return the processor time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def step_seconds(result: BootResult) -> float:
    """Return how long the node's image step took."""
    return next(event.duration_ms for event in result.events if isinstance(event, End) and event.step == "image") / 1000


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="build.sh bench registry", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="boots of each stage, in turn")
    parser.add_argument("--node-memory", default="2G", help="the nodes' memory")
    parser.add_argument("--memory", action="store_true", help="also look for the least memory that boots")
    parser.add_argument("--only", choices=STAGES, help="with this stage only, as for --runs 0 --memory")
    parser.add_argument("--output", type=Path, default=Path("out/bench-registry.json"), help="where the figures go")
    options = parser.parse_args(arguments)
    for program in ("docker-registry", "buildah"):
        if shutil.which(program) is None:
            raise AnchorError(f"{program} is missing", "`./build.sh test` installs what tests and this need")
    os.environ["ANCHOR_BUILD_CONFIG"] = os.devnull
    console = Console()
    figures: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anchor-bench-")))
        authority = pki.make_authority(work / "ca")
        leaf = pki.issue(authority, work, "registry")
        with console.step("prepare the image and the registry"):
            key = image.login_key(image.CACHE)
            site = image.build_image(image.CACHE, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8"))
            digest, layers = push_image(site, work, work / "storage")
            server = stack.enter_context(registry(work / "serve", storage=work / "storage", leaf=leaf))
        probe = work / "probe"
        probe.mkdir()
        (probe / "stage.toml").write_text(PROBE_TOML)
        (probe / "stage.sh").write_text(PROBE_SH)
        machines, sizes = {}, {}
        stages = (options.only,) if options.only else STAGES
        path = f"{NAME}@sha256:{digest}"
        parameters = {
            "oci": {"image": f"https://HOST:{server.port}/{path}"},
            "buildah": {"registry": f"https://HOST:{server.port}", "image": path},
        }
        for name in stages:
            with console.step(f"build {name}"):
                sizes[name] = build(name, site, work).stat().st_size / 1e6
                initrd = build(name, site, work, "--stage-dir", str(probe), "--auth", "probe")
            words = [f"rd.anchor.{name}.{key}={value}" for key, value in parameters[name].items()]
            append = " ".join(["root=anchor rd.anchor.on_failure=poweroff", *words]).replace("HOST", "10.0.2.2")
            machines[name] = qemu.Machine(site.kernel, initrd, append, memory=options.node_memory, accel="tcg")
        log = work / "console.log"
        for n in range(options.runs):
            for name, machine in machines.items():
                with console.step(f"run {n + 1} of {options.runs}: boot {name}"):
                    spent = processor_seconds()
                    result = boot(machine, log)
                    spent = processor_seconds() - spent
                before, peak = memory_used(log)
                with console.step(f"run {n + 1} of {options.runs}: {name} on this host"):
                    given = {key: value.replace("HOST", "127.0.0.1") for key, value in parameters[name].items()}
                    seconds, processor = on_host(name, given, authority.certificate, work)
                for what, value in (
                    ("switch_root s", result.seconds),
                    ("step image s", step_seconds(result)),
                    ("processor time of QEMU s", spent),
                    ("memory at the peak MB", peak),
                    ("memory before the image MB", before),
                    ("step image on this host s", seconds),
                    ("its processor time s", processor),
                ):
                    figures.setdefault(what, {}).setdefault(name, []).append(value)
            # What an interrupted run has is not lost.
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({"sizes": sizes, "figures": figures}) + "\n", encoding="utf-8")
        less = "" if options.only else f"{sizes['oci'] - sizes['buildah']:+.1f} MB"
        rows = [["initramfs MB", *(f"{sizes[name]:.1f}" for name in stages), less]]
        for what, values in figures.items():
            rows.append([what, *(spread(values[name]) for name in stages), ratio(values)])
        if options.memory:
            least = [least_memory(machines[name], MEMORY_RANGE[name], log, console.step) for name in stages]
            share = f"{least[0] / least[1]:.2f}" if len(least) > 1 and least[0] and least[1] else ""
            rows.append(["least memory MB", *map(str, least), share])
    megabytes = ", ".join(f"{unpacked / 1e6:.0f} MB ({size / 1e6:.0f} MB gzip)" for unpacked, size in layers)
    print(f"layers: {megabytes}")  # noqa: T201 - the result
    print(format_table(["median (least to most)", *stages, "oci / buildah"], rows))  # noqa: T201 - the result
