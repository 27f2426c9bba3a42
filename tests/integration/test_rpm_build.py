"""`anchor-build rpm` with the real programs: what is made, that it is always the same, and every way to fail."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from anchor_build.plan import whole_plan
from anchor_build.registry import load_registry
from anchor_build.render import render_plan
from anchor_build.rpm.check import declared, problems_of
from anchor_build.rpm.header import read_rpm
from anchor_build.rpm.spec import choose_stages, make_packages, make_packaging
from tests.conftest import SITE_STAGES, TOP, WriteStage
from tests.integration import rpm_host
from tests.integration.rpm_host import AS_NOBODY, KEY_NAME, TIME, build, contents, report, run

pytestmark = pytest.mark.slow
ALL = [
    *("anchor-dracut-auth-acme", "anchor-dracut-auth-none", "anchor-dracut-image-squashfs", "anchor-dracut-module"),
    "anchor-dracut-transport-https",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build everything once: tests read it only."""
    out = tmp_path_factory.mktemp("rpm") / "out"
    build(out, "--all", "--srpm", "--dist", ".test1")
    return out


@pytest.fixture(scope="module")
def gnupg() -> Iterator[Path]:
    with rpm_host.signing_key() as home:
        yield home


def query(file: Path, text: str) -> str:
    return run("rpm", "-qp", "--qf", text, file).out


def empty(out: Path) -> bool:
    """Whether a failed build left nothing: neither in its output nor in its cache."""
    cache = out.parent / "cache" / "anchor-build"
    return list(out.iterdir()) == [] and (not cache.exists() or list(cache.iterdir()) == [])


# --- What is made -----------------------------------------------------------------------------------------


def test_there_is_a_package_for_the_core_and_for_each_stage(built: Path) -> None:
    names = sorted({package["name"] for package in report(built)["packages"]})
    stages = sorted(f"anchor-dracut-{stage.id}" for stage in load_registry().stages)
    assert names == sorted([*stages, "anchor-dracut-module"])
    assert set(ALL) <= set(names)
    files_ = sorted(path.name for path in built.iterdir() if path.suffix == ".rpm")
    version, release = report(built)["version"], report(built)["release"]
    assert release == "1.test1"
    expected = [f"{name}-{version}-{release}.noarch.rpm" for name in names]
    assert files_ == sorted([*expected, f"anchor-dracut-module-{version}-{release}.src.rpm"])


def test_rpm_itself_sees_what_was_rendered(built: Path) -> None:
    for module in render_plan(whole_plan(load_registry())):
        name = f"anchor-dracut-{module.stage.id}" if not module.stage.is_core else "anchor-dracut-module"
        [file] = built.glob(f"{name}-[0-9]*.noarch.rpm")
        dump = [line.split() for line in run("rpm", "-qp", "--dump", file).out.splitlines()]
        top = f"/usr/lib/dracut/modules.d/{module.name}"
        modes = {row[0]: row[4] for row in dump}
        assert modes[top] == "040755"
        found = {path.removeprefix(f"{top}/"): mode for path, mode in modes.items() if path.startswith(f"{top}/")}
        assert found == {name: f"0100{file.mode:o}" for name, file in module.files.items()}
        assert {(row[5], row[6]) for row in dump} == {("root", "root")}
        assert query(file, "%{ARCH} %{LICENSE} %{BUILDHOST} %{VENDOR}") == "noarch Apache-2.0 anchor-build (none)"
        assert "(none)" in query(file, "%{PREIN}%{POSTIN}%{PREUN}%{POSTUN}")
        assert query(file, "%{BUILDTIME}") == str(TIME)
        assert "anchor-build" in run("rpm", "-qp", "--changelog", file).out
        assert run("rpm", "-qp", "--licensefiles", file).out.strip().endswith("/LICENSE")
        assert "reference.md" in run("rpm", "-qp", "--docfiles", file).out


