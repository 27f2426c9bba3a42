"""`anchor-build image --distribution`: real mmdebstrap and dnf, with repositories of stub packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from anchor_build.distribution import Distribution, dnf_arguments, host_sources
from tests.integration.test_image import inside, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and capabilities")


def call(*words: str | Path) -> None:
    """Run a program that has to succeed."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True, timeout=60)


@dataclass(frozen=True)
class Signer:
    """A key of gpg, and the file of its public half."""

    home: Path
    public: Path

    def gpg(self, *words: str | Path) -> None:
        """Run gpg with this key."""
        call("gpg", "--homedir", self.home, "--batch", "--quiet", *words)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    top = tmp_path_factory.mktemp("signer")
    home = top / "gnupg"
    home.mkdir(mode=0o700)
    made = Signer(home, top / "site.asc")
    made.gpg("--passphrase", "", "--quick-gen-key", "site", "rsa2048", "sign", "never")
    made.gpg("--armor", "--output", made.public, "--export", "site")
    return made


@pytest.fixture(scope="module")
def rpms(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    """Return a repository with one signed package, `tiny`."""
    if shutil.which("dnf") is None or shutil.which("createrepo_c") is None:
        pytest.skip("needs dnf and createrepo_c")
    top = tmp_path_factory.mktemp("rpms")
    repository = top / "repo"
    (top / "tiny.spec").write_text(
        "Name: tiny\nVersion: 1\nRelease: 1\nSummary: x\nLicense: MIT\nBuildArch: noarch\n%description\nx\n"
        "%install\nmkdir -p %{buildroot}/etc\necho from an rpm >%{buildroot}/etc/tiny\n"
        "echo 0123456789abcdef0123456789abcdef >%{buildroot}/etc/machine-id\n%files\n/etc/tiny\n/etc/machine-id\n"
    )
    call("rpmbuild", "-bb", "--quiet", "-D", f"_topdir {top}/rpm", "-D", f"_rpmdir {repository}", top / "tiny.spec")
    (package,) = repository.rglob("*.rpm")
    macros = ("__gpg /usr/bin/gpg", "_gpg_name site", f"_gpg_path {signer.home}")
    call("rpmsign", "--addsign", *(word for macro in macros for word in ("-D", macro)), package)
    call("createrepo_c", "--quiet", repository)
    return repository


def test_an_rpm_distribution_is_installed_from_its_mirrors(tmp_path: Path, rpms: Path, signer: Signer) -> None:
    image = tmp_path / "el.squashfs"
    options = ("--distribution", "site:9", "--mirror", f"file://{rpms}", "--mirror-key", signer.public)
    done = run(*options, "--package", "tiny", "-o", image, "--json")
    assert done.returncode == 0, done.stderr
    found = inside(image, "squashfs", tmp_path)
    assert found["etc/tiny"][6] == b"from an rpm\n"
    assert found["etc/machine-id"][6] == b"", "each node gets its own"
    assert "var/cache/dnf" not in found
    assert json.loads(done.stdout)["sources"] == [f"file://{rpms}"]
    for words, hint in (
        (("--package", "absent"), "names of the packages right"),
        (("--package", "tiny", "--mirror-key", other_key(tmp_path)), "is --mirror-key the public key that signs"),
    ):
        done = run(*options, *words, "-o", tmp_path / "none.squashfs")
        assert (done.returncode, hint in done.stderr) == (1, True), done.stderr
        assert not (tmp_path / "none.squashfs").exists()


def other_key(tmp_path: Path) -> Path:
    """Return the public half of a key that signed nothing."""
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    made = Signer(home, tmp_path / "another.asc")
    made.gpg("--passphrase", "", "--quick-gen-key", "another", "rsa2048", "sign", "never")
    made.gpg("--armor", "--output", made.public, "--export", "another")
    return made.public


def test_dnf5_is_told_to_use_the_repositories_of_this_host(tmp_path: Path) -> None:
    fedora = Distribution("fedora:42")
    old, new = (dnf_arguments(fedora, tmp_path, text) for text in ("4.14.0\n", "dnf5 version 5.2.8.1\n"))
    assert [word for word in new if word not in old] == ["--use-host-config"]


@pytest.fixture(scope="module")
def debs(tmp_path_factory: pytest.TempPathFactory, signer: Signer) -> Path:
    """Return a signed archive with one package, `tiny`; its suite is `stable`."""
    if shutil.which("mmdebstrap") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs mmdebstrap and dpkg-deb")
    top = tmp_path_factory.mktemp("debs")
    package, archive = top / "package", top / "archive"
    (package / "DEBIAN").mkdir(parents=True)
    (package / "etc").mkdir()
    (package / "etc/tiny").write_text("from a deb\n")
    (package / "proc").mkdir()
    control = "Package: tiny\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    (package / "DEBIAN/control").write_text(control)
    lists = archive / "dists/stable/main/binary-amd64"
    lists.mkdir(parents=True)
    call("dpkg-deb", "--root-owner-group", "--build", package, archive / "tiny.deb")
    data = (archive / "tiny.deb").read_bytes()
    facts = f"Filename: tiny.deb\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
    text = (control + facts).encode()
    (lists / "Packages").write_bytes(text)
    release = archive / "dists/stable/Release"
    release.write_text(
        "Suite: stable\nCodename: stable\nComponents: main\nArchitectures: amd64 all\n"
        "Date: Thu, 01 Jan 2026 00:00:00 UTC\n"
        f"SHA256:\n {hashlib.sha256(text).hexdigest()} {len(text)} main/binary-amd64/Packages\n"
    )
    signer.gpg("--clearsign", "--output", release.with_name("InRelease"), release)
    return archive


def test_a_deb_distribution_is_installed_from_its_mirrors(tmp_path: Path, debs: Path, signer: Signer) -> None:
    source = f"deb [arch=amd64] copy://{debs} stable main"
    options = ("--distribution", "debian:stable", "--variant", "extract", "--package", "tiny", "--mirror", source)
    image = tmp_path / "deb.squashfs"
    done = run(*options, "--mirror-key", signer.public, "-o", image, "--json")
    assert done.returncode == 0, done.stderr
    found = inside(image, "squashfs", tmp_path)
    assert found["etc/tiny"][6] == b"from a deb\n"
    assert not found.keys() & {"etc/hostname", "etc/resolv.conf"}, "these are of the host that built it"
    # The report says how to make the same bytes again.
    again = tmp_path / "again.squashfs"
    epoch = str(json.loads(done.stdout)["source_date_epoch"])
    assert run(*options, "--mirror-key", signer.public, "-o", again, SOURCE_DATE_EPOCH=epoch).returncode == 0
    assert again.read_bytes() == image.read_bytes()
    done = run(*options, "-o", tmp_path / "none.squashfs")
    assert (done.returncode, "is --mirror-key the public key" in done.stderr) == (1, True), done.stderr
    done = run(*options, "--mirror-key", signer.public, "--package", "absent", "-o", tmp_path / "none.squashfs")
    assert (done.returncode, "names of the packages right" in done.stderr) == (1, True), done.stderr


def test_the_mirrors_of_this_host_serve_every_suite() -> None:
    lines = host_sources("debian", "trixie")
    if not lines:
        pytest.skip("this is no Debian")
    assert any(line.endswith(" trixie main") for line in lines)
    assert any(line.endswith(" trixie-security main") for line in lines)
    assert not [line for line in host_sources("debian", "sid") if "-security" in line]
    assert host_sources("ubuntu", "noble") == ()
