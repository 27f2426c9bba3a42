"""Reads finished packages back: names, relations, files, modes and digests against what was to be packaged.

The tags are those of rpm.org/docs/4.19.x/manual/tags.html, by the names that rpmfile gives them.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rpmfile

from anchor_build.cpio import Member, read_initramfs
from anchor_build.errors import AnchorError
from anchor_build.rpmspec import LICENSE, MODULES, NAME, Package, Packaging, license_text

SHA256 = 8  # RPMTAG_FILEDIGESTALGO
DOC, LICENSE_FLAG = 1 << 1, 1 << 7  # RPMTAG_FILEFLAGS
SENSES = ((1 << 1, "<"), (1 << 2, ">"), (1 << 3, "="))  # RPMTAG_REQUIREFLAGS
# dependencies on rpm itself, which rpmbuild adds
INTERNAL = "rpmlib("


@dataclass(frozen=True)
class PackagedFile:
    """A file as the header describes it; `mode` has type and permission bits, `flags` are those of RPMTAG_FILEFLAGS."""

    path: str
    mode: int
    digest: str
    owner: str
    flags: int


def read_header(file: Path) -> dict[str, Any]:
    """Return a package's tags by name; raises AnchorError when the file is no package."""
    try:
        with rpmfile.open(file) as package:
            return {**package.headers, "payload_offset": package.data_offset}
    except Exception as error:  # rpmfile raises whatever its parsing runs into
        raise AnchorError(f"{file}: is not a whole RPM package: {error}") from None


def problems_of(file: Path, package: Package, packaging: Packaging, dist: str, work: Path) -> list[str]:
    """Return one line for each thing in which a binary package is not what was to be packaged.

    `work` is a directory for what is unpacked on the way.
    """
    header = read_header(file)
    return [f"{file.name}: {problem}" for problem in _problems(file, header, package, packaging, dist, work)]


def source_problems(file: Path, packaging: Packaging, sources: Mapping[str, bytes], work: Path) -> list[str]:
    """Return one line for each thing in which a source package is not made of `sources`, which are by file name."""
    header = read_header(file)
    wanted = {"name": NAME, "version": packaging.version, "copyright": LICENSE, "buildtime": packaging.time}
    found = [f"{tag} is {_plain(header.get(tag))!r}" for tag in wanted if _plain(header.get(tag)) != wanted[tag]]
    found += [f"has BuildRequires: {relation}" for relation in relations(header, "Requires")]
    members = _payload(file, header, work)
    found += [f"holds {name}, which is no source" for name in sorted(set(members) - set(sources))]
    for name, content in sources.items():
        if name not in members or members[name].content != content:
            found.append(f"does not hold {name} as it was made")
    return [f"{file.name}: {problem}" for problem in found]


def _problems(
    file: Path, header: Mapping[str, Any], package: Package, packaging: Packaging, dist: str, work: Path
) -> Iterator[str]:
    evr = f"{packaging.version}-{packaging.release}{dist}"
    for tag, wanted in {
        "name": package.name,
        "version": packaging.version,
        "release": f"{packaging.release}{dist}",
        "arch": "noarch",
        "copyright": LICENSE,
        "buildtime": packaging.time,
        "summary": package.summary,
    }.items():
        if _plain(header.get(tag)) != wanted:
            yield f"{tag} is {_plain(header.get(tag))!r} instead of {wanted!r}"
    for kind in ("Requires", "Recommends", "Provides", "Obsoletes"):
        found, expected = set(relations(header, kind)), _expected(package, kind, evr)
        yield from (f"lacks {kind}: {relation}" for relation in sorted(expected - found))
        yield from (f"has {kind}: {relation}, which nobody declared" for relation in sorted(found - expected))
    if scripts := [tag for tag in ("prein", "postin", "preun", "postun") if tag in header]:
        yield f"runs scripts: {', '.join(scripts)}"
    yield from _file_problems(header, package)
    yield from _payload_problems(file, header, work)


def _expected(package: Package, kind: str, evr: str) -> set[str]:
    expected = {relation for tag, relation in package.relations if tag == kind}
    expected = {relation.replace("%{version}-%{release}", evr) for relation in expected}
    if kind == "Provides":
        expected.add(f"{package.name} = {evr}")
    if kind == "Requires" and not package.module.stage.is_core:
        expected.add(f"anchor-dracut-module = {evr}")
    return expected


