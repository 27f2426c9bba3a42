"""The count of failed boots in the variables of a real firmware: OVMF, whose variables are a file of this host.

The boot that ends the count has its image in the initramfs and mounts it there (squashfs_mount_only of Anchor 0.1.5).
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build import qemu
from tests.integration.conftest import LIMIT_S, BuildInitramfs, Site

pytestmark = [pytest.mark.boot, pytest.mark.slow]

# Debian's and Fedora's names of the firmware and of its variables.
FIRMWARE = (
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
)
VARIABLE = "AnchorFailedBoots"


def counted(store: Path) -> list[int]:
    """Return the values that the variable has in the firmware's store: one, or none where it was deleted.

    The store is a row of headers, each followed by name and value. A header of an authenticated variable is 60 bytes,
    of which the third is the state (0x3f: valid) and two 32-bit numbers at 36 the sizes of name and value
    (MdeModulePkg/Include/Guid/VariableFormat.h of EDK II).
    """
    data, name, found = store.read_bytes(), f"{VARIABLE}\0".encode("utf-16-le"), []
    at = data.find(name)
    while at >= 0:
        header = data[at - 60 : at]
        assert header[:2] == b"\xaa\x55"
        name_size, value_size = struct.unpack_from("<II", header, 36)
        assert (name_size, value_size) == (len(name), 1)
        found += [data[at + name_size]] if header[2] == 0x3F else []
        at = data.find(name, at + 1)
    return found


def run_to_its_end(machine: qemu.Machine, directory: Path) -> str:
    """Run a node until it reboots, which ends QEMU; return what its console showed."""
    directory.mkdir()
    console = directory / "console.log"
    argv = [str(qemu.find_qemu()), *qemu.arguments(machine, directory, console)]
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S, check=True)
    return console.read_text(encoding="utf-8", errors="replace")


def with_file(initrd: Path, file: Path, name: str, output: Path) -> Path:
    """Return a copy of an initramfs with a file in its root directory: another archive behind the first one."""
    directory = output.with_suffix(".d")
    directory.mkdir()
    (directory / name).symlink_to(file)
    argv = ["cpio", "--create", "--format=newc", "--dereference", "--quiet"]
    made = subprocess.run(argv, cwd=directory, input=name.encode(), capture_output=True, check=True)
    first = initrd.read_bytes()
    # The kernel looks for the next archive at a multiple of four bytes.
    output.write_bytes(first + bytes(-len(first) % 4) + made.stdout)
    return output


def test_failures_are_counted_over_reboots_and_forgotten(
    site: Site, build_initramfs: BuildInitramfs, tmp_path: Path
) -> None:
    built = build_initramfs("--auth", "none", "--transport", "file", "--image", "squashfs")
    initrd = with_file(built, site.root_image.squashfs, "node.squashfs", tmp_path / "with-image.img")
    found = [pair for pair in FIRMWARE if all(Path(name).is_file() for name in pair)]
    assert found, "no OVMF: contrib/packages.txt names its package"
    store = tmp_path / "variables.fd"
    shutil.copyfile(found[0][1], store)
    append = f"root=anchor squashfs_mount_only=/node.squashfs {site.digest} "
    machine = replace(site.machine(initrd, append), firmware=(Path(found[0][0]), store), forwards=())
    wrong = "rd.anchor.fetch.attempts=many rd.anchor.sqashfs.sha256=x rd.anchor.squashfs.url=http://10.0.2.2/x"
    failing = replace(machine, append=f"root=anchor {wrong} rd.anchor.on_failure=reboot rd.anchor.reboot_delay=0")
    assert counted(store) == []
    console = run_to_its_end(failing, tmp_path / "failing")
    assert "anchor: failure 1 in a row, as the firmware counts" in console, console[-3000:]
    assert counted(store) == [1]
    # What was wrong with the parameters, all of it, and what to do.
    reason, todo = (next(line for line in console.splitlines() if word in line) for word in ("why: ", "what to do: "))
    for name in ("rd.anchor.fetch.attempts", "rd.anchor.sqashfs.sha256", "rd.anchor.squashfs.url"):
        assert name in reason
    assert "anchor-build check" in todo
    # As far as the booted system: what was in the initramfs is removed at switch_root, but for what is mounted.
    result = qemu.boot(machine, timeout=LIMIT_S, console=tmp_path / "console.log")
    assert result.ok, result
    assert counted(store) == []
    assert result.boot_json is not None
    (image,) = (step for step in result.boot_json["steps"] if step["step"] == "image")
    assert (image["url"], image["sha256"]) == ("file:///node.squashfs", site.root_image.sha256)
