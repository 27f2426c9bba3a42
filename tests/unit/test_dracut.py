"""How dracut is asked: its version, a private base directory in which our modules win, and the argument vector."""

from __future__ import annotations

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from anchor_build import dracut
from anchor_build.dracut import Dracut, Request
from anchor_build.errors import AnchorError
from anchor_build.kernel import Kernel
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from anchor_build.render import render_plan


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
    return Request(kernel, ("a", "b c"), drivers, "zstd -3", tmp_path, tmp_path / "dracut.conf", Path("o u"))


def test_the_arguments_are_words_that_no_shell_splits(base: Path, tmp_path: Path) -> None:
    argv = dracut.arguments(dracut.find_dracut(), request(tmp_path, ("mlx5_core", "ice")))
    assert argv[0].endswith("/dracut")
    assert argv[-1] == "o u"
    options = dict(pairwise(argv))
    assert options["--modules"] == "a b c"
    assert options["--add-drivers"] == "mlx5_core ice"
    assert options["--compress"] == "zstd -3"
    assert options["--kver"] == "6.1.0-18-amd64"
    assert {"--no-hostonly", "--no-hostonly-cmdline", "--reproducible", "--no-early-microcode"} <= set(argv)


def test_no_path_of_this_host_is_in_the_arguments(base: Path, tmp_path: Path) -> None:
    # dracut keeps them in the initramfs; what it needs to know stands in its configuration.
    argv = dracut.arguments(dracut.find_dracut(), request(tmp_path))
    assert not [word for word in argv[1:] if "/" in word and not word.startswith("./")]
    text = dracut.configuration(tmp_path / "lib's $(x)", tmp_path / "work")
    lines = subprocess.run(
        ["sh", "-c", f'{text}\nprintf "%s\\n" "$drivers_dir" "$tmpdir"'], capture_output=True, text=True, check=True
    )
    assert lines.stdout.splitlines() == [f"{tmp_path}/lib's $(x)", f"{tmp_path}/work"]


def test_no_drivers_no_option(base: Path, tmp_path: Path) -> None:
    assert "--add-drivers" not in dracut.arguments(dracut.find_dracut(), request(tmp_path))


def test_gzip_where_the_kernel_cannot_unpack_zstd(tmp_path: Path) -> None:
    assert dracut.choose_compression(Kernel("6.1.0", tmp_path)).startswith("zstd ")
    assert dracut.choose_compression(Kernel("4.18.0-80.el8", tmp_path)).split()[0] in ("gzip", "pigz")
