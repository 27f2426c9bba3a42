"""The demo: a whole site on this machine, and a diskless node that boots from it.

Everything that it makes stays in out/demo; the root image is kept in .cache/site for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from anchor_build.cli import cli
from anchor_build.console import Console
from anchor_build.errors import AnchorError
from contrib.site import pki, servers
from contrib.site.image import CACHE, SiteImage, build_image, login_key
from contrib.site.kept import is_running, read_kept, stop_kept, write_kept

OUT = Path("out/demo")
NODE = "node1.demo.example"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return the status to exit with."""
    parser = argparse.ArgumentParser(prog="build.sh demo", description="Boot a diskless node on this machine.")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--keep", action="store_true", help="leave the node running, with a login")
    group.add_argument("--stop", action="store_true", help="end what --keep left running")
    options = parser.parse_args(argv)
    console = Console()
    # The profiles of whoever tries it have no part in the demo.
    os.environ["ANCHOR_BUILD_CONFIG"] = os.devnull
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with alone():
            if options.stop:
                stop(console)
            else:
                demo(console, keep=options.keep)
    except AnchorError as error:
        console.error(error.message, error.hint)
        return error.exit_status
    except (KeyboardInterrupt, click.Abort):
        console.error("interrupted; everything that ran has been ended")
        return 130
    return 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the demo's directory; raises AnchorError when another demo has it."""
    OUT.parent.mkdir(exist_ok=True)
    with OUT.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AnchorError("another demo is at work in this checkout", "wait for it or interrupt it") from None
        yield


def demo(console: Console, *, keep: bool) -> None:
    """Set the site up, build the initramfs, boot the node and show what it did.

    Raises AnchorError when a step fails or an earlier demo was left running.
    """
    if any(is_running(kept) for kept in read_kept(OUT)):
        raise AnchorError("an earlier demo is still running", "stop it with: ./build.sh demo --stop")
    started = time.monotonic()
    image, key = make_image(console)
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "www").mkdir(parents=True)
    (OUT / "www" / "image.squashfs").symlink_to(image.squashfs)
    validation, ssh = servers.free_port(), servers.free_port()
    with ExitStack() as stack:
        authority, acme, store = start_site(console, stack, validation, keep=keep)
        anchor_build(
            *("initramfs", "--auth", "acme", "--image", "squashfs", "--ca", authority.certificate),
            *("--kernel", image.kernel, "--modules", image.modules, "-o", OUT / "initramfs.img"),
            *("--set", f"rd.anchor.acme.server=10.0.2.2:{acme.port}/dir"),
        )
        result = boot(image, store, validation, ssh, keep=keep)
        if keep:
            pids = [*acme.pids, *store.pids, int(Path(result["pid_file"]).read_text(encoding="utf-8"))]
            write_kept(OUT, pids)
            stack.pop_all()
    show(console, result, image, time.monotonic() - started)
    if keep:
        print_login(ssh, key)


def start_site(
    console: Console, stack: ExitStack, validation: int, *, keep: bool
) -> tuple[pki.Authority, servers.Acme, servers.Store]:
    """Make the certificates and start the servers, which end with `stack`."""
    with console.step("make the site's own certificate authority"):
        authority = pki.make_authority(OUT / "pki")
        leaf = pki.issue(authority, OUT / "pki", "store")
    with console.step("start an ACME server (pebble) and an image store (nginx, mutual TLS)"):
        tls_port = servers.free_port()
        pebble = servers.pebble(OUT / "acme", authority, http_port=validation, tls_port=tls_port, outlive=keep)
        acme = stack.enter_context(pebble)
        www, ca = OUT / "www", acme.root
        nginx = servers.nginx(OUT / "store", root=www, leaf=leaf, client_ca=ca, plain=False, outlive=keep)
        store = stack.enter_context(nginx)
    console.info(f"        ACME at 127.0.0.1:{acme.port}, images at 127.0.0.1:{store.https_port}, only on loopback")
    return authority, acme, store


def make_image(console: Console) -> tuple[SiteImage, Path]:
    """Return the root image, built now or taken from the cache, and the SSH key that its root accepts."""
    with console.step("make the root image: Debian with systemd, as squashfs (about a minute, then cached)"):
        key = login_key(CACHE)
        image = build_image(CACHE, authorized_key=key.with_suffix(".pub").read_text(encoding="utf-8"))
    console.info(f"        {megabytes(image.squashfs)}, kernel {image.release}, sha256 {image.sha256[:16]}…")
    return image, key


