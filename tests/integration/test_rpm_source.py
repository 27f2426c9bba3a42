"""The source package of the tool: always the same bytes, and real rpmbuild makes the package out of it.

Debian's rpm has no macros for Python. tests/fixtures/rpm/pyproject.macros stands in for those that the spec uses; it
proves the spec's own parts - prep, man pages, completions, check, files - and not the distributions' macros.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from anchor_build.errors import AnchorError
from anchor_build.inspect.artifact import Artifact, read_artifact
from anchor_build.rpm import repo
from anchor_build.rpm.source import archive, source_files, tool_srpm
from anchor_build.version import parse_tag, tree_version
from tests.conftest import TOP
from tests.integration.rpm_host import AS_NOBODY, KEY_NAME, rpmlint, run, signing_key

HIDDEN = (
    *("shellcheck", "shfmt", "busybox", "lz4", "man", "curl", "dracut", "qemu-system-x86_64", "nginx", "strace"),
    *("mksquashfs", "unsquashfs", "sqfs2tar", "mkfs.erofs", "fsck.erofs", "createrepo_c", "dnf", "rpmlint", "faketime"),
    *("socat", "uacme", "rsync", "ssh", "dropbear", "chronyd", "dnsmasq", "pebble"),
)
MACROS = TOP / "tests" / "fixtures" / "rpm" / "pyproject.macros"
WHEN = 1_700_000_000  # seconds since the epoch: 2023-11-14
SITE = "usr/lib/python3.11/site-packages"
# What rpmlint goes on to warn of, and why it stays.
EXPLAINED = {
    "no-url-tag": "the project has no page of its own",
    "invalid-url": "the source archive is made by anchor-build, not downloaded",
}

pytestmark = pytest.mark.skipif(shutil.which("rpmbuild") is None, reason="rpmbuild is missing")


def git(top: Path, *words: str) -> None:
    identity = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    dates = {"GIT_AUTHOR_DATE": f"{WHEN} +0000", "GIT_COMMITTER_DATE": f"{WHEN} +0000"}
    env = {"PATH": os.environ["PATH"], "HOME": str(top), "GIT_CONFIG_NOSYSTEM": "1", **identity, **dates}
    subprocess.run(["git", "-C", top, *words], env=env, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkout of this tree, tagged as a release candidate."""
    top = tmp_path_factory.mktemp("checkout")
    for name in source_files(TOP):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TOP / name, top / name, follow_symlinks=False)
    (top / ".gitignore").write_text("out/\n__pycache__/\n")
    git(top, "init", "--quiet")
    git(top, "add", ".")
    git(top, "commit", "--quiet", "-m", "everything")
    git(top, "tag", "v9.8.7-rc1")
    return top


