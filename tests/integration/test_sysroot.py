"""Building inside another system, with its dracut: what comes out, what stays as it was, and the cache of builds."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anchor_build import cache, inputs
from anchor_build.build import InitramfsBuild, build_initramfs
from anchor_build.cpio import read_initramfs
from anchor_build.files import MEMORY, work_directory
from anchor_build.kernel import find_kernel, release_of
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from anchor_build.root import Root, open_root
from anchor_build.settings import read_ca
from contrib.site import pki
from contrib.site.registry import CONFIG, MANIFEST, registry
from tests.conftest import TOP
from tests.integration.roots import DRACUT, SHARED, debian_root

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another system, and private mounts"),
]

LIMIT_S = 240.0
LAYER = "application/vnd.oci.image.layer.v1.tar"
# Five times what it takes on a busy machine.
CACHED_LIMIT_S = 5.0
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@pytest.fixture(scope="session")
def system() -> Path:
    """Return a system with another dracut than this host's."""
    root = debian_root(SHARED)
    # A build keeps nothing whose inputs are so new that their next change could have the same time.
    wait_for(lambda: time.time_ns() - root.stat().st_ctime_ns > cache.RACY_NS, 30)
    return root


def environment(top: Path, **extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TOP), "XDG_CACHE_HOME": str(top / "cache"), **extra}


def argv(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "anchor_build", "initramfs", *map(str, words)]