@pytest.mark.parametrize("family", ["fedora", "suse"])
def test_packages_require_what_the_stages_declare_and_nothing_else(built: Path, tmp_path: Path, family: str) -> None:
    """As rpm sees it, beside the declarations as they are written."""
    out = built
    if family == "suse":
        out = tmp_path / "out"
        build(out, "--family", "suse")
    version = f"{report(out)['version']}-{report(out)['release']}"
    for file in sorted((TOP / "dracut-modules").glob("*/stage.toml")):
        declared = tomllib.loads(file.read_text())
        stage = declared["stage"]
        required: set[str] = set()
        recommended: set[str] = set()
        for binary in stage.get("binaries", []):
            name = binary.get("suse", binary["rpm"]) if family == "suse" else binary["rpm"]
            (recommended if binary.get("optional") else required).add(name)
        if file.parent.name == "anchor":
            package = "anchor-dracut-module"
            # SUSE has all of dracut's modules in one package.
            required |= {"dracut"} if family == "suse" else {"dracut", "dracut-network"}
        else:
            package = f"anchor-dracut-{file.parent.name}"
            required.add(f"anchor-dracut-module = {version}")
            assert "dracut" not in stage
        if any(param.get("source") for param in declared.get("param", [])):
            required.add(f"anchor-dracut-transport-https = {version}")
        [rpm] = out.glob(f"{package}-[0-9]*.noarch.rpm")
        said = run("rpm", "-qp", "--requires", rpm).out.splitlines()
        assert {name for name in said if not name.startswith("rpmlib(")} == required, package
        assert set(run("rpm", "-qp", "--recommends", rpm).out.splitlines()) == recommended - required, package


def test_the_names_of_directories_are_those_that_are_documented(built: Path) -> None:
    [core] = built.glob("anchor-dracut-module-[0-9]*.noarch.rpm")
    documents = run("rpm", "-qp", "--docfiles", core).out.splitlines()
    [example] = (path for path in documents if path.endswith("dracut-anchor.conf"))
    assert f"--conf {example} " in (TOP / "specs" / "dracut-anchor.conf").read_text()
    assert run("rpm", "-qp", "--licensefiles", core).out == "/usr/share/licenses/anchor-dracut-module/LICENSE\n"


def test_build_sh_alone_leaves_packages_without_a_terminal(tmp_path: Path) -> None:
    """Also where nobody is there to answer, from another directory; .venv is there already, as after the first run."""
    top = tmp_path / "tree"
    (top / "contrib").mkdir(parents=True)
    (top / ".venv" / "bin").mkdir(parents=True)
    for name in ("build.sh", "pyproject.toml", "contrib/packages.txt"):
        shutil.copy(TOP / name, top / name)
    shutil.copy(TOP / "pyproject.toml", top / ".venv" / ".prepared-build")
    (top / ".venv" / "bin" / "python").symlink_to(sys.executable)
    program = top / ".venv" / "bin" / "anchor-build"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m anchor_build "$@"\n')
    program.chmod(0o755)
    env = {"PYTHONPATH": str(TOP), "TERM": "dumb", "HOME": str(tmp_path), "SOURCE_DATE_EPOCH": str(TIME)}
    done = run("setsid", "--wait", top / "build.sh", cwd=tmp_path, env=env)
    names = sorted(path.name for path in (top / "out" / "rpm").glob("*.noarch.rpm"))
    assert [Path(line).name for line in done.out.splitlines()] == names
    assert len(names) == len(load_registry().stages) + 1
    assert "\x1b" not in done.out + done.err


