"""Rendered modules: pure text that follows from the declarations, whatever these say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from anchor_build.plan import Plan, make_plan, whole_plan
from anchor_build.registry import load_registry
from anchor_build.render import (
    RenderedModule,
    installed_files,
    module_directory,
    render_module,
    render_plan,
    write_modules,
)
from anchor_build.stage import load_stage
from tests.conftest import SITE_STAGES, WriteStage


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Every stage there is, the site's too."""
    return whole_plan(load_registry([SITE_STAGES]))


@pytest.fixture(scope="module")
def site_module() -> RenderedModule:
    return render_module(load_stage(SITE_STAGES / "auth-local-file", "a test"))


def setup_values(module: RenderedModule, script: str) -> list[str]:
    """Source a module-setup.sh in bash and return the lines that `script` prints."""
    text = module.files["module-setup.sh"].content.decode()
    done = subprocess.run(["bash", "-c", f"{text}\n{script}"], capture_output=True, text=True, check=True, timeout=10)
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_core_is_50_and_the_kinds_follow() -> None:
    plan = make_plan(load_registry([SITE_STAGES]), auth=["local-file"], image=["squashfs"])
    assert [module_directory(stage) for stage in plan.all] == [
        "50anchor",
        "51anchor-auth-local-file",
        "52anchor-transport-https",
        "53anchor-image-squashfs",
    ]


def test_rendering_twice_gives_the_same(plan: Plan) -> None:
    assert render_plan(plan) == render_plan(plan)


def test_every_installed_file_is_in_the_module(plan: Plan) -> None:
    for stage, module in zip(plan.all, render_plan(plan), strict=True):
        for source, target, mode in installed_files(stage):
            assert module.files[source].mode == mode, (stage.id, source)
            assert target.startswith("/")


def test_targets_are_unique(plan: Plan) -> None:
    targets = [target for stage in plan.all for _, target, _ in installed_files(stage)]
    own = [target for target in targets if not target.startswith("/usr/lib/anchor/lib/")]
    assert len(own) == len(set(own))


def test_settings_that_a_stage_brings_are_made(write_stage: WriteStage, tmp_path: Path) -> None:
    """Its module comes after the core's, which has left them to the root by then."""
    directory = write_stage(body='[[file]]\nsource = "net.conf"\ntarget = "/etc/sysctl.d/50-net.conf"')
    (directory / "net.conf").write_text("net.ipv4.tcp_timestamps = 0\n", encoding="utf-8")
    module = render_module(load_stage(directory, "a test"))
    unit, rules = tmp_path / "etc/systemd/system/systemd-sysctl.service", tmp_path / "etc/udev/rules.d/99-systemd.rules"
    for path in (unit, rules):
        path.parent.mkdir(parents=True)
    install = f"inst_simple() {{ :; }}\nmoddir=/m initdir={tmp_path}\ninstall"
    setup_values(module, install)
    unit.symlink_to("/dev/null")
    rules.write_text("a\n# left out\n", encoding="utf-8")
    setup_values(module, install)
    assert not (unit.is_symlink() or rules.exists())
    unit.write_text("its own", encoding="utf-8")
    rules.write_text("their own", encoding="utf-8")
    setup_values(module, install)
    assert unit.exists() and rules.exists()


def test_module_setup_declares_what_the_stage_needs(site_module: RenderedModule) -> None:
    assert setup_values(site_module, "printf '%s\\n' \"${programs[@]}\"") == [
        "tac: install coreutils (deb) or coreutils (rpm)"
    ]
    assert setup_values(site_module, "printf '%s\\n' \"${stage_drivers[@]}\"") == ["squashfs?", "no_such_driver?"]
    files = setup_values(site_module, "printf '%s %s\\n' \"${files[@]}\"")
    assert "notice.txt /usr/share/site/notice.txt" in files
    assert "stage.sh /usr/lib/anchor/stages/auth/20-local-file/stage.sh" in files


def test_a_module_that_may_be_absent_is_named_only_where_it_is(site_module: RenderedModule, tmp_path: Path) -> None:
    (tmp_path / "modules.d" / "99base").mkdir(parents=True)
    assert setup_values(site_module, f"dracutbasedir={tmp_path}; depends") == ["anchor", "base"]
    (tmp_path / "modules.d" / "80no-such-module").mkdir()
    assert setup_values(site_module, f"dracutbasedir={tmp_path}; depends") == ["anchor", "base", "no-such-module"]


