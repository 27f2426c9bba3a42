"""Packages, spec and source archive as data: what follows from a declaration, and what is refused."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from datetime import date
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError, InvalidFilesError
from anchor_build.registry import load_registry
from anchor_build.rpm import spec
from anchor_build.rpm.changelog import Release
from anchor_build.rpm.spec import choose_stages, make_packages, make_packaging, render_spec, source_archive
from anchor_build.stage import Stage, load_stage
from tests.conftest import SITE_STAGES, WriteStage

TIME = 1_700_000_000  # 2023-11-14


def one(stage: Stage, family: str = "fedora") -> spec.Package:
    return make_packages([load_registry().core, stage], family)[1]


def packaging(version: str = "1.2.3", release: str = "1") -> spec.Packaging:
    return make_packaging(make_packages(choose_stages(load_registry()), "fedora"), version, release, TIME)


def relations(package: spec.Package, tag: str) -> list[str]:
    return [value for name, value in package.relations if name == tag]


@pytest.mark.parametrize(("family", "iproute", "network"), [("fedora", "iproute", True), ("suse", "iproute2", False)])
def test_names_are_those_of_the_family(family: str, iproute: str, network: bool) -> None:
    core = make_packages(choose_stages(load_registry()), family)[0]
    required = relations(core, "Requires")
    assert iproute in required
    assert ("dracut-network" in required) is network
    assert "dracut" in required
    assert len(required) == len(set(required))


def test_every_stage_is_a_package_with_what_it_declares() -> None:
    stages = choose_stages(load_registry([SITE_STAGES]))
    packages = {package.name: package for package in make_packages(stages, "fedora")}
    assert [package_stage.id for package_stage in stages] == [p.module.stage.id for p in packages.values()]
    acme = load_registry().find("auth", "acme")
    declared = {binary.rpm for binary in acme.binaries}
    assert {"socat", "uacme"} <= declared
    assert relations(packages["anchor-dracut-auth-acme"], "Requires") == sorted(declared)
    assert relations(packages["anchor-dracut-auth-acme"], "Obsoletes") == ["anchor-dracut-module < 0.2.0~"]
    assert "anchor-dracut-auth-local-file" in packages
    for package in packages.values():
        assert len(package.summary) < 80
        assert not package.summary.endswith((".", ":", ","))
        assert all(len(line) < 80 for line in package.description.splitlines())


def test_an_update_of_anchor_0_1_5_brings_what_it_could_do() -> None:
    """Its one package had every way to authenticate and fetch whose parameters are accepted under their older names."""
    packages = make_packages(choose_stages(load_registry()), "fedora")
    replacing = {package.module.stage.id for package in packages if relations(package, "Obsoletes")}
    older = {p.module.stage.id for p in packages if any(param.alias for param in p.module.stage.params)}
    # squashfs_mount_only= is a parameter of the image, for which the transport is needed; the disk's names are ocidd's.
    assert replacing == {"anchor", *older, "transport-file"} - {"transport-https", "image-disk"}


def test_nodes_are_told_the_version_of_the_package() -> None:
    core = make_packages(choose_stages(load_registry()), "fedora", version="1.2.3rc1")[0]
    assert core.module.files["version"].content == b"1.2.3rc1\n"


def test_an_image_stage_brings_the_transport_without_which_it_is_idle() -> None:
    registry = load_registry()
    stages = choose_stages(registry, [registry.find("image", "squashfs")])
    assert [stage.id for stage in stages] == ["anchor", "transport-https", "image-squashfs"]
    image = make_packages(stages, "fedora")[-1]
    own = {"coreutils", "device-mapper", "util-linux"}
    assert set(relations(image, "Requires")) - own == {"anchor-dracut-transport-https = %{version}-%{release}"}
    alone = choose_stages(registry, [registry.find("auth", "acme")])
    assert [stage.id for stage in alone] == ["anchor", "auth-acme"]


def test_optional_programs_are_recommended(write_stage: WriteStage) -> None:
    binaries = (
        '{ name = "a", rpm = "a-rpm", deb = "a", optional = true }, { name = "b", rpm = "both", deb = "b" },'
        '{ name = "c", rpm = "both", deb = "b", optional = true },'
        '{ name = "d", rpm = "-", deb = "d", optional = true }'
    )
    stage = load_stage(write_stage(header=f"binaries = [{binaries}]"), "a test")
    assert one(stage).relations == (("Requires", "both"), ("Recommends", "a-rpm"))


@pytest.mark.parametrize(
    ("names", "family", "key"),
    [
        ('rpm = "-"', "fedora", "rpm"),
        ('rpm = "-"', "suse", "rpm"),
        ('rpm = "tool", suse = "-"', "suse", "suse"),
    ],
)
def test_a_program_without_a_package_is_named_by_file_and_key(
    write_stage: WriteStage, names: str, family: str, key: str
) -> None:
    header = f'binaries = [{{ name = "sh", rpm = "sh", deb = "sh" }}, {{ name = "tool", deb = "tool", {names} }}]'
    directory = write_stage(header=header)
    with pytest.raises(InvalidFilesError) as caught:
        one(load_stage(directory, "a test"), family)
    [problem] = caught.value.problems
    expected = f"stage.binaries[1].{key}: names no package of tool for the family {family}"
    assert problem == f"{directory / 'stage.toml'}: {expected}"
    assert "--stage" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "release"), [("1.2-rc1", "1"), ("1.2", "1-2"), ("1.2 3", "1"), ("", "1"), ("%x", "1")]
)
def test_versions_that_rpm_does_not_allow_are_refused(version: str, release: str) -> None:
    with pytest.raises(AnchorError) as caught:
        packaging(version, release)
    assert ("between version and release" in caught.value.message) is ("-" in version + release)
    assert "1.2~rc1" in caught.value.hint


def test_text_is_never_expanded_by_rpm(write_stage: WriteStage) -> None:
    directory = write_stage()
    file = directory / "stage.toml"
    file.write_text(file.read_text().replace('"A stage."', '"Takes 100%, %{_topdir}, %(touch /x) and %name."'))
    packages = make_packages([load_registry().core, load_stage(directory, "a test")], "fedora")
    spec = render_spec(make_packaging(packages, "1", "1", TIME))
    assert "Takes 100%%, %%{_topdir}, %%(touch /x) and %%name" in spec
    assert "%(" not in spec.replace("%%(", "")


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("Short.", "Short"),
        ("A: " + "b" * 40 + ", " + "c" * 60 + ".", "A: " + "b" * 40),
        ("word " * 30, " ".join(["word"] * 15) + " ..."),
    ],
)
def test_summaries_end_at_a_boundary(text: str, summary: str) -> None:
    assert spec._summary(text) == summary


def test_changelog_is_the_projects_own() -> None:
    made = dataclasses.replace(
        packaging(),
        changes=(
            Release("1.2.3", None, ("Added: 100% more, " + "long " * 30,)),
            Release("1.0", date(2023, 3, 5), ("Fixed: one.", "Fixed: two.")),
        ),
    )
    text = render_spec(made).partition("%changelog\n")[2]
    lines = text.splitlines()
    assert lines[0] == "* Tue Nov 14 2023 anchor-build - 1.2.3-1"
    assert lines[1].startswith("- Added: 100%% more, long long")
    assert "* Sun Mar 05 2023 anchor-build - 1.0-1\n- Fixed: one.\n- Fixed: two.\n" in text
    assert all(len(line) < 80 for line in lines)


def test_a_tree_after_a_release_has_an_entry_of_its_own() -> None:
    made = dataclasses.replace(packaging("1.1~dev2"), changes=(Release("1.0", date(2023, 3, 5), ("Fixed: one.",)),))
    text = render_spec(made).partition("%changelog\n")[2]
    assert text.startswith("* Tue Nov 14 2023 anchor-build - 1.1~dev2-1\n- Built from the tree after 1.0\n")


def test_source_archive_is_always_the_same_and_holds_what_was_rendered(tmp_path: Path) -> None:
    made = packaging()
    first = source_archive(made)
    assert first == source_archive(packaging())
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members.values()} == {(TIME, 0, 0, "root")}
        tar.extractall(tmp_path, filter="data")
    top = tmp_path / "anchor-dracut-module-1.2.3"
    for package in made.packages:
        directory = top / "modules.d" / package.directory
        assert sorted(path.name for path in directory.iterdir()) == sorted(package.module.files)
        for name, file in package.module.files.items():
            assert (directory / name).read_bytes() == file.content
            assert members[f"{top.name}/modules.d/{package.directory}/{name}"].mode == file.mode
    assert (top / "LICENSE").is_file()
    assert (top / "doc" / "anchor-dracut-module" / "dracut-anchor.conf").is_file()