def test_the_source_package_alone_gives_the_same_packages(built: Path, tmp_path: Path) -> None:
    """What mock, Koji, OBS and Copr do: rebuild with the distribution's own settings, and no network."""
    [source] = built.glob("*.src.rpm")
    where = ["--define", f"_topdir {tmp_path}", "--define", f"_tmppath {tmp_path}", "--define", "dist .test1"]
    offline = ["unshare", "-n"] if os.geteuid() == 0 else []
    run(*offline, "rpmbuild", "--rebuild", *where, source, env={"HOME": str(tmp_path)})
    again = {path.name: path for path in (tmp_path / "RPMS").rglob("*.rpm")}
    assert sorted(again) == sorted(path.name for path in built.glob("*.noarch.rpm"))
    for name, path in again.items():
        first, second = read_rpm(built / name), read_rpm(path)
        assert [(f.path, f.mode, f.digest) for f in first.files] == [(f.path, f.mode, f.digest) for f in second.files]
        for kind in ("requires", "recommends", "obsoletes", "provides"):
            assert declared(first, kind) == declared(second, kind)


def test_a_stage_directory_of_a_third_party_is_a_package_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = build(out, "--stage-dir", SITE_STAGES, "--stage", "local-file", "--stage", "auth-none", "--json")
    assert json.loads(done.out)["built"] is True
    names = [package["name"] for package in report(out)["packages"]]
    assert names == ["anchor-dracut-module", "anchor-dracut-auth-local-file", "anchor-dracut-auth-none"]
    [file] = out.glob("anchor-dracut-auth-local-file-*.rpm")
    assert "/usr/lib/dracut/modules.d/51anchor-auth-local-file/stage.sh\n" in run("rpm", "-qpl", file).out


def test_suse_has_its_own_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, "--family", "suse", "--stage", "acme")
    [file] = out.glob("anchor-dracut-module-*.rpm")
    found = run("rpm", "-qpR", file).out.splitlines()
    assert "iproute2" in found
    assert not {"iproute", "dracut-network"} & set(found)


