"""Another system as a place to build in: paths that stay inside of it, and what is refused before anything runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_build import root as roots
from anchor_build.dracut import find_dracut
from anchor_build.elf import dynamic_linker, machine_of, needed_libraries
from anchor_build.errors import AnchorError
from anchor_build.kernel import find_kernel, installed_releases
from anchor_build.root import HOST, WORK, Root, enter, mounts_of, open_root
from anchor_build.settings import read_ca

AARCH64, X86_64, BIG = 183, 62, 2
VAR_TMP = "/var/tmp"  # noqa: S108 - a path inside


def elf(machine: int, order: int = 1) -> bytes:
    """Return the start of an ELF file."""
    return (
        b"\x7fELF\2"
        + bytes([order, 1, 0])
        + bytes(8)
        + b"\2\0"
        + machine.to_bytes(2, "little" if order == 1 else "big")
    )


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Lay out the least that a system has: a shell for this processor, and the directories for mounts."""
    top = tmp_path / "system"
    for name in ("proc", "sys", "dev", "run", "tmp", "usr/bin", "etc"):
        (top / name).mkdir(parents=True)
    (top / "bin").symlink_to("/usr/bin")
    (top / "usr/bin/dash").write_bytes(Path("/proc/self/exe").read_bytes()[:64])
    (top / "usr/bin/dash").chmod(0o755)
    (top / "usr/bin/sh").symlink_to("dash")
    return top


def test_paths_stay_inside(tmp_path: Path) -> None:
    root = Root(tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "out").symlink_to("../../../../etc")
    (tmp_path / "absolute").symlink_to("/etc")
    (tmp_path / "chain").symlink_to("absolute/../lib/./x")
    expected = {
        "/lib/modules": "usr/lib/modules",
        "/out/passwd": "etc/passwd",
        "absolute/passwd": "etc/passwd",
        "/chain": "usr/lib/x",
        "/../../etc": "etc",
        "/etc/./../x": "x",
    }
    for path, place in expected.items():
        assert root.at(path) == tmp_path / place, path
        assert root.inside(root.at(path)) == Path("/") / place


def test_a_circle_inside_leads_to_nothing_outside(tmp_path: Path) -> None:
    """A hostile system has links to a file of the host, which it has as a link back."""
    secret, top = tmp_path / "secret", tmp_path / "root"
    secret.write_text("of the host", encoding="utf-8")
    back = top.joinpath(*secret.parts[1:])
    back.parent.mkdir(parents=True)
    back.symlink_to("/status")
    (top / "status").symlink_to(secret)
    (top / "ring").symlink_to("ring")
    assert (top / "status").read_text(encoding="utf-8") == "of the host"
    for name in ("/status", "/ring"):
        path = Root(top).at(name)
        assert not (path.exists() or path.is_file() or path.is_dir() or list(path.glob("*")))
        with pytest.raises(NotADirectoryError):
            path.read_bytes()


def test_this_host_has_its_own_paths() -> None:
    assert HOST.at("usr/bin") == HOST.inside(Path("/usr/bin")) == Path("/usr/bin")
    assert HOST.name == "this host"
    assert enter(HOST, Path("/work"), ["dracut", Path("x")]) == ["dracut", "x"]


def test_programs_are_those_of_the_system(system: Path) -> None:
    root = open_root(system)
    assert root.find_program("sh") == system / "usr/bin/dash"
    (system / "usr/bin/plain").touch(mode=0o644)
    for name in ("plain", "python3", "no-such"):
        assert root.find_program(name) is None


def test_what_is_no_system(system: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "gone", "No such file"), (tmp_path / "file", "Not a directory")):
        with pytest.raises(AnchorError, match=f"--sysroot {path}: {reason}"):
            open_root(path)
    (system / "dev").rmdir()
    with pytest.raises(AnchorError, match="has no directory /dev, which dracut needs"):
        open_root(system)
    (system / "bin").unlink()
    with pytest.raises(AnchorError, match="has no /bin/sh: nothing can run in it") as caught:
        open_root(system)
    assert "the top directory of an installed system" in caught.value.hint


def test_a_system_for_another_processor(system: Path) -> None:
    (system / "usr/bin/dash").write_bytes(elf(AARCH64))
    with pytest.raises(
        AnchorError, match=r"is a system for aarch64, and this host is \w+: its programs cannot run here"
    ):
        open_root(system, "--container x")


