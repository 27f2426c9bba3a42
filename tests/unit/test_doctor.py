"""`doctor`: what a host lacks, and which package has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anchor_build import doctor, dracut, kernel
from anchor_build.doctor import Finding, examine, packages
from anchor_build.plan import Plan, make_plan
from anchor_build.registry import load_registry
from tests.conftest import TOP, WriteStage


@pytest.fixture
def plan(write_stage: WriteStage) -> Plan:
    """Make a plan with a program that nobody has."""
    needs = 'binaries = [{ name = "no-such-program", rpm = "rpm-name", deb = "deb-name" }]\ndracut = ["no-such-module"]'
    return make_plan(load_registry([write_stage(header=needs)]), auth=["demo"], image=["squashfs"])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def find(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what == what)


def test_a_program_that_is_missing(plan: Plan) -> None:
    findings = examine(plan)
    missing = find(findings, "auth-demo: no-such-program")
    assert (missing.ok, missing.needed, missing.detail) == (False, True, "not found")
    assert "deb-name" in packages(findings, "deb")
    assert "rpm-name" in packages(findings, "rpm")
    assert "deb-name" not in packages(findings, "rpm")


def test_a_dracut_module_that_is_missing(plan: Plan) -> None:
    missing = find(examine(plan), "auth-demo: dracut module no-such-module")
    assert (missing.ok, missing.needed) == (False, True)


def test_a_program_where_dracut_does_not_look(
    write_stage: WriteStage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "site-tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    needs = 'binaries = [{ name = "site-tool", rpm = "r", deb = "d" }]'
    plan = make_plan(load_registry([write_stage(header=needs)]), auth=["demo"], image=["squashfs"])
    finding = find(examine(plan), "auth-demo: site-tool")
    assert not finding.ok
    assert str(program) in finding.detail


def test_a_host_without_dracut(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dracut, "BASE", tmp_path / "gone")
    findings = examine(plan)
    assert find(findings, "dracut").detail == "dracut is not installed"
    assert "dracut-core" in packages(findings, "deb")


def test_what_is_a_convenience_is_not_needed(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel, "MODULE_TREES", (tmp_path,))
    monkeypatch.setattr(dracut, "NETWORKD", (Path("no/networkd"),))
    findings = examine(plan)
    for what in ("kernel with modules", "systemd-networkd"):
        assert not find(findings, what).ok
        assert not find(findings, what).needed


def test_a_cache_that_cannot_be_written(plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    finding = find(examine(plan), "cache directory")
    assert (finding.ok, finding.needed) == (False, True)
    assert "Not a directory" in finding.detail


@pytest.mark.parametrize("apt", [True, False])
@pytest.mark.parametrize(
    ("release", "family"),
    [
        ({"ID": "debian"}, "deb"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "deb"),
        ({"ID": "fedora"}, "rpm"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "rpm"),
        ({"ID": "another"}, ""),
        (None, ""),
    ],
)
def test_the_family_is_that_of_the_distribution_and_else_of_the_package_manager(
    monkeypatch: pytest.MonkeyPatch, apt: bool, release: dict[str, str] | None, family: str
) -> None:
    def read() -> dict[str, str]:
        if release is None:
            raise FileNotFoundError
        return release

    monkeypatch.setattr("platform.freedesktop_os_release", read)
    monkeypatch.setattr(doctor, "which", lambda program: Path("/usr/bin/apt-get") if apt else None)
    assert doctor.package_family() == (family or ("deb" if apt else "rpm"))


def test_build_sh_knows_the_same_distributions() -> None:
    text = (TOP / "build.sh").read_text(encoding="utf-8")
    for family, known in doctor.FAMILIES.items():
        [line] = [line for line in text.splitlines() if f"printf {family} &&" in line]
        assert set(re.findall(r"\*' (\w+) '\*", line)) == known