def relations(header: Mapping[str, Any], kind: str) -> list[str]:
    """Return a header's relations of one kind (Requires, Recommends, Provides, Obsoletes), as they stand in a spec."""
    names, versions, flags = {
        "Requires": ("requirename", "requireversion", "requireflags"),
        "Recommends": ("recommendname", "recommendversion", "recommendflags"),
        "Provides": ("provides", "provideversion", "provideflags"),
        "Obsoletes": ("obsoletes", "obsoleteversion", "obsoleteflags"),
    }[kind]
    rows = zip(_many(header.get(names)), _many(header.get(versions)), _many(header.get(flags)), strict=True)
    found = []
    for name, version, flag in rows:
        sense = "".join(sign for bit, sign in SENSES if flag & bit)
        if not name.startswith(INTERNAL):
            found.append(f"{name} {sense} {version}" if sense else name)
    return found


def files(header: Mapping[str, Any]) -> list[PackagedFile]:
    """Return the files and directories that a header lists."""
    directories = _many(header.get("dirnames"))
    columns = ("dirindexes", "basenames", "filemodes", "filemd5s", "fileusername", "filegroupname", "fileflags")
    rows = zip(*(_many(header.get(column)) for column in columns), strict=True)
    return [
        PackagedFile(f"{directories[index]}{name}", mode & 0xFFFF, digest, f"{user}:{group}", flags)
        for index, name, mode, digest, user, group, flags in rows
    ]


def _file_problems(header: Mapping[str, Any], package: Package) -> Iterator[str]:
    if header.get("filedigestalgo") != SHA256:
        yield "has no SHA-256 digests of its files"
    top = f"{MODULES}/{package.directory}"
    expected = {top: (stat.S_IFDIR | 0o755, "")}
    for name, file in package.module.files.items():
        expected[f"{top}/{name}"] = (stat.S_IFREG | file.mode, hashlib.sha256(file.content).hexdigest())
    # Where documents and licences lie is the distribution's business: they are known by name.
    documents = {("LICENSE", LICENSE_FLAG): license_text()}
    documents |= {(name, DOC): content for name, content in package.documents.items()}
    for found in files(header):
        if found.owner != "root:root":
            yield f"{found.path} belongs to {found.owner}"
        if found.flags & (DOC | LICENSE_FLAG):
            content = documents.pop((found.path.rpartition("/")[2], found.flags & (DOC | LICENSE_FLAG)), None)
            wanted = (stat.S_IFREG | 0o644, hashlib.sha256(content).hexdigest() if content is not None else "none")
        elif stat.S_ISDIR(found.mode) and found.path.startswith("/usr/share/") and package.name in found.path:
            wanted = (stat.S_IFDIR | 0o755, "")  # for the documents, named after the package
        else:
            wanted = expected.pop(found.path, (0, "none"))
        if (found.mode, found.digest) != wanted:
            yield f"{found.path} is not as rendered: mode {found.mode:o}, digest {found.digest or 'none'}"
    yield from (f"lacks {path}" for path in sorted(expected))
    yield from (f"lacks the document {name}" for name, _ in sorted(documents))


def _payload_problems(file: Path, header: Mapping[str, Any], work: Path) -> Iterator[str]:
    """Check that the archive holds what the header says: rpm itself looks only when it installs."""
    members = _payload(file, header, work)
    for found in files(header):
        member = members.get(found.path.strip("/"))
        if member is None or member.mode != found.mode:
            yield f"{found.path} is not in the archive as the header has it"
        elif stat.S_ISREG(found.mode) and hashlib.sha256(member.content).hexdigest() != found.digest:
            yield f"{found.path} is in the archive with other content"


def _payload(file: Path, header: Mapping[str, Any], work: Path) -> Mapping[str, Member]:
    """Return what a package's archive holds: the same format as an initramfs (cpio, newc)."""
    payload = work / "payload"
    payload.write_bytes(file.read_bytes()[header["payload_offset"] :])
    return read_initramfs(payload, work).members


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _many(value: Any) -> list[Any]:
    """Return a tag's values as a list: rpmfile gives a single number as it is, and a missing tag not at all."""
    if value is None:
        return []
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else [_plain(value)]
