"""A small root image for a diskless node: Debian from the host's own mirrors, as squashfs, and its kernel.

The image reaches multi-user quickly, takes its network and its name from DHCP, and lets root in by SSH
with one key and with nothing else. Its own files are below `root/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anchor_build.distribution import host_sources
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.run import run, start, stop

# Where the demo and the tests keep images; nothing in it is needed, all of it can be made again.
CACHE = Path(__file__).parents[2] / ".cache" / "site"
FILES = Path(__file__).parent / "root"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
BUILD_TIMEOUT = 900.0
# Every file gets this time (2024-01-01), so that an image depends on its packages alone.
IMAGE_TIME = int(os.environ.get("SOURCE_DATE_EPOCH", "1704067200"))
# zstd 15 saves 7 % of the size and takes eight times as long.
COMPRESSION = "6"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

PACKAGES = ("systemd", "systemd-sysv", "udev", "kmod", "iproute2", "dropbear-bin")
# What nobody reads on a node. Without the kernel's hooks no initramfs is made that nobody boots.
LEFT_OUT = ("doc", "man", "info", "locale", "lintian", "i18n", "bash-completion", "zoneinfo")
DPKG_OPTIONS = (
    *(f"path-exclude=/usr/share/{name}/*" for name in LEFT_OUT),
    *("path-exclude=/etc/kernel/*", "path-exclude=/usr/lib/udev/hwdb.d/*"),
)
ENABLED = ("systemd-networkd.service", "site-ssh.service", "site-names.service", "site-links.service")
# What waits for a bus, a clock, a disk or a screen that the node does not have.
MASKED = (
    *("systemd-logind.service", "systemd-timesyncd.service", "systemd-networkd-wait-online.service"),
    *("systemd-pstore.service", "systemd-machine-id-commit.service", "e2scrub_reap.service"),
    *("e2scrub_all.timer", "fstrim.timer", "apt-daily.timer", "apt-daily-upgrade.timer"),
    *("dpkg-db-backup.timer", "getty-static.service", "sys-kernel-config.mount", "sys-kernel-debug.mount"),
    *("sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "systemd-update-utmp-runlevel.service"),
)
REMOVED = (
    *("boot/*", "vmlinuz*", "initrd.img*", "etc/hostname", "etc/resolv.conf", "etc/*-", "etc/dropbear/*_key"),
    *("var/cache/*", "var/lib/apt/*", "var/lib/dpkg/*-old", "var/log/*", "var/lib/systemd/catalog/database"),
    *("run/*", "tmp/*", "root/.bash_history"),
)


@dataclass(frozen=True)
class SiteImage:
    """A finished root image, its digest, and the kernel that belongs to it.

    `modules` is a directory that ends in lib/modules/<release>, as dracut wants it.
    """

    squashfs: Path
    kernel: Path
    modules: Path
    release: str
    sha256: str


def login_key(cache: Path) -> Path:
    """Return the private SSH key for logins to images of this cache; the public one is beside it as .pub."""
    key = cache / "login-key"
    with _locked(cache):
        if not key.exists():
            fresh = cache / "login-key.new"
            for leftover in (fresh, fresh.with_suffix(".new.pub")):
                leftover.unlink(missing_ok=True)
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "anchor demo", "-f", fresh])
            (cache / "login-key.new.pub").rename(cache / "login-key.pub")
            fresh.rename(key)
    return key


def build_image(cache: Path, *, authorized_key: str, suite: str = "bookworm") -> SiteImage:
    """Return the image of this recipe from `cache`, after building it there if it is missing (about a minute).

    `authorized_key` is a line of an authorized_keys file. Processes that ask at the same time wait for
    one build; an interrupted build leaves nothing that could be taken for an image.

    Raises AnchorError when a program is missing or a step fails.
    """
    cache = cache.resolve()
    files = image_files(authorized_key)
    recipe = json.dumps([suite, IMAGE_TIME, Path(__file__).read_text("utf-8")])
    digest = hashlib.sha256(recipe.encode() + files)
    target = cache / f"{suite}-{digest.hexdigest()[:16]}"
    with _locked(cache):
        if not target.exists():
            for killed in cache.glob("unfinished-*"):
                shutil.rmtree(killed)
            with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache) as temporary:
                work = Path(temporary) / "image"
                work.mkdir()
                _build(work, files, suite)
                work.rename(target)
    facts = json.loads((target / "image.json").read_text("utf-8"))
    release = facts["release"]
    modules = target / "lib" / "modules" / release
    return SiteImage(target / "image.squashfs", target / "vmlinuz", modules, release, facts["sha256"])


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def image_files(authorized_key: str) -> bytes:
    """Return the image's own files as a tar archive that is the same on every host."""
    archive = io.BytesIO()
    login = Path("root/.ssh/authorized_keys")
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(FILES.rglob("*")):
            name = path.relative_to(FILES)
            if path.is_dir():
                _add(tar, name, None, 0o755)
            else:
                _add(tar, name, path.read_bytes(), 0o755 if "sbin" in name.parts else 0o644)
        # An empty id means "not the first boot", and the two stamps "nothing in /usr is newer": otherwise
        # every boot would build caches anew that the image already holds.
        for stamp in ("etc/machine-id", "etc/.updated", "var/.updated"):
            _add(tar, Path(stamp), b"", 0o644)
        _add(tar, Path("etc/dropbear"), None, 0o755)
        _add(tar, login.parent, None, 0o700)
        _add(tar, login, authorized_key.strip().encode() + b"\n", 0o600)
    return archive.getvalue()


