"""Builds the packages of dracut modules: spec and sources -> rpmbuild -> read back -> signed, indexed -> in place.

A report, packages.json, lies beside the packages. When nothing that decides their bytes has changed, and they are
still what it says, nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_build import __version__, rpmrepo, rpmspec
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import cache_directory
from anchor_build.registry import data_directory
from anchor_build.render import module_digest
from anchor_build.rpmcheck import problems_of, source_problems
from anchor_build.run import Completed, run, which
from anchor_build.stage import Stage
from anchor_build.version import git, source_date_epoch, tree_version

REPORT = "packages.json"
LIMIT_S = 300
# rpm's macros and the shell text that they make do not survive other characters in a path.
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")
# What a build leaves in its output besides the report.
MADE = re.compile(r"[^/]+\.rpm|repodata/[^/]+")
FIXED = {
    # Nothing of this host, of its clock or of who builds is in the packages (reproducible-builds.org).
    "_buildhost": "anchor-build",
    "use_source_date_epoch_as_buildtime": "1",
    "clamp_mtime_to_source_date_epoch": "1",
    "build_mtime_policy": "clamp_to_source_date_epoch",  # rpm 4.20's word for the line before
    "source_date_epoch_from_changelog": "0",
    "_changelog_trimage": "0",
    "_changelog_trimtime": "0",
    "_build_id_links": "none",
    "_srcdefattr": "(0644,root,root)",
    # What every rpm since 4.14 can read and write, whatever this one prefers.
    "_binary_payload": "w9.gzdio",
    "_source_payload": "w9.gzdio",
    "_binary_filedigest_algorithm": "8",
    "_source_filedigest_algorithm": "8",
    "_rpmfilename": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
}
# Who distributes packages says so with macros: here nobody does, whatever this host's say.
UNDEFINED = ("vendor", "packager", "distribution", "disturl", "bugurl")
Step = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class RpmBuild:
    """Everything that decides which packages are made, and where they go.

    `known` are all stages that could have been chosen; `dist` is None for what rpm's macros say.
    """

    stages: tuple[Stage, ...]
    known: tuple[Stage, ...]
    output: Path
    family: str
    dist: str | None = None
    source: bool = False
    repository: bool = False
    key: str | None = None
    # Called with each line of rpmbuild's log when it matters (-v).
    tell: Callable[[str], None] = field(default=lambda line: None)


@dataclass(frozen=True)
class _Prepared:
    """A build whose inputs have all been read: `inputs` has their digests by role."""

    packaging: rpmspec.Packaging
    spec: str
    archive: bytes
    dist: str
    signer: str | None
    inputs: dict[str, str]
    warnings: tuple[str, ...]


def host_family() -> str:
    """Return the family of this host's distribution: `suse`, else `fedora`."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    words = f"{release.get('ID', '')} {release.get('ID_LIKE', '')}".split()
    return "suse" if any("suse" in word for word in words) else "fedora"


def build_packages(build: RpmBuild, step: Step) -> tuple[dict[str, Any], bool]:
    """Build, read back, sign and index the packages; return the report, and whether anything had to be done.

    The output holds one build: what an earlier one left is replaced once all of the new one is there. Raises
    AnchorError for everything that is missing or cannot be written, a failed rpmbuild, and packages that are not what
    was to be packaged.
    """
    packages = rpmspec.make_packages(build.stages, build.family, build.known)
    _check_host(build)
    with _work_directory() as work:
        prepared = _prepare(build, packages, work)
        report = _unchanged(build.output, prepared.inputs)
        if report is not None:
            return report, False
        with _disk_errors(), _staging(build.output) as made:
            with step(f"build {len(packages)} packages with rpmbuild"):
                built = _rpmbuild(build, prepared, work, made)
            with step("read the packages back"):
                _check(build, prepared, built, work)
            if prepared.signer:
                with step(f"sign with {prepared.signer}"):
                    rpmrepo.sign_packages(built, prepared.signer, prepared.packaging.time, work)
            if build.repository:
                with step("make the repository's index"):
                    rpmrepo.make_index(made, prepared.packaging.time, prepared.signer)
            report = _report(build, prepared, made)
            _put_in_place(made, build.output, report)
    return report, True


def _check_host(build: RpmBuild) -> None:
    """Refuse, all at once, what would only fail after rpmbuild's run."""
    problems = [
        f"{program} is missing: install {packages}"
        for program, packages, wanted in (
            ("rpmbuild", "rpm (deb) or rpm-build (rpm)", True),
            ("createrepo_c", "createrepo-c (deb) or createrepo_c (rpm)", build.repository),
            ("rpmsign", "rpm (deb) or rpm-sign (rpm)", build.key is not None),
            ("gpg", "gpg (deb) or gnupg2 (rpm)", build.key is not None),
        )
        if wanted and which(program) is None
    ]
    if build.dist is not None and not rpmspec.DIST.fullmatch(build.dist):
        problems.append(f"--dist {build.dist!r}: RPM allows letters, digits and . _ + ~ ^ only, such as .el9")
    problems += _output_problems(build.output)
    if problems:
        raise AnchorError("\n".join(problems))


