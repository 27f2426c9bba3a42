"""Which kernel: releases ordered as people order them, read from an image, found with their modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from anchor_build import kernel
from anchor_build.cli import cli
from anchor_build.errors import AnchorError
from anchor_build.kernel import Kernel, check_place, find_kernel, installed_releases, release_of, version_key
from anchor_build.root import Root
from tests.unit.test_root import elf

RELEASE = "6.1.0-56-cloud-amd64"


def kernel_image(path: Path, release: str = RELEASE, magic: bytes = b"HdrS") -> Path:
    """Write the start of an x86 kernel image: the setup header, and the version text where its pointer says."""
    data = bytearray(0x4000)
    data[0x202:0x206] = magic
    data[0x20E:0x210] = (0x3000).to_bytes(2, "little")
    text = f"{release} (debian-kernel@lists.debian.org) #1 SMP".encode() + b"\0"
    data[0x3200 : 0x3200 + len(text)] = text
    path.write_bytes(data)
    return path


def modules(tree: Path, release: str, dep: str = "kernel/fs/overlayfs/overlay.ko:\n") -> Path:
    directory = tree / release
    directory.mkdir(parents=True)
    (directory / "modules.dep").write_text(dep, encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for /lib/modules."""
    directory = tmp_path / "host-modules"
    directory.mkdir()
    monkeypatch.setattr(kernel, "MODULE_TREES", (directory,))
    return directory


ORDERED = [
    ["4.18.0-957.el8.x86_64", "4.18.0-1062.el8.x86_64"],
    ["4.18.0-80.el8.x86_64", "4.18.0-80.1.2.el8_0.x86_64", "4.18.0-80.11.1.el8_0.x86_64", "4.18.0-147.el8.x86_64"],
    ["3.10.0-957.21.3.el7.x86_64", "3.10.0-1062.el7.x86_64", "5.14.0-70.el9.x86_64"],
    ["5.9", "5.10", "6.1"],
    ["6.1-rc1", "6.1-rc2", "6.1-rc10", "6.1", "6.1.1"],
    ["6.1~rc3-amd64", "6.1-amd64"],
    ["6.1.0-9-amd64", "6.1.0-18-amd64"],
    ["6.8.0-rc7", "6.8.0"],
]


@pytest.mark.parametrize("ordered", ORDERED, ids=lambda releases: releases[0])
def test_releases_are_ordered_as_people_do(ordered: list[str]) -> None:
    backwards = ordered[::-1]
    assert sorted(backwards, key=version_key) == ordered
    assert sorted(ordered, key=version_key) == ordered


def test_any_two_releases_can_be_compared() -> None:
    every = [release for ordered in ORDERED for release in ordered]
    assert len(sorted([*every, "", "~", "x", "1x", "6.1+", "6.1."], key=version_key)) == len(every) + 6


def test_the_newest_kernel_of_this_host(tree: Path) -> None:
    for release in ("4.18.0-957.el8.x86_64", "4.18.0-1062.el8.x86_64"):
        modules(tree, release)
    (tree / "9.9.9-without-modules").mkdir()
    assert installed_releases() == ["4.18.0-957.el8.x86_64", "4.18.0-1062.el8.x86_64"]
    assert find_kernel(None).release == "4.18.0-1062.el8.x86_64"


@pytest.mark.parametrize(
    ("options", "offered"), [([], ["6.1"]), (["--sysroot", "/x"], [""]), (["--container", "x"], [""])]
)
def test_shells_complete_the_kernels_of_this_host_only(tree: Path, options: list[str], offered: list[str]) -> None:
    modules(tree, "6.1")
    completion = ShellComplete(cli, {}, "anchor-build", "_X")
    assert [item.value for item in completion.get_completions(["initramfs", *options, "--kernel"], "")] == offered


def test_a_host_without_a_kernel() -> None:
    with pytest.raises(AnchorError, match="this host has no kernel with modules") as caught:
        find_kernel(None)
    assert "--modules" in caught.value.hint


def test_a_release_without_modules_names_those_that_there_are(tree: Path) -> None:
    modules(tree, "6.1.0-9-amd64")
    modules(tree, "6.1.0-18-amd64")
    with pytest.raises(AnchorError) as caught:
        find_kernel("6.1.0-20-amd64")
    assert caught.value.message == f"kernel 6.1.0-20-amd64: no modules (modules.dep) in {tree}/6.1.0-20-amd64"
    assert "kernels of this host: 6.1.0-9-amd64, 6.1.0-18-amd64;" in caught.value.hint


