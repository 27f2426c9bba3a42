"""What a package says about itself, and whether its payload is what its header promises."""

from __future__ import annotations

import hashlib
import io
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anchor_build.artifact import Artifact, Entry, file_facts, utc
from anchor_build.console import printable
from anchor_build.cpio import Member, compression_of, decompress, read_archive
from anchor_build.errors import AnchorError

LEAD_SIZE = 96
HEADER_MAGIC = b"\x8e\xad\xe8\x01"
# Limits of rpm itself: lib/header.c, HEADER_TAGS_MAX and HEADER_DATA_MAX (the second is 256 MiB there).
TAGS_MAX = 0xFFFF
STORE_MAX = 64 << 20
# Bytes of one value by type: RPM_CHAR and RPM_INT8 to RPM_INT64, BIN; texts have at least their final zero.
VALUE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 1, 9: 1}
# PGPHASHALGO of RFC 4880, as in the tag FILEDIGESTALGO; none means MD5.
DIGESTS = {0: "md5", 1: "md5", 2: "sha1", 8: "sha256", 9: "sha384", 10: "sha512", 11: "sha224"}
GHOST = 1 << 6  # RPMFILE_GHOST: in the header, not in the payload
RELATIONS = ((1 << 1, "<"), (1 << 2, ">"), (1 << 3, "="))
# What rpmfile names a tag, by what it is: name, flags and version of each relation are three arrays.
DEPENDENCIES = {
    "requires": ("requirename", "requireflags", "requireversion"),
    "recommends": ("recommendname", "recommendflags", "recommendversion"),
    "suggests": ("suggestname", "suggestflags", "suggestversion"),
    "supplements": ("supplementname", "supplementflags", "supplementversion"),
    "enhances": ("enhancename", "enhanceflags", "enhanceversion"),
    "provides": ("provides", "provideflags", "provideversion"),
    "conflicts": ("conflictname", "conflictflags", "conflictversion"),
    "obsoletes": ("obsoletes", "obsoleteflags", "obsoleteversion"),
}
SCRIPTS = ("pretrans", "prein", "postin", "preun", "postun", "posttrans", "verifyscript", "triggerscripts")
SIGNATURES = {
    "rsaheader": "RSA",
    "signature": "DSA",
    "pgp": "RSA (header and payload)",
    "gpg": "DSA (header and payload)",
}
Headers = Mapping[Any, Any]


def inspect_rpm(file: Path) -> Artifact:
    """Read a package: its header by rpmfile, its payload by cpio.py, each file's digest compared.

    Raises AnchorError when it is cut off, damaged, or its payload is not what its header says.
    """
    data = file.read_bytes()
    payload = data[_payload_start(file, data) :]
    headers = _headers(file, data)
    try:
        facts = {**file_facts(file), **_facts(headers), "payload": compression_of(payload) or "none"}
        promised = _entries(headers)
        algorithm = DIGESTS[_number(headers, "filedigestalgo")]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise AnchorError(f"{file}: its header is damaged: {type(error).__name__}: {error}") from None
    entries, problems = _check_payload(promised, _payload(file, payload), algorithm)
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise AnchorError(
            f"{file}: its payload is not what its header says:\n  "
            + "\n  ".join([*map(printable, problems[:10]), *more]),
            "it is damaged or was tampered with: fetch or build it again",
        )
    return Artifact("rpm", {name: fact for name, fact in facts.items() if fact != "" and fact != []}, entries)


# --- The header -------------------------------------------------------------------------------------------


def _payload_start(file: Path, data: bytes) -> int:
    """Check the structure of lead, signature and header (rpm.org: RPM V4 package format); return where they end.

    rpmfile trusts the counts in a header; here they are compared with what is there.
    """
    position = LEAD_SIZE
    for name in ("signature", "header"):
        position = (position + 7) & ~7
        if data[position : position + 4] != HEADER_MAGIC or len(data) < position + 16:
            raise AnchorError(f"{file}: is cut off or damaged: its {name} is not at byte {position}")
        count, size = struct.unpack_from(">II", data, position + 8)
        store = position + 16 + 16 * count
        if count > TAGS_MAX or size > STORE_MAX or len(data) < store + size:
            raise AnchorError(f"{file}: is cut off or damaged: its {name} claims {count} tags and {size} bytes")
        for tag, kind, offset, values in struct.iter_unpack(">iIII", data[position + 16 : store]):
            if offset >= size or values * VALUE_SIZES.get(kind, 1) > size - offset:
                raise AnchorError(f"{file}: is damaged: tag {tag} of its {name} does not fit into it")
        position = store + size
    return position


def _headers(file: Path, data: bytes) -> Headers:
    import rpmfile
    from rpmfile.errors import RPMError

    try:
        found: Headers = rpmfile.open(fileobj=io.BytesIO(data)).headers
    except (RPMError, AssertionError, ValueError, IndexError, struct.error) as error:
        raise AnchorError(f"{file}: its header is damaged: {error}") from None
    return found


def _list(headers: Headers, tag: str) -> list[Any]:
    """Return the values of a tag: rpmfile gives one number alone, several as a tuple."""
    value = headers.get(tag, [])
    return list(value) if isinstance(value, list | tuple) else [value]


