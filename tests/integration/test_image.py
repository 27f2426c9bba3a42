"""`anchor-build image`: real packers; what goes in comes out, entry by entry, and the same bytes each time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from anchor_build.image import published_name
from anchor_build.manifest import read_manifest

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and capabilities"),
    pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="mkfs.erofs is missing"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="mksquashfs is missing"),
]
# cap_net_raw+ep, as in the kernel's struct vfs_cap_data, revision 2.
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
FORMATS = pytest.mark.parametrize("kind", ["squashfs", "erofs"])
Entry = tuple[int, int, int, int, int, int, bytes, tuple[tuple[str, bytes], ...]]


def run(*arguments: str | Path, **env: str) -> CompletedProcess[str]:
    """Run the command."""
    argv = [sys.executable, "-m", "anchor_build", "image", *map(str, arguments)]
    return subprocess.run(argv, env={**os.environ, **env}, capture_output=True, text=True, timeout=100, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a small root with all that is easily lost."""
    top = tmp_path / "tree"
    for name in (
        "etc",
        "usr/bin",
        "lib/modules/6.1.0-1",
        "lib/modules/empty",
        "proc/1",
        "sys",
        "dev",
        "run",
        "var/tmp",
    ):
        (top / name).mkdir(parents=True)
    (top / "lib/modules/6.1.0-1/modules.dep").write_text("")
    (top / "etc/motd").write_text("hello\n" * 1000)
    (top / "etc/shadow").write_text("secret\n")
    (top / "etc/shadow").chmod(0o640)
    os.chown(top / "etc/shadow", 0, 42)
    (top / "usr/bin/ping").write_bytes(os.urandom(70_000))
    (top / "usr/bin/ping").chmod(0o755)
    (top / "usr/bin/su").write_text("#!/bin/sh\n")
    (top / "usr/bin/su").chmod(0o4755)
    os.link(top / "usr/bin/su", top / "usr/bin/su2")
    os.chown(top / "usr/bin/su", 0, 10_000_000)
    (top / "usr/bin/su").chmod(0o4755)
    os.setxattr(top / "usr/bin/ping", "security.capability", CAPABILITY)
    os.setxattr(top / "etc/motd", "user.note", b"bytes \x00\xff\n")
    os.setxattr(top / "etc", "trusted.mark", b"yes")
    (top / "var/tmp").chmod(0o1777)
    (top / "etc/link").symlink_to("../no where")
    os.mkfifo(top / "etc/pipe")
    os.mknod(top / "etc/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (top / "etc/with space\nand line").write_text("x")
    for junk in ("proc/1/status", "sys/.hidden", "run/pid"):
        (top / junk).write_text("junk")
    os.mknod(top / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, (1_600_000_000, 1_600_000_000), follow_symlinks=False)
    os.utime(top, (1_600_000_000, 1_600_000_000))
    return top


def entries(top: Path) -> dict[str, Entry]:
    """Return type and mode, owners, device, links, time, content and xattrs of each entry, by its path."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        facts = path.lstat()
        content = b""
        if path.is_symlink():
            content = os.fsencode(path.readlink())
        elif stat.S_ISREG(facts.st_mode):
            content = path.read_bytes()
        try:
            names = sorted(os.listxattr(path, follow_symlinks=False))
        except OSError as error:
            # A squashfs without any says that it has no such thing.
            assert error.errno == errno.ENOTSUP
            names = []
        xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)
        links = 0 if path.is_dir() else facts.st_nlink
        entry = (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_rdev, links, int(facts.st_mtime), content, xattrs)
        found[str(path.relative_to(top))] = entry
    return found


def wanted(tree: Path) -> dict[str, Entry]:
    """Return the entries of a tree without what lies in pseudo file systems."""
    return {
        path: entry
        for path, entry in entries(tree).items()
        if not (path.split("/")[0] in ("proc", "sys", "dev", "run") and "/" in path)
    }


def inside(image: Path, kind: str, tmp_path: Path) -> dict[str, Entry]:
    """Mount an image and return its entries."""
    place = tmp_path / "mounted"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", "loop,ro", image, place], check=True)
    try:
        return entries(place)
    finally:
        subprocess.run(["umount", place], check=True)


@FORMATS
def test_what_goes_in_comes_out(tree: Path, tmp_path: Path, kind: str) -> None:
    image = tmp_path / f"node.{kind}"
    done = run(tree, "-o", image, "--json")
    assert done.returncode == 0, done.stderr
    got, source = inside(image, kind, tmp_path), wanted(tree)
    assert got.keys() == source.keys()
    assert {path: entry for path, entry in got.items() if entry != source[path]} == {}
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / f"node.{kind}.json").read_text())
    manifest, _ = read_manifest(tmp_path / f"node.{kind}.manifest")
    assert (manifest.size, manifest.format, manifest.image) == (image.stat().st_size, kind, "squashfs")
    assert manifest.kernels == ("6.1.0-1",)
    regular = {os.lstat(tree / p).st_ino: len(e[6]) for p, e in source.items() if stat.S_ISREG(e[0])}
    assert manifest.unpacked == sum(regular.values())
    assert report["entries"] == len(source)
    assert any("not signed" in text for text in report["warnings"])


@FORMATS
def test_the_same_input_gives_the_same_bytes(tree: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "root.tar.zst"
    tar = ["tar", "--create", "--zstd", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sort=name"]
    subprocess.run([*tar, "--file", archive, "-C", tree, "."], check=True, timeout=60)
    made = []
    for n, source in enumerate((tree, tree, archive, archive)):
        image = tmp_path / f"{n}.{kind}"
        done = run(source, "-o", image)
        assert done.returncode == 0, done.stderr
        made.append(image.read_bytes())
    assert made[0] == made[1]
    assert made[2] == made[3]
    assert inside(tmp_path / f"2.{kind}", kind, tmp_path) == wanted(tree)
    clamped = run(tree, "-o", tmp_path / "old", "--format", kind, SOURCE_DATE_EPOCH="1500000000")
    assert clamped.returncode == 0, clamped.stderr
    assert {entry[5] for entry in inside(tmp_path / "old", kind, tmp_path).values()} == {1500000000}


def test_missing_directories_are_made(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    done = run(top, "-o", tmp_path / "node.squashfs")
    assert done.returncode == 0, done.stderr
    found = inside(tmp_path / "node.squashfs", "squashfs", tmp_path)
    assert {name: oct(found[name][0] & 0o7777) for name in ("dev", "proc", "run", "sys")} == {
        "dev": "0o755",
        "proc": "0o555",
        "run": "0o755",
        "sys": "0o555",
    }
    done = run(top, "-o", tmp_path / "node.erofs")
    assert done.returncode == 1
    assert "has no directory /dev, /proc, /run, /sys" in done.stderr
    assert sorted(path.name for path in top.iterdir()) == ["etc"]
    assert not (tmp_path / "node.erofs").exists()


def test_a_root_that_nothing_can_start_in_is_told(tree: Path, tmp_path: Path) -> None:
    """The directory above the root, say, or a container image: most hold no init."""
    image = tmp_path / "node.squashfs"
    assert "warning: the image holds no init such as /sbin/init: " in run(tree, "-o", image).stderr
    # Where this leads on the host is no matter.
    (tmp_path / "host").mkdir()
    (tmp_path / "host/init").touch()
    (tree / "sbin").symlink_to(tmp_path / "host")
    assert "the image holds no init" in run(tree, "-o", image).stderr
    (tree / "sbin").unlink()
    (tree / "usr/sbin").mkdir()
    (tree / "sbin").symlink_to("/usr/sbin")
    (tree / "usr/sbin/init").symlink_to("/lib/somewhere/else")
    done = run(tree, "-o", image)
    assert (done.returncode, "no init" in done.stderr) == (0, False), done.stderr


def test_an_image_gets_a_new_manifest(tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "node.squashfs"
    assert run(tree, "-o", image).returncode == 0
    before, data = image.read_bytes(), (tmp_path / "node.squashfs.manifest").read_bytes()
    done = run(image, "--valid-for", "30d", "--url", "https://store.example/images/", "--peer", "http://peer/x")
    assert done.returncode == 0, done.stderr
    assert image.read_bytes() == before
    manifest, now = read_manifest(tmp_path / "node.squashfs.manifest")
    assert now != data
    assert manifest.kernels == ("6.1.0-1",)
    assert manifest.expires == manifest.created + 30 * 86400
    name = published_name(image, manifest.sha256)
    assert manifest.mirrors == (f"https://store.example/images/{name}",)
    assert manifest.peers == ("http://peer/x",)
    # Renewed once more, it keeps the places.
    assert run(image, "--valid-for", "60d").returncode == 0
    again, _ = read_manifest(tmp_path / "node.squashfs.manifest")
    assert (again.mirrors, again.peers) == (manifest.mirrors, manifest.peers)


def test_what_cannot_be_a_source_is_told_and_nothing_is_left(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar\n" * 100)
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08\x00broken")
    out = tmp_path / "out"
    out.mkdir()
    for arguments, status, words in (
        ((tmp_path / "text",), 2, "is neither a directory, nor a tar archive, nor an image"),
        ((tmp_path / "away",), 2, "there is no such file"),
        ((tmp_path / "cut.tar.gz",), 1, "is "),
        ((tree, "--compression", "rar"), 2, "squashfs has zstd, gzip, lz4, xz, lzo"),
        ((tree, "--compression", "lz4:3"), 2, "lz4 and xz have no levels"),
        ((tree, "--valid-for", "soon"), 2, "is not a duration"),
        ((tree, "--url", "store"), 2, "--url store: is not a URL"),
        ((tree, "--url", "ftp://x/"), 2, "--url ftp://x/: is not a URL with one of the schemes: https http"),
        ((tree, "--peer", "https://x/", "--peer", "y"), 2, "--peer y: is not a URL"),
        (
            (tree, "--sign-key", tmp_path / "text", "--sign-pass-file", "/dev/zero"),
            1,
            "/dev/zero: has more than 16 MiB",
        ),
        ((tree, "--package", "vim"), 2, "belong to --distribution"),
        ((tree, "--sign-key", tmp_path / "text"), 1, "private key, in PEM"),
        (("/dev/null",), 2, "is neither a directory nor a plain file"),
        (("--distribution", "debian:bookworm", "--mirror-key", "nosuch"), 1, "--mirror-key nosuch: there is no such"),
        (("--distribution", "fedora:42", "--mirror", "https://m/"), 2, "needs --mirror-key FILE"),
        (("--distribution", "fedora:42", "--variant", "apt"), 2, "--variant is for Debian"),
        (("--distribution", "debian:bookworm", "--variant", "big"), 2, "is none of extract"),
        (("--distribution", "debian:bookworm", "--package", "vim,-y"), 2, "is not the name of a package"),
        (("--distribution", "debian"), 2, "is not a name and a version"),
        ((), 2, "one of SOURCE, --from, --at and --distribution"),
    ):
        done = run(*arguments, "-o", out / "node.squashfs")
        assert (done.returncode, words in done.stderr) == (status, True), done.stderr
        assert list(out.iterdir()) == []
    done = run(tree, "-o", tree / "node.squashfs")
    assert (done.returncode, "lies inside" in done.stderr) == (1, True)


def test_without_root_it_says_why(tree: Path, tmp_path: Path) -> None:
    call = f"main(['image', {str(tree)!r}, '-o', {str(tmp_path / 'x')!r}])"
    script = f"import os; os.geteuid = lambda: 65534; from anchor_build.cli import main; {call}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "only root can keep owners, capabilities and device files" in done.stderr


def test_sockets_of_a_running_system_do_no_harm(tree: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tree / "run")
        try:
            server.bind("s")
        finally:
            os.chdir(here)
        assert run(tree, "-o", tmp_path / "node.squashfs").returncode == 0
    assert "run/s" not in inside(tmp_path / "node.squashfs", "squashfs", tmp_path)


def test_what_an_image_already_is_cannot_be_chosen(tree: Path, tmp_path: Path) -> None:
    image = tmp_path / "node.squashfs"
    assert run(tree, "-o", image).returncode == 0
    for option in (("--format", "erofs"), ("--compression", "xz")):
        done = run(image, *option)
        assert (done.returncode, "is a squashfs image already" in done.stderr) == (2, True), done.stderr
    before = (tmp_path / "node.squashfs.manifest").read_bytes()
    done = run(image, "-o", tmp_path / "node.squashfs.manifest")
    assert (done.returncode, "would take the place of" in done.stderr) == (2, True), done.stderr
    assert before == (tmp_path / "node.squashfs.manifest").read_bytes()


def test_renewing_leaves_the_image_alone(tree: Path, tmp_path: Path) -> None:
    image, link = tmp_path / "real" / "node.squashfs", tmp_path / "node.squashfs"
    image.parent.mkdir()
    assert run(tree, "-o", image).returncode == 0
    manifest = tmp_path / "node.squashfs.manifest"
    (tmp_path / "real/node.squashfs.manifest").rename(manifest)
    link.symlink_to(image)
    for path, mode in ((image, 0o640), (manifest, 0o664)):
        path.chmod(mode)
        os.chown(path, 1, 42)
    before = image.stat().st_mtime_ns, image.lstat().st_ino, image.stat().st_mode, image.stat().st_uid
    assert run(link, "--valid-for", "30d").returncode == 0
    assert link.is_symlink()
    assert before == (image.stat().st_mtime_ns, image.lstat().st_ino, image.stat().st_mode, image.stat().st_uid)
    facts = manifest.stat()
    assert (facts.st_mode & 0o777, facts.st_uid, facts.st_gid) == (0o664, 1, 42)
    assert read_manifest(manifest)[0].kernels == ("6.1.0-1",)


def test_a_damaged_manifest_is_replaced(tree: Path, tmp_path: Path) -> None:
    image, manifest = tmp_path / "node.squashfs", tmp_path / "node.squashfs.manifest"
    assert run(tree, "-o", image).returncode == 0
    for damage, warning in (
        (manifest.read_bytes()[:40], "it was cut off"),
        (manifest.read_bytes().replace(b"sha256 ", b"sha256 0")[:-1], "not a manifest"),
    ):
        manifest.write_bytes(damage)
        done = run(image)
        assert done.returncode == 0, done.stderr
        assert warning in done.stderr
        assert read_manifest(manifest)[0].size == image.stat().st_size


def test_directories_of_modules_with_other_names_are_told(tree: Path, tmp_path: Path) -> None:
    for name in ("6.1.0 copy", "new\nline"):
        (tree / "lib/modules" / name).mkdir()
        (tree / "lib/modules" / name / "modules.dep").write_text("")
    # A link out of the tree would show the kernels of this host.
    (tmp_path / "host/modules/9.9.9").mkdir(parents=True)
    (tmp_path / "host/modules/9.9.9/modules.dep").write_text("")
    (tree / "usr/lib").symlink_to(tmp_path / "host")
    done = run(tree, "-o", tmp_path / "node.squashfs")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "node.squashfs.manifest")[0].kernels == ("6.1.0-1",)
    assert "lib/modules/6.1.0 copy: is not the name of a kernel release" in done.stderr
    assert "lib/modules/new\\nline: is not the name" in done.stderr


def test_a_root_has_directories_to_mount_on(tree: Path, tmp_path: Path) -> None:
    shutil.rmtree(tree / "proc")
    (tree / "proc").write_text("no directory")
    shutil.rmtree(tree / "dev")
    (tree / "dev").symlink_to("/dev")
    archive = tmp_path / "root.tar"
    subprocess.run(["tar", "--create", "--file", archive, "-C", tree, "."], check=True, timeout=60)
    for source in (tree, archive):
        done = run(source, "-o", tmp_path / "node.squashfs")
        assert (done.returncode, "/dev and /proc must be a directory" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "node.squashfs").exists()


@pytest.mark.parametrize("epoch", ["99999999999999999999", "4294967296", "-1", "²"])
def test_a_time_that_cannot_be_is_refused(tree: Path, tmp_path: Path, epoch: str) -> None:
    done = run(tree, "-o", tmp_path / "node.squashfs", SOURCE_DATE_EPOCH=epoch)
    assert done.returncode == 1
    assert done.stderr.startswith("error: SOURCE_DATE_EPOCH="), done.stderr


def test_what_is_wrong_with_the_key_is_said_before_the_work(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "k").write_text("no key")
    done = run(tree, "-o", tmp_path / "node.squashfs", "--sign-key", tmp_path / "k")
    assert (done.returncode, "pack" in done.stderr) == (1, False), done.stderr


def test_a_full_disk_is_told(tree: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    (tree / "etc/large").write_bytes(os.urandom(400_000))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], check=True)
    try:
        for kind in ("squashfs", "erofs"):
            done = run(tree, "-o", small / f"node.{kind}")
            assert (done.returncode, "make room where the output goes" in done.stderr) == (1, True), done.stderr
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
