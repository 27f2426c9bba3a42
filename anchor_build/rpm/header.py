"""Reads a package: its header by rpmfile, its payload by cpio.py, and whether the second is what the first promises.

The tags are those of rpm.org/docs/4.19.x/manual/tags.html, by the names that rpmfile gives them.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build.cpio import Member, compression_of, decompress, read_archive
from anchor_build.errors import AnchorError
from anchor_build.files import sha256

LEAD_SIZE = 96
HEADER_MAGIC = b"\x8e\xad\xe8\x01"
HEADER_INTRO = 16  # bytes: magic, four reserved, number of tags, size of the values
TAG_SIZE = 16  # bytes: number, type, offset, count
# Limits of rpm itself: lib/header.c, HEADER_TAGS_MAX and HEADER_DATA_MAX (the second is 256 MiB there).
TAGS_MAX = 0xFFFF
STORE_MAX = 64 << 20
# Bytes of one value by type: RPM_CHAR and RPM_INT8 to RPM_INT64, BIN; texts have at least their final zero.
VALUE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 1, 9: 1}
# PGPHASHALGO of RFC 4880, as in the tag FILEDIGESTALGO; none means MD5.
DIGESTS = {0: "md5", 1: "md5", 2: "sha1", 8: "sha256", 9: "sha384", 10: "sha512", 11: "sha224"}
# RPMTAG_FILEFLAGS; a ghost is in the header, not in the payload.
CONFIG, DOC, GHOST, LICENSE = 1 << 0, 1 << 1, 1 << 6, 1 << 7
SENSES = ((1 << 1, "<"), (1 << 2, ">"), (1 << 3, "="))  # RPMTAG_REQUIREFLAGS
# What rpmfile names a relation: name, flags and version are three arrays.
RELATIONS = {
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
LARGE_MAGIC = b"07070X"  # rpm's own form of cpio for files above 4 GiB
MODE_BITS = 0xFFFF  # rpmfile gives modes as signed numbers where they were stored so
# What reading a tag that is not as it should be runs into.
DAMAGED = (KeyError, ValueError, IndexError, TypeError, AttributeError, OverflowError)
Headers = Mapping[Any, Any]


@dataclass(frozen=True)
class PackagedFile:
    """A file as the header describes it, by its path there (`/usr/…`; in a source package its name).

    `mode` has type and permission bits, `size` is in bytes, `time` in seconds since the epoch, `flags` are those of
    RPMTAG_FILEFLAGS, `digest` is of the package's algorithm; `target` is where a symbolic link leads.
    """

    path: str
    mode: int
    size: int
    owner: str
    time: int
    digest: str
    target: str
    flags: int

    @property
    def name(self) -> str:
        """Its path in the payload."""
        return self.path.strip("/")


@dataclass(frozen=True)
class RpmPackage:
    """A package: tags by rpmfile's names, files of its header, and what its payload holds by path.

    `algorithm` is that of the files' digests, `compression` that of the payload (`none` if it is not compressed).
    """

    file: Path
    headers: Headers
    files: tuple[PackagedFile, ...]
    members: Mapping[str, Member]
    algorithm: str
    compression: str

    def text(self, tag: str) -> str:
        """Return a tag's text, one line for each value; nothing where there is no such tag."""
        return text(self.headers, tag)

    def number(self, tag: str) -> int:
        """Return a tag's number, 0 where there is no such tag."""
        return _number(self.headers, tag)

    @property
    def scripts(self) -> list[str]:
        """The scripts that rpm would run."""
        return [name for name in SCRIPTS if name in self.headers]

    @property
    def relations(self) -> dict[str, list[str]]:
        """Relations by kind (requires, provides and so on), as they stand in a spec: `dracut >= 59`; sorted."""
        return {kind: _relations(self.headers, *tags) for kind, tags in RELATIONS.items()}


def read_rpm(file: Path) -> RpmPackage:
    """Read a package; raises AnchorError when it is cut off or damaged, and OSError when it cannot be read."""
    data = file.read_bytes()
    payload = data[_payload_start(file, data) :]
    headers = _headers(file, data)
    try:
        files = tuple(_files(headers))
        algorithm = DIGESTS[_number(headers, "filedigestalgo")]
        for tags in RELATIONS.values():
            _relations(headers, *tags)
    except DAMAGED as error:
        raise AnchorError(f"{file}: its header is damaged: {type(error).__name__}: {error}") from None
    kind = compression_of(payload)
    return RpmPackage(file, headers, files, _payload(file, payload, kind), algorithm, kind or "none")