def anchor_build(top: Path, *words: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run it in `top`, with a cache of its own there."""
    return subprocess.run(
        argv(*words),
        env=environment(top, **extra),
        cwd=top,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def everything(top: Path) -> dict[str, tuple[int, ...]]:
    """Return what would show that something in a tree was touched, directories included."""
    found: dict[str, tuple[int, ...]] = {}
    for directory, names, files in os.walk(top):
        for name in (".", *names, *files):
            facts = os.lstat(os.path.join(directory, name))  # noqa: PTH118 - thousands of files
            found[f"{directory}/{name}"] = (facts.st_mode, facts.st_size, facts.st_ino, facts.st_ctime_ns)
    return found


def processes_that_know(text: str) -> list[int]:
    """Return the processes with a text on their command line, but not this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if text.encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def works_of(process: int) -> list[Path]:
    """Return the work directories of a process in which dracut has begun."""
    found = []
    for path in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            found.append(path.readlink())
    return [path for path in found if list(path.glob("tmp/dracut.*/initramfs/*"))]


@pytest.fixture(autouse=True)
def nothing_is_left(system: Path, tmp_path: Path) -> Iterator[None]:
    """Check that no test leaves a mount, a process, or a change in the system."""
    before = everything(system)
    yield
    # Others may mount what they like meanwhile.
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8")
    assert [line for line in mounts.splitlines() if str(system) in line or str(tmp_path) in line] == []
    assert everything(system) == before
    assert processes_that_know(str(tmp_path / "cache")) == []


def test_a_build_is_of_that_system_and_the_second_one_is_kept(system: Path, tmp_path: Path) -> None:
    embedded = small_image(tmp_path)
    words = ("--sysroot", system, "--auth", "acme", "--image", "squashfs", *embedded, "-o", "node.img", "--json")
    first = anchor_build(tmp_path, *words, INHERITED="x", kernel_cmdline="x")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["dracut"].startswith(DRACUT[SHARED])
    release = report["kernel"]
    assert (system / "lib/modules" / release).is_dir()
    initramfs = read_initramfs(tmp_path / "node.img")
    for path in ("usr/bin/curl", "usr/lib/x86_64-linux-gnu/libc.so.6", f"usr/lib/modules/{release}/modules.builtin"):
        member = initramfs.resolve(path)
        assert member is not None, path
        assert member.content == Root(system).at(path).read_bytes(), path
    assert {"virtio_net", "overlay", "squashfs"} <= set(report["drivers"])
    assert [image["name"] for image in report["embedded"]] == ["monitor"]
    assert "etc/anchor/images.squashfs" in initramfs.members
    # The kernel lies beside it.
    assert report["kernel_file"] == f"vmlinuz-{release}"
    copy = tmp_path / report["kernel_file"]
    assert release_of(copy) == release
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == report["inputs"]["kernel"]
    for text in (first.stdout, *(m.content.decode("latin-1") for m in initramfs.members.values() if m.size < 10000)):
        assert str(system) not in text
        assert str(tmp_path) not in text
    # Settings of whoever builds do not get in, and nothing is left but what is kept.
    assert b"kernel_cmdline" not in b"".join(m.content for p, m in initramfs.members.items() if "cmdline.d" in p)
    assert [path.name for path in (tmp_path / "cache/anchor-build").iterdir()] == ["initramfs"]

    image = (tmp_path / "node.img").read_bytes()
    began = time.monotonic()
    second = anchor_build(tmp_path, *words[:-2], "again.img", "--json", "--no-copy-kernel")
    assert time.monotonic() - began < CACHED_LIMIT_S
    assert "nothing has changed: take the initramfs from the cache" in second.stderr
    assert (tmp_path / "again.img").read_bytes() == image
    assert json.loads(second.stdout) == {**report, "file": "again.img", "kernel_file": None}
    # The same, made anew.
    third = anchor_build(tmp_path, *words, "--no-cache")
    assert "from the cache" not in third.stderr
    assert json.loads(third.stdout) == report


def test_what_a_stage_needs_is_looked_for_inside(system: Path, tmp_path: Path) -> None:
    words = ("--sysroot", system, "--image", "squashfs")
    ended = anchor_build(tmp_path, *words, "--auth", "nfs", "--add-drivers", "nosuch")
    assert ended.returncode == 1
    assert f"auth-nfs: mount.nfs is missing in {system}: install nfs-common (deb)" in ended.stderr
    assert "has no driver nosuch" in ended.stderr
    ended = anchor_build(tmp_path, *words, "--kernel", "5.4.0-1-amd64")
    assert ended.returncode == 1
    assert f"hint: kernels of {system}: " in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kernels", ["same", "other", "none"])
def test_kernel_and_image_are_checked_against_each_other(system: Path, tmp_path: Path, kernels: str) -> None:
    release = find_kernel(None, None, open_root(system)).release
    lines = {"same": [f"kernel {release}"], "other": ["kernel 5.4.0-1-amd64"], "none": []}[kernels]
    manifest = ["anchor-manifest 1", "image squashfs", f"sha256 {'0' * 64}", "size 1", "created 1", *lines]
    (tmp_path / "node.squashfs").write_bytes(b"hsqs")
    (tmp_path / "node.squashfs.manifest").write_text("\n".join(manifest) + "\n", encoding="ascii")
    file = "node.squashfs" if kernels == "other" else "node.squashfs.manifest"
    words = ("--sysroot", system, "--image", "squashfs", "--for-image", file)
    # It ends before dracut is asked, but for what is wrong with the driver.
    ended = anchor_build(tmp_path, *words, "--add-drivers", "nosuch")
    assert ended.returncode == 1
    mismatch = f"has the modules of 5.4.0-1-amd64, and the initramfs is for kernel {release}"
    assert (mismatch in ended.stderr) is (kernels == "other")
    assert ("has no driver nosuch" in ended.stderr) is (kernels != "other")


def test_a_failure_leaves_nothing(system: Path, tmp_path: Path) -> None:
    before = set(MEMORY.glob("anchor-build-*"))
    (tmp_path / "node.img").write_bytes(b"old")
    words = ("--sysroot", system, "--image", "squashfs", "--compress", "false", "-o", "node.img")
    ended = anchor_build(tmp_path, *words)
    assert ended.returncode == 1, ended.stderr
    assert "--compress 'false'" in ended.stderr
    assert "unshare" not in ended.stderr
    assert (tmp_path / "node.img").read_bytes() == b"old"
    assert list((tmp_path / "cache").rglob("build-*")) == []
    assert [path for path in MEMORY.glob("anchor-build-*") if path not in before] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_a_build_that_is_ended_leaves_nothing_running(system: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = ("--sysroot", system, "--image", "squashfs", "--no-cache", "-o", "node.img")
    child = subprocess.Popen(
        argv(*words), env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: works_of(child.pid), LIMIT_S)
        [work] = works_of(child.pid)
        inside = processes_that_know("/tmp/anchor-build/initramfs.cpio")  # noqa: S108 - a path inside
        assert inside
        child.send_signal(number)
        status = child.wait(LIMIT_S)
    finally:
        child.kill()
        child.wait()
    assert status == (130 if number != signal.SIGKILL else -number)
    # What was killed is gone with the first process of its namespace; the kernel needs a moment.
    wait_for(lambda: not processes_that_know(str(work)), LIMIT_S)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in inside), LIMIT_S)
    assert not (tmp_path / "node.img").exists()
    if number == signal.SIGKILL:
        # Without a process it is nobody's any more: the next build removes it.
        os.utime(work, (0, 0))
        with work_directory():
            pass
    assert not work.exists()
    if number != signal.SIGKILL:
        assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def wait_for(condition: Callable[[], object], limit: float) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- The cache --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_system(system: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the system that a test may change."""
    copy = tmp_path_factory.mktemp("system") / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", system, copy], check=True)
    return copy


def append(path: Path) -> Callable[[], None]:
    """Change a file; return what takes the change back, with the file's content but not its times."""
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    return lambda: void(path.write_bytes(content))


def add(path: Path) -> Callable[[], None]:
    path.touch()
    return path.unlink


def relink(path: Path, target: str) -> Callable[[], None]:
    before = path.readlink()
    path.unlink()
    path.symlink_to(target)

    def back() -> None:
        path.unlink()
        path.symlink_to(before)

    return back


def mode(path: Path, bits: int) -> Callable[[], None]:
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(bits)
    return lambda: path.chmod(before)


def void(_: object) -> None:
    pass


def test_whatever_is_changed_a_build_is_never_stale(
    own_system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each input of a kept build in turn, and back again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stage = tmp_path / "stages" / "auth-own"
    shutil.copytree(TOP / "dracut-modules" / "auth-none", stage)
    text = (stage / "stage.toml").read_text(encoding="utf-8").replace('name = "none"', 'name = "own"')
    (stage / "stage.toml").write_text(text, encoding="utf-8")
    script = (stage / "stage.sh").read_text(encoding="utf-8").replace("anchor_none_", "anchor_own_")
    (stage / "stage.sh").write_text(script, encoding="utf-8")
    root = open_root(own_system)
    plan = make_plan(load_registry([stage]), auth=["own"], image=["squashfs"])
    build = InitramfsBuild(plan, find_kernel(None, None, root), tmp_path / "node.img", read_ca(None, root)[0])
    key = cache.key_of(inputs.facts_of(build))
    # Nothing is kept whose inputs are so new that their next change could have the same time.
    wait_for(lambda: cache.is_settled(cache.snapshot(inputs.before_build(build)), time.time_ns()), 60)
    build_initramfs(build, lambda title, progress=None: nullcontext())
    assert cache.find(key) is not None

    modules = build.kernel.modules
    driver = next(modules.rglob("virtio_net.ko*"))
    unused = next(modules.rglob("pcspkr.ko*"), None) or next(modules.rglob("nfs.ko*"))
    library = root.at("/usr/lib/x86_64-linux-gnu/libcurl.so.4")
    base = own_system / "usr/lib/dracut"
    changes: Mapping[str, Callable[[], Callable[[], None]]] = {
        "a module of dracut": lambda: append(next(base.glob("modules.d/*base/module-setup.sh"))),
        "dracut itself": lambda: append(base / "dracut-functions.sh"),
        "dracut's version": lambda: append(base / "dracut-version.sh"),
        "a new module of dracut": lambda: add(base / "modules.d/99new"),
        "a driver that is inside": lambda: append(driver),
        "modules.dep": lambda: append(modules / "modules.dep"),
        "the kernel's configuration": lambda: append(own_system / f"boot/config-{build.kernel.release}"),
        "a program": lambda: append(root.at("/usr/bin/curl")),
        "a program's mode": lambda: mode(root.at("/usr/bin/curl"), 0o700),
        "a program that may be there": lambda: add(own_system / "usr/bin/no-such-program"),
        "a program that comes first": lambda: add(own_system / "usr/sbin/curl"),
        "a library": lambda: append(library),
        "a library that comes first": lambda: add(own_system / "usr/local/lib/libcurl.so.4"),
        "what sh is": lambda: relink(own_system / "usr/bin/sh", "bash"),
        "the loader's cache": lambda: append(own_system / "etc/ld.so.cache"),
        "users": lambda: append(own_system / "etc/passwd"),
        "a udev rule": lambda: add(own_system / "usr/lib/udev/rules.d/99-new.rules"),
        "a unit": lambda: append(own_system / "usr/lib/systemd/system/initrd.target"),
        "configuration": lambda: add(own_system / "etc/modprobe.d/new.conf"),
        "the stage's script": lambda: append(stage / "stage.sh"),
        "the stage's declaration": lambda: append(stage / "stage.toml"),
    }
    for what, change in changes.items():
        undo = change()
        assert cache.find(key) is None, what
        undo()
        assert cache.find(key) is not None, what
    # These have no digest: whether they are as before is not known.
    append(unused)()
    assert cache.find(key) is None
    # What is built then is new, and has the change in it.
    append(root.at("/usr/bin/curl"))
    build_initramfs(replace(build, output=tmp_path / "new.img"), lambda title, progress=None: nullcontext())
    member = read_initramfs(tmp_path / "new.img").resolve("usr/bin/curl")
    assert member is not None
    assert member.content == root.at("/usr/bin/curl").read_bytes()
    assert cache.find(key) is None  # the change was a moment ago


def test_without_systemd_switch_root_has_to_be_there(own_system: Path, tmp_path: Path) -> None:
    program = Root(own_system).at("/usr/sbin/switch_root")
    program.rename(program.with_name("gone"))
    ended = anchor_build(tmp_path, "--sysroot", own_system, "--image", "squashfs", "--no-systemd")
    program.with_name("gone").rename(program)
    assert ended.returncode == 1
    missing = f"anchor: switch_root, needed without systemd, is missing in {own_system}: install util-linux-extra (deb)"
    assert missing in ended.stderr
    assert list((tmp_path / "cache/anchor-build").glob("initramfs/*")) == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_dracut_looks_nowhere_else(system: Path, tmp_path: Path) -> None:
    """Each path that a traced build asks for is one whose change or appearance the cache would see."""
    trace = tmp_path / "trace"
    words = ("--sysroot", system, "--auth", "acme", "--image", "squashfs", "--no-cache", "-o", tmp_path / "node.img")
    strace = ("strace", "-f", "--seccomp-bpf", "-qq", "-s", "4096", "-e", "trace=%file", "-o", str(trace))
    subprocess.run(
        [*strace, *argv(*words)], env=environment(tmp_path), check=True, capture_output=True, timeout=LIMIT_S
    )
    root = open_root(system)
    plan = make_plan(load_registry(), auth=["acme"], image=["squashfs"])
    build = InitramfsBuild(plan, find_kernel(None, None, root), tmp_path / "node.img", b"")
    before = inputs.before_build(build)
    more = inputs.went_in(root, read_initramfs(build.output).members)
    known = cache.Inputs(before.trees, before.lists | more.lists, before.files | more.files)
    asked = set(paths_asked_for(trace))
    assert len(asked) > 1000
    assert sorted(path for path in asked if not is_known(path, root, known)) == []


def paths_asked_for(trace: Path) -> Iterator[str]:
    """Yield the absolute paths that dracut and its children named, but for those of the kernel and of the build."""
    started = ended = False
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        started = started or ('execve("/usr/bin/dracut"' in line and '"--kver"' in line)
        ended = ended or (started and 'zstd", "-d"' in line)  # anchor-build reads it back
        found = QUOTED.search(line)
        if started and not ended and found and found[1].startswith("/"):
            path = os.path.normpath(found[1]).replace("//", "/")
            if not re.match(r"/(proc|dev|sys|tmp|run|var/tmp)(/|$)", path):
                yield path


def is_known(path: str, root: Root, known: cache.Inputs) -> bool:
    """Whether a change of a path would be seen: its own, or where it would first come to be."""
    while True:
        parent, _, name = path.rpartition("/")
        place = root.at(parent or "/") / name
        if known.covers(str(place)) or known.covers(str(root.at(path))) or root.at(path).is_dir():
            return True
        if os.path.lexists(place) or not parent or root.at(parent).is_dir():
            return False
        path = parent


# --- Container images -------------------------------------------------------------------------------------


def oci_image(system: Path, target: Path) -> Path:
    """Make an OCI image of one layer (image-spec, image-layout.md)."""
    blobs = target / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(what: Any, kind: str) -> dict[str, Any]:
        data = json.dumps(what).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{kind}+json", "digest": f"sha256:{digest}", "size": len(data)}

    layer = target / "layer"
    subprocess.run(["tar", "-C", system, "-cf", layer, "."], check=True)
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size = layer.stat().st_size
    layer.rename(blobs / digest)
    roots = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    config = put({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": roots}, "config.v1")
    layers = [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}", "size": size}]
    manifest = put({"schemaVersion": 2, "config": config, "layers": layers}, "manifest.v1")
    (target / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}), encoding="utf-8")
    (target / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}', encoding="utf-8")
    return target


def small_image(tmp_path: Path) -> tuple[str, str]:
    """Make a container image; return the options that embed it, by a path that is not absolute."""
    if not all(map(shutil.which, ("skopeo", "mksquashfs"))):
        pytest.skip("needs skopeo and mksquashfs")
    tree = tmp_path / "monitor-root"
    tree.mkdir()
    (tree / "monitor").write_text("runs after the boot\n")
    oci_image(tree, tmp_path / "monitor")
    return "--embed-image", "./monitor"


@pytest.mark.skipif(not all(map(shutil.which, ("skopeo", "umoci"))), reason="needs skopeo and umoci")
def test_a_container_image_gives_what_its_system_gives(system: Path, tmp_path: Path) -> None:
    image = oci_image(system, tmp_path / "oci")
    words = ("--image", "squashfs", *small_image(tmp_path), "--no-copy-kernel", "-o", "node.img", "--json")
    first = anchor_build(tmp_path, "--container", image, *words)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["dracut"].startswith(DRACUT[SHARED])
    assert [found["name"] for found in report["embedded"]] == ["monitor"]
    assert [path.name for path in (tmp_path / "cache/anchor-build").iterdir()] == ["initramfs"]
    archive = tmp_path / "node.oci.tar"
    subprocess.run(["tar", "-C", image, "-cf", archive, "."], check=True)
    second = anchor_build(tmp_path, "--container", archive, *words)
    assert second.returncode == 0, second.stderr
    assert "from the cache" in second.stderr  # the same image, whatever it is packed in
    assert json.loads(second.stdout) == report
    assert [path.name for path in (tmp_path / "cache/anchor-build").iterdir()] == ["initramfs"]


def layer_of(*members: tuple[str, bytes | None]) -> bytes:
    """Return a tar archive of directories, which have no content, and programs."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.mode, member.size = 0o755, len(content or b"")
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            tar.addfile(member, io.BytesIO(content or b""))
    return packed.getvalue()


@pytest.mark.skipif(not all(map(shutil.which, ("skopeo", "umoci"))), reason="needs skopeo and umoci")
@pytest.mark.skipif(shutil.which("docker-registry") is None, reason="docker-registry is missing")
def test_a_container_image_comes_from_a_registry(tmp_path: Path) -> None:
    """A small one, without a kernel: what is looked for in it, and not found, says that it was there."""
    authority = pki.make_authority(tmp_path / "pki")
    leaf = pki.issue(authority, tmp_path / "pki", "registry")
    directories = [(name, None) for name in ("bin", "proc", "sys", "dev", "run", "tmp")]
    layer = layer_of(*directories, ("bin/sh", Path("/bin/sh").read_bytes()))
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]}
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}
    storage = tmp_path / "storage"
    with (
        registry(tmp_path / "plain", storage=storage) as pushed,
        registry(tmp_path / "tls", storage=storage, leaf=leaf) as served,
    ):
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, **pushed.put_blob("team/node", json.dumps(config).encode())},
            "layers": [{"mediaType": LAYER, **pushed.put_blob("team/node", layer)}],
        }
        pushed.put_manifest("team/node", "1", manifest)
        names = [f"{served.host}/team/node:{tag}" for tag in ("1", "2")]
        trust = ("--registry-ca", authority.certificate)
        there, gone = (anchor_build(tmp_path, "--container", name, "--image", "squashfs", *trust) for name in names)
        stranger = anchor_build(tmp_path, "--container", names[0], "--image", "squashfs")
    assert [ended.returncode for ended in (there, gone, stranger)] == [1, 1, 1]
    assert f"--container {names[0]} has no kernel with modules" in there.stderr
    assert f"--container {names[1]}: " in gone.stderr
    assert "manifest unknown" in gone.stderr
    assert "certificate signed by unknown authority" in stranger.stderr
    assert list((tmp_path / "cache/anchor-build").iterdir()) == []


@pytest.mark.skipif(not all(map(shutil.which, ("skopeo", "umoci"))), reason="needs skopeo and umoci")
def test_what_is_no_container_image(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.tar").write_bytes(b"no archive")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/index.json").write_text("{}", encoding="utf-8")
    cases = {
        "empty": "is a directory, but not that of an OCI image",
        "file.tar": "is no archive of a container image",
        "broken": "",
        "./gone": "there is no such file or directory",
        "gone.tar": "there is no such file or directory, and no registry in the name",
        "gone/node:1": "there is no such file or directory, and no registry in the name",
        "containers-storage:localhost/no-such-image": "",
    }
    for reference, reason in cases.items():
        ended = anchor_build(tmp_path, "--container", reference, "--image", "squashfs")
        assert ended.returncode == 1, reference
        assert f"--container {reference}: {reason}" in ended.stderr
    assert list((tmp_path / "cache/anchor-build").iterdir()) == []
    both = anchor_build(tmp_path, "--container", "x", "--sysroot", "/", "--image", "squashfs")
    assert both.returncode == 2