@pytest.mark.parametrize("release", ["$(reboot)", "../../etc", "6.1 x", "6", "-6.1", ""])
def test_what_is_no_release(release: str, tmp_path: Path) -> None:
    directory = modules(tmp_path / "elsewhere", release or "x")
    with pytest.raises(AnchorError):
        find_kernel(None, directory)
    if release and "/" not in release:
        with pytest.raises(AnchorError, match="is not a kernel release"):
            find_kernel(release)


def test_the_release_is_read_from_the_image(tmp_path: Path) -> None:
    assert release_of(kernel_image(tmp_path / "vmlinuz")) == RELEASE


def test_an_image_leads_to_the_modules_beside_its_boot_directory(tmp_path: Path) -> None:
    (tmp_path / "root" / "boot").mkdir(parents=True)
    image = kernel_image(tmp_path / "root" / "boot" / "vmlinuz")
    directory = modules(tmp_path / "root" / "lib" / "modules", RELEASE)
    assert find_kernel(str(image)) == Kernel(RELEASE, directory, image)


def test_an_image_in_the_current_directory_needs_no_slash(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_image(tmp_path / "vmlinuz")
    modules(tree, RELEASE)
    monkeypatch.chdir(tmp_path)
    assert find_kernel("vmlinuz") == Kernel(RELEASE, tree / RELEASE, Path("vmlinuz"))


def test_a_modules_directory_says_which_release(tmp_path: Path) -> None:
    directory = modules(tmp_path / "x", RELEASE)
    (tmp_path / "link").symlink_to(directory)
    assert find_kernel(None, tmp_path / "link") == Kernel(RELEASE, directory)


def test_an_image_that_does_not_tell_its_release_goes_with_a_modules_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "Image.gz"
    image.write_bytes(b"\x1f\x8b an arm64 kernel")
    directory = modules(tmp_path / "x", "6.1.0-56-arm64")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert find_kernel(str(image), directory).release == "6.1.0-56-arm64"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(AnchorError, match=r"Image\.gz: is not an x86 Linux kernel image") as caught:
        find_kernel(str(image), directory)
    assert "--modules" not in caught.value.hint, "they were named"


def pe(machine: int) -> bytes:
    """Return the start of a PE file: a unified kernel image has no boot protocol."""
    return (
        b"MZ".ljust(0x3C, b"\0")
        + (0x80).to_bytes(4, "little").ljust(0x44, b"\0")
        + b"PE\0\0"
        + machine.to_bytes(2, "little")
    )


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (elf(62), True),
        (elf(3), True),
        (elf(183), False),
        (pe(0x8664), True),
        (pe(0xAA64), False),
        (b"MZ\0\x91".ljust(0x38, b"\0") + b"ARM\x64", False),
        (b"MZ", False),
        (b"hsqs".ljust(4096, b"\0"), False),
        (b"070701", False),
        (b"\x28\xb5\x2f\xfd", False),
    ],
    ids=["elf", "elf32", "arm64 elf", "pe", "arm64 pe", "arm64 Image", "dos", "squashfs", "cpio", "zstd"],
)
def test_which_images_go_with_a_modules_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, taken: bool
) -> None:
    image = tmp_path / "vmlinux"
    image.write_bytes(content)
    directory = modules(tmp_path / "x", RELEASE)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if taken:
        assert find_kernel(str(image), directory).image == image
    else:
        with pytest.raises(AnchorError, match="vmlinux: is not an x86 Linux kernel image"):
            find_kernel(str(image), directory)


@pytest.mark.parametrize("by_image", [True, False])
def test_a_kernel_and_the_modules_of_another_one(tmp_path: Path, by_image: bool) -> None:
    wanted = str(kernel_image(tmp_path / "vmlinuz")) if by_image else RELEASE
    directory = modules(tmp_path / "x", "6.1.0-18-amd64")
    with pytest.raises(AnchorError, match=r"is 6\.1\.0-56-cloud-amd64, but --modules .* is of 6\.1\.0-18-amd64"):
        find_kernel(wanted, directory)


def test_which_files_are_drivers_of_network_cards(tmp_path: Path) -> None:
    found = find_kernel(None, modules(tmp_path, RELEASE))
    top = f"usr/lib/modules/{RELEASE}"
    others = [f"{top}/kernel/drivers/net/{name}.ko" for name in ("bonding/bonding", "phy/phylib", "net_failover")]
    assert not found.drives_network([*others, "usr/bin/bash", f"{top}/updates/dkms", "usr/share/updates/x.ko"])
    for name in (
        "kernel/drivers/net/virtio_net.ko.xz",
        "extra/mlnx/drivers/net/ethernet/mellanox/mlx5/core/mlx5_core.ko",
        "updates/dkms/r8125.ko.xz",
        "extra/ixgbe/ixgbe.ko",
        "weak-updates/i40e/i40e.ko.zst",
        "kernel/drivers/net/thunderbolt/thunderbolt_net.ko",
        "kernel/drivers/net/thunderbolt.ko",
        "kernel/drivers/staging/qlge/qlge.ko",
        "kernel/drivers/infiniband/ulp/opa_vnic/opa_vnic.ko",
    ):
        assert found.drives_network([*others, f"{top}/{name}"])
    (found.modules / "modules.builtin").write_text("kernel/drivers/net/ethernet/intel/igb/igb.ko\n", encoding="utf-8")
    assert found.drives_network([])


