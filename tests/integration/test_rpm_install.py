"""The packages as a distribution's tools see them: rpmlint, rpm on private roots, and dnf with the made repository."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration import rpm_host
from tests.integration.rpm_host import KEY_NAME, TIME, Root, build, needed, report, run

pytestmark = pytest.mark.slow
# What rpmlint goes on to warn of, and why it stays.
EXPLAINED = {
    "requires-on-release": "a stage works with the core that it was rendered with",
    "only-non-binary-in-usr-lib": "dracut's modules are in /usr/lib, and are shell",
    "obsolete-not-provided": "the older package was split: its name is still that of the core, which provides it",
    "no-url-tag": "the project has no page of its own",
    "invalid-url": "the source archive is rendered by anchor-build, not downloaded",
}


@dataclass(frozen=True)
class Made:
    """A signed repository, its key, and what a distribution would have besides."""

    out: Path
    stand_ins: list[Path]
    newer: Path
    old: Path

    @property
    def packages(self) -> list[Path]:
        """The binary packages."""
        return sorted(self.out.glob("*.noarch.rpm"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    top = tmp_path_factory.mktemp("rpm")
    with rpm_host.signing_key() as home:
        words = ["--srpm", "--repo", "--sign", KEY_NAME]
        build(top / "out", *words, env={"GNUPGHOME": str(home)})
        tree = rpm_host.copy_tree(top / "tree", version="9.9")
        # One file goes, another one comes.
        stage = tree / "dracut-modules" / "auth-acme"
        for file in (stage / "stage.toml", stage / "stage.sh", stage / "anchor-acme.sh"):
            file.write_text(file.read_text().replace("anchor-acme.sh", "anchor-later.sh"))
        (stage / "anchor-acme.sh").rename(stage / "anchor-later.sh")
        build(top / "newer", env={"SOURCE_DATE_EPOCH": str(TIME + 1), "PYTHONPATH": str(tree)})
        stand_ins = rpm_host.stand_ins(top / "distribution", needed(top / "out"))
        run("createrepo_c", "--quiet", top / "distribution")
        [old] = rpm_host.old_package(top / "old")
        yield Made(top / "out", stand_ins, top / "newer", old)


@pytest.fixture
def root(made: Made, tmp_path: Path) -> Root:
    """Return a fresh root in which the distribution's packages are installed."""
    fresh = Root(tmp_path / "root")
    fresh.path.mkdir()
    fresh.rpm("-Uvh", *made.stand_ins)
    return fresh


def names(packages: list[str]) -> list[str]:
    return sorted(name for name in packages if name.startswith("anchor"))


def test_rpmlint_has_no_error_and_each_warning_is_explained(made: Made, tmp_path: Path) -> None:
    packages = sorted(made.out.glob("*.rpm"))
    assert len(packages) == len(made.packages) + 1
    key = made.out / "repodata" / "repomd.xml.key"
    assert rpm_host.rpmlint(packages, key, tmp_path) == (0, set(EXPLAINED))


def test_install_verify_and_remove_leave_nothing(made: Made, root: Root) -> None:
    before = root.files()
    root.rpm("-Uvh", *made.packages)
    assert len(names(root.packages())) == len(made.packages)
    modules = {path.name for path in (root.path / rpm_host.MODULES).iterdir()}
    assert {"50anchor", "51anchor-auth-acme", "53anchor-image-squashfs"} <= modules
    assert len(modules) == len(made.packages)
    own = [package["name"] for package in report(made.out)["packages"]]
    assert root.rpm("-V", *own).out == ""
    (root.path / rpm_host.MODULES / "50anchor" / "params.sh").chmod(0o777)
    assert root.rpm("-V", *own, check=False).out.startswith(".M")
    root.rpm("-e", *own)
    assert names(root.packages()) == []
    left = set(root.files()) - set(before)
    # Directories that belong to the distribution's own packages: dracut, filesystem.
    assert all((root.path / path).is_dir() and "anchor" not in path for path in left), left