# --- The same bytes, and no more work than needed ---------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_place_time_and_user_give_the_same_bytes(tmp_path: Path) -> None:
    """Another directory of the tree, another output, cache, home with macros of its own, umask, zone and user."""
    words: list[str | Path] = ["-m", "anchor_build", "rpm", "--srpm", "--dist", ".test1", "-o"]
    first, tree = tmp_path / "tree", Path("/var/tmp") / f"anchor-tree-{os.getpid()}"  # noqa: S108 - removed below
    fixed = {"SOURCE_DATE_EPOCH": str(TIME), "PYTHONDONTWRITEBYTECODE": "1"}
    site = next(path for path in sys.path if path.endswith("site-packages"))
    python = Path(sys.executable).resolve()
    try:
        for top in (first, tree):
            rpm_host.copy_tree(top)
        env = {**fixed, "PYTHONPATH": f"{first}:{site}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
        run(python, *words, first / "out", cwd=first, env=env)
        home = tree / "home with blanks"
        home.mkdir()
        (home / ".rpmmacros").write_text("%packager Somebody\n%vendor Else\n%_topdir /nowhere\n%dist .other\n")
        run("chown", "-R", "nobody", tree)
        script = f'umask 077 && cd "{tree}" && exec "$@"'
        env = {**fixed, "PYTHONPATH": f"{tree}:{site}", "HOME": str(home), "TZ": "Pacific/Kiritimati"}
        run(*AS_NOBODY, "sh", "-c", script, "sh", python, *words, tree / "other", env=env)
        assert contents(tree / "other") == contents(first / "out")
        assert len(contents(first / "out")) > 6
    finally:
        shutil.rmtree(tree, ignore_errors=True)


def test_nothing_is_done_again_until_something_changes(built: Path, tmp_path: Path, write_stage: WriteStage) -> None:
    """Every input in turn is changed; each change is noticed, and undoing it gives the first bytes again."""
    out = tmp_path / "out"
    stage = write_stage("site", body='[[file]]\nsource = "x.txt"\ntarget = "/etc/x.txt"\n')
    (stage / "x.txt").write_text("one\n")
    base: list[str | Path] = ["--stage-dir", stage, "--stage", "site"]

    def did_build(*words: str | Path, env: Mapping[str, str] | None = None) -> bool:
        return bool(json.loads(build(out, *base, *words, "--json", env=env).out)["built"])

    assert did_build()
    first, times = contents(out), {path: path.stat().st_mtime_ns for path in out.iterdir()}
    started = time.monotonic()
    assert not did_build()
    assert time.monotonic() - started < 15  # 0.4 s on an idle machine
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}

    changes: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
        "time": ((), {"SOURCE_DATE_EPOCH": str(TIME + 1)}),
        "dist": (("--dist", ".x"), {}),
        "family": (("--family", "suse"), {}),
        "srpm": (("--srpm",), {}),
        "repo": (("--repo",), {}),
        "stage": (("--stage", "none"), {}),
    }
    for what, (words, extra) in changes.items():
        assert did_build(*words, env=extra), what
        assert contents(out) != first, what
    assert did_build()
    assert contents(out) == first

    for text in ("two\n", "one\n"):
        (stage / "x.txt").write_text(text)
        assert did_build(), "a file of the stage"
    declaration = (stage / "stage.toml").read_text()
    (stage / "stage.toml").write_text(declaration.replace("A stage.", "Another stage."))
    assert did_build(), "the declaration"
    (stage / "stage.toml").write_text(declaration)
    assert did_build()
    damaged = next(out.glob("*.rpm"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert did_build(), "a damaged package"
    damaged.unlink()
    assert did_build(), "a missing package"
    (out / "packages.json").write_text("[]")
    assert did_build(), "a report that is none"
    assert contents(out) == first

    # another rpmbuild, and other macros of the host
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("rpmbuild")
    wrapper = programs / "rpmbuild"
    before_path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    for option, answer in (("--version", "RPM version 99"), ("--showrc", "-13: a_macro a_value")):
        wrapper.write_text(f'#!/bin/sh\n[ "$1" != {option} ] || {{ echo "{answer}"; exit; }}\nexec {real} "$@"\n')
        wrapper.chmod(0o755)
        assert did_build(env=before_path), option


def test_an_earlier_build_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(out, "--stage", "acme", "--stage", "none", "--srpm", "--repo", "--dist", ".old")
    (out / "mine.rpm").write_text("not the program's")
    (out / "notes").write_text("mine")
    build(out, "--stage", "none", "--dist", ".new")
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    version = report(out)["version"]
    own = [f"anchor-dracut-{name}-{version}-1.new.noarch.rpm" for name in ("auth-none", "module")]
    assert names == sorted([*own, "mine.rpm", "notes", "packages.json"])


def test_a_report_cannot_lead_elsewhere(tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious.rpm"
    out.mkdir()
    precious.touch()
    (out / "packages.json").write_text(
        json.dumps({"files": {str(precious): "", "../precious.rpm": "", "repodata/../../precious.rpm": ""}})
    )
    build(out, "--stage", "none")
    assert precious.exists()


# --- Repository and signatures ----------------------------------------------------------------------------


def test_repository_and_signatures(gnupg: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--stage", "none", "--srpm", "--repo", "--sign", KEY_NAME]
    build(out, *words, env={"GNUPGHOME": str(gnupg)})
    assert json.loads(build(out, *words, "--json", env={"GNUPGHOME": str(gnupg)}).out)["built"] is False
    fingerprint = report(out)["signed_by"]
    assert len(fingerprint) == 40
    keys: list[str | Path] = ["rpmkeys", "--define", "_keyring rpmdb", "--dbpath", tmp_path / "keys"]
    (tmp_path / "keys").mkdir()
    packages = sorted(out.glob("*.rpm"))
    assert len(packages) == 3
    assert run(*keys, "--checksig", *packages, check=False).status != 0, "without the key"
    run(*keys, "--import", out / "repodata" / "repomd.xml.key")
    assert run(*keys, "--checksig", *packages).out.count("signatures OK") == 3
    run(
        "gpg",
        "--verify",
        out / "repodata" / "repomd.xml.asc",
        out / "repodata" / "repomd.xml",
        env={"GNUPGHOME": str(gnupg)},
    )
    index = gzip.decompress((out / "repodata" / "primary.xml.gz").read_bytes()).decode()
    for path in packages:
        assert f'href="{path.name}"' in index
        assert run("sha256sum", path).out.split()[0] in index


def test_unsigned_repositories_are_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build(tmp_path / name / "out", "--stage", "none", "--repo")
        time.sleep(1.1)  # createrepo_c writes times in seconds
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")


# --- What can go wrong ------------------------------------------------------------------------------------


def test_a_package_that_is_not_what_was_to_be_packaged_is_noticed(built: Path, tmp_path: Path) -> None:
    packages = make_packages(choose_stages(load_registry()), "fedora")
    packaging = make_packaging(packages, report(built)["version"], "1", TIME)
    acme = next(package for package in packages if package.name == "anchor-dracut-auth-acme")
    core = packages[0]
    [file] = built.glob("anchor-dracut-auth-acme-*.rpm")
    assert problems_of(file, acme, packaging, ".test1") == []
    text = "\n".join(problems_of(file, core, packaging, ""))
    for part in (
        "name is",
        "release is",
        "lacks Requires: iproute",
        "has Requires: socat",
        "lacks /usr/lib",
        "is not as rendered",
    ):
        assert part in text
    damaged = tmp_path / file.name
    content = bytearray(file.read_bytes())
    content[-50] ^= 0xFF
    damaged.write_bytes(content)
    with pytest.raises(Exception, match=r"broken|damaged|is not|CRC"):
        assert problems_of(damaged, acme, packaging, ".test1") == []


def test_missing_programs_are_all_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    # run.py also looks where the system's programs are: there is nothing there, in a root without /usr/bin.
    code = (
        "import anchor_build.run as r; r.SYSTEM_PATH = '/nonexistent'; "
        "from anchor_build.cli import main; main(['rpm', '--out', 'out', '--repo', '--sign', 'x'])"
    )
    done = run(
        sys.executable, "-c", code, check=False, cwd=tmp_path, env={"PATH": "/nonexistent", "PYTHONPATH": str(TOP)}
    )
    assert done.status == 1
    for program, package in (
        *(("rpmbuild", "rpm-build (rpm)"), ("createrepo_c", "createrepo-c (deb)")),
        *(("rpmsign", "rpm-sign (rpm)"), ("gpg", "gnupg2 (rpm)")),
    ):
        assert f"{program} is missing: install" in done.err
        assert package in done.err
    assert empty(tmp_path / "out")


@pytest.mark.parametrize("when", ["at once", "after its packages are written"])
def test_a_failed_rpmbuild_shows_its_error_and_leaves_what_was_there(tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    build(out, "--stage", "none")
    before = contents(out)
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("rpmbuild")
    first = f'{real} "$@" >/dev/null || exit' if when != "at once" else ":"
    (programs / "rpmbuild").write_text(
        f'#!/bin/sh\ncase $1 in --*) exec {real} "$@" ;; esac\n{first}\n'
        'echo "error: No space for %install" >&2\nexit 3\n'
    )
    (programs / "rpmbuild").chmod(0o755)
    done = build(out, "--stage", "none", "--dist", ".x", check=False, env={"PATH": f"{programs}:{os.environ['PATH']}"})
    assert done.status == 1
    assert "rpmbuild exited with status 3" in done.err
    assert "| error: No space for %install" in done.err
    assert contents(out) == before
    assert [path.name for path in out.iterdir() if path.is_dir()] == []
    assert list((tmp_path / "cache" / "anchor-build").iterdir()) == []


def test_packages_that_rpmbuild_changed_are_refused(tmp_path: Path) -> None:
    """A distribution's macros could strip, compress or rewrite files, or add dependencies: none of that goes unseen."""
    out = tmp_path / "out"
    out.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    real = shutil.which("rpmbuild")
    (programs / "rpmbuild").write_text(
        f'#!/bin/sh\nspec=; for spec in "$@"; do :; done\n'
        'case $spec in *.spec) sed -i "s/^%attr(0755/%attr(0700/; s/^License:.*/&\\nRequires: more/" "$spec" ;; esac\n'
        f'exec {real} "$@"\n'
    )
    (programs / "rpmbuild").chmod(0o755)
    done = build(out, "--stage", "none", check=False, env={"PATH": f"{programs}:{os.environ['PATH']}"})
    assert done.status == 1
    assert "the finished packages are not what was to be packaged" in done.err
    assert "module-setup.sh is not as rendered: mode 100700" in done.err
    assert "has Requires: more, which nobody declared" in done.err
    assert empty(out)


def test_a_stage_without_package_names_is_named(tmp_path: Path, write_stage: WriteStage) -> None:
    out = tmp_path / "out"
    stage = write_stage(header='binaries = [{ name = "tool", rpm = "tool", suse = "-", deb = "tool" }]')
    done = build(out, "--stage-dir", stage, "--family", "suse", check=False)
    assert done.status == 1
    assert f"{stage / 'stage.toml'}: stage.binaries[0].suse: names no package of tool" in done.err
    assert not out.exists()
    build(out, "--stage-dir", stage, "--stage", "demo", "--family", "fedora")


@pytest.mark.parametrize(
    ("words", "extra", "status", "reason"),
    [
        (["--stage", "acmee"], {}, 2, "acmee: no such stage"),
        (["--stage", "acme", "--all"], {}, 2, "--stage and --all exclude each other"),
        (["--family", "debian"], {}, 2, "'debian' is not one of"),
        (["--dist", ".el9 %(touch x)"], {}, 1, "--dist '.el9 %(touch x)': begins with"),
        (["--dist", "-1"], {}, 1, "--dist '-1': begins with"),
        (["--dist", "el9"], {}, 1, "--dist 'el9': begins with a dot, such as .el9"),
        (["--sign", "nobody@site.example"], {}, 1, "gpg has no secret key of that name"),
        ([], {"SOURCE_DATE_EPOCH": "today"}, 1, "SOURCE_DATE_EPOCH=today: is not a number"),
        ([], {"XDG_CACHE_HOME": "/proc/1/no"}, 1, "XDG_CACHE_HOME"),
    ],
)
def test_wrong_requests_are_refused(
    tmp_path: Path, words: list[str], extra: dict[str, str], status: int, reason: str
) -> None:
    out = tmp_path / "out"
    done = build(out, *words, check=False, env={"GNUPGHOME": str(tmp_path), **extra})
    assert (done.status, done.out) == (status, "")
    assert reason in done.err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file"
    file.touch()
    out = {"a file": file, "below a file": file / "out", "read-only": Path("/proc/anchor")}[kind]
    done = build(out, check=False, env={"XDG_CACHE_HOME": str(tmp_path / "cache")}, cwd=tmp_path)
    assert done.status == (2 if kind == "a file" else 1)
    assert str(out) in done.err
    assert "Traceback" not in done.err
    assert file.read_bytes() == b""


def test_a_version_with_a_dash_is_refused(tmp_path: Path) -> None:
    code = (
        "import anchor_build.version as v; v.Version.rpm = v.RpmVersion('1.0-rc1', '1'); "
        "from anchor_build.cli import main; main(['rpm', '--out', 'out'])"
    )
    done = run(sys.executable, "-c", code, check=False, cwd=tmp_path, env={"PYTHONPATH": str(TOP)})
    assert done.status == 1
    assert "version '1.0-rc1': RPM allows" in done.err
    assert "between version and release" in done.err
    assert not (tmp_path / "out").exists()
