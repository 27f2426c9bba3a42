"""How dracut is asked: its version, a private base directory in which our modules win, and the argument vector."""

from __future__ import annotations

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from anchor_build import dracut
from anchor_build.build import _dracut_hint
from anchor_build.dracut import Dracut, Request
from anchor_build.elf import dynamic_linker, machine_of
from anchor_build.errors import AnchorError
from anchor_build.files import MEMORY
from anchor_build.kernel import Kernel
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from anchor_build.render import render_plan
from anchor_build.root import WORK, Root


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for an installed dracut: its program, and a base directory with two modules."""
    programs, directory = tmp_path / "bin", tmp_path / "base"
    programs.mkdir()
    program = programs / "dracut"
    program.write_text("#!/bin/sh\necho 'dracut 049-135.git.el8'\n", encoding="utf-8")
    program.chmod(0o755)
    for name in ("99base", "40network"):
        (directory / "modules.d" / name).mkdir(parents=True)
        (directory / "modules.d" / name / "module-setup.sh").touch()
    (directory / "dracut.conf.d").mkdir()
    (directory / "dracut.conf.d" / "01-dist.conf").write_text("hostonly=yes\n", encoding="utf-8")
    (directory / "dracut-functions.sh").touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(dracut, "BASE", directory)
    return directory


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("DRACUT_VERSION=059-4\n", "059-4"),
        ("DRACUT_VERSION='057-88.git20250311.el9'\n", "057-88.git20250311.el9"),
        ('# comment\nDRACUT_VERSION="106"\n', "106"),
    ],
)
def test_the_version_is_that_of_the_installed_script(base: Path, text: str, version: str) -> None:
    (base / "dracut-version.sh").write_text(text, encoding="utf-8")
    found = dracut.find_dracut()
    assert (found.version_text, found.base) == (version, base)


def test_without_that_script_dracut_is_asked(base: Path) -> None:
    assert dracut.find_dracut().version_text == "049-135.git.el8"


def test_a_version_that_cannot_be_told(base: Path) -> None:
    (base / "dracut-version.sh").write_text("DRACUT_VERSION=next\n", encoding="utf-8")
    with pytest.raises(AnchorError, match="cannot tell the version of") as caught:
        dracut.find_dracut()
    assert "DRACUT_VERSION=next" in caught.value.hint


def test_a_host_without_dracut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dracut, "BASE", tmp_path / "gone")
    with pytest.raises(AnchorError, match="dracut is not installed") as caught:
        dracut.find_dracut()
    assert caught.value.hint == "install dracut-core (deb) or dracut (rpm)"


def test_a_module_is_found_whatever_its_number(base: Path) -> None:
    found = Dracut(Path("dracut"), base, "059")
    assert found.has_module("network")
    assert not found.has_module("net")
    assert not found.has_module("work")


def test_the_private_base_holds_the_installed_one_and_our_modules(base: Path, tmp_path: Path) -> None:
    modules = render_plan(make_plan(load_registry(), image=["squashfs"]))
    for stale in ("99anchor", "50anchor", "53anchor-image-squashfs"):
        (base / "modules.d" / stale).mkdir()
    (base / "modules.d" / "90anchor-image-other").mkdir()
    target = tmp_path / "private"
    dracut.make_base(Dracut(Path("dracut"), base, "059"), modules, target)
    names = {path.name for path in (target / "modules.d").iterdir()}
    assert names == {"99base", "40network", "90anchor-image-other", *(module.name for module in modules)}
    assert (target / "modules.d" / "99base").readlink() == base / "modules.d" / "99base"
    assert not (target / "modules.d" / "50anchor").is_symlink()
    assert (target / "dracut-functions.sh").readlink() == base / "dracut-functions.sh"
    original = base / "dracut-functions.sh"
    assert (target / original.name).lstat().st_mtime_ns == original.stat().st_mtime_ns
    # The distribution's configuration would decide about the result.
    assert list((target / "dracut.conf.d").iterdir()) == []


def test_our_modules_are_named_and_systemd_only_where_all_of_it_is(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(load_registry(), auth=["acme"], image=["squashfs"])
    found = Dracut(Path("dracut"), base, "059")
    ours = ("anchor", "anchor-auth-acme", "anchor-transport-https", "anchor-image-squashfs")
    assert dracut.choose_modules(found, plan) == ours
    for name in dracut.SYSTEMD_MODULES:
        (base / "modules.d" / f"01{name}").mkdir()
    monkeypatch.setattr(dracut, "NETWORKD", (Path("no/such/networkd"),))
    assert dracut.choose_modules(found, plan) == ours
    monkeypatch.setattr(dracut, "NETWORKD", (Path("bin/sh"),))
    assert dracut.choose_modules(found, plan) == (*dracut.SYSTEMD_MODULES, *ours)


@pytest.mark.parametrize(("target", "named"), [("dash", True), ("bash", False)])
def test_dash_is_named_where_it_is_the_hosts_sh(
    base: Path, monkeypatch: pytest.MonkeyPatch, target: str, named: bool
) -> None:
    plan = make_plan(load_registry(), image=["squashfs"])
    (base / "modules.d" / "00dash").mkdir()
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path("/bin", target))
    chosen = dracut.choose_modules(Dracut(Path("dracut"), base, "059"), plan)
    assert ("dash" in chosen) is named


def request(tmp_path: Path, drivers: tuple[str, ...] = ()) -> Request:
    kernel = Kernel("6.1.0-18-amd64", tmp_path / "modules")
    return Request(kernel, ("a", "b c"), drivers, tmp_path, tmp_path / "dracut.conf", Path("o u"))


def test_the_arguments_are_words_that_no_shell_splits(base: Path, tmp_path: Path) -> None:
    argv = dracut.arguments(dracut.find_dracut(), request(tmp_path, ("mlx5_core", "ice")))
    assert argv[0].endswith("/dracut")
    assert argv[-1] == "o u"
    options = dict(pairwise(argv))
    assert options["--modules"] == "a b c"
    assert options["--add-drivers"] == "mlx5_core ice"
    assert "--no-compress" in argv
    assert options["--kver"] == "6.1.0-18-amd64"
    assert {"--no-hostonly", "--no-hostonly-cmdline", "--reproducible", "--no-early-microcode"} <= set(argv)


def test_no_path_of_this_host_is_in_the_arguments(base: Path, tmp_path: Path) -> None:
    # dracut keeps them in the initramfs; what it needs to know stands in its configuration.
    argv = dracut.arguments(dracut.find_dracut(), request(tmp_path))
    assert not [word for word in argv[1:] if "/" in word and not word.startswith("./")]
    text = dracut.configuration(tmp_path / "lib's $(x)", tmp_path / "work")
    lines = subprocess.run(
        ["bash", "-c", f'{text}\nprintf "%s\\n" "$drivers_dir" "$tmpdir"'], capture_output=True, text=True, check=True
    )
    assert lines.stdout.splitlines() == [f"{tmp_path}/lib's $(x)", f"{tmp_path}/work"]


def test_no_drivers_no_option(base: Path, tmp_path: Path) -> None:
    assert "--add-drivers" not in dracut.arguments(dracut.find_dracut(), request(tmp_path))


def test_devices_that_nobody_sets_up_stay_out_unless_they_are_wanted(base: Path, tmp_path: Path) -> None:
    for drivers, out in (((), True), (("tun",), False)):
        options = dict(pairwise(dracut.arguments(dracut.find_dracut(), request(tmp_path, drivers))))
        omitted = options["--omit-drivers"].split()
        assert ("tun" in omitted) is out
        assert "vxlan" in omitted
        assert not {"bonding", "8021q", "bridge", "team", "virtio_net"} & set(omitted)


@pytest.mark.parametrize("program", ["/bin/bash", "/usr/bin/ldd", "/usr/lib/os-release", "/usr/bin/openssl"])
def test_dracuts_ldd_says_what_ldd_says(tmp_path: Path, program: str) -> None:
    script = tmp_path / "ldd"
    script.write_text(dracut.ldd_script(dynamic_linker(Path("/bin/sh"))), encoding="utf-8")
    said = []
    for argv in (["sh", str(script), program], ["ldd", program]):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        said.append((done.returncode, re.sub(r"\(0x[0-9a-f]+\)", "", done.stdout + done.stderr)))
    assert said[0] == said[1]
    # It has not simply called ldd for a program of this kind.
    alone = subprocess.run(
        ["/bin/sh", str(script), program], env={"PATH": str(tmp_path / "none")}, capture_output=True, check=False
    )
    assert (alone.returncode == 0) is (machine_of(Path(program)) != "")


def system(tmp_path: Path, *modules: str, programs: tuple[str, ...] = ()) -> Dracut:
    """Lay out another system, with these modules of dracut and empty files for programs."""
    for name in modules:
        (tmp_path / "usr/lib/dracut/modules.d" / name).mkdir(parents=True)
    for name in programs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return Dracut(Path("/usr/bin/dracut"), dracut.BASE, "112-7", Root(tmp_path))


NETWORKD = ("01systemd-networkd", "35network-manager")


@pytest.mark.parametrize(
    ("network", "systemd", "unused"),
    [
        ("", True, True),
        ("systemd-networkd", True, True),
        ("network-manager", True, False),
        ("network-legacy", True, False),
        ("", False, False),
    ],
)
def test_only_networkd_does_without_the_bus(tmp_path: Path, network: str, systemd: bool, unused: bool) -> None:
    installed = system(tmp_path, *NETWORKD, programs=("usr/lib/systemd/systemd-networkd",))
    assert ("dbus" in dracut.unused_modules(installed, network, systemd=systemd)) is unused


def test_without_networkd_the_bus_is_used(tmp_path: Path) -> None:
    assert dracut.unused_modules(system(tmp_path, *NETWORKD)) == ()


@pytest.mark.parametrize("network", ["", "systemd-networkd", "network-manager"])
def test_a_back_end_that_is_there_with_its_program_is_no_problem(tmp_path: Path, network: str) -> None:
    programs = ("usr/lib/systemd/systemd-networkd", "usr/lib/NetworkManager/nm-initrd-generator")
    assert dracut.network_problem(system(tmp_path, *NETWORKD, programs=programs), network, systemd=True) == ""


@pytest.mark.parametrize(
    ("modules", "network", "systemd", "problem"),
    [
        (NETWORKD, "systemd-networkd", False, "--network systemd-networkd needs systemd in the initramfs: leave out"),
        (
            (*NETWORKD, "35network"),
            "network-legacy",
            True,
            "has no module network-legacy, which dracut no longer installs by default since 110;"
            " it has systemd-networkd, network-manager",
        ),
        # What is left without systemd.
        ((*NETWORKD, "35network"), "network-legacy", False, "since 110; it has network-manager"),
        ((), "network-legacy", True, "has no module network-legacy; install dracut-network"),
        (NETWORKD[:1], "network-manager", True, "; it has systemd-networkd; install dracut-network"),
        (NETWORKD, "network-manager", True, "nm-initrd-generator is missing in {}: install network-manager (deb)"),
        (("35network-legacy",), "network-legacy", True, "dhclient is missing in {}: install isc-dhcp-client (deb)"),
    ],
)
def test_a_back_end_that_cannot_be_is_refused_with_what_to_do(
    tmp_path: Path, modules: tuple[str, ...], network: str, *, systemd: bool, problem: str
) -> None:
    said = dracut.network_problem(system(tmp_path, *modules), network, systemd=systemd)
    assert said.startswith(f"--network {network}")
    assert problem.format(tmp_path) in said


# As dracut says it up to 106, and as 112 does.
@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (
            "dracut: dracut module 'network-manager' depends on 'dbus', which can't be installed",
            "dracut's module network-manager cannot be there: it needs the module dbus",
        ),
        (
            "dracut[E]: Module 'dbus-daemon' depends on module 'systemd', which can't be installed",
            "dracut's module dbus-daemon cannot be there: it needs the module systemd; leave out --no-systemd,"
            " or choose another --network",
        ),
        (
            "dracut module 'network-legacy' will not be installed, because command 'dhclient' could not be found!",
            "dracut's module network-legacy cannot be there: dhclient is missing; install the package that has it",
        ),
        ("dracut: something else", "run again with -v to see all that dracut says"),
    ],
)
def test_what_dracut_leaves_out_is_the_hint(line: str, hint: str) -> None:
    assert _dracut_hint(f"first\n{line}\nlast\n", WORK, Path("/work")) == hint


def test_a_full_disk_is_told_where_it_is() -> None:
    """Not where dracut sees it."""
    said = f"cp: error writing '{WORK}/x/initramfs/x': No space left on device"
    assert _dracut_hint(said, WORK, MEMORY / "anchor-build-x").startswith(f"make room in {MEMORY};")
    assert _dracut_hint(said, WORK, Path("/cache/build-x")).startswith("make room where the output goes")