def test_dracut_takes_modules_from_one_place_only(tmp_path: Path) -> None:
    for name in ("lib/modules", "usr/lib/modules"):
        check_place(find_kernel(None, modules(tmp_path / name, RELEASE)))
    with pytest.raises(
        AnchorError, match=f"--modules {tmp_path}/x/{RELEASE}: dracut takes modules only from a directory"
    ):
        check_place(find_kernel(None, modules(tmp_path / "x", RELEASE)))


def test_modules_of_another_system_in_a_place_that_dracut_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "MODULE_TREES", (Path("/lib/modules"),))
    modules(tmp_path / "srv", RELEASE)
    (tmp_path / "lib/modules").mkdir(parents=True)
    (tmp_path / "lib/modules" / RELEASE).symlink_to(f"/srv/{RELEASE}")
    with pytest.raises(
        AnchorError, match=rf"^{tmp_path}: the modules of {RELEASE} lie in /srv/{RELEASE}, and"
    ) as caught:
        check_place(find_kernel(None, None, Root(tmp_path)))
    assert "--modules" not in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"ELF", b"\0" * 0x8000, b"\0" * 0x202 + b"HdrS"], ids=len)
def test_a_file_that_is_no_kernel(tmp_path: Path, content: bytes) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(content)
    with pytest.raises(AnchorError, match=r"is not an x86 Linux kernel image|is not a kernel release"):
        find_kernel(str(image))


def test_an_image_whose_version_pointer_leaves_the_file(tmp_path: Path) -> None:
    image = kernel_image(tmp_path / "vmlinuz")
    image.write_bytes(image.read_bytes()[:0x3000])
    with pytest.raises(AnchorError, match="is not an x86 Linux kernel image"):
        release_of(image)


def test_an_image_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(AnchorError, match=f"--kernel {tmp_path}/vmlinuz: no such file"):
        find_kernel(str(tmp_path / "vmlinuz"))


def test_an_image_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = kernel_image(tmp_path / "vmlinuz")
    there = modules(tmp_path / "x", RELEASE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(image))

    monkeypatch.setattr(Path, "open", refuse)
    for directory in (None, there):
        with pytest.raises(AnchorError, match="vmlinuz: cannot be read: Permission denied") as caught:
            find_kernel(str(image), directory)
        assert caught.value.hint == ""


def test_drivers_are_named_with_underscores(tmp_path: Path) -> None:
    dep = "kernel/a/virtio-rng.ko.xz: kernel/b/virtio.ko\nkernel/b/virtio.ko:\n"
    directory = modules(tmp_path, RELEASE, dep)
    (directory / "modules.builtin").write_text("kernel/fs/ext-4.ko\n", encoding="utf-8")
    found = Kernel(RELEASE, directory)
    assert found.driver_names() == {"virtio_rng", "virtio"}
    assert found.builtin_names() == {"ext_4"}


@pytest.mark.parametrize(
    ("release", "config", "compression", "expected"),
    [
        ("6.1.0", "CONFIG_RD_ZSTD=y\n", "zstd", True),
        ("6.1.0", "# CONFIG_RD_ZSTD is not set\nCONFIG_RD_XZ=y\n", "zstd", False),
        ("4.18.0-80.el8", None, "zstd", False),
        ("5.8.18", None, "zstd", False),
        ("5.9.0-1", None, "zstd", True),
        ("5.14.0-70.el9", None, "zstd", True),
        ("4.18.0-80.el8", None, "gzip", True),
    ],
)
def test_what_a_kernel_unpacks(
    tmp_path: Path, release: str, config: str | None, compression: str, expected: bool
) -> None:
    directory = modules(tmp_path, release)
    if config is not None:
        (directory / "config").write_text(config, encoding="utf-8")
    assert Kernel(release, directory).unpacks(compression) is expected


def test_the_configuration_beside_the_image_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = kernel_image(tmp_path / "vmlinuz")
    (tmp_path / f"config-{RELEASE}").write_text("CONFIG_RD_ZSTD=n\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    directory = modules(tmp_path, RELEASE)
    for path in (image, Path("vmlinuz")):
        assert not Kernel(RELEASE, directory, path).unpacks("zstd")