@pytest.fixture
def copy(checkout: Path, tmp_path: Path) -> Path:
    """Return a copy of the checkout that a test may change."""
    shutil.copytree(checkout, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def source_package(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tool_srpm(tmp_path_factory.mktemp("srpm"), checkout)[0]


def test_the_source_package_is_named_and_holds_what_it_builds_from(source_package: Path) -> None:
    assert source_package.name == "anchor-build-9.8.7~rc1-1.src.rpm"
    found = read_artifact(source_package)
    assert set(found.entries) == {"anchor-build.spec", "anchor_build-9.8.7rc1.tar.gz"}
    assert (found.facts["arch"], found.facts["build_host"]) == ("src", "anchor-build")
    assert found.facts["build_time"] == "2023-11-14T22:13:20Z"
    assert {"python3dist(hatchling)", "python3dist(click)", "python3dist(jinja2)"} <= set(found.facts["requires"])
    mode = source_package.stat().st_mode & 0o777
    assert (mode, list(source_package.parent.iterdir())) == (0o644, [source_package])


def test_the_same_tree_gives_the_same_bytes(source_package: Path, copy: Path, tmp_path: Path) -> None:
    """Elsewhere, later, with another umask, time zone and locale, and files that git ignores."""
    (copy / "out").mkdir()
    (copy / "out" / "old.rpm").touch()
    os.utime(copy / "README.md", (1, 1))
    script = 'umask 077; exec "$@"'
    command = [sys.executable, "-m", "anchor_build", "rpm", "--tool", "--out", str(tmp_path / "elsewhere")]
    argv = ["sh", "-c", script, "sh", *command]
    env = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "TZ": "Asia/Tokyo",
        "LANG": "de_DE.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(argv, cwd=copy, env=env, capture_output=True, text=True, check=True)
    made = Path(done.stdout.strip())
    assert made == tmp_path / "elsewhere" / source_package.name
    assert made.read_bytes() == source_package.read_bytes()
    assert str(tmp_path).encode() not in made.read_bytes()


def test_a_changed_tree_is_another_version(copy: Path, tmp_path: Path) -> None:
    (copy / "lib" / "anchor-new.sh").write_text("#!/bin/sh\n")
    (copy / "README.md").unlink()
    made, warnings = tool_srpm(tmp_path / "out", copy)
    assert re.fullmatch(r"anchor-build-9\.8\.7~rc2~dev0\.g[0-9a-f]{7}\.dirty-1\.src\.rpm", made.name)
    assert any("not committed" in text for text in warnings)
    with tarfile.open(fileobj=gzip.open(unpack(made, tmp_path))) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    assert "lib/anchor-new.sh" in names
    assert "README.md" not in names


def unpack(package: Path, directory: Path) -> Path:
    """Unpack a source package by rpm's own tool; return its archive."""
    payload = subprocess.run(["rpm2cpio", package], capture_output=True, check=True).stdout
    subprocess.run(["cpio", "-idm", "--quiet"], input=payload, cwd=directory, check=True)
    return next(directory.glob("*.tar.gz"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_another_user_makes_the_same_bytes(source_package: Path) -> None:
    """From the source archive, with macros of their own."""
    # Not below pytest's own directory, which is root's alone.
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with tarfile.open(unpack(source_package, work)) as tar:
            tar.extractall(work, filter="data")
        (work / ".rpmmacros").write_text("%packager Somebody\n%vendor Else\n%_topdir /nowhere\n%dist .other\n")
        run("chown", "-R", "nobody", work)
        site = next(path for path in sys.path if path.endswith("site-packages"))
        [tree] = (path for path in work.glob("anchor_build-*") if path.is_dir())
        env = {"PYTHONPATH": f"{tree}:{site}", "HOME": name}
        command: list[str | Path] = [
            Path(sys.executable).resolve(),
            "-m",
            "anchor_build",
            "rpm",
            "--tool",
            "--out",
            work / "out",
        ]
        made = Path(run(*AS_NOBODY, *command, cwd=work, env=env).out.strip())
        assert made.read_bytes() == source_package.read_bytes()


def test_a_source_archive_makes_the_same_source_package(
    source_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without git: the version is in the archive, the time that of its files."""
    with tarfile.open(unpack(source_package, tmp_path)) as tar:
        tar.extractall(tmp_path / "archive", filter="data")
    (top,) = (tmp_path / "archive").iterdir()
    assert top.name == "anchor_build-9.8.7rc1"
    assert tree_version(top).version == parse_tag("v9.8.7-rc1")
    assert (top / "build.sh").stat().st_mode & 0o777 == 0o755
    made, warnings = tool_srpm(tmp_path / "out", top)
    assert (made.read_bytes(), warnings) == (source_package.read_bytes(), ())
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert read_artifact(tool_srpm(tmp_path / "out", top)[0]).facts["build_time"] == "1970-01-02T00:00:00Z"


def test_the_archive_is_all_that_pyproject_says(checkout: Path) -> None:
    files = source_files(checkout)
    for name in ("pyproject.toml", "build.sh", "LICENSE", "specs/anchor-build.spec.j2", "lib/anchor-boot.sh"):
        assert name in files
    assert not [name for name in files if name.startswith((".", "out/")) or "__pycache__" in name]
    version = tree_version(checkout).version
    assert archive(checkout, version, WHEN) == archive(checkout, version, WHEN)


def test_an_installed_program_takes_the_checkout_that_it_is_called_in(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anchor_build.__file__", str(tmp_path / "site-packages" / "anchor_build" / "__init__.py"))
    monkeypatch.chdir(copy)
    made, _ = tool_srpm(tmp_path / "out")
    assert made.read_bytes() == tool_srpm(tmp_path / "other", copy)[0].read_bytes()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnchorError, match=f"{tmp_path}: holds no specs/anchor-build.spec.j2") as caught:
        tool_srpm(tmp_path / "none")
    assert caught.value.hint == "run it in a checkout or a source archive of anchor-build"


@pytest.mark.parametrize("what", ["no tree", "no rpmbuild", "bad epoch", "bad spec", "bad tag", "not writable"])
def test_what_can_go_wrong(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    out = tmp_path / "out"
    expected = {
        "no tree": "holds no specs/anchor-build.spec.j2",
        "no rpmbuild": "rpmbuild is missing: install rpm (deb) or rpm-build (rpm)",
        "bad epoch": "SOURCE_DATE_EPOCH=soon: is not a number",
        "bad spec": "rpmbuild exited with status 1",
        "bad tag": "the git tag v9.8.8-final: is not a version",
        "not writable": "out is not a directory",
    }[what]
    top = copy
    if what == "no tree":
        top = tmp_path
    elif what == "no rpmbuild":
        monkeypatch.setattr("anchor_build.rpm.rpmbuild.which", lambda program: None)
    elif what == "bad epoch":
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    elif what == "bad spec":
        spec = copy / "specs" / "anchor-build.spec.j2"
        spec.write_text(spec.read_text().replace("License:", "Licence:"))
    elif what == "bad tag":
        git(copy, "commit", "--quiet", "--allow-empty", "-m", "more")
        git(copy, "tag", "v9.8.8-final")
    else:
        out.touch()
        out = out / "below"
    with pytest.raises(AnchorError, match=re.escape(expected)):
        tool_srpm(out, top)
    assert not out.exists() or out.is_file()


@pytest.mark.parametrize("suse", [False, True])
def test_the_spec_asks_each_family_for_its_macros(source_package: Path, tmp_path: Path, suse: bool) -> None:
    unpack(source_package, tmp_path)
    words: list[str | Path] = ["rpmspec", "--query", "--srpm", "--requires", "--load", MACROS]
    words += ["--define", f"stand_in_python {sys.executable}", *(["--define", "suse_version 1699"] if suse else [])]
    found = set(run(*words, tmp_path / "anchor-build.spec").out.split("\n"))
    assert ("python-rpm-macros" if suse else "pyproject-rpm-macros") in found
    assert ("pyproject-rpm-macros" if suse else "python-rpm-macros") not in found
    assert {"python3-devel >= 3.11", "python3dist(hatchling)", "python3dist(pytest)", "git-core"} <= found


# --- The package that comes out of it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(source_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rebuild the source package as a distribution would, tests included, without network."""
    top = tmp_path_factory.mktemp("rpmbuild")
    defines = {
        "_topdir": str(top),
        "_tmppath": str(top),
        "stand_in_python": sys.executable,
        "dist": ".test",
        "_buildhost": "anchor-build",
        # What distributions do with man pages: by bash, which is their /bin/sh, since it fails under Debian's.
        "__os_install_post": "bash /usr/lib/rpm/brp-compress",
    }
    argv = ["rpmbuild", "--rebuild", "--nodeps", "--load", str(MACROS)]
    argv += [word for name, value in defines.items() for word in ("--define", f"{name} {value}")]
    # As in a build root: no network but loopback, and no program that neither BuildRequires nor every build root has.
    hidden = " ".join(path for program in HIDDEN if (path := shutil.which(program)))
    script = f'ip link set lo up && for p in {hidden}; do mount --bind /dev/null "$p" || exit; done; exec "$@"'
    offline = ["unshare", "--net", "--mount", "sh", "-c", script, "sh"] if os.geteuid() == 0 else []
    # The version of a build is the archive's: the checkout around it is none of its business.
    env = {"PATH": os.environ["PATH"], "HOME": str(top), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*offline, *argv, source_package], env=env, cwd=top, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    tests = re.search(r"^([0-9]+) passed", done.stdout, re.MULTILINE)
    assert tests, done.stdout[-3000:]
    assert int(tests[1]) > 500
    return next(top.rglob("*.noarch.rpm"))


@pytest.fixture(scope="module")
def inside(package: Path) -> Artifact:
    return read_artifact(package)


@pytest.mark.slow
def test_the_package_has_everything_in_its_place(package: Path, inside: Artifact) -> None:
    assert package.name == "anchor-build-9.8.7~rc1-1.test.noarch.rpm"
    modes = {path: entry.values["mode"] for path, entry in inside.entries.items()}
    assert modes["usr/bin/anchor-build"] == "0755"
    for path in (
        f"{SITE}/anchor_build/cli.py",
        f"{SITE}/anchor_build/data/lib/anchor-boot.sh",
        f"{SITE}/anchor_build/data/dracut-modules/anchor/stage.toml",
        f"{SITE}/anchor_build-9.8.7rc1.dist-info/METADATA",
        "etc/anchor-build/anchor.toml",
        "usr/share/bash-completion/completions/anchor-build",
        "usr/share/zsh/site-functions/_anchor-build",
        "usr/share/fish/vendor_completions.d/anchor-build.fish",
    ):
        assert modes[path] == "0644", path
    assert {"usr/share/man/man1/anchor-build.1.gz", "usr/share/man/man7/anchor-build-stages.7.gz"} <= set(modes)
    assert not [path for path in modes if "/tests" in path or path.startswith(f"{SITE}/contrib")]
    # The second half is what rpm's own generator makes of the wheel's metadata.
    modules = {"python3.11dist(click) >= 8.1", "python3.11dist(jinja2) >= 3.1", "python3.11dist(rpmfile) >= 2"}
    assert {"dracut", "kmod", "zstd"} | modules <= set(inside.facts["requires"])
    assert "scripts" not in inside.facts


@pytest.mark.slow
def test_rpmlint_has_no_error_and_each_warning_is_explained(
    package: Path, source_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [Path(shutil.copy(file, tmp_path)) for file in (package, source_package)]
    with signing_key() as home:
        monkeypatch.setenv("GNUPGHOME", str(home))
        (tmp_path / "work").mkdir()
        repo.sign_packages(packages, repo.find_key(KEY_NAME), WHEN, tmp_path / "work")
    assert rpmlint(packages, tmp_path / "work" / "key.asc", tmp_path) == (0, set(EXPLAINED))


@pytest.mark.slow
def test_the_sites_profiles_survive_an_update(package: Path) -> None:
    query = "[%{FILEFLAGS:fflags} %{FILENAMES}\\n]"
    said = subprocess.run(["rpm", "-qp", "--qf", query, package], capture_output=True, text=True, check=True).stdout
    flags = {path: flag for flag, path in (line.split(" ") for line in said.splitlines())}
    assert [path for path, flag in flags.items() if "c" in flag] == ["/etc/anchor-build/anchor.toml"]
    assert "n" in flags["/etc/anchor-build/anchor.toml"]


@pytest.mark.slow
def test_the_package_works_where_it_is_installed(package: Path, tmp_path: Path) -> None:
    payload = subprocess.run(["rpm2cpio", package], capture_output=True, check=True).stdout
    subprocess.run(["cpio", "-idm", "--quiet"], input=payload, cwd=tmp_path, check=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / SITE)}
    argv: list[str | Path] = [
        sys.executable,
        tmp_path / "usr/bin/anchor-build",
    ]  # whose own Python need not have the modules
    said = subprocess.run([*argv, "--version"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert said.stdout == "anchor-build, version 9.8.7rc1\n"
    said = subprocess.run([*argv, "stages"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert "acme" in said.stdout
    completion = tmp_path / "usr/share/bash-completion/completions/anchor-build"
    script = f"source {completion}; complete -p anchor-build"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.rstrip().endswith("anchor-build")


@pytest.mark.parametrize("words", [["--stage", "acme"], ["--all"], ["--sign", "x"], ["--repo"], ["--dist", ".el9"]])
def test_the_tool_is_packaged_alone(words: list[str], tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "anchor_build", "rpm", "--tool", "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(argv, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"--tool makes a source package only: {words[0]} does not go with it." in done.stderr
    assert not (tmp_path / "out").exists()
