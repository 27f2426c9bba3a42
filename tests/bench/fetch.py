"""`./build.sh bench fetch`: the whole download of a node, with digest and mount, beside curl alone.

Everything runs on this host: the node's own shell text, curl and mount, nginx on loopback, and the image of 1 GB in
memory on both sides, so that no disk counts. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from anchor_build.console import format_table
from contrib.site import pki, servers

TOP = Path(__file__).resolve().parents[2]
SIZE_MB = 1000
RATE = 312_500_000  # bytes a second
LIMIT_S = 60
POLL_S = 0.02
PARAMETERS = {"timeout": "900", "connect_timeout": "10", "stall": "20", "attempts": "8", "reserve": str(64 << 20)}
NODE = """
for lib in report mounts memory params fetch fetch-mirrors fetch-digest fetch-room http; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGES/transport-https/stage.sh" && . "$STAGES/image-squashfs/stage.sh" || exit 9
anchor_stage_for_scheme() { anchor_transport=https anchor_transport_needs_digest=0; }
mkdir -p "$ANCHOR_ROOT/run/anchor/lower" || exit 9
anchor_squashfs_run && anchor_squashfs_mount "$ANCHOR_ROOT/run/anchor/lower"
"""


def make_image(directory: Path) -> Path:
    """Make a squashfs of SIZE_MB that does not compress."""
    (directory / "root").mkdir()
    with (directory / "root/noise").open("wb") as noise:
        for _ in range(SIZE_MB):
            noise.write(os.urandom(1_000_000))
    image = directory / "image.squashfs"
    plain = ["-noI", "-noD", "-noF", "-noX", "-quiet", "-no-progress"]
    subprocess.run(["mksquashfs", directory / "root", image, *plain], check=True, capture_output=True, timeout=LIMIT_S)
    shutil.rmtree(directory / "root")
    return image


def memory_of(pid: int) -> int:
    """Return the bytes of memory of a process and all that it started; what they share counts once (proc(5), Pss)."""
    total = 0
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                total += memory_of(int(child))
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * int(smaps.partition("\nPss:")[2].split()[0])
    except (OSError, IndexError):  # it has ended
        pass
    return total


def timed(argv: list[str], env: Mapping[str, str], watch: Callable[[int], None] | None = None) -> float:
    """Run a command, and return its seconds; `watch` gets its process now and then."""
    began = time.monotonic()
    with subprocess.Popen(argv, env=dict(env), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            if watch is not None:
                watch(child.pid)
            time.sleep(POLL_S)
        seconds = time.monotonic() - began
        if child.returncode != 0:
            raise SystemExit(child.stderr.read() if child.stderr else "failed")
    return seconds


def main(arguments: list[str]) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="build.sh bench fetch", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="downloads of each kind")
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="anchor-bench-", dir="/dev/shm")))
        image = make_image(work)
        with image.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = image.stat().st_size
        authority = pki.make_authority(work / "ca")
        leaf, node = pki.issue(authority, work, "store"), pki.issue(authority, work, "node", client=True)
        www = work / "www"
        www.mkdir()
        image.rename(www / image.name)
        # As fast as it can be, which takes a core from the node; and as from another machine, over 2.5 Gbit/s.
        store, remote = (
            stack.enter_context(
                servers.nginx(work / f"nginx{rate}", root=www, leaf=leaf, client_ca=authority.certificate, rate=rate)
            )
            for rate in (0, RATE)
        )
        root = work / "node"
        for name in ("etc/anchor", "run/anchor/credentials", "run/anchor/image", "run/anchor/lower"):
            (root / name).mkdir(parents=True)
        shutil.copy(authority.certificate, root / "etc/anchor/ca.pem")
        shutil.copy(node.certificate, root / "run/anchor/credentials/client.crt")
        shutil.copy(node.key, root / "run/anchor/credentials/client.key")
        rows = []
        for name, url in (
            ("mutual TLS", f"https://127.0.0.1:{store.https_port}/{image.name}"),
            ("plain HTTP", f"http://127.0.0.1:{store.http_port}/{image.name}"),
            ("mutual TLS, 2.5 Gbit/s", f"https://127.0.0.1:{remote.https_port}/{image.name}"),
            ("plain HTTP, 2.5 Gbit/s", f"http://127.0.0.1:{remote.http_port}/{image.name}"),
        ):
            curl = ["curl", "-sS", "--http1.1", "--cacert", str(authority.certificate), "--cert", str(node.certificate)]
            curl += [
                "--key",
                str(node.key),
                "--tls13-ciphers",
                "TLS_AES_128_GCM_SHA256",
                "-o",
                str(root / "alone"),
                url,
            ]
            env = {
                "PATH": os.environ["PATH"],
                "LIB": str(TOP / "lib"),
                "STAGES": str(TOP / "dracut-modules"),
                "ANCHOR_ROOT": str(root),
                "anchor_squashfs_url": url,
                "anchor_squashfs_sha256": digest,
                "anchor_https_proxy": "",
                **{f"anchor_fetch_{key}": value for key, value in PARAMETERS.items()},
            }
            peak = 0

            def watch(pid: int) -> None:
                nonlocal peak
                peak = max(peak, memory_of(pid))

            alone, whole = [], []
            for _ in range(options.runs):
                alone.append(timed(curl, os.environ))
                (root / "alone").unlink()
                whole.append(timed(["unshare", "--mount", "--", "sh", "-c", NODE], env, watch))
            ratios = [a / b for a, b in zip(whole, alone, strict=True)]
            rows.append(
                [
                    name,
                    *(
                        f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                        for values in (alone, whole, ratios)
                    ),
                    f"{(size + peak) / size:.3f}",
                ]
            )
    print(f"image: {size / 1e6:.0f} MB")  # noqa: T201 - the result
    print(format_table(["", "curl alone, s", "fetch, digest, mount, s", "ratio", "memory / image"], rows))  # noqa: T201 - the result
