"""`anchor-build inspect` on packages that rpmbuild makes, whole or not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import read_artifact
from tests.integration.inspect_files import cut, image, inspect, make_tree, refuse

SPEC = """\
Name: demo
Epoch: 2
Version: 1.2.3~dev5.gabcdef0
Release: 1
Summary: A package
License: Apache-2.0
BuildArch: noarch
Requires: dracut >= 59
Recommends: curl
Provides: older = 1
Obsoletes: older < 2
%description
What it is.
%install
mkdir -p %{buildroot}/usr/lib/demo %{buildroot}/etc
printf '%{?text}%{!?text:text}' >%{buildroot}/usr/lib/demo/file
printf x >%{buildroot}/usr/lib/demo/one
ln %{buildroot}/usr/lib/demo/one %{buildroot}/usr/lib/demo/two
ln -s file %{buildroot}/usr/lib/demo/link
touch %{buildroot}/etc/ghost
%post
:
%files
%dir /usr/lib/demo
%attr(0640, root, root) /usr/lib/demo/file
/usr/lib/demo/one
/usr/lib/demo/two
/usr/lib/demo/link
%ghost /etc/ghost
%changelog
* Sat Jan 03 2026 A <a@example.org> - 1.2.3-1
- It begins.
"""
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    if shutil.which("rpmbuild") is None:
        pytest.skip("rpmbuild is missing")

    def build(*options: str, name: str = "demo", mode: str = "-bb") -> Path:
        top = tmp_path / name
        top.mkdir()
        (top / "demo.spec").write_text(SPEC)
        argv = ["rpmbuild", "--quiet", "--nodeps", mode, "--define", f"_topdir {top}", *options, top / "demo.spec"]
        subprocess.run(list(map(str, argv)), check=True, capture_output=True, timeout=60)
        (made,) = (path for path in top.rglob("*.rpm"))
        return made

    return build


@pytest.mark.parametrize(
    ("macro", "name"), [("w6.gzdio", "gzip"), ("w3.xzdio", "xz"), ("w3.zstdio", "zstd"), ("w3.bzdio", "bzip2")]
)
def test_a_package_with_each_payload(build: Build, macro: str, name: str) -> None:
    found = read_artifact(build("--define", f"_binary_payload {macro}"))
    facts = found.facts
    assert (found.kind, facts["payload"], facts["name"], facts["arch"]) == ("rpm", name, "demo", "noarch")
    assert (facts["version"], facts["release"]) == ("2:1.2.3~dev5.gabcdef0", "1")
    assert "dracut >= 59" in facts["requires"]
    assert facts["recommends"] == ["curl"]
    assert facts["obsoletes"] == ["older < 2"]
    assert {"older = 1", "demo = 2:1.2.3~dev5.gabcdef0-1"} <= set(facts["provides"])
    assert facts["scripts"] == ["postin"]
    assert facts["signature"] == "none"
    assert "It begins." in facts["changelog"]
    entries = found.entries
    assert set(entries) == {f"usr/lib/demo{part}" for part in ("", "/file", "/one", "/two", "/link")} | {"etc/ghost"}
    assert entries["usr/lib/demo/file"].values["mode"] == "0640"
    assert entries["usr/lib/demo/file"].owner == "root:root"
    assert entries["usr/lib/demo/file"].digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert entries["usr/lib/demo/one"].digest == entries["usr/lib/demo/two"].digest != ""
    assert entries["usr/lib/demo/link"].target == "file"
    assert entries["etc/ghost"].digest == ""


@pytest.mark.parametrize("algorithm", ["1", "10"])
def test_a_package_with_other_digests(build: Build, algorithm: str) -> None:
    found = read_artifact(build("--define", f"_binary_filedigest_algorithm {algorithm}"))
    digest = found.entries["usr/lib/demo/file"].digest
    assert digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"


def test_a_source_package(build: Build) -> None:
    found = read_artifact(build(mode="-bs"))
    assert found.facts["arch"] == "src"
    assert set(found.entries) == {"demo.spec"}


def test_a_package_for_people(build: Build) -> None:
    file = build()
    said = inspect(file, "--files")
    assert (said.status, said.err) == (0, "")
    assert "2:1.2.3~dev5.gabcdef0" in said.out
    assert "-rw-r-----  root:root      4  usr/lib/demo/file" in said.out
    brief = inspect(file)
    assert "usr/lib/demo/file" not in brief.out
    assert "dracut >= 59" in brief.out
    assert brief.err == "6 entries: --files lists them\n"


def test_how_two_packages_differ(build: Build) -> None:
    first, second = build(), build("--define", "text other", name="second")
    data = inspect(first, second, "--json").data
    assert data["changed"]["usr/lib/demo/file"]["size"] == ["4", "5"]
    assert "sha256" in data["changed"]["usr/lib/demo/file"]
    assert data["same"] is False
    assert "usr/lib/demo/file: size 4 -> 5, content" in inspect(first, second).out


def test_a_package_that_is_cut_off_or_damaged(build: Build) -> None:
    file = build("--define", "_binary_payload w6.gzdio")
    size = file.stat().st_size
    for length in (4, 90, 100, 120, 500, size // 2, size - 20, size - 1):
        refuse(cut(file, length))
    good = file.read_bytes()
    for position in range(96, size, 13):
        for value in (0, 0xFF):
            file.write_bytes(good[:position] + bytes([value]) + good[position + 1 :])
            try:
                read_artifact(file)
            except AnchorError as error:
                assert all(c == "\n" or c.isprintable() for c in error.message)


def test_a_payload_that_was_replaced(build: Build) -> None:
    """The payload of one package behind the header of another."""
    none = ("--define", "_binary_payload w.ufdio")
    first, second = build(*none), build(*none, "--define", "text evil", name="second")
    genuine, evil = first.read_bytes(), second.read_bytes()
    start = genuine.index(b"07070100")
    first.write_bytes(genuine[:start] + evil[evil.index(b"07070100") :])
    assert "usr/lib/demo/file: has another digest" in refuse(first).message


def test_different_kinds_are_not_compared(tmp_path: Path, build: Build) -> None:
    said = inspect(build(), image(make_tree(tmp_path), "erofs"))
    assert (said.status, said.out) == (2, "")
    assert "cannot be compared" in said.err