def _add(tar: tarfile.TarFile, name: Path, content: bytes | None, mode: int) -> None:
    entry = tarfile.TarInfo(str(name))
    entry.mtime, entry.mode = IMAGE_TIME, mode
    entry.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
    entry.size = len(content or b"")
    tar.addfile(entry, io.BytesIO(content or b""))


def _build(work: Path, files: bytes, suite: str) -> None:
    (work / "files.tar").write_bytes(files)
    (work / "lib").mkdir()
    log = work / "build.log"
    run(
        _mmdebstrap(work, suite),
        env={"SOURCE_DATE_EPOCH": str(IMAGE_TIME)},
        log=log,
        timeout=BUILD_TIMEOUT,
        hint="the mirrors are those of this host's apt; is the network there?",
    )
    releases = sorted(path.name for path in (work / "lib" / "modules").iterdir())
    if len(releases) != 1 or not (work / "lib" / "modules" / releases[0] / "modules.dep").is_file():
        raise AnchorError(f"the image should hold one kernel with its modules, not {releases}")
    shutil.copyfile(work / "boot" / f"vmlinuz-{releases[0]}", work / "vmlinuz")
    _squash(work / "root.tar", work / "image.squashfs", work / "squash.log")
    for leftover in ("root.tar", "files.tar"):
        (work / leftover).unlink()
    shutil.rmtree(work / "boot")
    with (work / "image.squashfs").open("rb") as image:
        sha256 = hashlib.file_digest(image, "sha256").hexdigest()
    facts = {"release": releases[0], "sha256": sha256}
    (work / "image.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _mmdebstrap(work: Path, suite: str) -> list[str | Path]:
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    packages = ",".join((*PACKAGES, f"linux-image-cloud-{architecture}"))
    hooks = [
        f"tar-in {work}/files.tar /",
        'chroot "$1" systemctl --quiet set-default multi-user.target',
        f'chroot "$1" systemctl --quiet enable {" ".join(ENABLED)}',
        f'chroot "$1" systemctl --quiet mask {" ".join(MASKED)}',
        f"copy-out /boot {work}",
        f"copy-out /lib/modules {work}/lib",
        f'cd "$1" && rm -rf {" ".join(REMOVED)}',
    ]
    return [
        *("mmdebstrap", "--variant=minbase", f"--include={packages}"),
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        *(f"--customize-hook={hook}" for hook in hooks),
        *((f"--keyring={KEYRING}",) if KEYRING.exists() else ()),
        *(suite, work / "root.tar", *host_sources("debian", suite)),
    ]


def _squash(tar: Path, target: Path, log: Path) -> None:
    """Turn a tar archive, with the owners that it names, into a squashfs whose bytes depend on it alone."""
    time = str(IMAGE_TIME)
    # The archive's own entry for the root directory is not read, so its mode is given here.
    argv = [
        "mksquashfs",
        "-",
        str(target),
        "-tar",
        "-root-mode",
        "0755",
        "-mkfs-time",
        time,
        "-all-time",
        time,
    ]
    argv += ["-comp", "zstd", "-Xcompression-level", COMPRESSION, "-no-progress", "-quiet"]
    with tar.open("rb") as source:
        packer = start(argv, log=log, stdin=source)
    try:
        packer.wait(timeout=BUILD_TIMEOUT)
    finally:
        stop(packer)
    if packer.returncode != 0:
        raise ProcessError(argv, packer.returncode, log.read_text("utf-8", errors="replace"))
