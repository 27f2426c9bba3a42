"""anchor-direct.sh and anchor-cards.sh: when dracut's own script is left out, and which drivers systemd loads first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shell.conftest import TOP, Shell

MODULE = TOP / "dracut-modules" / "anchor"
LIBRARY = """
anchor_boot_direct() { echo "boot of $NEWROOT"; }
anchor_boot_handoff() { echo handoff; }
"""
OURS = ("cmdline/20-hook-cmdline.sh", "pre-mount/50-hook-pre-mount.sh", "cleanup/90-hook-cleanup.sh")


def script(name: str, root: Path, *places: str) -> str:
    """Return a script of the module whose absolute paths in `places` lie below a directory."""
    text = (MODULE / name).read_text(encoding="utf-8")
    for place in places:
        assert place in text
        text = text.replace(place, f"{root}{place}")
    return text


def direct(shell: Shell, hook: str, cmdline: str, hooks: tuple[str, ...] = OURS) -> list[str]:
    """Run anchor-direct.sh for a hook; return what ran: our function, or dracut's script."""
    for name in hooks:
        file = shell.root / "lib/dracut/hooks" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    files = {
        "proc/cmdline": f"{cmdline}\n",
        "usr/lib/anchor/lib/anchor-boot.sh": LIBRARY,
        "dracut": "#!/bin/sh\necho dracut\n",
    }
    for name, text in files.items():
        (shell.root / name).parent.mkdir(parents=True, exist_ok=True)
        (shell.root / name).write_text(text, encoding="utf-8")
    (shell.root / "dracut").chmod(0o755)
    places = ("/proc/cmdline", "/etc/cmdline", "/lib/dracut/hooks", "/etc/dracut/hooks", "/usr/lib/anchor/lib")
    file = shell.root / "anchor-direct.sh"
    file.write_text(
        script("anchor-direct.sh", shell.root, *places).replace(f"/var{shell.root}", "/var"), encoding="utf-8"
    )
    run = 'file=$1; shift; . "$file"'
    done = shell.run(run, str(file), hook, str(shell.root / "dracut"), env={"NEWROOT": "/sysroot"})
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("hook", "ran"), [("cmdline", []), ("pre-mount", ["boot of /sysroot"]), ("pre-pivot", ["handoff"])]
)
def test_a_boot_of_ours_needs_no_script_of_dracut(shell: Shell, hook: str, ran: list[str]) -> None:
    assert direct(shell, hook, "console=ttyS0 root=live:x root=anchor rd.anchor.squashfs.url=https://h/x*y") == ran


@pytest.mark.parametrize(
    "cmdline",
    [
        "",
        "root=/dev/sda1",
        "root=anchor root=/dev/sda1",
        "root=anchor rd.break=pre-mount",
        "root=anchor rd.break",
        "rdbreak root=anchor",
        "root=anchor rd.debug",
        "root=anchor rd.udev.log_level=debug",
        "root=anchor rd.hostonly=0",
        'root=anchor "rd.break"',
    ],
)
def test_what_asks_dracut_for_something_gets_dracut(shell: Shell, cmdline: str) -> None:
    assert direct(shell, "pre-mount", cmdline) == ["dracut"]


@pytest.mark.parametrize(
    "other",
    ["cmdline/30-parse-x.sh", "pre-mount/01-x.sh", "pre-pivot/50-x.sh", "cleanup/50-x.sh", "cmdline/x-hook-cmdline.sh"],
)
def test_hooks_of_other_modules_get_dracut(shell: Shell, other: str) -> None:
    assert direct(shell, "pre-mount", "root=anchor", (*OURS, other)) == ["dracut"]


def test_words_of_files_get_dracut(shell: Shell) -> None:
    (shell.root / "etc/cmdline.d").mkdir(parents=True)
    (shell.root / "etc/cmdline.d/1.conf").write_text("rd.break\n")
    assert direct(shell, "pre-mount", "root=anchor") == ["dracut"]


def test_the_drivers_of_network_cards_are_loaded(shell: Shell) -> None:
    devices = {
        "sys/bus/pci/devices/0000:00:01.0": ("0x030000", "pci:vga"),
        "sys/bus/pci/devices/0000:00:02.0": ("0x020000", "pci:virtio*net"),
        "sys/bus/pci/devices/0000:00:03.0": ("0x028000", "pci:other"),
        "sys/bus/virtio/devices/virtio0": (None, "virtio:d1"),
    }
    for name, (kind, alias) in devices.items():
        (shell.root / name).mkdir(parents=True)
        (shell.root / name / "modalias").write_text(f"{alias}\n")
        if kind:
            (shell.root / name / "class").write_text(f"{kind}\n")
    text = script("anchor-cards.sh", shell.root, "/sys/bus/pci", "/sys/bus/virtio")
    done = shell.run('modprobe() { printf "<%s>" "$@"; echo; }\n' + text)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "<-q><-a><-b><--><pci:virtio*net><pci:other>",
        "<-q><-a><-b><--><virtio:d1>",
    ]


def test_without_cards_nothing_is_loaded(shell: Shell) -> None:
    text = script("anchor-cards.sh", shell.root, "/sys/bus/pci", "/sys/bus/virtio")
    done = shell.run("modprobe() { echo loaded; }\n" + text)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