def test_check_names_every_missing_program(write_stage: WriteStage) -> None:
    programs = ", ".join(f'{{ name = "no-{n}", rpm = "r{n}", deb = "d{n}" }}' for n in (1, 2))
    module = render_module(load_stage(write_stage(header=f"binaries = [{programs}]"), "a test"))
    fakes = 'derror() { printf "%s\\n" "$*"; }; require_binaries() { return 1; }\n'
    assert setup_values(module, f'{fakes}check; echo "status $?"') == [
        "anchor-auth-demo: missing program no-1: install d1 (deb) or r1 (rpm)",
        "anchor-auth-demo: missing program no-2: install d2 (deb) or r2 (rpm)",
        "status 1",
    ]


def test_optional_programs_are_taken_where_they_are_there(write_stage: WriteStage) -> None:
    programs = '{ name = "must", rpm = "r", deb = "d" }, { name = "may", rpm = "r", deb = "d", optional = true }'
    module = render_module(load_stage(write_stage(header=f"binaries = [{programs}]"), "a test"))
    fakes = (
        'require_binaries() { [[ $1 == must ]]; }; inst_simple() { :; }; inst_multiple() { echo "$*"; }; moddir=/x\n'
    )
    assert setup_values(module, f'{fakes}check; echo "$?"; install') == ["255", "must", "-o may"]


@pytest.mark.parametrize("there", [True, False])
def test_a_program_is_needed_without_a_module(write_stage: WriteStage, there: bool) -> None:
    program = '{ name = "may", rpm = "r", deb = "d", without = "systemd" }'
    module = render_module(load_stage(write_stage(header=f"binaries = [{program}]"), "a test"))
    fakes = "moddir=/x; require_binaries() { false; }; inst_simple() { :; }; inst_multiple() { echo $*; false; }\n"
    fakes += 'derror() { echo "$*"; }\n'
    fakes += f"dracut_module_included() {{ [[ $1 == systemd ]] && {'true' if there else 'false'}; }}\n"
    expected = [] if there else ["may", "anchor-auth-demo: missing program may: install d (deb) or r (rpm)"]
    assert setup_values(module, f'{fakes}check; echo "$?"; (install) || true') == ["255", *expected]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("dracutmodules=auto add_dracutmodules=' anchor anchor-image-squashfs '", ["anchor", "anchor-transport-https"]),
        ("dracutmodules=auto add_dracutmodules=' anchor-image-squashfs anchor-transport-site '", ["anchor"]),
        ("dracutmodules='base anchor-transport-site anchor-image-squashfs' add_dracutmodules=", ["anchor"]),
        ("force_add_dracutmodules='anchor-transport-https'", ["anchor"]),
        ("", ["anchor", "anchor-transport-https"]),
    ],
)
def test_what_fetches_brings_a_transport_unless_one_is_named(asked: str, expected: list[str]) -> None:
    module = render_module(load_registry().find("image", "squashfs"))
    assert setup_values(module, f"dracutbasedir=/x {asked}; depends") == expected


def test_a_module_joins_an_initramfs_only_when_asked(site_module: RenderedModule) -> None:
    assert setup_values(site_module, 'require_binaries() { :; }; check; echo "$?"') == ["255"]


def test_a_file_that_cannot_be_installed_stops_dracut(site_module: RenderedModule) -> None:
    fakes = "moddir=/x; inst_multiple() { :; }; inst_simple() { [[ $1 != */notice.txt ]]; }\n"
    assert setup_values(site_module, f'{fakes} (install); echo "$?"') == ["1"]
    fakes = "moddir=/x; inst_simple() { :; }; inst_multiple() { return 1; }\n"
    assert setup_values(site_module, f'{fakes} (install); echo "$?"') == ["1"]


def test_a_stage_that_needs_nothing(write_stage: WriteStage) -> None:
    module = render_module(load_stage(write_stage(), "a test"))
    script = "moddir=/x; inst_simple() { :; }; installkernel && install && depends && echo fine"
    assert setup_values(module, script) == ["anchor", "fine"]


def test_modules_are_written_with_their_modes_whatever_the_umask(plan: Plan, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_modules(render_plan(plan), tmp_path)
    finally:
        os.umask(before)
    setup = tmp_path / "50anchor" / "module-setup.sh"
    assert setup.stat().st_mode & 0o777 == 0o755
    assert setup.parent.stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "50anchor" / "params.sh").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "50anchor" / "hook-cmdline.sh").stat().st_mode & 0o777 == 0o755
