"""What a package says about itself, and whether its payload is what its header promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchor_build.console import printable
from anchor_build.errors import AnchorError
from anchor_build.files import sha256
from anchor_build.inspect.artifact import Artifact, Entry, file_facts, utc
from anchor_build.rpm.header import DAMAGED, RpmPackage, payload_problems, read_rpm, texts

PROBLEMS_SHOWN = 10
SIGNATURES = {
    "rsaheader": "RSA",
    "signature": "DSA",
    "pgp": "RSA (header and payload)",
    "gpg": "DSA (header and payload)",
}


def inspect_rpm(file: Path) -> Artifact:
    """Read a package, each file's digest compared.

    Raises AnchorError when it is cut off, damaged, or its payload is not what its header says.
    """
    package = read_rpm(file)
    try:
        facts = {**file_facts(file), **_facts(package), "payload": package.compression}
    except DAMAGED as error:
        raise AnchorError(f"{file}: its header is damaged: {type(error).__name__}: {error}") from None
    if problems := payload_problems(package):
        rest = len(problems) - PROBLEMS_SHOWN
        shown = [*map(printable, problems[:PROBLEMS_SHOWN]), *([f"and {rest} more"] if rest > 0 else [])]
        raise AnchorError(
            f"{file}: its payload is not what its header says:\n  " + "\n  ".join(shown),
            "it is damaged or was tampered with: fetch or build it again",
        )
    return Artifact("rpm", {name: fact for name, fact in facts.items() if fact not in ("", [])}, _entries(package))


def _facts(package: RpmPackage) -> dict[str, Any]:
    signatures = [text for tag, text in SIGNATURES.items() if tag in package.headers]
    serial = f"{package.number('serial')}:" if "serial" in package.headers else ""
    return {
        "name": package.text("name"),
        "version": f"{serial}{package.text('version')}",
        "release": package.text("release"),
        # A package without the tag SOURCERPM is a source package itself.
        "arch": package.text("arch") if "sourcerpm" in package.headers else "src",
        "summary": package.text("summary"),
        "license": package.text("copyright"),
        "url": package.text("url"),
        "vendor": package.text("vendor"),
        "build_time": utc(package.number("buildtime")),
        "build_host": package.text("buildhost"),
        "source": package.text("sourcerpm"),
        "signature": signatures or "none",
        **package.relations,
        "scripts": package.scripts,
        # rpmfile calls CHANGELOGNAME (author and version) and CHANGELOGTEXT so.
        "changelog": "\n".join([*texts(package.headers, "authors")[:1], *texts(package.headers, "comments")[:1]]),
    }


def _entries(package: RpmPackage) -> dict[str, Entry]:
    """Return the files of the header, with SHA-256 digests whatever the header's are."""
    entries = {}
    for file in sorted(package.files, key=lambda file: file.name):
        member = package.members.get(file.name)
        digest = sha256(member.content) if member is not None and member.is_file else ""
        entries[file.name] = Entry(file.name, file.mode, file.size, file.owner, file.time, digest, file.target)
    return entries