def _texts(headers: Headers, tag: str) -> list[str]:
    return [value.decode("utf-8", "surrogateescape") for value in _list(headers, tag)]


def _text(headers: Headers, tag: str) -> str:
    return "\n".join(_texts(headers, tag))


def _number(headers: Headers, tag: str) -> int:
    return int(next(iter(_list(headers, tag)), 0))


def _facts(headers: Headers) -> dict[str, Any]:
    signatures = [text for tag, text in SIGNATURES.items() if tag in headers]
    serial = f"{_number(headers, 'serial')}:" if "serial" in headers else ""
    return {
        "name": _text(headers, "name"),
        "version": f"{serial}{_text(headers, 'version')}",
        "release": _text(headers, "release"),
        # A package without the tag SOURCERPM is a source package itself.
        "arch": _text(headers, "arch") if "sourcerpm" in headers else "src",
        "summary": _text(headers, "summary"),
        "license": _text(headers, "copyright"),
        "url": _text(headers, "url"),
        "vendor": _text(headers, "vendor"),
        "build_time": utc(_number(headers, "buildtime")),
        "build_host": _text(headers, "buildhost"),
        "source": _text(headers, "sourcerpm"),
        "signature": signatures or "none",
        **{name: _relations(headers, *tags) for name, tags in DEPENDENCIES.items()},
        "scripts": [name for name in SCRIPTS if name in headers],
        # rpmfile calls CHANGELOGNAME (author and version) and CHANGELOGTEXT so.
        "changelog": "\n".join([*_texts(headers, "authors")[:1], *_texts(headers, "comments")[:1]]),
    }


def _relations(headers: Headers, names: str, flags: str, versions: str) -> list[str]:
    """Return dependencies as a spec file has them, such as `dracut >= 59`."""
    found = []
    for name, flag, version in zip(
        _texts(headers, names), _list(headers, flags), _texts(headers, versions), strict=True
    ):
        relation = "".join(sign for bit, sign in RELATIONS if flag & bit)
        found.append(f"{name} {relation} {version}" if relation and version else name)
    return sorted(found)


def _entries(headers: Headers) -> dict[str, tuple[Entry, int]]:
    """Return the files of the header with their flags; the digest is that of the header, whatever its algorithm."""
    directories = _texts(headers, "dirnames")
    paths = [
        directories[index] + name
        for index, name in zip(_list(headers, "dirindexes"), _texts(headers, "basenames"), strict=True)
    ]
    columns = zip(
        paths,
        _list(headers, "filemodes"),
        _list(headers, "filesizes"),
        _texts(headers, "fileusername"),
        _texts(headers, "filegroupname"),
        _list(headers, "filemtimes"),
        _texts(headers, "filemd5s"),
        _texts(headers, "filelinktos"),
        _list(headers, "fileflags"),
        strict=True,
    )
    found = {}
    for path, mode, size, user, group, mtime, digest, target, flags in columns:
        name = path.strip("/")
        found[name] = Entry(name, mode, size, f"{user}:{group}", mtime, digest, target), flags
    return found


# --- The payload ------------------------------------------------------------------------------------------


def _payload(file: Path, payload: bytes) -> dict[str, Member]:
    kind = compression_of(payload)
    data = decompress(file, payload, kind, None) if kind else payload
    if data.startswith(b"07070X"):
        raise AnchorError(f"{file}: its payload is in rpm's own form for files above 4 GiB, which inspect cannot read")
    members: dict[str, Member] = {}
    if rest := read_archive(file, data, members):
        raise AnchorError(f"{file}: {len(rest)} bytes follow the end of its payload")
    return members


def _check_payload(
    promised: Mapping[str, tuple[Entry, int]], members: Mapping[str, Member], algorithm: str
) -> tuple[dict[str, Entry], list[str]]:
    """Compare header and payload; return the entries with SHA-256 digests, and what is wrong."""
    problems = [f"{path}: is in the payload only" for path in sorted(members.keys() - promised.keys())]
    entries = {}
    for path, (entry, flags) in sorted(promised.items()):
        member = members.get(path)
        digest = ""
        if member is None:
            problems += [] if flags & GHOST else [f"{path}: is not in the payload"]
        elif stat.S_IFMT(member.mode) != stat.S_IFMT(entry.mode) or stat.S_IMODE(member.mode) != stat.S_IMODE(
            entry.mode
        ):
            problems.append(f"{path}: has mode {member.mode:o} instead of {entry.mode:o}")
        elif member.is_file:
            digest = hashlib.sha256(member.content).hexdigest()
            if len(member.content) != entry.size:
                problems.append(f"{path}: has {len(member.content)} bytes instead of {entry.size}")
            elif hashlib.new(algorithm, member.content, usedforsecurity=False).hexdigest() != entry.digest:
                problems.append(f"{path}: has another digest")
        elif member.is_link and member.content != entry.target.encode("utf-8", "surrogateescape"):
            problems.append(f"{path}: leads elsewhere")
        entries[path] = Entry(**{**vars(entry), "digest": digest})
    return entries, problems
