"""anchor-count.sh: failed boots in a row, in a directory that stands in for the firmware's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shell.conftest import Shell

LOAD = '. "$LIB/anchor-report.sh"; . "$LIB/anchor-count.sh"; mkdir -p "$ANCHOR_RUN"\n'
UP = 'anchor_count_up; printf "%s:%s " $? "$anchor_count"\n'


@pytest.fixture
def counter(shell: Shell) -> Path:
    """Make the directory with a variable of the firmware's own; return the file of the count."""
    directory = shell.root / "sys/firmware/efi/efivars"
    directory.mkdir(parents=True)
    (directory / "BootOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(b"\7\0\0\0\1\0")
    return directory / "AnchorFailedBoots-6f1d5a0c-93f6-4c1b-9c55-0d4a1e4c7b36"


def test_failures_are_counted_to_a_limit_and_forgotten(shell: Shell, counter: Path) -> None:
    done = shell.run(LOAD + UP * 17)
    assert done.stdout.split() == [f"0:{min(n, 15)}" for n in range(1, 18)]
    assert counter.read_bytes() == b"\7\0\0\0\x0f"
    before = counter.stat().st_mtime_ns
    assert shell.run(LOAD + UP).stdout == "0:15 "
    assert counter.stat().st_mtime_ns == before, "the firmware's flash was written for nothing"
    assert shell.run(LOAD + "anchor_count_reset; anchor_count_reset; printf $?").stdout == "0"
    assert not counter.exists()
    assert [path.name.partition("-")[0] for path in counter.parent.iterdir()] == ["BootOrder"]
    assert shell.run(LOAD + UP).stdout == "0:1 "


@pytest.mark.parametrize(
    "content", [b"", b"\7\0\0\0", b"\7\0\0\0\x10", b"\7\0\0\0\2\2", b"\3\0\0\0\2", b"\7\0\0\0\xff", b"text" * 999]
)
def test_what_was_not_written_here_counts_as_nothing(shell: Shell, counter: Path, content: bytes) -> None:
    counter.write_bytes(content)
    assert shell.run(LOAD + UP).stdout == "0:1 "
    assert counter.read_bytes() == b"\7\0\0\0\1"


def test_a_node_without_efi_counts_nothing(shell: Shell) -> None:
    assert shell.run(LOAD + UP + "anchor_count_reset; printf $?").stdout == "1: 0"
    assert not (shell.root / "sys").exists()


def test_a_firmware_that_refuses_counts_nothing(shell: Shell, counter: Path) -> None:
    """A directory in the file's place: nobody can write to that, root included."""
    counter.mkdir()
    done = shell.run(LOAD + UP)
    assert (done.stdout, done.stderr) == ("1: ", "")


def test_a_firmware_that_keeps_nothing_counts_nothing(shell: Shell, counter: Path) -> None:
    counter.symlink_to("/dev/null")
    assert shell.run(LOAD + UP).stdout == "1: "


def test_a_variable_that_the_kernel_has_locked_is_unlocked_first(shell: Shell, counter: Path) -> None:
    """The kernel's lock is that of chattr; a stand-in takes note, since not every file system has it."""
    counter.write_bytes(b"\7\0\0\0\1")
    script = 'chattr() { printf "%s " "$*"; }\n'
    done = shell.run(LOAD + script + UP + "anchor_count_reset")
    assert done.stdout == f"-i {counter} 0:2 -i {counter} "


def test_variables_that_nobody_mounted_are_mounted(shell: Shell, counter: Path) -> None:
    next(counter.parent.iterdir()).unlink()
    script = f'mount() {{ printf "%s " "$*"; : >"{counter.parent}/x"; }}\n'
    done = shell.run(LOAD + script + UP + UP)
    assert done.stdout == f"-t efivarfs -o nosuid,nodev,noexec efivarfs {counter.parent} 0:1 0:2 "