def _output_problems(output: Path) -> Iterator[str]:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield f"--out {output}: cannot be made: {error.strerror}"
        return
    if not os.access(output, os.W_OK | os.X_OK):
        yield f"--out {output}: may not be written"


def source_time() -> int:
    """Return the packages' time in seconds since the epoch: SOURCE_DATE_EPOCH, that of the commit, or of the files.

    A clock reading would make two builds of the same inputs differ. Raises AnchorError for a SOURCE_DATE_EPOCH that
    is no number (reproducible-builds.org/specs/source-date-epoch).
    """
    given = source_date_epoch()
    if given is not None:
        return given
    top = data_directory()
    if (top / ".git").exists() and which("git") is not None:
        committed = git(top, "log", "-1", "--format=%ct", check=False)
        if committed.status == 0:
            return int(committed.stdout)
    newest = max(int(path.stat().st_mtime) for path in (top / "dracut-modules").rglob("*"))
    return min(newest, int(time.time()))


def _prepare(build: RpmBuild, packages: tuple[rpmspec.Package, ...], work: Path) -> _Prepared:
    tree = tree_version()
    version = tree.version.rpm
    packaging = rpmspec.make_packaging(packages, version.version, version.release, source_time())
    spec, archive = rpmspec.render_spec(packaging), rpmspec.source_archive(packaging)
    dist = build.dist
    if dist is None:
        dist = _rpm(["rpm", "--eval", "%{?dist}"], packaging.time, work).stdout.strip()
    signer = rpmrepo.find_key(build.key) if build.key is not None else None
    macros = re.sub(r"^.*0x[0-9a-f]+.*$", "", _rpm(["rpmbuild", "--showrc"], packaging.time, work).stdout)
    inputs = {package.directory: module_digest(package.module) for package in packages}
    inputs |= {
        "spec": _sha256(spec.encode()),
        "source archive": _sha256(archive),
        "rpmbuild": _rpm(["rpmbuild", "--version"], packaging.time, work).stdout.strip(),
        "rpm's macros": _sha256(macros.replace(str(work), "").encode()),
        "options": _sha256(json.dumps([FIXED, UNDEFINED, packaging.time, dist, build.source, signer]).encode()),
        "repository": rpmrepo.version() if build.repository else "none",
        "anchor-build": __version__,
    }
    return _Prepared(packaging, spec, archive, dist, signer, inputs, tree.warnings)


def _rpm(argv: list[str], seconds: int, work: Path, *, log: Path | None = None) -> Completed:
    """Run a program of rpm without the settings of who runs it: ~/.rpmmacros and its like are not read."""
    home = str(work / "home")
    env = {"HOME": home, "XDG_CONFIG_HOME": home, "SOURCE_DATE_EPOCH": str(seconds), "TZ": "UTC"}
    return run(argv, env=env, cwd=work, log=log, timeout=LIMIT_S, umask=0o022)


def _rpmbuild(build: RpmBuild, prepared: _Prepared, work: Path, made: Path) -> list[Path]:
    """Run rpmbuild; return its packages in `made`, in the order of the packaging, and last the source package."""
    packaging = prepared.packaging
    spec = work / f"{rpmspec.NAME}.spec"
    for path, content in {work / packaging.source_name: prepared.archive, spec: prepared.spec.encode()}.items():
        path.write_bytes(content)
        path.chmod(0o644)
    _run_rpmbuild(build, "-bb", spec, str(work), prepared)
    if build.source:
        # A source package keeps its spec with every macro expanded, directories too: here they are relative, which is
        # enough where nothing is built.
        _run_rpmbuild(build, "-bs", spec, ".", prepared)
    built = sorted((work / "made").glob("*.rpm"))
    evr = f"{packaging.version}-{packaging.release}{prepared.dist}"
    wanted = [f"{package.name}-{evr}.noarch.rpm" for package in packaging.packages]
    wanted += [f"{rpmspec.NAME}-{evr}.src.rpm"] if build.source else []
    if sorted(wanted) != [path.name for path in built]:
        raise AnchorError(f"rpmbuild made {[path.name for path in built]} instead of {sorted(wanted)}")
    for name in wanted:
        _copy(work / "made" / name, made / name, packaging.time)
    return [made / name for name in wanted]


