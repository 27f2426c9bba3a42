"""Builds the packages of dracut modules: spec and sources -> rpmbuild -> read back -> signed, indexed -> in place.

A report, packages.json, lies beside the packages. When nothing that decides their bytes has changed, and they are
still what it says, nothing is done.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_build import __version__
from anchor_build.console import Step
from anchor_build.errors import AnchorError
from anchor_build.files import directory_problems, disk_errors, file_digest, place, sha256, staging, work_directory
from anchor_build.registry import data_directory
from anchor_build.render import module_digest
from anchor_build.rpm import repo, spec
from anchor_build.rpm.check import problems_of, source_problems
from anchor_build.rpm.rpmbuild import MACROS, RPMBUILD, UNDEFINED, missing, run_rpm, run_rpmbuild
from anchor_build.stage import Stage
from anchor_build.version import TreeVersion, tree_time, tree_version

REPORT = "packages.json"
# What a build leaves in its output besides the report.
MADE = re.compile(r"[^/]+\.rpm|repodata/[^/]+")


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

    packaging: spec.Packaging
    spec_text: str
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
    tree = tree_version()
    packages = spec.make_packages(build.stages, build.family, build.known, tree.version.python)
    if problems := list(_host_problems(build)):
        raise AnchorError("\n".join(problems))
    with disk_errors(), work_directory(plain=True) as work:
        prepared = _prepare(build, tree, packages, work)
        report = _unchanged(build.output, prepared.inputs)
        if report is not None:
            return report, False
        with staging(build.output) as made:
            with step(f"build {len(packages)} packages with rpmbuild"):
                built = _build(build, prepared, work, made)
            with step("read the packages back"):
                _check(build, prepared, built)
            if prepared.signer:
                with step(f"sign with {prepared.signer}"):
                    repo.sign_packages(built, prepared.signer, prepared.packaging.time, work)
            if build.repository:
                with step("make the repository's index"):
                    repo.make_index(made, prepared.packaging.time, prepared.signer)
            report = _report(build, prepared, made)
            _put_in_place(made, build.output, report)
    return report, True


def _host_problems(build: RpmBuild) -> Iterator[str]:
    """Say what would only fail after rpmbuild's run."""
    wanted = [RPMBUILD, *([repo.CREATEREPO] if build.repository else [])]
    yield from missing([*wanted, *([repo.RPMSIGN, repo.GPG] if build.key is not None else [])])
    if build.dist is not None and not spec.DIST.fullmatch(build.dist):
        yield (
            f"--dist {build.dist!r}: begins with a dot, such as .el9, and RPM allows letters, digits and . _ + ~ ^ only"
        )
    yield from directory_problems(build.output)


def _prepare(build: RpmBuild, tree: TreeVersion, packages: tuple[spec.Package, ...], work: Path) -> _Prepared:
    top = data_directory()
    version, time = tree.version.rpm, tree_time(top, (top / "dracut-modules").rglob("*"))
    packaging = spec.make_packaging(packages, version.version, version.release, time)
    text, archive = spec.render_spec(packaging), spec.source_archive(packaging)
    dist = build.dist
    if dist is None:
        dist = run_rpm(["rpm", "--eval", "%{?dist}"], time, work).stdout.strip()
    signer = repo.find_key(build.key) if build.key is not None else None
    macros = run_rpm(["rpmbuild", "--showrc"], time, work).stdout.replace(str(work), "")
    inputs = {package.directory: module_digest(package.module) for package in packages}
    inputs |= {
        "spec": sha256(text.encode()),
        "source archive": sha256(archive),
        "rpmbuild": run_rpm(["rpmbuild", "--version"], time, work).stdout.strip(),
        "rpm's macros": sha256(macros.encode()),
        "options": sha256(json.dumps([MACROS, UNDEFINED, time, dist, build.source, signer]).encode()),
        "repository": repo.version() if build.repository else "none",
        "anchor-build": __version__,
    }
    return _Prepared(packaging, text, archive, dist, signer, inputs, tree.warnings)


def _build(build: RpmBuild, prepared: _Prepared, work: Path, made: Path) -> list[Path]:
    """Run rpmbuild; return its packages in `made`, in the order of the packaging, and last the source package."""
    packaging, file = prepared.packaging, work / f"{spec.NAME}.spec"
    for path, content in {work / packaging.source_name: prepared.archive, file: prepared.spec_text.encode()}.items():
        path.write_bytes(content)
        path.chmod(0o644)
    for mode in ("-bb", "-bs") if build.source else ("-bb",):
        built = run_rpmbuild(mode, file, prepared.dist, packaging.time, build.tell)
    evr = f"{packaging.version}-{packaging.release}{prepared.dist}"
    wanted = [f"{package.name}-{evr}.noarch.rpm" for package in packaging.packages]
    wanted += [f"{spec.NAME}-{evr}.src.rpm"] if build.source else []
    names = {path.name: path for path in built}
    if set(wanted) != set(names):
        raise AnchorError(f"rpmbuild made {sorted(names)} instead of {sorted(wanted)}")
    for name in wanted:
        place(names[name], made / name, packaging.time)
    return [made / name for name in wanted]


def _check(build: RpmBuild, prepared: _Prepared, built: list[Path]) -> None:
    packaging = prepared.packaging
    pairs = zip(packaging.packages, built, strict=False)  # the source package is the last one, and has no Package
    problems = [p for package, file in pairs for p in problems_of(file, package, packaging, prepared.dist)]
    if build.source:
        sources = {f"{spec.NAME}.spec": prepared.spec_text.encode(), packaging.source_name: prepared.archive}
        problems += source_problems(built[-1], packaging, sources)
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
        "files": {str(path.relative_to(made)): file_digest(path) for path in paths},
    }


def _unchanged(output: Path, inputs: dict[str, str]) -> dict[str, Any] | None:
    """Return the report of an earlier build whose inputs were the same and whose files are still there, unchanged."""
    report = _earlier(output)
    if report is None or report.get("inputs") != inputs:
        return None
    for name, digest in report["files"].items():
        try:
            if file_digest(output / name) != digest:
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
        (output / name).unlink(missing_ok=True)
    for path in sorted(path for path in made.rglob("*") if path.is_file() and path.name != REPORT):
        target = output / path.relative_to(made)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    index = output / "repodata"
    if index.is_dir() and not any(index.iterdir()):
        index.rmdir()
    (made / REPORT).replace(output / REPORT)