def payload_problems(package: RpmPackage) -> list[str]:
    """Return one line for each thing in which the payload is not what the header says; rpm looks when it installs."""
    promised = {file.name: file for file in package.files}
    problems = [f"{path}: is in the payload only" for path in sorted(package.members.keys() - promised.keys())]
    for path, file in sorted(promised.items()):
        member = package.members.get(path)
        if member is None:
            problems += [] if file.flags & GHOST else [f"{path}: is not in the payload"]
        elif member.mode & MODE_BITS != file.mode:
            problems.append(f"{path}: has mode {member.mode:o} instead of {file.mode:o}")
        elif member.is_file and len(member.content) != file.size:
            problems.append(f"{path}: has {len(member.content)} bytes instead of {file.size}")
        elif member.is_file and _digest(package.algorithm, member.content) != file.digest:
            problems.append(f"{path}: has another digest")
        elif member.is_link and member.content != file.target.encode("utf-8", "surrogateescape"):
            problems.append(f"{path}: leads elsewhere")
    return problems


def _digest(algorithm: str, content: bytes) -> str:
    if algorithm == "sha256":
        return sha256(content)
    return hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()


def _payload_start(file: Path, data: bytes) -> int:
    """Check the structure of lead, signature and header (rpm.org: RPM V4 package format); return where they end.

    rpmfile trusts the counts in a header; here they are compared with what is there.
    """
    position = LEAD_SIZE
    for name in ("signature", "header"):
        position = (position + 7) & ~7
        if data[position : position + len(HEADER_MAGIC)] != HEADER_MAGIC or len(data) < position + HEADER_INTRO:
            raise AnchorError(f"{file}: is cut off or damaged: its {name} is not at byte {position}")
        count, size = struct.unpack_from(">II", data, position + HEADER_INTRO - 8)
        store = position + HEADER_INTRO + TAG_SIZE * count
        if count > TAGS_MAX or size > STORE_MAX or len(data) < store + size:
            raise AnchorError(f"{file}: is cut off or damaged: its {name} claims {count} tags and {size} bytes")
        for tag, kind, offset, values in struct.iter_unpack(">iIII", data[position + HEADER_INTRO : store]):
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


def texts(headers: Headers, tag: str) -> list[str]:
    """Return the texts of a tag; bytes that are not UTF-8 survive (PEP 383)."""
    return [value.decode("utf-8", "surrogateescape") for value in _list(headers, tag)]


def text(headers: Headers, tag: str) -> str:
    """Return the texts of a tag as lines."""
    return "\n".join(texts(headers, tag))


def _number(headers: Headers, tag: str) -> int:
    return int(next(iter(_list(headers, tag)), 0))


def _relations(headers: Headers, names: str, flags: str, versions: str) -> list[str]:
    found = []
    for name, flag, version in zip(texts(headers, names), _list(headers, flags), texts(headers, versions), strict=True):
        sense = "".join(sign for bit, sign in SENSES if flag & bit)
        found.append(f"{name} {sense} {version}" if sense and version else name)
    return sorted(found)


def _files(headers: Headers) -> list[PackagedFile]:
    directories = texts(headers, "dirnames")
    paths = [
        directories[index] + name
        for index, name in zip(_list(headers, "dirindexes"), texts(headers, "basenames"), strict=True)
    ]
    columns = zip(
        paths,
        _list(headers, "filemodes"),
        _list(headers, "filesizes"),
        texts(headers, "fileusername"),
        texts(headers, "filegroupname"),
        _list(headers, "filemtimes"),
        texts(headers, "filemd5s"),
        texts(headers, "filelinktos"),
        _list(headers, "fileflags"),
        strict=True,
    )
    return [
        PackagedFile(path, mode & MODE_BITS, size, f"{user}:{group}", time, digest, target, flags)
        for path, mode, size, user, group, time, digest, target, flags in columns
    ]


def _payload(file: Path, payload: bytes, kind: str | None) -> dict[str, Member]:
    data = decompress(file, payload, kind) if kind else payload
    if data.startswith(LARGE_MAGIC):
        raise AnchorError(f"{file}: its payload is in rpm's own form for files above 4 GiB, which is not read here")
    members: dict[str, Member] = {}
    if rest := read_archive(file, data, members):
        raise AnchorError(f"{file}: {len(rest)} bytes follow the end of its payload")
    return members