def _run_rpmbuild(build: RpmBuild, mode: str, spec: Path, top: str, prepared: _Prepared) -> None:
    places = {"_topdir": ".", "_sourcedir": ".", "_specdir": ".", "_rpmdir": "made", "_srcrpmdir": "made"}
    places |= {"_builddir": "build", "_buildrootdir": "root", "_tmppath": "tmp"}
    for place in places.values():
        (spec.parent / place).mkdir(exist_ok=True)
    defines = {**FIXED, **{name: f"{top}/{place}" for name, place in places.items()}, "dist": prepared.dist or "%{nil}"}
    argv = ["rpmbuild", mode, "--target", "noarch"]
    argv += [word for name, value in defines.items() for word in ("--define", f"{name} {value}")]
    argv += [word for name in UNDEFINED for word in ("--undefine", name)]
    log = spec.with_name("rpmbuild.log")
    try:
        _rpm([*argv, spec.name], prepared.packaging.time, spec.parent, log=log)
    except ProcessError as error:
        hint = "run again with -v to see all that rpmbuild says"
        raise ProcessError(["rpmbuild", mode, spec.name], error.status, error.tail, hint) from None
    finally:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            build.tell(line)


def _copy(source: Path, target: Path, seconds: int) -> None:
    target.write_bytes(source.read_bytes())
    target.chmod(0o644)
    os.utime(target, (seconds, seconds))


def _check(build: RpmBuild, prepared: _Prepared, built: list[Path], work: Path) -> None:
    packaging = prepared.packaging
    pairs = zip(packaging.packages, built, strict=False)  # the source package is the last one, and has no Package
    problems = [p for package, file in pairs for p in problems_of(file, package, packaging, prepared.dist, work)]
    if build.source:
        sources = {f"{rpmspec.NAME}.spec": prepared.spec.encode(), packaging.source_name: prepared.archive}
        problems += source_problems(built[-1], packaging, sources, work)
    if problems:
        lines = "\n  ".join(problems)
        raise AnchorError(f"the finished packages are not what was to be packaged:\n  {lines}", "look with -v")


def _report(build: RpmBuild, prepared: _Prepared, made: Path) -> dict[str, Any]:
    packaging = prepared.packaging
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    return {
        "anchor_build": __version__,
        "version": packaging.version,
        "release": f"{packaging.release}{prepared.dist}",
        "family": build.family,
        "build_time": packaging.time,
        "signed_by": prepared.signer,
        "warnings": list(prepared.warnings),
        "packages": [
            {
                "name": package.name,
                "file": f"{package.name}-{packaging.version}-{packaging.release}{prepared.dist}.noarch.rpm",
                "stage": package.module.stage.id,
                "requires": [value for tag, value in package.relations if tag == "Requires"],
                "recommends": [value for tag, value in package.relations if tag == "Recommends"],
            }
            for package in packaging.packages
        ],
        "inputs": prepared.inputs,
        "files": {str(path.relative_to(made)): _sha256(path.read_bytes()) for path in paths},
    }


def _unchanged(output: Path, inputs: dict[str, str]) -> dict[str, Any] | None:
    """Return the report of an earlier build whose inputs were the same and whose files are still there, unchanged."""
    report = _earlier(output)
    if report is None or report.get("inputs") != inputs or not isinstance(report.get("files"), dict):
        return None
    for name, digest in report["files"].items():
        try:
            if _sha256((output / name).read_bytes()) != digest:
                return None
        except OSError:
            return None
    if "repodata/repomd.xml" not in report["files"] and (output / "repodata").exists():
        return None
    return report


def _earlier(output: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    # Whatever else somebody put there is not a report of ours.
    files = report.get("files") if isinstance(report, dict) else None
    return report if isinstance(files, dict) and all(MADE.fullmatch(name) for name in files) else None


def _put_in_place(made: Path, output: Path, report: dict[str, Any]) -> None:
    """Move the finished files into the output, take away those of the build before, and write the report last."""
    earlier = _earlier(output) or {}
    text = json.dumps(report, indent=2) + "\n"
    (made / REPORT).write_text(text, encoding="utf-8")
    (output / REPORT).unlink(missing_ok=True)
    for name in earlier.get("files", ()):
        # A report that somebody changed must not lead elsewhere.
        if MADE.fullmatch(name):
            (output / name).unlink(missing_ok=True)
    for path in sorted(path for path in made.rglob("*") if path.is_file() and path.name != REPORT):
        target = output / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    index = output / "repodata"
    if index.is_dir() and not any(index.iterdir()):
        index.rmdir()
    (made / REPORT).replace(output / REPORT)


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """Yield a directory from which finished files only have to be renamed; it is removed on the way out."""
    with tempfile.TemporaryDirectory(prefix=".anchor-build-", dir=output) as name:
        yield Path(name)


@contextmanager
def _work_directory() -> Iterator[Path]:
    cache = cache_directory().absolute()
    # rpmbuild does not work below every path that a user may have.
    parent = cache if PLAIN_PATH.fullmatch(str(cache)) else Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix="rpm-", dir=parent)
    except OSError as error:
        raise AnchorError(
            f"{parent}: cannot be written: {error.strerror}", "name another cache directory with XDG_CACHE_HOME"
        ) from None
    with work as name:
        (Path(name) / "home").mkdir()
        yield Path(name)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn what a disk or its permissions refuse into a failure that a user can mend."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise AnchorError(f"{what}{error.strerror}", "make room, or name another directory with --out") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