def test_only_root_may_enter(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(roots, "which", lambda name: None if name == "unshare" else Path(name))
    with pytest.raises(AnchorError) as caught:
        open_root(system)
    assert caught.value.message.splitlines() == [
        "unshare is missing: install util-linux or coreutils",
        "only root can enter another system: run it as root",
    ]


def test_a_system_without_dracut_or_kernel_or_authorities(system: Path) -> None:
    root = open_root(system)
    with pytest.raises(AnchorError, match=f"dracut is not installed in {system}") as caught:
        find_dracut(root)
    assert caught.value.hint == f"install dracut-core (deb) or dracut (rpm) in {system}"
    with pytest.raises(AnchorError, match=f"{system} has no kernel with modules"):
        find_kernel(None, None, root)
    with pytest.raises(AnchorError, match=f"no --ca, and {system} has no CA bundle of its own"):
        read_ca(None, root)


def test_a_dracut_that_does_not_know_its_version(system: Path) -> None:
    """As Debian's of bullseye."""
    (system / "usr/bin/dracut").touch(mode=0o755)
    (system / "usr/lib/dracut").mkdir(parents=True)
    (system / "usr/lib/dracut/dracut-version.sh").write_text("DRACUT_VERSION=\n", encoding="utf-8")
    (system / "var/lib/dpkg").mkdir(parents=True)
    status = "Package: dash\nVersion: 0.5\n\nPackage: dracut-core\nStatus: install ok installed\nVersion: 051-1\n\n"
    (system / "var/lib/dpkg/status").write_text(status, encoding="utf-8")
    found = find_dracut(open_root(system))
    assert (found.version_text, found.program) == ("051-1", Path("/usr/bin/dracut"))


def test_the_kernels_of_a_system(system: Path) -> None:
    root = open_root(system)
    (system / "lib").symlink_to("usr/lib")
    for release in ("6.1.0-9-amd64", "6.1.0-18-amd64"):
        (system / "usr/lib/modules" / release).mkdir(parents=True)
        (system / "usr/lib/modules" / release / "modules.dep").touch()
    (system / "boot").mkdir()
    (system / "boot/vmlinuz-6.1.0-9-amd64").write_bytes(b"kernel")
    assert installed_releases(root) == ["6.1.0-9-amd64", "6.1.0-18-amd64"]
    newest = find_kernel(None, None, root)
    assert (newest.release, newest.image) == ("6.1.0-18-amd64", None)
    assert newest.modules == system / "usr/lib/modules/6.1.0-18-amd64"
    assert find_kernel("6.1.0-9-amd64", None, root).image == system / "boot/vmlinuz-6.1.0-9-amd64"
    with pytest.raises(AnchorError) as caught:
        find_kernel("6.5.0-1-amd64", None, root)
    assert caught.value.hint == f"kernels of {system}: 6.1.0-9-amd64, 6.1.0-18-amd64"
    with pytest.raises(AnchorError, match=rf"--kernel /boot/gone: no such file in {system}"):
        find_kernel("/boot/gone", None, root)
    with pytest.raises(AnchorError, match="--modules belongs to builds with this host's dracut"):
        find_kernel(None, system, root)


def test_the_links_beside_a_systems_modules_lead_nowhere_outside(system: Path, tmp_path: Path) -> None:
    """What is found there is copied beside the initramfs, for all to read."""
    root, release = open_root(system), "6.1.0-18-amd64"
    modules = system / "usr/lib/modules" / release
    modules.mkdir(parents=True)
    (system / "lib").symlink_to("usr/lib")
    secret = tmp_path / "secret"
    secret.write_text("CONFIG_RD_LZ4=y\n", encoding="utf-8")
    (modules / "modules.dep").touch()
    for name in ("vmlinuz", "modules.builtin", "config"):
        (modules / name).symlink_to(secret)
    found = find_kernel(None, None, root)
    assert (found.image, found.builtin_names(), found.unpacks("zstd")) == (None, frozenset(), True)
    (modules / "modules.builtin").unlink()
    (modules / "modules.builtin").write_bytes(b"kernel/fs/\xff.ko\nkernel/fs/ext4.ko\n")
    assert "ext4" in found.builtin_names()
    (system / "boot").mkdir()
    (system / "boot/kernel").write_bytes(b"of the system")
    (modules / "vmlinuz").unlink()
    (modules / "vmlinuz").symlink_to("/boot/kernel")
    assert find_kernel(None, None, root).image == system / "boot/kernel"
    (modules / "modules.dep").unlink()
    (modules / "modules.dep").symlink_to(secret)
    assert installed_releases(root) == []


def test_the_command_ends_with_its_starter_and_takes_its_mounts_along(system: Path, tmp_path: Path) -> None:
    argv = enter(open_root(system), tmp_path, ["dracut", "a b"])
    assert argv[:4] == ["setpriv", "--pdeathsig", "KILL", "--"]
    assert {"--mount", "--pid", "--kill-child=KILL"} <= set(argv)
    assert argv[argv.index("--propagation") + 1] == "private"
    assert argv[-2:] == ["dracut", "a b"]
    # root, work, what is mounted, nothing mounted below it, two places for what is written (there is no var/tmp)
    words = argv[argv.index("sh", argv.index("-c")) + 1 :]
    assert words[:2] == [str(system), str(tmp_path)]
    assert words[2:-2] == ["/proc", "/sys", "/dev", str(WORK), "0", "2", "/run", "/tmp"]  # noqa: S108 - a path inside


def entered(root: Root, work: Path) -> subprocess.CompletedProcess[str]:
    """Have a system say what is in the work directory, and what of /dev, by its shell alone."""
    work.mkdir()
    (work / "mark").touch()
    say = "echo *; echo >made; echo /dev/null /tmp/*"
    return subprocess.run(enter(root, work, ["/bin/sh", "-c", say]), text=True, capture_output=True, check=False)


@pytest.fixture
def live(system: Path) -> Path:
    """Give the system a shell that runs."""
    shell = Path("/bin/dash").resolve()
    listed = subprocess.run(["ldd", shell], text=True, capture_output=True, check=True).stdout
    for file in [shell, *map(Path, re.findall(r"(/\S+) \(0x", listed))]:
        place = system / file.relative_to("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return system


@pytest.mark.parametrize(
    ("links", "seen"),
    [
        ({}, str(WORK)),
        ({"tmp": "var/tmp"}, f"{VAR_TMP}/anchor-build"),
        ({"tmp": VAR_TMP}, f"{VAR_TMP}/anchor-build"),
        ({"tmp": VAR_TMP, "dev": "/usr/dev", "proc": "/usr/proc"}, f"{VAR_TMP}/anchor-build"),
        ({"tmp": "../../host"}, "/host/anchor-build"),
    ],
    ids=str,
)
def test_the_links_of_a_system_make_nothing_on_the_host(
    live: Path, tmp_path: Path, links: dict[str, str], seen: str
) -> None:
    host, work = tmp_path / "host", tmp_path / "work"
    for path in ("var/tmp", "usr/proc", "usr/dev", "host"):
        (live / path).mkdir(parents=True, exist_ok=True)
    host.mkdir()
    for name, target in links.items():
        (live / name).rmdir()
        (live / name).symlink_to(target)
    ours = [WORK, Path(VAR_TMP, WORK.name)]
    before = [path for path in ours if path.exists()]
    root = open_root(live)
    assert mounts_of(root, work)[Path(seen)] == work
    done = entered(root, work)
    assert (list(host.iterdir()), [path for path in ours if path.exists()]) == ([], before)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["mark", "root"]
    assert str(WORK) in done.stdout
    assert (work / "made").is_file()


def test_a_directory_that_is_the_whole_system(system: Path) -> None:
    (system / "tmp").rmdir()
    (system / "tmp").symlink_to("/")
    with pytest.raises(AnchorError, match="has no directory /tmp"):
        open_root(system)


def test_processors_by_name(tmp_path: Path) -> None:
    cases = {elf(X86_64): "x86_64", elf(AARCH64): "aarch64", elf(21): "ppc64le", elf(21, BIG): "ppc64"}
    cases |= {elf(999): "the processor 999 (e_machine)", b"#!/bin/sh\n": "", b"\x7fELF": ""}
    for content, name in cases.items():
        (tmp_path / "program").write_bytes(content)
        assert machine_of(tmp_path / "program") == name
    assert machine_of(tmp_path / "gone") == ""


def test_the_dynamic_linker(tmp_path: Path) -> None:
    assert Path(dynamic_linker(Path("/bin/sh"))).is_file()
    whole = Path("/bin/sh").read_bytes()
    for size in (0, 4, 20, 64, 300):
        (tmp_path / "cut").write_bytes(whole[:size])
        assert dynamic_linker(tmp_path / "cut") == ""
    assert dynamic_linker(Path("/usr/bin/ldd")) == ""
    assert dynamic_linker(tmp_path / "gone") == ""


def test_needed_libraries() -> None:
    libraries = needed_libraries(Path("/bin/bash").read_bytes())
    assert any(name.startswith("libc.so") for name in libraries)
    assert any(name.startswith("libtinfo.so") for name in libraries)
    assert needed_libraries(b"#!/bin/sh\n") == []
    whole = Path(sys.executable).resolve().read_bytes()
    for size in (64, 100, 4096):
        assert needed_libraries(whole[:size]) == []
