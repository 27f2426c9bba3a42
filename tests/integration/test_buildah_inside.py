"""The image stage buildah with nothing but what is in an initramfs without systemd: its programs, libraries and files.

The initramfs is unpacked and entered with chroot, which costs seconds where a boot costs a minute; a node with such an
initramfs came to multi-user by hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from contrib.site import pki
from contrib.site.registry import PASSWORD, USER, registry
from tests.integration.conftest import BuildInitramfs, Site
from tests.stages.oci_image import Layer, push

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("docker-registry", "buildah", "cpio", "zstd"))),
        reason="needs root, docker-registry, buildah, cpio and zstd",
    ),
]

LIMIT_S = 120
# As the kernel and dracut's init leave it.
INSIDE = """
set -e
cd "$1"
mount --bind . . && cd "$PWD"
mount -t proc proc proc && mount --rbind /sys sys && mount --rbind /dev dev && mount -t tmpfs run run
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "IMAGE=$2" "REGISTRY=$3" "OWNER=$4" /usr/sbin/chroot . /bin/sh -c "$5"
"""
STEP = """
LC_ALL=C anchor_step_dir=/run/anchor/steps/10
export LC_ALL
mkdir -p "$anchor_step_dir" /run/anchor/credentials /run/anchor/lower || exit 9
for lib in types report params mounts memory fetch fetch-mirrors fetch-digest fetch-room http oci registry; do
    . "/usr/lib/anchor/lib/anchor-$lib.sh" || exit 9
done
. /usr/lib/anchor/stages/image/*-buildah/stage.sh || exit 9
anchor_buildah_registry=https://$REGISTRY anchor_buildah_image=$IMAGE anchor_buildah_user=$OWNER
anchor_buildah_password=$(cat /etc/password)
anchor_buildah_policy= anchor_buildah_lookaside= anchor_buildah_platform= anchor_buildah_proxy=
anchor_fetch_timeout=60 anchor_fetch_connect_timeout=10 anchor_fetch_stall=20
anchor_fetch_attempts=3 anchor_fetch_reserve=1048576
anchor_buildah_run && anchor_buildah_mount /run/anchor/lower || exit 1
cd /run/anchor/lower && cat etc/* && ls -d etc/gone /run/anchor/buildah /run/anchor/buildah.d 2>&1
"""


def test_buildah_works_in_an_initramfs_without_systemd(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    initrd = build_initramfs("--image", "buildah", "--no-systemd")
    root = tmp_path / "root"
    root.mkdir()
    argv = ["sh", "-c", 'zstd -dcq "$1" | cpio -idm --quiet', "sh", str(initrd)]
    subprocess.run(argv, cwd=root, check=True, capture_output=True, timeout=LIMIT_S)
    assert not (root / "usr/lib/systemd/systemd").exists()
    (root / "etc/password").write_text(PASSWORD)
    leaf = pki.issue(site.authority, tmp_path, "registry")
    storage = tmp_path / "storage"
    base = Layer().directory("./").directory("etc/").add("etc/kept", b"kept\n").add("etc/gone", b"gone\n")
    with (
        registry(tmp_path / "plain", storage=storage) as plain,
        registry(tmp_path / "basic", storage=storage, leaf=leaf, auth="basic") as server,
    ):
        digest = push(plain, "nodes/small", [base, Layer().add("etc/.wh.gone").add("etc/new", b"new\n")])
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", INSIDE, "sh", str(root)]
        argv += [f"nodes/small@sha256:{digest}", server.host, USER, STEP]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout.splitlines()[:2] == ["kept", "new"], done.stdout + done.stderr
    # The storage is gone, and what a layer took away.
    assert len(done.stdout.splitlines()[2:]) == 3, done.stdout
    assert all("cannot access" in line or "No such" in line for line in done.stdout.splitlines()[2:]), done.stdout
    assert PASSWORD not in done.stderr