def test_upgrade_from_the_version_before(made: Made, root: Root) -> None:
    root.rpm("-Uvh", *made.packages)
    stage = root.path / rpm_host.MODULES / "51anchor-auth-acme"
    assert (stage / "anchor-acme.sh").exists()
    root.rpm("-Uvh", *sorted(made.newer.glob("*.noarch.rpm")))
    own = [package["name"] for package in report(made.out)["packages"]]
    assert names(root.packages()) == sorted(f"{name}-9.9" for name in own)
    assert root.rpm("-V", *own).out == ""
    # Nothing of the version before is left.
    found = {path for path in (root.path / rpm_host.MODULES).rglob("*") if path.is_file()}
    listed = set(root.rpm("-ql", *own).out.splitlines())
    assert {f"/{path.relative_to(root.path)}" for path in found} <= listed
    assert (stage / "anchor-later.sh") in found
    version = root.path / rpm_host.MODULES / "50anchor" / "version"
    assert version.read_text() == "9.9\n"


def test_a_stage_of_another_build_is_refused(made: Made, root: Root) -> None:
    root.rpm("-Uvh", *made.packages)
    done = root.rpm("-Uvh", *made.newer.glob("anchor-dracut-auth-none*"), check=False)
    assert done.status != 0
    assert "anchor-dracut-module = " in done.err


def test_upgrade_from_anchor_0_1_5(made: Made, root: Root) -> None:
    root.rpm("-Uvh", made.old)
    old = root.path / rpm_host.MODULES / "50anchor" / "parse-anchor.sh"
    assert old.exists()
    root.rpm("-Uvh", *made.packages)
    assert not old.exists()
    assert "anchor-dracut-module-0.1.5" not in root.packages()
    assert root.rpm("-V", "anchor-dracut-module").out == ""


@dataclass(frozen=True)
class Dnf:
    """dnf on a private root, with the made repository and that of the distribution."""

    root: Path
    made: Made

    def run(self, *words: str) -> rpm_host.Ended:
        """Run dnf without network, the host's settings, cache or log."""
        place = self.root.parent
        config = place / "dnf.conf"
        config.write_text(
            "[main]\nplugins=0\nkeepcache=0\n"
            f"cachedir={place / 'dnf'}\nlogdir={place / 'dnf'}\npersistdir={place / 'dnf'}\nreposdir=/nonexistent\n"
            f"[distribution]\nname=distribution\nbaseurl=file://{self.made.stand_ins[0].parent}\ngpgcheck=0\n"
            f"[anchor]\nname=anchor\nbaseurl=file://{self.made.out}\ngpgcheck=1\nrepo_gpgcheck=1\n"
            f"gpgkey=file://{self.made.out}/repodata/repomd.xml.key\n"
        )
        options = ["--config", str(config), "--installroot", str(self.root), "--releasever", "9", "--assumeyes"]
        # The database of the private root is where the distribution's rpm has it, whatever Debian's thinks.
        return run("dnf", *options, "--setopt=logdir=/var/log", *words, env={"HOME": str(place)})


@pytest.fixture
def dnf(made: Made, tmp_path: Path) -> Dnf:
    (tmp_path / "root").mkdir()
    return Dnf(tmp_path / "root", made)


def installed(dnf: Dnf) -> list[str]:
    return dnf.run("repoquery", "--installed", "--qf", "%{name}").out.split()


def test_dnf_resolves_a_stage_with_all_that_it_needs(dnf: Dnf) -> None:
    dnf.run("install", "anchor-dracut-auth-acme", "anchor-dracut-image-squashfs")
    found = installed(dnf)
    assert names(found) == [
        *("anchor-dracut-auth-acme", "anchor-dracut-image-squashfs", "anchor-dracut-module"),
        "anchor-dracut-transport-https",
    ]
    assert {"uacme", "socat", "curl", "dracut", "dracut-network", "iproute"} <= set(found)
    assert (dnf.root / rpm_host.MODULES / "52anchor-transport-https" / "stage.sh").is_file()


def test_dnf_upgrades_anchor_0_1_5_to_what_it_could_do(dnf: Dnf, made: Made) -> None:
    dnf.run("install", str(made.old))
    assert installed(dnf) == ["anchor-dracut-module"]
    dnf.run("upgrade")
    found = names(installed(dnf))
    assert {"anchor-dracut-auth-acme", "anchor-dracut-image-squashfs", "anchor-dracut-transport-https"} <= set(found)
    assert not (dnf.root / rpm_host.MODULES / "50anchor" / "parse-anchor.sh").exists()
