"""Reads finished packages back: names, relations, files, modes and digests against what was to be packaged."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from anchor_build.files import sha256
from anchor_build.rpm.header import DOC, LICENSE, RpmPackage, payload_problems, read_rpm
from anchor_build.rpm.spec import LICENSE_NAME, MODULES, NAME, Package, Packaging, license_text

DIRECTORY = stat.S_IFDIR | 0o755
DOCUMENT = stat.S_IFREG | 0o644
# dependencies on rpm itself, which rpmbuild adds
INTERNAL = "rpmlib("
CHECKED = ("requires", "recommends", "provides", "obsoletes")


def problems_of(file: Path, package: Package, packaging: Packaging, dist: str) -> list[str]:
    """Return one line for each thing in which a binary package is not what was to be packaged.

    Raises AnchorError when it is no whole package.
    """
    found = read_rpm(file)
    return [f"{file.name}: {problem}" for problem in _problems(found, package, packaging, dist)]


def source_problems(file: Path, packaging: Packaging, sources: Mapping[str, bytes]) -> list[str]:
    """Return one line for each thing in which a source package is not made of `sources`, which are by file name.

    Raises AnchorError when it is no whole package.
    """
    found = read_rpm(file)
    problems = list(_tag_problems(found, packaging, {"name": NAME, "version": packaging.version}))
    problems += [f"has BuildRequires: {relation}" for relation in declared(found, "requires")]
    problems += [f"holds {name}, which is no source" for name in sorted(set(found.members) - set(sources))]
    for name, content in sources.items():
        if name not in found.members or found.members[name].content != content:
            problems.append(f"does not hold {name} as it was made")
    return [f"{file.name}: {problem}" for problem in [*problems, *payload_problems(found)]]


def declared(package: RpmPackage, kind: str) -> list[str]:
    """Return a package's relations of one kind (requires, recommends and so on) that rpmbuild did not add."""
    return [relation for relation in package.relations[kind] if not relation.startswith(INTERNAL)]


def _problems(found: RpmPackage, package: Package, packaging: Packaging, dist: str) -> Iterator[str]:
    release = f"{packaging.release}{dist}"
    texts = {"name": package.name, "version": packaging.version, "release": release, "arch": "noarch"}
    yield from _tag_problems(found, packaging, {**texts, "summary": package.summary})
    for kind in CHECKED:
        given, expected = set(declared(found, kind)), _expected(package, kind, f"{packaging.version}-{release}")
        yield from (f"lacks {kind.capitalize()}: {relation}" for relation in sorted(expected - given))
        yield from (
            f"has {kind.capitalize()}: {relation}, which nobody declared" for relation in sorted(given - expected)
        )
    if found.scripts:
        yield f"runs scripts: {', '.join(found.scripts)}"
    yield from _file_problems(found, package)
    yield from payload_problems(found)


def _tag_problems(found: RpmPackage, packaging: Packaging, texts: Mapping[str, str]) -> Iterator[str]:
    for tag, wanted in {**texts, "copyright": LICENSE_NAME}.items():
        if found.text(tag) != wanted:
            yield f"{tag} is {found.text(tag)!r} instead of {wanted!r}"
    if found.number("buildtime") != packaging.time:
        yield f"buildtime is {found.number('buildtime')} instead of {packaging.time}"


def _expected(package: Package, kind: str, evr: str) -> set[str]:
    expected = {relation for tag, relation in package.relations if tag.lower() == kind}
    expected = {relation.replace("%{version}-%{release}", evr) for relation in expected}
    if kind == "provides":
        expected.add(f"{package.name} = {evr}")
    if kind == "requires" and not package.module.stage.is_core:
        expected.add(f"{NAME} = {evr}")
    return expected


def _file_problems(found: RpmPackage, package: Package) -> Iterator[str]:
    if found.algorithm != "sha256":
        yield f"has no SHA-256 digests of its files but {found.algorithm}"
    top = f"{MODULES}/{package.directory}"
    expected = {top: (DIRECTORY, "")}
    for name, module_file in package.module.files.items():
        expected[f"{top}/{name}"] = (stat.S_IFREG | module_file.mode, sha256(module_file.content))
    # Where documents and licences lie is the distribution's business: they are known by name.
    documents = {("LICENSE", LICENSE): license_text()}
    documents |= {(name, DOC): content for name, content in package.documents.items()}
    for file in found.files:
        if file.owner != "root:root":
            yield f"{file.path} belongs to {file.owner}"
        if file.flags & (DOC | LICENSE):
            content = documents.pop((file.path.rpartition("/")[2], file.flags & (DOC | LICENSE)), None)
            wanted = (DOCUMENT, sha256(content) if content is not None else "none")
        elif stat.S_ISDIR(file.mode) and file.path.startswith("/usr/share/") and package.name in file.path:
            wanted = (DIRECTORY, "")  # for the documents, named after the package
        else:
            wanted = expected.pop(file.path, (0, "none"))
        if (file.mode, file.digest) != wanted:
            yield f"{file.path} is not as rendered: mode {file.mode:o}, digest {file.digest or 'none'}"
    yield from (f"lacks {path}" for path in sorted(expected))
    yield from (f"lacks the document {name}" for name, _ in sorted(documents))
