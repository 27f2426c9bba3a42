"""Takes out of programs and drivers what only debuggers want, where a distribution has not done so.

dracut would look at each program and each driver, and start three programs for each driver, to find nothing to do.
"""

from __future__ import annotations

from pathlib import Path

from anchor_build.cpio import Initramfs, Member
from anchor_build.elf import MAGIC
from anchor_build.readback import included_modules
from anchor_build.root import ENVIRONMENT, Root, enter
from anchor_build.run import run

# What is in the names of sections that debuggers want, and how a signed driver ends: strip(1) would take that away.
DEBUG = b".debug_info"
SIGNED = b"~Module signature appended~\n"


def strip(initramfs: Initramfs, root: Root, work: Path) -> dict[str, bytes]:
    """Return by their paths the new contents of programs and drivers that were not stripped.

    As with dracut, signed drivers stay as they are, and everything does where the system has no program for that, or
    with the module fips, whose sums (.hmac) are those of the files as they are installed. `work` is for files.
    """
    if "fips" in included_modules(initramfs):
        return {}
    program = root.find_program("eu-strip") or root.find_program("strip")
    paths = [path for path, member in initramfs.members.items() if is_unstripped(member)]
    if program is None or not paths:
        return {}
    place = work / "strip"
    place.mkdir()
    for number, path in enumerate(paths):
        (place / str(number)).write_bytes(initramfs.members[path].content)
    argv: list[str | Path] = [root.inside(program), "-g", "-p", *(f"strip/{number}" for number in range(len(paths)))]
    # What it does not know it leaves as it is.
    run(enter(root, work, argv), env=ENVIRONMENT, only_env=True, cwd=work, check=False)
    return {path: (place / str(number)).read_bytes() for number, path in enumerate(paths)}


def is_unstripped(member: Member) -> bool:
    """Whether it is a program, or a driver that is not signed, with what debuggers want. Hard links are left alone."""
    if not member.is_file or member.links > 1 or not member.content.startswith(MAGIC):
        return False
    is_driver = "lib/modules/" in member.path and member.path.endswith(".ko")
    wanted = not member.content.endswith(SIGNED) if is_driver else member.mode & 0o111
    return bool(wanted) and DEBUG in member.content
