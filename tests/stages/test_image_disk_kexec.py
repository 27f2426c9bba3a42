"""image disk: which kernel of an installed disk kexec starts, and with what.

kexec itself is a stand-in: a boot in tests/integration/test_node_disk.py has the real one.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS
from tests.stages.disk_images import MIB
from tests.stages.disk_node import Node, prepared

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")

LOAD = """
anchor_disk__dir=$ANCHOR_RUN/disk
mkdir -p "$anchor_disk__dir"
anchor_disk__name=${anchor_disk_target##*/}
kexec() {
    [ "${REFUSES:+-s}" != "$1" ] || { printf '%s\\n' "$REFUSES" >&2; return 255; }
    for each; do
        case $each in
            --initrd=*) each="--initrd=$(cat "${each#*=}")" ;;
            */files/*) each="$(cat "$each")" ;;
        esac
        printf '%s\\n' "$each"
    done >"$ANCHOR_ROOT/kexec"
}
anchor_disk__kexec
"""


def wait_until_free(device: Path) -> None:
    """Wait until nothing has the device: on a busy machine, a file system may outlive its umount by a moment."""
    end = time.monotonic() + 10
    while True:
        try:
            os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
        except OSError:
            assert time.monotonic() < end, f"{device} is still in use"
            time.sleep(0.02)
        else:
            return


@dataclass(frozen=True)
class Installed:
    """A node whose disk is one file system with these files."""

    node: Node

    def fill(self, files: Mapping[str, str], links: Mapping[str, str] | None = None) -> None:
        """Make the file system."""
        tree = self.node.shell.root.parent / "tree"
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        for name, target in (links or {}).items():
            (tree / name).symlink_to(target)
        argv = ["mkfs.ext4", "-q", "-F", "-d", str(tree), str(self.node.device)]
        wait_until_free(self.node.device)
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def started(self, refuses: str = "") -> list[str]:
        """Return what kexec was told, files by what is in them."""
        done = self.node.run(f"REFUSES='{refuses}'{LOAD}")
        assert done.returncode == 0, done.stderr
        mounts = Path("/proc/self/mounts").read_text()
        assert str(self.node.shell.root) not in mounts
        return (self.node.shell.root / "kexec").read_text().splitlines()

    def refused(self, *messages: str, refuses: str = "") -> bool:
        """Whether nothing is started, for these reasons."""
        done = self.node.run(f"REFUSES='{refuses}'{LOAD}")
        return self.node.refused(done, *messages) and not (self.node.shell.root / "kexec").exists()


@pytest.fixture(params=sorted(SHELLS))
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Installed]:
    for node in prepared(request.param, tmp_path):
        yield Installed(node)


@pytest.fixture
def dash(tmp_path: Path) -> Iterator[Installed]:
    """One shell only, for what is the same in all."""
    for node in prepared("dash", tmp_path):
        yield Installed(node)


def entry(version: str, **lines: str) -> str:
    """Return an entry of the Boot Loader Specification."""
    given = {"linux": f"/vmlinuz-{version}", "initrd": f"/initrd-{version}", "options": "root=LABEL=root ro", **lines}
    return "".join(f"{key} {value}\n" for key, value in {"title": "A system", "version": version, **given}.items())


GRUB = """
set default="${saved_entry}"
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-1' {
\tload_video
\tif [ x$grub_platform = xxen ]; then insmod xzio; fi
\tlinux\t/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1-2 ro  quiet console=ttyS0,115200 $vt_handoff
\tinitrd\t/boot/initrd.img-6.1.0-9-amd64
}
menuentry 'recovery mode' {
\tlinux\t/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1-2 ro single
\tinitrd\t/boot/initrd.img-6.1.0-9-amd64
}
"""


def test_the_newest_entry_counts_and_no_rescue_system(installed: Installed) -> None:
    files = {f"loader/entries/{name}.conf": entry(name) for name in ("6.9.1-2", "6.10.0-1", "0-rescue-abc")}
    files |= {f"vmlinuz-{name}": f"kernel {name}" for name in ("6.9.1-2", "6.10.0-1", "0-rescue-abc")}
    files |= {f"initrd-{name}": f"initramfs {name}" for name in ("6.9.1-2", "6.10.0-1")}
    installed.fill(files)
    said = ["-s", "-l", "--initrd=initramfs 6.10.0-1", "--command-line=root=LABEL=root ro", "kernel 6.10.0-1"]
    assert installed.started() == said
    assert installed.node.note("note-kernel") == "/vmlinuz-6.10.0-1"
    assert installed.node.note("note-entry").endswith(":/loader/entries/6.10.0-1.conf")


def test_several_initramfs_and_variables_as_enterprise_linux_has_them(dash: Installed) -> None:
    # /boot is a part of the root here, and the paths are as if it were not.
    options = {"options": "$kernelopts $tuned_params panic=1", "initrd": "/microcode /initrd-4.18 $tuned_initrd"}
    files = {"boot/loader/entries/a.conf": entry("4.18", **options), "boot/vmlinuz-4.18": "kernel"}
    files |= {"boot/microcode": "micro", "boot/initrd-4.18": "initramfs"}
    files["boot/grub2/grubenv"] = "# GRUB Environment Block\nsaved_entry=x\nkernelopts=root=/dev/vda1 ro \n####"
    dash.fill(files)
    assert dash.started()[2:4] == ["--initrd=microinitramfs", "--command-line=root=/dev/vda1 ro panic=1"]


def test_grubs_first_kernel_counts_where_there_is_no_entry(installed: Installed) -> None:
    files = {"boot/grub/grub.cfg": GRUB, "boot/vmlinuz-6.1.0-9-amd64": "kernel"}
    installed.fill(files | {"boot/initrd.img-6.1.0-9-amd64": "initramfs"})
    options = "--command-line=root=UUID=1-2 ro quiet console=ttyS0,115200"
    assert installed.started() == ["-s", "-l", "--initrd=initramfs", options, "kernel"]


@pytest.mark.parametrize(
    ("lines", "links", "message"),
    [
        ({"linux": "/none"}, {}, "/none is not on this file system"),
        ({"initrd": "/none"}, {}, "/none is not on this file system"),
        ({"linux": "/../../../../../../etc/passwd"}, {}, "passwd is not on this file system"),
        ({"linux": "/link"}, {"link": "/etc/passwd"}, "/link is not on this file system"),
        ({"linux": "/up/passwd"}, {"up": "../../../../../../../../etc"}, "/up/passwd is not on this file system"),
        ({"options": "$kernelopts"}, {}, "is not in a grubenv"),
        ({"options": "root=\x1b[2J"}, {}, "not printable ASCII"),
    ],
    ids=["no kernel", "no initramfs", "up", "link", "directory", "grubenv", "control"],
)
def test_an_entry_that_cannot_be_right_is_passed_over(
    dash: Installed, lines: dict[str, str], links: dict[str, str], message: str
) -> None:
    files = {"loader/entries/9.conf": entry("9", **lines), "vmlinuz-9": "kernel 9", "initrd-9": "9"}
    dash.fill(files, links)
    assert dash.refused("found no kernel to start", "passing over /loader/entries/9.conf", message)
    older = {"loader/entries/8.conf": entry("8"), "vmlinuz-8": "kernel 8", "initrd-8": "8"}
    dash.fill(files | older)
    assert dash.started()[-1] == "kernel 8"


def test_a_disk_without_a_kernel_says_where_it_looked(dash: Installed) -> None:
    dash.fill({"etc/hostname": "x"})
    assert dash.refused("found no kernel to start", f"looked at: {dash.node.device.name}", "reboot")


def test_a_kernel_that_is_not_signed_is_refused_with_the_kernels_words(dash: Installed) -> None:
    dash.fill({"loader/entries/9.conf": entry("9"), "vmlinuz-9": "kernel 9", "initrd-9": "9"})
    # The last one is Linux's answer to a file without a signature.
    for why in (
        "Required key not available",
        "Key was rejected by service",
        "Operation not permitted",
        "No data available",
    ):
        words = f"kexec_file_load failed: {why}"
        # The older way asks for no signature, and is not taken.
        assert dash.refused("does not take /vmlinuz-9", words, "Secure Boot", "lockdown=", refuses=words)
    assert dash.refused("No data available (it has no signature)", refuses=words)


def test_where_the_kernel_reads_no_file_the_older_way_is_taken(dash: Installed) -> None:
    dash.fill({"loader/entries/9.conf": entry("9"), "vmlinuz-9": "kernel 9", "initrd-9": "9"})
    assert dash.started("syscall kexec_file_load not available.")[0] == "-l"
    assert "syscall kexec_file_load not available." in (dash.node.shell.root / "run/anchor/boot.log").read_text()


def test_what_cannot_start_a_kernel_says_so_before_a_disk_is_written(dash: Installed) -> None:
    image = dash.node.put("image", bytes(MIB))
    done = dash.node.run("PATH=/none\nanchor_disk_run", disk_url=image, disk_then="kexec")
    assert dash.node.refused(done, "this initramfs has no kexec", "kexec-tools")
    (dash.node.shell.root / "proc").unlink()
    file = dash.node.shell.root / "proc/sys/kernel/kexec_load_disabled"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    done = dash.node.run("kexec() { :; }\nanchor_disk_run", disk_url=image, disk_installed="kexec")
    assert dash.node.refused(done, "starts no other (kernel.kexec_load_disabled)")
    assert not any(dash.node.file.read_bytes())


@pytest.mark.parametrize(
    ("state", "locked"),
    [("none [integrity] confidentiality", True), ("[none] integrity confidentiality", False), ("", False)],
)
def test_a_kernel_that_is_locked_down_says_what_it_starts(dash: Installed, state: str, locked: bool) -> None:
    script = f"anchor_recall() {{ case $1 in */lockdown) anchor_recall='{state}' ;; *) anchor_recall=0 ;; esac; }}\n"
    done = dash.node.run(f"{script}kexec() {{ :; }}\nanchor_disk__kexec_possible")
    assert done.returncode == 0, done.stderr
    assert ("this kernel is locked down: it starts only one that is signed" in done.stderr) is locked
