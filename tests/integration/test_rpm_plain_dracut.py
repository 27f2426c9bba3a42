"""The packages on a host without anchor-build: what plain dracut makes of the installed modules, and what it does not.

dracut and its configuration are those of this host; the packages' files, /etc/anchor and dracut.conf.d are in a private
mount namespace, so that nothing of the machine changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build import qemu
from anchor_build.cpio import Initramfs, read_initramfs
from anchor_build.events import End
from tests.integration.conftest import LIMIT_S, Site
from tests.integration.rpm_host import MODULES, TIME, build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dracut") is None, reason="dracut is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: private mounts, and files that only root may read"),
]
DRACUT_LIMIT_S = 180
STAGES = "anchor anchor-auth-acme anchor-image-squashfs"
# A private /usr/lib/dracut/modules.d and /etc, then the program that follows.
IN_NAMESPACE = (
    'mount --bind "$1/modules.d" /usr/lib/dracut/modules.d && mount --bind "$1/etc" /etc && shift && exec "$@"'
)


@dataclass(frozen=True)
class Host:
    """The host as it would be with the packages installed: `top` has its modules.d and its etc."""

    top: Path
    documents: Path

    def dracut(self, output: Path, *words: str | Path) -> str:
        """Run plain dracut, with nothing of anchor-build in its reach; return what it said."""
        argv = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            IN_NAMESPACE,
            "sh",
            str(self.top),
            "dracut",
            "--force",
            "--no-hostonly",
        ]
        done = subprocess.run(
            [*argv, *map(str, words), str(output)],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SOURCE_DATE_EPOCH": str(TIME)},
            cwd=output.parent,
            capture_output=True,
            text=True,
            timeout=DRACUT_LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stderr


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build all packages, and unpack them as rpm would."""
    top = tmp_path_factory.mktemp("packages")
    build(top / "out")
    (top / "root").mkdir()
    for package in sorted((top / "out").glob("*.rpm")):
        script = 'rpm2cpio "$1" | cpio --extract --make-directories --preserve-modification-time --quiet'
        subprocess.run(["sh", "-c", script, "sh", package], cwd=top / "root", check=True, timeout=60)
    return top / "root"


def make_host(top: Path, packages: Path | None) -> Host:
    shutil.copytree("/usr/lib/dracut/modules.d", top / "modules.d", symlinks=True)
    shutil.copytree("/etc", top / "etc", symlinks=True)
    if packages is not None:
        shutil.copytree(packages / MODULES, top / "modules.d", dirs_exist_ok=True)
    return Host(top, packages or top)


@pytest.fixture(scope="module")
def host(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Host:
    return make_host(tmp_path_factory.mktemp("host"), packages)


def ours(initramfs: Initramfs) -> list[str]:
    """Return the stages and libraries of Anchor in an initramfs."""
    return sorted(path for path in initramfs.members if "anchor" in path)


def test_installed_packages_change_no_initramfs(host: Host, tmp_path: Path) -> None:
    """The same host with and without the packages: the same bytes."""
    bare = make_host(tmp_path / "bare", None)
    words = ["--no-kernel", "--no-compress", "--reproducible", "--kver", "6.1.0-test"]
    files = [tmp_path / "with.img", tmp_path / "without.img"]
    for which, file in zip((host, bare), files, strict=True):
        # The configuration keeps the name of the output: the same name, in turn.
        said = which.dracut(tmp_path / "it.img", *words)
        assert "Including module: base" in said
        assert "Including module: anchor" not in said
        (tmp_path / "it.img").rename(file)
    assert ours(read_initramfs(files[0])) == []
    assert files[0].read_bytes() == files[1].read_bytes()


def test_example_configuration_asks_for_it(host: Host, packages: Path, tmp_path: Path) -> None:
    [example] = packages.rglob("dracut-anchor.conf")
    asking = Host(tmp_path / "host", host.documents)
    shutil.copytree(host.top, asking.top, symlinks=True)
    target = asking.top / "etc" / "dracut.conf.d" / "anchor.conf"
    target.parent.mkdir(exist_ok=True)
    shutil.copy(example, target)
    said = asking.dracut(tmp_path / "it.img", "--no-kernel", "--no-compress", "--kver", "6.1.0-test")
    for module in (*STAGES.split(), "anchor-transport-https"):
        assert f"Including module: {module} " in said
    assert "usr/lib/anchor/stages/auth/10-acme/stage.sh" in ours(read_initramfs(tmp_path / "it.img"))


@pytest.mark.boot
def test_an_initramfs_of_plain_dracut_boots(host: Host, site: Site, tmp_path: Path) -> None:
    own = Host(tmp_path / "host", host.documents)
    shutil.copytree(host.top, own.top, symlinks=True)
    (own.top / "etc" / "anchor").mkdir()
    shutil.copy(site.authority.certificate, own.top / "etc" / "anchor" / "ca.pem")
    initrd = tmp_path / "node.img"
    kernel: list[str | Path] = ["--kver", site.root_image.modules.name, "--kmoddir", site.root_image.modules]
    own.dracut(initrd, *kernel, "--compress", "zstd -3 -T0 -q", "--add", STAGES)
    append = (
        f"root=anchor rd.anchor.acme.server={site.acme_server} rd.anchor.squashfs.url={site.url} {site.digest} "
        "rd.anchor.on_failure=poweroff"
    )
    console = tmp_path / "console.log"
    result = qemu.boot(site.machine(initrd, append), until="switch-root", timeout=LIMIT_S, console=console)
    assert result.ok, result
    steps = {event.step: event.ok for event in result.events if isinstance(event, End)}
    assert all(steps.values()), steps
    assert {"network", "clock", "auth", "image", "mount", "overlay"} <= set(steps)