def boot(image: SiteImage, store: servers.Store, validation: int, ssh: int, *, keep: bool) -> dict[str, Any]:
    """Boot the node with `anchor-build boot` and return the result that it prints."""
    words = [
        "root=anchor",
        f"rd.anchor.squashfs.url=https://10.0.2.2:{store.https_port}/image.squashfs",
        f"rd.anchor.squashfs.sha256={image.sha256}",
        "console=ttyS0",
    ]
    printed = anchor_build(
        *("boot", "--kernel", image.kernel, "--initrd", OUT / "initramfs.img", "--append", " ".join(words)),
        *("--hostname", NODE, "--until", "multi-user", "--json"),
        *("--hostfwd", f"tcp:127.0.0.1:{validation}-:80", "--hostfwd", f"tcp:127.0.0.1:{ssh}-:22"),
        *("--console", OUT / "console.log", "--boot-json", OUT / "boot.json"),
        *(["--keep"] if keep else []),
        capture=True,
    )
    (OUT / "boot-result.json").write_text(printed, encoding="utf-8")
    return dict(json.loads(printed))


def anchor_build(*words: str | Path, capture: bool = False) -> str:
    """Run an anchor-build command, shown as a user would type it; return what it printed if `capture` is set."""
    argv = [os.path.relpath(word) if isinstance(word, Path) else word for word in words]
    click.echo(f"\n$ ./build.sh {shlex.join(argv)}", err=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if capture else contextlib.nullcontext():
        cli.main(argv, prog_name="anchor-build", standalone_mode=False)
    return printed.getvalue()


def show(console: Console, result: dict[str, Any], image: SiteImage, seconds: float) -> None:
    """Print the boot's steps from the node's own report, and the demo in numbers."""
    report = json.loads((OUT / "boot.json").read_text(encoding="utf-8"))
    click.echo(f"\nWhat {report['node']} did, from its own /run/anchor/boot.json:\n")
    console.table(["step", "stage", "start s", "took s", "result"], boot_rows(report))
    served = (OUT / "store" / "access.log").read_text(encoding="utf-8")
    client = re.search(r'^20[06] (\d+) "[^"]*" "([^"]+)"', served, re.MULTILINE)
    if client:
        click.echo(
            f"\nThe store served {int(client[1]) / 1e6:.1f} MB, to the holder of a certificate for {client[2]} only."
        )
    click.echo(f"initramfs {megabytes(OUT / 'initramfs.img')}, image {megabytes(image.squashfs)}. ", nl=False)
    click.echo(f"The demo took {seconds:.0f} s, {result['seconds']:.0f} s of it the boot ({result['accel']}).")
    click.echo(f"Everything is in {OUT}/: initramfs.img and its report, boot.json, console.log, keys and server logs.")


def boot_rows(report: dict[str, Any]) -> list[list[object]]:
    """Return the rows of a boot.json as a table, milestones included, in seconds since the kernel started."""
    rows: list[tuple[int, list[object]]] = []
    for step in report["steps"]:
        start, took = step["start_ms"], step["duration_ms"]
        rows.append((start, [step["step"], step["stage"], start / 1000, took / 1000, step["result"]]))
    for milestone, title in (("switch_root_ms", "switch_root"), ("ready_ms", "multi-user")):
        if milestone in report:
            rows.append((report[milestone], [title, "", report[milestone] / 1000, "", ""]))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def print_login(ssh: int, key: Path) -> None:
    """Say how to reach the node, and how to end it."""
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    click.echo("\nThe node and its servers go on running.")
    click.echo(f"  log in: ssh -i {os.path.relpath(key)} -p {ssh} {options} root@127.0.0.1")
    click.echo("  look:   cat /run/anchor/boot.json; findmnt /; ls -l /run/anchor/credentials")
    click.echo("  stop:   ./build.sh demo --stop")


def stop(console: Console) -> None:
    """End what a demo left running."""
    count = stop_kept(OUT)
    console.info(f"ended {count} processes" if count else "nothing of the demo is running")
    with contextlib.suppress(OSError, KeyError, TypeError):
        # `boot --keep` keeps QEMU's own files beside its process id.
        machine = Path(json.loads((OUT / "boot-result.json").read_text(encoding="utf-8"))["pid_file"]).parent
        if machine.name.startswith("anchor-boot-"):
            shutil.rmtree(machine, ignore_errors=True)


def megabytes(path: Path) -> str:
    """Return a file's size for people."""
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
