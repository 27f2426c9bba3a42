"""`anchor-build initramfs` with the host's dracut: what is inside, that it is always the same, and every way to fail.

One built initramfs is shared; what fails, fails before dracut or in the middle of it, and leaves everything as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anchor_build import dracut
from anchor_build.cpio import Initramfs, read_initramfs
from anchor_build.elf import dynamic_linker
from anchor_build.files import MEMORY
from anchor_build.inspect.artifact import read_artifact
from anchor_build.plan import make_plan
from anchor_build.readback import find_program
from anchor_build.registry import load_registry
from anchor_build.render import installed_files, render_plan
from contrib.site.image import CACHE, SiteImage, build_image, login_key
from tests.conftest import SITE_STAGES, TOP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dracut") is None, reason="dracut is missing"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: private mounts, and files that only root may read"),
]

PIN = 'it\'s a "secret" $(reboot)'
KEPT = ("/usr/lib/dracut", "/etc", "/var/lib", "/var/tmp", "/run", "/boot", "/lib/modules")  # noqa: S108 - only read
TEMPORARY = "/tmp"  # noqa: S108 - only read
OLD = b"what was there before"
BUILD_LIMIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """A finished anchor-build."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Bench:
    """A place to build in: an output with something already in it, and a cache of its own."""

    image: SiteImage
    top: Path

    @property
    def output(self) -> Path:
        """Where the initramfs goes."""
        return self.top / "out" / "node.img"

    @property
    def cache(self) -> Path:
        """What XDG_CACHE_HOME names."""
        return self.top / "cache"

    def argv(self, *words: str | Path) -> list[str]:
        """Return a build's arguments: a small plan, the demo's kernel, and `words`."""
        kernel = ["--kernel", str(self.image.kernel), "--modules", str(self.image.modules)]
        plan = [] if "--image" in words else ["--image", "squashfs"]
        own = ["initramfs", *plan, *([] if "--kernel" in words else kernel), "-o", str(self.output)]
        return [sys.executable, "-m", "anchor_build", *own, *map(str, words)]

    def environment(self, **extra: str) -> dict[str, str]:
        """Return a build's environment; `extra` may change it."""
        return {**os.environ, "PYTHONPATH": str(TOP), "XDG_CACHE_HOME": str(self.cache), **extra}

    def run(self, *words: str | Path, prefix: Sequence[str] = (), cwd: Path | None = None, **extra: str) -> Ended:
        """Build, under `prefix` if there is one."""
        done = subprocess.run(
            [*prefix, *self.argv(*words)],
            env=self.environment(**extra),
            cwd=cwd or self.top,
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def check_untouched(self) -> None:
        """Check that a failed build left the old output, no report, nothing beside them, and nothing in the cache."""
        assert self.output.read_bytes() == OLD
        assert [path.name for path in self.output.parent.iterdir()] == ["node.img"]
        cache = self.cache / "anchor-build"
        assert not cache.is_dir() or list(cache.iterdir()) == []


@pytest.fixture(scope="session")
def image() -> SiteImage:
    """Return the demo's kernel and its modules."""
    return build_image(CACHE, authorized_key=login_key(CACHE).with_suffix(".pub").read_text(encoding="utf-8"))


def make_bench(image: SiteImage, top: Path) -> Bench:
    bench = Bench(image, top)
    bench.output.parent.mkdir(parents=True)
    bench.output.write_bytes(OLD)
    return bench


@pytest.fixture
def bench(image: SiteImage, tmp_path: Path) -> Bench:
    return make_bench(image, tmp_path)


def snapshot() -> dict[Path, tuple[int, int, int]]:
    """Return what lies where a build must not write: size, mode and time of change of each file."""
    found = {}
    for top in KEPT:
        for path in Path(top).rglob("*"):
            with suppress(FileNotFoundError):
                facts = path.lstat()
                # What rpmbuild and skopeo, which other tests run meanwhile, leave there; dracut calls neither.
                others = ("rpm-tmp.", "blob-info-cache")
                if (
                    not stat.S_ISDIR(facts.st_mode)
                    and not path.name.startswith(others)
                    and "/anchor-tree-" not in str(path)
                ):
                    found[path] = (facts.st_size, facts.st_mode, facts.st_mtime_ns)
    return found


def temporary() -> set[str]:
    """Return the names in the system's directory for temporary files that a build could have made."""
    names = {path.name for path in Path(TEMPORARY).iterdir() if path.name.startswith(("dracut", "anchor", "build"))}
    # These are made by boots and by builds in containers, which other tests run meanwhile.
    return {name for name in names if not name.startswith(("anchor-boot-", "buildah"))}


@dataclass(frozen=True)
class Built:
    """The shared initramfs, how its build ended, and what it changed outside its output and cache."""

    bench: Bench
    ended: Ended
    report: dict[str, Any]
    initramfs: Initramfs
    strange: list[str]


# The site's own stage, a secret, a setting, another driver, and a CA of the site's own.
def words_of(directory: Path, ca: Path) -> list[str]:
    pin = directory / "pin"
    pin.write_text(f"{PIN}\n", encoding="utf-8")
    return [
        *("--stage-dir", str(SITE_STAGES), "--auth", "local-file", "--image", "squashfs", "--ca", str(ca)),
        *("--set", f"rd.anchor.local-file.pin=@{pin}", "--set", "rd.anchor.fetch.attempts=3"),
        *("--add-drivers", "virtio-balloon, dummy"),
    ]


def profile_of(directory: Path, ca: Path) -> str:
    """Return the same as the profiles of a file in `directory`."""
    words_of(directory, ca)
    return f"""
[profile.site]
stage-dir = "{os.path.relpath(SITE_STAGES, directory)}"
auth = "local-file"
image = "squashfs"
ca = "{ca}"
set = {{ "rd.anchor.fetch.attempts" = 3 }}
[profile.default]
inherits = "site"
add-drivers = ["virtio-balloon", "dummy"]
set = {{ "rd.anchor.local-file.pin" = "@pin" }}
"""


@pytest.fixture(scope="session")
def built(image: SiteImage, site_ca: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build once what most tests look at."""
    bench = make_bench(image, tmp_path_factory.mktemp("built"))
    before, others = snapshot(), temporary()
    ended = bench.run("--json", *words_of(bench.top, site_ca), prefix=("sh", "-c", 'umask 077; exec "$@"', "sh"))
    assert ended.status == 0, ended.err
    after = snapshot()
    strange = [str(path) for path in after if before.get(path) != after[path]]
    strange += temporary() - others
    return Built(bench, ended, json.loads(ended.out), read_initramfs(bench.output), strange)


def content(built: Built, path: str) -> bytes:
    member = built.initramfs.resolve(path)
    assert member is not None, path
    return member.content


def test_everything_that_the_stages_promise_is_inside(built: Built) -> None:
    plan = make_plan(load_registry([SITE_STAGES]), auth=["local-file"], image=["squashfs"])
    for stage, module in zip(plan.all, render_plan(plan), strict=True):
        for source, target, mode in installed_files(stage):
            member = built.initramfs.resolve(target)
            assert member is not None, target
            assert member.content == module.files[source].content, target
            assert member.mode & 0o7777 == mode, target
        for binary in stage.binaries:
            assert binary.without == "systemd" or find_program(built.initramfs, binary.name) is not None, binary.name
    assert {"overlay", "loop", "squashfs", "virtio_net", "virtio_balloon", "dummy"} <= set(built.report["drivers"])
    assert "no_such_driver" not in built.report["drivers"]


def test_the_sites_own_files_are_inside(built: Built, site_ca: Path) -> None:
    for path in ("etc/anchor/ca.pem", "ca.pem", "etc/ssl/certs/ca-certificates.crt", "etc/pki/tls/certs/ca-bundle.crt"):
        assert content(built, path) == site_ca.read_bytes()
    params = built.initramfs.resolve("etc/anchor/params")
    assert params is not None
    assert params.mode & 0o7777 == 0o600
    assert params.content.decode() == f"rd.anchor.fetch.attempts=3\nrd.anchor.local-file.pin={PIN}\n"
    assert int(content(built, "etc/anchor/build-time")) == built.report["build_time"] <= time.time()


def test_hooks_and_network_are_inside(built: Built) -> None:
    for hook in ("cmdline/20-hook-cmdline.sh", "pre-mount/50-hook-pre-mount.sh", "cleanup/90-hook-cleanup.sh"):
        member = built.initramfs.resolve(f"usr/lib/dracut/hooks/{hook}")
        assert member is not None
        assert member.mode & 0o111
    assert b"DHCP=yes" in content(built, "etc/systemd/network/zz-anchor.network")
    # The server that gave the address to iPXE gives the same one again, at each boot.
    assert b"\nClientIdentifier=mac\n" in content(built, "etc/systemd/network/zz-anchor.network")
    assert built.initramfs.resolve("etc/systemd/system/initrd.target.wants/systemd-networkd.service")
    assert b"anchor_netdev_run" in content(built, "etc/systemd/system/sysinit.target.wants/anchor-netdev.service")
    assert content(built, "etc/modprobe.d/anchor.conf") == b"options bonding max_bonds=0\n"
    link = content(built, "etc/systemd/network/10-anchor-bond.link")
    assert link == b"[Match]\nType=bond\n\n[Link]\nMACAddressPolicy=none\n"


def test_the_last_hook_is_left_out_where_the_steps_handed_off(built: Built) -> None:
    drop_in = content(built, "etc/systemd/system/dracut-pre-pivot.service.d/anchor.conf").decode()
    assert drop_in.endswith("[Unit]\nConditionPathExists=!/run/anchor/steps/handed-off\n")
    assert "anchor-direct.sh pre-pivot " in drop_in


def test_a_program_whose_reader_has_gone_ends(built: Built) -> None:
    text = content(built, "etc/systemd/system/dracut-pre-mount.service.d/anchor-pipe.conf")
    assert b"IgnoreSIGPIPE=no" in text


def test_udev_does_not_wait_for_the_cmdline_hooks(built: Built) -> None:
    unit = content(built, "etc/systemd/system/dracut-pre-udev.service").decode()
    assert "Before=systemd-udevd.service" in unit
    assert "After=dracut-cmdline" not in unit
    # rd.driver.*, for which this service runs, is read by dracut's cmdline service.
    waits = unit.index("ExecStartPre=-systemctl start dracut-cmdline.service\n")
    assert waits < unit.index("ExecStart=-/bin/dracut-pre-udev")
    assert content(built, "etc/systemd/system/dracut-initqueue.service.d/anchor.conf") == (
        b"[Unit]\nAfter=dracut-cmdline.service\n"
    )
    hooks = content(built, "etc/systemd/system/dracut-cmdline.service").decode()
    assert "dracut-pre-udev" not in hooks
    assert "ExecStart=-/bin/dracut-cmdline" in hooks


def test_udev_gets_to_the_network_card_without_detours(built: Built) -> None:
    for unit in ("systemd-sysusers", "systemd-tmpfiles-setup-dev", "kmod-static-nodes"):
        assert built.initramfs.members[f"etc/systemd/system/{unit}.service"].content == b"/dev/null"
    for generator in ("dracut-rootfs-generator", "systemd-gpt-auto-generator"):
        assert built.initramfs.members[f"etc/systemd/system-generators/{generator}"].content == b"/dev/null"
    # What networkd and the rules of udev name is there without a service that makes it.
    users, groups = (content(built, f"etc/{name}").decode() for name in ("passwd", "group"))
    assert users.count("systemd-network:") == groups.count("systemd-network:") == 1
    assert {"tty", "disk", "kmem"} <= {line.partition(":")[0] for line in groups.splitlines()}
    trigger = content(built, "etc/systemd/system/systemd-udev-trigger.service").decode()
    assert " --subsystem-nomatch=tty " in trigger
    assert " --subsystem-nomatch=module " in trigger
    # udev and the journal start without filters; systemd-networkd, which strangers can reach, keeps its own.
    for unit in ("systemd-udevd", "systemd-journald"):
        assert b"\nSystemCallFilter=\n" in content(built, f"etc/systemd/system/{unit}.service.d/anchor.conf")
    assert content(built, "etc/systemd/system/systemd-networkd.service.d/anchor.conf") == b"[Service]\nNice=-10\n"
    assert not any(
        f"--subsystem-nomatch={name}" in trigger for name in ("pci", "virtio", "usb", "net", "block", "acpi")
    )


def test_the_kernel_finds_modprobe_once_proc_is_mounted(built: Built) -> None:
    link = built.initramfs.members["usr/sbin/modprobe"]
    assert link.content == b"/proc/self/root/usr/bin/kmod"
    program = built.initramfs.resolve("sbin/modprobe")
    assert program is not None
    assert program.content.startswith(b"\x7fELF")


def test_settings_that_are_not_the_networks_are_left_to_the_root(built: Built) -> None:
    names = [name for name in built.initramfs.members if "/sysctl.d/" in name]
    about_the_network = any(re.search(rb"^[^#;\n]*net[./]", content(built, name), re.MULTILINE) for name in names)
    left_out = "etc/systemd/system/systemd-sysctl.service" in built.initramfs.members
    assert left_out != about_the_network
    if left_out:
        rules = content(built, "etc/udev/rules.d/99-systemd.rules")
        assert b"systemd-sysctl" not in rules
        assert b'SUBSYSTEM=="net"' in rules


def test_modes_do_not_depend_on_the_umask(built: Built) -> None:
    # The build ran with umask 077: a daemon of another user must get to its files all the same.
    members = built.initramfs.members
    for path in ("", "etc", "etc/anchor", "usr", "usr/lib", "usr/lib/anchor", "usr/lib/anchor/stages/auth"):
        if path in members:
            assert members[path].mode & 0o055 == 0o055, path
    for path in ("etc/passwd", "etc/anchor/ca.pem", "etc/anchor/build-time", "usr/lib/anchor/lib/anchor-boot.sh"):
        assert members[path].mode & 0o777 == 0o644, path
    assert all(m.mode & 0o022 == 0 or m.is_link or stat.S_ISVTX & m.mode for m in members.values() if m.is_file)


def test_the_report_is_complete(built: Built) -> None:
    report = built.report
    data = built.bench.output.read_bytes()
    assert report == json.loads((built.bench.output.parent / "node.img.json").read_text(encoding="utf-8"))
    assert (report["file"], report["bytes"], report["sha256"]) == (
        *("node.img", len(data)),
        hashlib.sha256(data).hexdigest(),
    )
    assert report["kernel"] == built.bench.image.release
    assert report["stages"] == ["anchor", "auth-local-file", "transport-https", "image-squashfs"]
    assert report["settings"] == {"rd.anchor.fetch.attempts": "3", "rd.anchor.local-file.pin": "(secret)"}
    assert report["uncompressed_bytes"] == sum(report["bytes_by_stage"].values())
    assert {"anchor", "auth-local-file", "base system"} <= set(report["bytes_by_stage"])
    assert len(report["largest_files"]) == 10
    assert all(len(digest) == 64 for digest in report["inputs"].values())
    inputs = {"ca", "kernel", "modules.dep", "50anchor", "51anchor-auth-local-file", "program curl"}
    assert inputs <= set(report["inputs"])


def test_programs_find_all_libraries_and_symbols_in_what_is_left(built: Built, tmp_path: Path) -> None:
    """As `ldd -r` does, for all of them, in a root that has nothing but what is in the initramfs."""
    left_out = {path for path in built.report["left_out"] if path not in built.initramfs.members}
    assert len(left_out) < len(built.report["left_out"])  # the others are placeholders
    programs = []
    for path, member in sorted(built.initramfs.members.items()):
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if member.is_link:
            place.symlink_to(member.content.decode())
        elif member.is_file:
            place.write_bytes(member.content)
            place.chmod(0o755)
            if member.content.startswith(b"\x7fELF") and path.startswith("usr/") and ".ko" not in path:
                programs.append(f"/{path}")
    assert len(programs) > 50
    # The dynamic linker answers for the program: none of them runs.
    env = {"LD_WARN": "yes", "LD_BIND_NOW": "yes", "PATH": "/usr/sbin:/usr/bin"}
    linker = dynamic_linker(tmp_path / "usr/bin/curl")
    problems = []
    for program in programs:
        argv = ["chroot", str(tmp_path), linker, "--list", program]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=30)
        problems += [
            line for line in (done.stdout + done.stderr).splitlines() if "not found" in line or "undef" in line
        ]
    assert problems == []


def test_a_secret_is_in_the_image_only(built: Built) -> None:
    assert stat.S_IMODE(built.bench.output.stat().st_mode) == 0o600
    assert "holds secrets (rd.anchor.local-file.pin)" in built.ended.err
    report = (built.bench.output.parent / "node.img.json").read_text(encoding="utf-8")
    for text in (built.ended.out, built.ended.err, report):
        assert PIN not in text
        assert str(built.bench.top) not in report


def test_inspect_tells_what_the_report_tells(built: Built) -> None:
    found = read_artifact(built.bench.output, (SITE_STAGES,))
    facts, report = found.facts, built.report
    for name in ("sha256", "bytes", "anchor_build", "dracut", "drivers", "settings", "uncompressed_bytes"):
        assert facts[name] == report[name], name
    assert facts["kernel"] == [report["kernel"]]
    assert set(report["dracut_modules"]) <= set(facts["dracut_modules"])
    assert set(report["stages"]) <= set(facts["bytes_by_stage"])
    assert facts["bytes_by_stage"]["auth-local-file"] == report["bytes_by_stage"]["auth-local-file"]
    assert len(facts["ca_certificates"]) == 1
    assert "private_keys" not in facts
    assert found.entries["etc/anchor/params"].values["mode"] == "0600"


def test_a_command_line_is_checked_by_the_report(built: Built) -> None:
    argv = [sys.executable, "-m", "anchor_build", "check", "--stage-dir", str(SITE_STAGES), "--initramfs"]
    line = "root=anchor team=team0:eth0"
    done = subprocess.run([*argv, built.bench.output, line], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert built.report["network"] == "systemd-networkd"
    assert "error: team=team0: systemd-networkd is not told about teams" in done.stderr


def test_nothing_is_written_outside_the_output_and_the_cache(built: Built) -> None:
    assert built.strange == []
    kernel = f"vmlinuz-{built.report['kernel']}"
    assert sorted(path.name for path in built.bench.output.parent.iterdir()) == ["node.img", "node.img.json", kernel]
    assert {path.name for path in built.bench.cache.glob("anchor-build/*")} <= {"initramfs"}


def test_the_same_inputs_give_the_same_bytes(built: Built, site_ca: Path, bench: Bench) -> None:
    """From a profile, another directory and cache, with another umask, locale, time zone and name; at another time."""
    elsewhere = bench.top / "another directory"
    elsewhere.mkdir()
    file = elsewhere / "anchor.toml"
    file.write_text(profile_of(elsewhere, site_ca), encoding="utf-8")
    ended = bench.run(
        prefix=("sh", "-c", 'umask 002; exec "$@"', "sh"),
        cwd=elsewhere,
        LANG="de_DE.UTF-8",
        TZ="Pacific/Auckland",
        COLUMNS="40",
        ANCHOR_BUILD_CONFIG="",
    )
    assert ended.status == 0, ended.err
    assert ended.err.startswith("profile default of anchor.toml: stage-dir, auth, image, ca, set, add-drivers\n")
    assert hashlib.sha256(bench.output.read_bytes()).hexdigest() == built.report["sha256"]
    report = json.loads((bench.output.parent / "node.img.json").read_text(encoding="utf-8"))
    assert report["inputs"].pop("profile default") == hashlib.sha256(file.read_bytes()).hexdigest()
    assert report == built.report


def with_installed(bench: Bench, modules: Mapping[str, str]) -> Callable[..., list[str]]:
    """Return a maker of build arguments for a dracut that has more `modules`: their module-setup.sh by name."""
    farm = bench.top / "dracut"
    (farm / "modules.d").mkdir(parents=True)
    for path in [*dracut.BASE.glob("[!m]*"), *dracut.BASE.glob("modules.d/*")]:
        (farm / path.relative_to(dracut.BASE)).symlink_to(path)
    for name, text in modules.items():
        (farm / "modules.d" / name).mkdir()
        setup = farm / "modules.d" / name / "module-setup.sh"
        setup.write_text(text, encoding="utf-8")
        setup.chmod(0o755)
    patch = f"from pathlib import Path; from anchor_build import cli, dracut; dracut.BASE = Path({str(farm)!r}); "
    return lambda *words: [sys.executable, "-c", f"{patch}cli.main({bench.argv(*words)[3:]!r})"]


def test_the_output_is_for_everybody_without_secrets_and_a_stale_installed_module_does_not_win(
    bench: Bench, installed_package: Path
) -> None:
    """Built from a package with an entry point, with a dracut that has an older copy of our modules installed."""
    text = "check() { return 0; }\ninstall() { derror STALE; exit 1; }\n"
    argv = with_installed(bench, dict.fromkeys(("50anchor", "99anchor-image-squashfs"), text))
    done = subprocess.run(
        argv("--auth", "local-file", "--compress", "gzip -1", "--no-trim"),
        env=bench.environment(PYTHONPATH=f"{TOP}:{installed_package}"),
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: no --ca: nodes trust every public CA that this host trusts" in done.stderr
    assert stat.S_IMODE(bench.output.stat().st_mode) == 0o644
    initramfs = read_initramfs(bench.output)
    assert initramfs.compression == "gzip"
    # With --no-trim every library is the system's own.
    assert json.loads(bench.output.with_name("node.img.json").read_text(encoding="utf-8"))["left_out"] == []
    [library] = (path for path in initramfs.members if path.endswith("/librtmp.so.1"))
    assert initramfs.members[library].content == Path("/", library).read_bytes()
    assert initramfs.resolve("usr/lib/anchor/stages/auth/20-local-file/stage.sh") is not None
    assert "etc/anchor/params" not in initramfs.members
    sizes = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith(("anchor ", "auth-local-file "))]
    assert len(sizes) == 2


def own_stage(bench: Bench, header: str) -> list[str]:
    """Write a stage with a need of its own; return the arguments that build it in."""
    directory = bench.top / "auth-own"
    directory.mkdir()
    declaration = f'[stage]\nkind = "auth"\nname = "own"\napi = 1\nsummary = "Of one site."\n{header}\n'
    (directory / "stage.toml").write_text(declaration, encoding="utf-8")
    (directory / "stage.sh").write_text("#!/bin/sh\nanchor_own_run() {\n    :\n}\n", encoding="utf-8")
    return ["--stage-dir", str(directory), "--auth", "own"]


REFUSED = {
    "program": ('binaries = [{ name = "no-such-program", rpm = "rpm-name", deb = "deb-name" }]', []),
    "module": ('dracut = ["no-such-module"]', []),
    "driver": ('drivers = ["no_such_driver"]', []),
    "added driver": ("", ["--add-drivers", "no-such-driver"]),
    "kernel": ("", ["--kernel", "9.9.9-none"]),
    "CA": ("", ["--ca", "/no/such/ca.pem"]),
    "setting": ("", ["--set", "rd.anchor.fetch.atempts=1"]),
}
REASONS = {
    "program": "auth-own: no-such-program is missing: install deb-name (deb) or rpm-name (rpm)",
    "module": "auth-own: this dracut has no module no-such-module",
    "driver": "has no driver no_such_driver",
    "added driver": "--add-drivers: kernel {release} has no driver no-such-driver\nhint: is the name right?",
    "kernel": "kernel 9.9.9-none: no modules (modules.dep) in /lib/modules/9.9.9-none",
    "CA": "--ca /no/such/ca.pem: cannot be read: No such file or directory",
    "setting": "did you mean rd.anchor.fetch.attempts?",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_missing_is_said_before_dracut_runs(bench: Bench, what: str) -> None:
    header, words = REFUSED[what]
    ended = bench.run(*own_stage(bench, header), *words)
    assert ended.status == (2 if what == "setting" else 1)
    assert ended.out == ""
    assert REASONS[what].format(release=bench.image.release) in ended.err
    assert "run dracut" not in ended.err
    assert "Traceback" not in ended.err
    bench.check_untouched()


def test_everything_that_is_missing_is_said_at_once(bench: Bench) -> None:
    header = 'binaries = [{ name = "no-such-program", rpm = "r", deb = "d" }]\ndrivers = ["no_such_driver"]'
    ended = bench.run(*own_stage(bench, header), "--add-drivers", "none1,none2")
    for word in ("no-such-program", "no_such_driver", "none1", "none2"):
        assert word in ended.err
    bench.check_untouched()


def test_a_ca_with_a_private_key_is_refused(bench: Bench, site_ca: Path) -> None:
    both = bench.top / "both.pem"
    both.write_bytes(site_ca.read_bytes() + site_ca.with_suffix(".key").read_bytes())
    ended = bench.run("--ca", both)
    assert (ended.status, ended.out) == (1, "")
    assert "holds a private key" in ended.err
    bench.check_untouched()


def test_manifest_keys_are_looked_at_before_anything_is_built(bench: Bench, tmp_path: Path) -> None:
    for words, status, told in (
        (("--manifest-since", "2026-01-01"), 2, "--manifest-since needs --manifest-key"),
        (("--manifest-key", tmp_path / "away"), 1, "No such file"),
    ):
        done = bench.run(*words)
        assert (done.status, told in done.err) == (status, True), done.err
        bench.check_untouched()


def test_an_output_that_is_no_plain_file_is_left_alone(bench: Bench) -> None:
    fifo = bench.top / "fifo"
    os.mkfifo(fifo)
    ended = bench.run("-o", fifo)
    assert ended.status == 1
    assert "is there and not a plain file" in ended.err
    assert fifo.is_fifo()
    said = bench.run("-o", "/no/such/directory/x").err
    assert "/no/such/directory is not a directory" in said
    assert "hint: name another place with --output FILE" in said
    assert "doctor" not in said


def test_no_input_is_overwritten(bench: Bench, site_ca: Path) -> None:
    ca = bench.top / "ca.pem"
    ca.write_bytes(site_ca.read_bytes())
    ended = bench.run("--ca", ca, "-o", ca)
    assert (ended.status, f"--output {ca}: would take the place of {ca}, which is read" in ended.err) == (2, True)
    assert ca.read_bytes() == site_ca.read_bytes()
    assert not ca.with_name("ca.pem.json").exists()


def breaking_stage(bench: Bench, install: str) -> list[str]:
    """Build with a dracut module that does `install` in the middle of dracut's run, because a stage needs it."""
    text = f"check() {{ return 255; }}\ninstall() {{\n{install}\n}}\n"
    return with_installed(bench, {"98breaks": text})(*own_stage(bench, 'dracut = ["breaks"]'))


def test_dracut_failing_half_way_leaves_everything_as_it_was(bench: Bench) -> None:
    argv = breaking_stage(bench, "derror 'the disk is on fire'; exit 1")
    done = subprocess.run(argv, env=bench.environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "failed  run dracut" in done.stderr
    assert "the disk is on fire" in done.stderr
    assert "command: /usr/bin/dracut --force" in done.stderr
    assert "Traceback" not in done.stderr
    bench.check_untouched()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_build_leaves_nothing_behind(bench: Bench, number: signal.Signals) -> None:
    mark = bench.top / "in-the-middle"
    argv = breaking_stage(bench, f"sleep 300 & echo $! >{shlex.quote(str(mark))}; wait")
    with subprocess.Popen(
        argv, env=bench.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        deadline = time.monotonic() + 60
        while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        sleeper = int(mark.read_text())
        child.send_signal(number)
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (130, "")
    assert "error: interrupted" in err
    assert "Traceback" not in err
    assert not Path(f"/proc/{sleeper}").exists()
    bench.check_untouched()


def in_small(bench: Bench, directory: Path, size: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a build in a mount namespace of its own, in which `directory` has `size` of room; then show what is left.

    There, nothing may be in memory.
    """
    script = (
        f"mount -t tmpfs -o size=4k none {MEMORY} || exit 99\n"
        f"mount -t tmpfs -o size={size} none {shlex.quote(str(directory))} || exit 99\n"
        f"[ {shlex.quote(str(directory))} != {shlex.quote(str(bench.output.parent))} ] ||"
        f" printf '%s' {shlex.quote(OLD.decode())} >{shlex.quote(str(bench.output))}\n"
        '"$@"; status=$?\n'
        f"find {shlex.quote(str(directory))} -type f; cat {shlex.quote(str(bench.output))}; exit $status"
    )
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command],
        env=bench.environment(),
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )


@pytest.mark.parametrize(("place", "size"), [("output", "2m"), ("cache", "1m"), ("cache", "12m")])
def test_a_full_disk(bench: Bench, place: str, size: str) -> None:
    directory = bench.output.parent if place == "output" else bench.cache
    directory.mkdir(exist_ok=True)
    done = in_small(bench, directory, size, bench.argv())
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "hint: make room" in done.stderr
    assert "Traceback" not in done.stderr
    left = [str(bench.output)] if place == "output" else []
    assert done.stdout.splitlines() == [*left, OLD.decode()]
    bench.check_untouched()


def test_a_build_as_another_user(bench: Bench, image: SiteImage) -> None:
    """Either it works, or it says what only root may read; in both cases it writes where it should only."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing")
    # The user may read the checkout, the interpreter and the kernel only where their parents let everybody through.
    home = Path(tempfile.mkdtemp(prefix="user-"))
    home.chmod(0o755)
    try:
        for source, target in ((TOP / "anchor_build", "anchor_build"), (TOP / "lib", "lib")):
            shutil.copytree(source, home / target, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(TOP / "dracut-modules", home / "dracut-modules")
        shutil.copytree(image.modules, home / "lib" / "modules" / image.release, symlinks=True)
        for name in ("out", "cache", "tmp"):
            (home / name).mkdir()
            os.chown(home / name, 65534, 65534)
        packages = home / "packages"
        packages.mkdir()
        for name in ("click", "jinja2", "markupsafe"):
            module = __import__(name)
            assert module.__file__ is not None
            shutil.copytree(Path(module.__file__).parent, packages / name)
        python = shutil.which("python3", path="/usr/bin")
        if python is None:
            pytest.skip("there is no Python that another user may run")
        output = home / "out" / "node.img"
        done = subprocess.run(
            [
                *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", python, "-m", "anchor_build"),
                *("initramfs", "--image", "squashfs", "-o", output),
                *("--modules", home / "lib" / "modules" / image.release),
            ],
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": "/nonexistent",
                "PYTHONPATH": f"{home}:{packages}",
                "XDG_CACHE_HOME": str(home / "cache"),
                "TMPDIR": str(home / "tmp"),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            cwd=home,
            capture_output=True,
            text=True,
            timeout=BUILD_LIMIT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            assert read_initramfs(output).resolve("usr/lib/anchor/lib/anchor-boot.sh") is not None
        else:
            assert "run it as root" in done.stderr
            assert list((home / "out").iterdir()) == []
        assert {path.name for path in (home / "cache").glob("anchor-build/*")} <= {"initramfs"}
    finally:
        shutil.rmtree(home)


@pytest.fixture(autouse=True)
def no_mounts_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check that no test leaves a mount in this namespace."""
    own = str(tmp_path_factory.getbasetemp())

    def mounts() -> list[str]:
        # Tests that run beside this one mount what they like in directories of their own.
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        return [line for line in lines if "/pytest-of-" not in line or own in line]

    before = mounts()
    yield
    assert mounts() == before
