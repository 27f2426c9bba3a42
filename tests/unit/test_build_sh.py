"""build.sh with recording stand-ins on PATH: what it prepares, and which command it then runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
REAL = ("bash", "cat", "chmod", "cmp", "cp", "dirname", "flock", "install", "mkdir", "rm", "sed", "sleep")
RECORD = '#!/bin/bash\nprintf "%s\\n" "${0##*/} $*" >>"$LOG"\n'

# Makes an environment whose programs record themselves; answers the version check; runs nothing else.
PYTHON = """
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/anchor-build" ;;
    "-c "*version_info*) exit "${OLD_PYTHON:-0}" ;;
    "-c "*) printf 'pytest>=8\\nruff\\n' ;;
esac
"""
DPKG_QUERY = 'for name in "${@:4}"; do [[ " $MISSING " == *" $name "* ]] || printf "installed:%s " "$name"; done\n'
POLICY = "$ANCHOR_ROOT/usr/sbin/policy-rc.d"
APT_GET = f'[[ ! -x {POLICY} ]] || cat {POLICY} >>"$LOG"\nexit "${{APT_STATUS:-0}}"\n'
RPM = 'for name in "${@:3}"; do [[ " $MISSING " != *" $name "* ]] || echo "no package provides $name"; done\n'


@dataclass
class Checkout:
    """A copy of what build.sh reads, in a system of stand-ins."""

    directory: Path

    @property
    def bin(self) -> Path:
        """The only directory on PATH."""
        return self.directory / "bin"

    def stand_in(self, name: str, body: str = "") -> None:
        """Put a program on PATH that records its arguments, then runs `body`."""
        (self.bin / name).write_text(RECORD + body, encoding="utf-8")
        (self.bin / name).chmod(0o755)

    def run(self, *words: str, cwd: Path | None = None, **extra: str) -> tuple[int, list[str], str]:
        """Run build.sh; return its status, the commands it ran and what it said."""
        log = self.directory / "log"
        log.write_text("", encoding="utf-8")
        env = {"PATH": str(self.bin), "LOG": str(log), "ANCHOR_ROOT": str(self.directory / "root"), **extra}
        done = subprocess.run(
            [self.directory / "tree" / "build.sh", *words],
            env=env,
            cwd=cwd or self.directory,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
        return done.returncode, log.read_text(encoding="utf-8").splitlines(), done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    made = Checkout(tmp_path)
    for directory in ("bin", "root/etc", "root/usr/sbin", "tree/contrib", "tree/anchor_build/commands"):
        (tmp_path / directory).mkdir(parents=True)
    for name in REAL:
        found = shutil.which(name)
        assert found, f"{name} is not on this host"
        (made.bin / name).symlink_to(found)
    for name in ("build.sh", "pyproject.toml", "contrib/packages.txt"):
        shutil.copy(CHECKOUT / name, tmp_path / "tree" / name)
    (tmp_path / "root/etc/os-release").write_text('NAME="A system"\nID=debian\n', encoding="utf-8")
    for name, body in {
        "apt-get": APT_GET,
        "dpkg-query": DPKG_QUERY,
        "python3": PYTHON,
        "id": "echo 0\n",
        "env": 'while [[ $1 == *=* ]]; do export "$1"; shift; done\nexec "$@"\n',
    }.items():
        made.stand_in(name, body)
    return made


def ran(log: list[str], start: str) -> list[str]:
    return [line for line in log if line.startswith(start)]


def test_arguments_reach_anchor_build_unchanged(checkout: Checkout, tmp_path: Path) -> None:
    checkout.stand_in("python3", PYTHON + '[[ $0 != */anchor-build ]] || printf "<%s>\\n" "$PWD" "$@" >>"$LOG"\n')
    status, log, _ = checkout.run("check", "root=anchor  a='b c'", "$(id)", cwd=tmp_path / "root")
    assert status == 0
    assert log[-4:] == [f"<{tmp_path / 'root'}>", "<check>", "<root=anchor  a='b c'>", "<$(id)>"]


def test_no_arguments_build_the_packages_in_the_checkout(checkout: Checkout, tmp_path: Path) -> None:
    checkout.stand_in("python3", PYTHON + '[[ $0 != */anchor-build ]] || printf "<%s>\\n" "$PWD" >>"$LOG"\n')
    _, log, _ = checkout.run(cwd=tmp_path / "root", MISSING="rpm")
    assert log[-2:] == ["anchor-build rpm", f"<{tmp_path / 'tree'}>"]
    assert any(line.endswith("--no-install-recommends rpm") for line in ran(log, "apt-get"))


def test_what_packages_need_is_installed_for_them_only(checkout: Checkout) -> None:
    for words, asked in ((["-v", "rpm", "--repo"], True), (["-v", "stages"], False), (["show", "rpm"], False)):
        _, log, _ = checkout.run(*words, MISSING="rpm")
        assert any(line.endswith("rpm") for line in ran(log, "apt-get")) is asked, words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demo"], "python -m contrib.site.demo"),
        (["demo", "--keep"], "python -m contrib.site.demo --keep"),
        (["test"], "python -m pytest --numprocesses 2 --dist loadfile"),
        (["test", "-k", "net"], "python -m pytest --numprocesses 2 --dist loadfile -k net"),
        (["test", "--fast", "-x"], "python -m pytest --numprocesses 2 --dist loadfile -m not slow and not boot -x"),
        (["bench", "--json"], "python -m tests.bench --json"),
    ],
)
def test_own_commands(checkout: Checkout, words: list[str], expected: str) -> None:
    status, log, _ = checkout.run(*words)
    assert status == 0
    assert log[-1] == expected


def test_the_status_of_the_command_is_the_status(checkout: Checkout) -> None:
    checkout.stand_in("python3", PYTHON + "[[ $0 != */anchor-build ]] || exit 7\n")
    assert checkout.run("doctor")[0] == 7


def test_environment_is_made_once_and_again_when_pyproject_changes(checkout: Checkout, tmp_path: Path) -> None:
    _, first, said = checkout.run("stages")
    assert len(ran(first, "python3 -m venv")) == 1
    assert len(ran(first, "python -m pip")) == 1
    assert "making the Python environment" in said
    _, second, said = checkout.run("stages")
    assert ran(second, "python") == []
    assert said == ""
    with (tmp_path / "tree/pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    _, third, _ = checkout.run("stages")
    assert ran(third, "python3 -m venv") == []
    assert len(ran(third, "python -m pip")) == 1


def test_tests_get_their_dependency_group(checkout: Checkout) -> None:
    checkout.run("stages")
    _, log, _ = checkout.run("test")
    assert ran(log, "python -m pip")[0].endswith(f"--editable {checkout.directory}/tree pytest>=8 ruff")


def test_failed_pip_is_tried_again_next_time(checkout: Checkout) -> None:
    checkout.stand_in("python3", PYTHON + '[[ "$2" != pip ]] || exit 1\n')
    status, log, said = checkout.run("stages")
    assert status == 1
    assert "pip could not install" in said
    assert ran(log, "anchor-build") == []
    checkout.stand_in("python3", PYTHON)
    shutil.copy(checkout.bin / "python3", checkout.directory / "tree/.venv/bin/python")
    status, log, _ = checkout.run("stages")
    assert status == 0
    assert len(ran(log, "python -m pip")) == 1


def test_old_python_is_refused(checkout: Checkout) -> None:
    status, log, said = checkout.run("stages", OLD_PYTHON="1")
    assert status == 1
    assert "needs Python 3.11 or newer" in said
    assert ran(log, "anchor-build") == []


def test_only_missing_packages_are_installed_and_no_daemon_may_start(checkout: Checkout) -> None:
    status, log, said = checkout.run("demo", MISSING="nginx zstd faketime")
    assert status == 0
    assert "installing: zstd nginx" in said
    installs = [line for line in ran(log, "apt-get") if "install" in line]
    assert [line.split("--no-install-recommends ")[1] for line in installs] == ["zstd nginx"]
    assert log[log.index("#!/bin/sh") + 1] == "case $1 in none*) exit 0 ;; *) exit 101 ;; esac"
    assert not (checkout.directory / "root/usr/sbin/policy-rc.d").exists()


def test_policy_of_the_host_stays(checkout: Checkout) -> None:
    policy = checkout.directory / "root/usr/sbin/policy-rc.d"
    policy.write_text("theirs", encoding="utf-8")
    assert checkout.run("stages", MISSING="zstd")[0] == 0
    assert policy.read_text(encoding="utf-8") == "theirs"


def test_daemons_do_not_start_at_the_next_boot(checkout: Checkout) -> None:
    checkout.stand_in("systemctl", "[[ $* != *is-active* ]]\n")
    _, log, _ = checkout.run("demo", MISSING="chrony nginx zstd")
    assert ran(log, "systemctl --quiet disable") == [
        f"systemctl --quiet disable {d}.service" for d in ("nginx", "chrony")
    ]


def test_time_service_that_chrony_replaces_goes_on(checkout: Checkout) -> None:
    checkout.stand_in("systemctl")
    _, log, _ = checkout.run("stages", MISSING="chrony")
    assert "case $1 in chrony*) exit 0 ;; *) exit 101 ;; esac" in log
    assert ran(log, "systemctl --quiet disable") == []


def test_failed_installation_stops_and_cleans_up(checkout: Checkout) -> None:
    status, log, said = checkout.run("stages", MISSING="zstd", APT_STATUS="100")
    assert status == 1
    assert "could not install: zstd" in said
    assert ran(log, "anchor-build") == []
    assert not (checkout.directory / "root/usr/sbin/policy-rc.d").exists()


def test_user_installs_with_sudo(checkout: Checkout) -> None:
    checkout.stand_in("id", "echo 1000\n")
    status, log, said = checkout.run("stages", MISSING="zstd")
    assert (status, ran(log, "apt-get")) == (1, [])
    assert "there is no sudo" in said
    checkout.stand_in("sudo", 'exec "$@"\n')
    status, log, said = checkout.run("stages", MISSING="zstd")
    assert status == 0
    assert "using sudo" in said
    assert len([line for line in ran(log, "sudo") if "apt-get" in line]) == 2
    _, log, said = checkout.run("stages")
    assert (ran(log, "sudo"), said) == ([], "")


def test_fedora_uses_its_own_names(checkout: Checkout) -> None:
    release = checkout.directory / "root/etc/os-release"
    release.write_text('ID="rocky"\nID_LIKE="rhel centos fedora"\n', encoding="utf-8")
    checkout.stand_in("rpm", RPM)
    checkout.stand_in("dnf")
    status, log, _ = checkout.run("stages", MISSING="systemd-udev iproute nginx")
    assert status == 0
    assert ran(log, "dnf") == ["dnf install -y --setopt=install_weak_deps=False systemd-udev iproute"]
    assert ran(log, "apt-get") == []


def test_other_systems_are_told_what_to_do(checkout: Checkout) -> None:
    (checkout.directory / "root/etc/os-release").write_text('NAME="Other"\nID=other\n', encoding="utf-8")
    status, log, said = checkout.run("stages")
    assert status == 1
    assert "Other has neither apt nor dnf" in said
    assert ran(log, "anchor-build") == []


def test_package_table_is_whole() -> None:
    lines = (CHECKOUT / "contrib/packages.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    assert {row[0] for row in rows} == {"build", "rpm", "demo", "test", "bench"}
    assert all(len(row) == 3 for row in rows)
    debs = [row[1] for row in rows if row[1] != "-"]
    assert len(debs) == len(set(debs))


def test_pipeline_runs_the_test_command_only() -> None:
    script = (CHECKOUT / ".ci/run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert commands == ['cd "$(dirname "$0")/.." && exec ./build.sh test']
    assert os.access(CHECKOUT / ".ci/run", os.X_OK)
