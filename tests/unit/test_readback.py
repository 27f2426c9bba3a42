"""The finished initramfs against what its stages promise: each missing thing is named, and every byte has an owner."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build import dracut, readback
from anchor_build.cpio import Initramfs, Member
from anchor_build.kernel import Kernel
from anchor_build.plan import Plan, make_plan
from anchor_build.readback import measure, missing
from anchor_build.registry import load_registry
from anchor_build.render import HOOKS, NETWORK_FILE, RenderedModule, installed_files, render_plan
from anchor_build.stage import is_promised
from tests.conftest import SITE_STAGES

SITE = {"ca.pem": b"a CA", "build-time": b"1\n", "params": b"rd.anchor.local-file.pin=1234\n"}
NETWORKD = str(dracut.NETWORKD[0]).lstrip("/")
DEP = "kernel/fs/squashfs/squashfs.ko:\nkernel/net/virtio-net.ko.xz: kernel/net/failover.ko\nkernel/net/failover.ko:\n"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_registry([SITE_STAGES]), auth=["local-file"], image=["squashfs"])


@pytest.fixture(scope="module")
def modules(plan: Plan) -> tuple[RenderedModule, ...]:
    return render_plan(plan)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """Make a kernel whose overlay and loop are built in."""
    (tmp_path / "modules.dep").write_text(DEP, encoding="utf-8")
    (tmp_path / "modules.builtin").write_text("kernel/fs/overlay.ko\nkernel/drivers/loop.ko\n", encoding="utf-8")
    return Kernel("6.1.0", tmp_path)


@pytest.fixture
def members(plan: Plan, modules: tuple[RenderedModule, ...]) -> dict[str, Member]:
    """Everything that the plan promises."""
    found: dict[str, Member] = {}

    def add(path: str, content: bytes, mode: int = 0o644) -> None:
        name = path.strip("/")
        found[name] = Member(name, stat.S_IFREG | mode, len(content), content)

    for stage, module in zip(plan.all, modules, strict=True):
        for source, target, mode in installed_files(stage):
            add(target, module.files[source].content, mode)
        for binary in stage.binaries:
            add(f"usr/bin/{binary.name}", b"program", 0o755)
    for name, content in SITE.items():
        add(f"etc/anchor/{name}", content, 0o600 if name == "params" else 0o644)
    for hook, number in HOOKS.items():
        script = modules[0].files[f"hook-{hook}.sh"].content
        add(f"usr/lib/dracut/hooks/{hook}/{number}-hook-{hook}.sh", script, 0o755)
    add(NETWORKD, b"program", 0o755)
    add(NETWORK_FILE[1], modules[0].files[NETWORK_FILE[0]].content)
    found["lib"] = Member("lib", stat.S_IFLNK | 0o777, 7, b"usr/lib")
    add("usr/lib/modules/6.1.0/kernel/fs/squashfs/squashfs.ko", b"driver")
    return found


Case = tuple[dict[str, Member], Plan, tuple[RenderedModule, ...], Kernel]


@pytest.fixture
def case(members: dict[str, Member], plan: Plan, modules: tuple[RenderedModule, ...], kernel: Kernel) -> Case:
    return members, plan, modules, kernel


def said(case: Case) -> list[str]:
    members, plan, modules, kernel = case
    return missing(Initramfs(members, "none"), plan, modules, kernel, SITE)


def test_nothing_is_missing(case: Case) -> None:
    assert said(case) == []


GONE = {
    "usr/bin/ip": "anchor: the program ip is not inside",
    "usr/bin/tac": "auth-local-file: the program tac is not inside",
    "usr/lib/modules/6.1.0/kernel/fs/squashfs/squashfs.ko": "image-squashfs: the driver squashfs is not inside",
    "usr/share/site/notice.txt": "auth-local-file: /usr/share/site/notice.txt is not inside",
    "usr/lib/anchor/lib/anchor-boot.sh": "anchor: /usr/lib/anchor/lib/anchor-boot.sh is not inside",
    "usr/lib/anchor/stages/image/10-squashfs/stage.sh": "/usr/lib/anchor/stages/image/10-squashfs/stage.sh is not",
    "etc/anchor/ca.pem": "anchor: /etc/anchor/ca.pem is not inside",
    "etc/anchor/params": "anchor: /etc/anchor/params is not inside",
    "usr/lib/dracut/hooks/pre-mount/50-hook-pre-mount.sh": "anchor: the pre-mount hook is not inside",
    "usr/lib/dracut/hooks/cleanup/90-hook-cleanup.sh": "anchor: the cleanup hook is not inside",
}


@pytest.mark.parametrize("path", GONE)
def test_what_is_gone_is_named(case: Case, path: str) -> None:
    del case[0][path]
    assert [GONE[path] in problem for problem in said(case)] == [True]


def test_what_only_dracuts_own_script_calls_is_not_missed_with_systemd(case: Case) -> None:
    members = case[0]
    del members["usr/bin/switch_root"]
    assert said(case) == ["anchor: the program switch_root is not inside"]
    name = "usr/lib/dracut/modules.txt"
    members[name] = Member(name, stat.S_IFREG | 0o644, 13, b"base\nsystemd\n")
    assert said(case) == []


def test_everything_missing_at_once(case: Case) -> None:
    for path in GONE:
        del case[0][path]
    assert len(said(case)) == len(GONE)


@pytest.mark.parametrize(
    "path", ["etc/anchor/ca.pem", "usr/share/site/notice.txt", "usr/lib/dracut/hooks/cmdline/20-hook-cmdline.sh"]
)
def test_other_content_is_named(case: Case, path: str) -> None:
    case[0][path] = replace(case[0][path], content=b"stale")
    (problem,) = said(case)
    assert problem.endswith("is inside with other content")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("usr/share/site/notice.txt", "has mode 0644 instead of 0640"),
        ("etc/anchor/params", "has mode 0644 instead of 0600"),
    ],
)
def test_another_mode_is_named(case: Case, path: str, problem: str) -> None:
    case[0][path] = replace(case[0][path], mode=stat.S_IFREG | 0o644)
    (said_,) = said(case)
    assert said_.endswith(problem)


def test_a_program_may_be_a_link_to_another_one(case: Case) -> None:
    members = case[0]
    members["usr/sbin/ip"] = Member("usr/sbin/ip", stat.S_IFLNK | 0o777, 0, b"/usr/bin/tac")
    del members["usr/bin/ip"]
    assert said(case) == []
    members["usr/sbin/ip"] = replace(members["usr/sbin/ip"], content=b"/usr/bin/gone")
    assert said(case) == ["anchor: the program ip is not inside"]


def test_a_driver_may_be_compressed_or_spelt_otherwise(case: Case) -> None:
    members = case[0]
    path = "usr/lib/modules/6.1.0/kernel/fs/squashfs/squashfs.ko"
    members[path + ".zst"] = members.pop(path)
    assert said(case) == []


@pytest.mark.parametrize(
    ("driver", "promised"), [("nfs", True), ("nfs?", False), ("=drivers/net", False), ("virtio-net", True)]
)
def test_which_drivers_are_promised(driver: str, promised: bool) -> None:
    assert is_promised(driver) is promised


def test_every_byte_has_one_owner(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    members, plan, _, kernel = case
    libraries = {"transport-https": ["/lib/libcurl.so.4"], "auth-local-file": ["/lib/libc.so.6"]}
    monkeypatch.setattr(readback, "libraries", lambda initramfs, stage: libraries.get(stage.id, []))
    for path, size in (("usr/lib/libcurl.so.4", 700), ("usr/lib/libc.so.6", 900), ("usr/bin/other", 5)):
        members[path] = Member(path, stat.S_IFREG | 0o755, size, b"")
    virtio = "usr/lib/modules/6.1.0/kernel/net/virtio-net.ko.xz"
    members[virtio] = Member(virtio, stat.S_IFREG | 0o644, 30, b"")
    contents = measure(Initramfs(members, "none"), plan, kernel)
    assert contents.total == sum(member.size for member in members.values() if member.is_file)
    assert contents.total == sum(contents.by_owner.values())
    assert contents.by_owner["transport-https"] > 700
    assert contents.by_owner["auth-local-file"] > 900
    assert contents.by_owner["other drivers"] == 30
    assert contents.largest[0][1] >= contents.largest[1][1]
    assert contents.drivers == ("squashfs", "virtio_net")
    assert contents.files == sum(member.is_file for member in members.values())


def test_the_networks_configuration_goes_with_networkd(case: Case) -> None:
    members, *_ = case
    name = NETWORK_FILE[1].strip("/")
    members[name] = replace(members[name], content=b"[Match]\n")
    assert said(case) == [f"anchor: {NETWORK_FILE[1]} is inside with other content"]
    del members[name]
    assert said(case) == [f"anchor: {NETWORK_FILE[1]} is not inside"]
    del members[NETWORKD]
    assert said(case) == []
