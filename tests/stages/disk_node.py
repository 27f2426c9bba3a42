"""A node whose one disk is a loop device: what tests of image disk share."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.shell.conftest import TOP, Shell
from tests.stages.disk_images import MIB, RECORD_AT, disk_image, loop_device, without_record

STAGES = TOP / "dracut-modules"
SIZE = 12 * MIB
IMAGE = disk_image(SIZE, "one")
OTHER = disk_image(SIZE, "two")
DEFAULTS = {
    "fetch_timeout": "40",
    "fetch_connect_timeout": "3",
    "fetch_stall": "3",
    "fetch_attempts": "4",
    "fetch_reserve": "1000",
    "https_proxy": "",
    "disk_target": "",
    "disk_url": "",
    "disk_mirrors": "",
    "disk_tag": "",
    "disk_blob": "",
    "disk_allow_no_tls": "0",
    "disk_sha256": "",
    "disk_raw_sha256": "",
    "disk_overwrite": "never",
    "disk_timeout": "0",
    "disk_then": "reboot",
    "disk_installed": "boot",
    "disk_root": "",
    "disk_ask": "0",
    "disk_bs": "65536",
}
LOAD = r"""
for lib in report types params fetch fetch-mirrors fetch-digest fetch-room http stream oci registry; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGES/transport-s3/anchor-s3.sh" || exit 9
for transport in https file s3 rsync; do . "$STAGES/transport-$transport/stage.sh" || exit 9; done
for file in anchor-disk anchor-disk-kexec stage; do . "$STAGES/image-disk/$file.sh" || exit 9; done
anchor_step_dir=$ANCHOR_RUN/steps/10
ANCHOR_DISK_CHUNK=1048576
anchor_stage_for_scheme() {
    anchor_transport_needs_digest=0 anchor_transport=$1
    case $1 in
        https | file | s3) ;;
        http) anchor_transport_needs_digest=1 anchor_transport=https ;;
        rsync) anchor_transport_needs_digest=1 ;;
        *) return 1 ;;
    esac
}
od() { # the waits' random numbers are as small as they can be
    case $* in
        *urandom) printf '0\n' ;;
        *) command od "$@" ;;
    esac
}
udevadm() { :; }
"""


def sha256(data: bytes) -> str:
    """Return a digest as parameters have it."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Node:
    """A node whose one disk is a loop device, and whose kernel is this host's."""

    shell: Shell
    file: Path
    device: Path

    def run(self, script: str = "anchor_disk_run", **parameters: str) -> subprocess.CompletedProcess[str]:
        """Run `script` with these parameters of the stage."""
        (self.shell.root / "run/anchor/steps/finish").unlink(missing_ok=True)
        values = {**DEFAULTS, "disk_target": str(self.device), **parameters}
        env = {f"anchor_{name}": value for name, value in values.items()} | {"STAGES": str(STAGES)}
        done = self.shell.run(LOAD + script, env=env, timeout=120)
        assert not list((self.shell.root / "run/anchor").glob("**/*.fetch"))
        return done

    def put(self, name: str, data: bytes) -> str:
        """Leave a file on the node; return its URL."""
        (self.shell.root / name).write_bytes(data)
        return f"file:///{name}"

    def installed(self, done: subprocess.CompletedProcess[str], image: bytes = IMAGE, then: str = "reboot") -> bool:
        """Whether the image is on the disk, all of it, and the boot ends as it should."""
        assert done.returncode == 0, done.stderr
        assert (self.shell.root / "run/anchor/steps/finish").read_text() == f"{then}\n"
        data = self.file.read_bytes()
        assert without_record(data)[: len(image)] == image
        return data[RECORD_AT:].startswith(b"anchor-disk 1\nsha256 ")

    def refused(self, done: subprocess.CompletedProcess[str], *messages: str) -> bool:
        """Whether the stage failed with these words and one hint, and did not ask for an end of the boot."""
        assert done.returncode == 1, done.stderr
        assert [text for text in messages if text not in done.stderr] == [], done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr
        assert done.stderr.count("hint: ") == 1, done.stderr
        return not (self.shell.root / "run/anchor/steps/finish").exists()

    def note(self, name: str) -> str:
        """Return what the step noted."""
        return (self.shell.root / "run/anchor/steps/10" / name).read_text().rstrip("\n")


def prepared(name: str, top: Path) -> Iterator[Node]:
    root = top / "node"
    for directory in ("run/anchor/steps/10", "run/anchor/credentials", "etc/anchor"):
        (root / directory).mkdir(parents=True)
    for directory in ("dev", "proc", "sys"):
        (root / directory).symlink_to(f"/{directory}")
    file = top / "disk.raw"
    with file.open("wb") as disk:
        disk.truncate(SIZE)
    with loop_device(file) as device:
        yield Node(Shell(name, root), file, device)
