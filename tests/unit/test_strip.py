"""What debuggers want is taken out of programs and drivers where it was left in, and nothing else is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from anchor_build.cpio import Initramfs, Member
from anchor_build.root import HOST
from anchor_build.strip import DEBUG, SIGNED, strip

pytestmark = pytest.mark.usefixtures("processes")
DRIVER = "usr/lib/modules/6.1/kernel/x.ko"


@pytest.fixture
def unstripped(tmp_path: Path) -> bytes:
    """Return a program with a section that debuggers read."""
    notes, program = tmp_path / "notes", tmp_path / "program"
    notes.write_bytes(b"where each line is" * 1000)
    shutil.copyfile("/usr/bin/true", program)
    subprocess.run(["objcopy", "--add-section", f".debug_info={notes}", program], check=True)
    return program.read_bytes()


def stripped(tmp_path: Path, content: bytes, path: str = "usr/bin/x", mode: int = 0o100755, links: int = 1) -> bytes:
    member = Member(path, mode, len(content), content, links=links)
    return strip(Initramfs({path: member}, "none"), HOST, tmp_path).get(path, content)


@pytest.mark.parametrize(("path", "mode"), [("usr/bin/x", 0o100755), (DRIVER, 0o100644)])
def test_programs_and_drivers_are_stripped(tmp_path: Path, unstripped: bytes, path: str, mode: int) -> None:
    content = stripped(tmp_path, unstripped, path, mode)
    assert len(content) < len(unstripped)
    assert DEBUG not in content
    (tmp_path / "works").write_bytes(content)
    (tmp_path / "works").chmod(0o755)
    subprocess.run([tmp_path / "works"], check=True)


def test_a_signature_and_libraries_stay(tmp_path: Path, unstripped: bytes) -> None:
    assert stripped(tmp_path, unstripped + SIGNED, DRIVER, 0o100644) == unstripped + SIGNED
    assert stripped(tmp_path, unstripped, "usr/lib/libx.so", 0o100644) == unstripped
    assert stripped(tmp_path, unstripped, links=2) == unstripped


def test_with_fips_programs_keep_the_sums_that_they_are_installed_with(tmp_path: Path, unstripped: bytes) -> None:
    for name, expected in (("base\nfips\n", False), ("base\n", True)):
        modules = name.encode()
        members = {
            "usr/lib/dracut/modules.txt": Member("usr/lib/dracut/modules.txt", 0o100644, len(modules), modules),
            "usr/bin/x": Member("usr/bin/x", 0o100755, len(unstripped), unstripped),
        }
        assert bool(strip(Initramfs(members, "none"), HOST, tmp_path)) is expected


def test_what_is_stripped_already_and_what_is_no_program(tmp_path: Path) -> None:
    for content in (Path("/usr/bin/true").read_bytes(), b"#!/bin/sh\n# .debug_info\n"):
        assert stripped(tmp_path, content) == content
    broken = b"\x7fELF .debug_info"
    assert stripped(tmp_path, broken) == broken
