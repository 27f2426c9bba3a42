"""The manifest: which image a node boots and where it is, as signed text; lib/anchor-manifest.sh reads it on the node.

Lines of `key value`, the first one `anchor-manifest 1`, the last one `signature BASE64` over all bytes before it. The
keys are described in doc/images.md. Both halves accept and refuse the same (tests/vectors/manifest.json).
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from anchor_build.errors import AnchorError, UsageError
from anchor_build.paramtypes import InvalidValueError, check_value

MAGIC = "anchor-manifest"
VERSION = 1
MAX_BYTES = 65536
SUFFIX = ".manifest"

LINE = re.compile(r"[ -~]+")
RELEASE = re.compile(r"[A-Za-z0-9._+~-]+")
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
# key -> its type and the type's options; each may be there once.
SINGLE: dict[str, tuple[str, dict[str, object]]] = {
    "image": ("name", {}),
    "format": ("name", {}),
    "file": ("name", {}),
    "sha256": ("sha256", {}),
    "size": ("int", {"min": 1}),
    "unpacked": ("int", {"min": 0}),
    "created": ("int", {"min": 0}),
    "expires": ("int", {"min": 0}),
    "verity": ("sha256", {}),
}
REQUIRED = ("image", "sha256", "size", "created")
# The stage of images at a registry: there `sha256` and `size` are of the OCI manifest or index, `mirrors` references.
REGISTRY_STAGE = "oci"
# The stage of images that may have a hash tree, whose root hash is `verity`.
VERITY_STAGE = "squashfs"
DAY_S = 86400
# No manifest is older than the format.
EARLIEST_DATE = "2020-01-01"
EARLIEST = int(datetime.fromisoformat(f"{EARLIEST_DATE}T00:00:00+00:00").timestamp())


@dataclass(frozen=True)
class Manifest:
    """What a manifest says: sizes in bytes, times in seconds since the epoch; None where it says nothing.

    `verity` is the root hash of a hash tree in the image, by which nodes read it in place.
    """

    image: str
    sha256: str
    size: int
    created: int
    format: str = ""
    file: str = ""
    unpacked: int | None = None
    expires: int | None = None
    verity: str = ""
    mirrors: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    notes: tuple[tuple[str, str], ...] = field(default=())


def manifest_text(manifest: Manifest) -> str:
    """Return the text of a manifest without a signature."""
    lines: list[tuple[str, object]] = [
        (MAGIC, VERSION),
        ("image", manifest.image),
        ("format", manifest.format),
        ("file", manifest.file),
        ("sha256", manifest.sha256),
        ("size", manifest.size),
        ("verity", manifest.verity),
        ("unpacked", manifest.unpacked),
        ("created", manifest.created),
        ("expires", manifest.expires),
        *(("kernel", release) for release in manifest.kernels),
        *(("mirror", url) for url in manifest.mirrors),
        *(("peer", url) for url in manifest.peers),
        *manifest.notes,
    ]
    text = "".join(f"{key} {value}\n" for key, value in lines if value not in (None, ""))
    parse_manifest(text.encode())
    return text


def split_manifest(data: bytes) -> tuple[bytes, bytes]:
    """Return the bytes that the signature covers, and the signature (empty for an unsigned manifest).

    Raises AnchorError for what is no manifest at all.
    """
    if len(data) > MAX_BYTES:
        raise _refuse(f"it has {len(data)} bytes, and {MAX_BYTES} are allowed")
    if data and not data.endswith(b"\n"):
        raise _refuse("its last line has no end: it was cut off")
    lines = data.decode("latin-1").split("\n")[:-1]
    if not all(LINE.fullmatch(line) for line in lines):
        raise _refuse("it has a line that is not printable ASCII")
    signed = [n for n, line in enumerate(lines) if line.startswith("signature ")]
    if not signed:
        return data, b""
    if signed[0] != len(lines) - 1:
        raise _refuse("something follows its signature")
    value = lines[-1].removeprefix("signature ")
    try:
        signature = base64.b64decode(value, validate=True)
    except binascii.Error:
        signature = b""
    if not signature or not BASE64.fullmatch(value):
        raise _refuse("its signature is not base64")
    return data[: len(data) - len(lines[-1]) - 1], signature


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest, whoever signed it; raises AnchorError with the line and the reason."""
    body, _ = split_manifest(data)
    lines = body.decode("ascii").split("\n")[:-1]
    if not lines or lines[0] != f"{MAGIC} {VERSION}":
        newer = lines and lines[0].startswith(f"{MAGIC} ")
        raise _refuse("its format is newer" if newer else f'it does not begin with "{MAGIC} {VERSION}"')
    single: dict[str, str] = {}
    many: dict[str, list[str]] = {"mirror": [], "peer": [], "kernel": []}
    notes = []
    for number, line in enumerate(lines[1:], start=2):
        key, _, value = line.partition(" ")
        try:
            if key in single:
                raise InvalidValueError("is there twice")
            if key in SINGLE:
                single[key] = check_value(SINGLE[key][0], value, SINGLE[key][1])
            elif key in many:
                if key == "kernel" and not RELEASE.fullmatch(value):
                    raise InvalidValueError("is not a kernel release")
                many[key].append(value if key == "kernel" else check_value("url", value, {}))
            elif key.startswith("x-") and key != "x-":
                notes.append((key, value))
            else:
                raise InvalidValueError("is not a known key")
        except InvalidValueError as error:
            raise _refuse(f"line {number}: {key} {error}") from None
    for key in REQUIRED:
        if key not in single:
            raise _refuse(f"it has no {key}")
    if "verity" in single and single["image"] != VERITY_STAGE:
        raise _refuse(f"verity is only for image {VERITY_STAGE}")
    return Manifest(
        image=single["image"],
        sha256=single["sha256"],
        size=int(single["size"]),
        created=int(single["created"]),
        format=single.get("format", ""),
        file=single.get("file", ""),
        unpacked=int(single["unpacked"]) if "unpacked" in single else None,
        expires=int(single["expires"]) if "expires" in single else None,
        verity=single.get("verity", ""),
        mirrors=tuple(many["mirror"]),
        peers=tuple(many["peer"]),
        kernels=tuple(many["kernel"]),
        notes=tuple(notes),
    )


def _refuse(reason: str) -> AnchorError:
    return AnchorError(f"not a manifest: {reason}")


def read_manifest(path: Path) -> tuple[Manifest, bytes]:
    """Read a manifest's file; return what it says and its bytes. Raises AnchorError with the file's name."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return parse_manifest(data), data
    except OSError as error:
        problem = str(error.strerror)
    except AnchorError as error:
        problem = error.message
    raise AnchorError(f"{path}: {problem}", "`anchor-build image` makes manifests") from None


def read_since(text: str) -> int:
    """Return the seconds since the epoch that --manifest-since means: a number, a date or a manifest's creation.

    Raises UsageError for what is neither, and for a time that cannot be meant: before there were manifests, or so late
    that nodes would refuse every manifest of today.
    """
    how = "write it as 2026-01-31T12:00:00Z (UTC where no zone is given), or as seconds since the epoch"
    if re.fullmatch(r"[0-9]{1,12}", text):
        since = int(text)
    elif Path(text).is_file():
        since = read_manifest(Path(text))[0].created
    else:
        try:
            given = datetime.fromisoformat(text)
            since = int((given if given.tzinfo else given.replace(tzinfo=UTC)).timestamp())
        except (ValueError, OverflowError):
            raise UsageError(f"--manifest-since {text}: is neither a time nor the file of a manifest", how) from None
    if since < EARLIEST:
        raise UsageError(f"--manifest-since {text}: is before {EARLIEST_DATE}, when there were no manifests", how)
    if since > time.time() + DAY_S:
        raise UsageError(
            f"--manifest-since {text}: lies in the future: nodes would refuse every manifest made before then", how
        )
    return since
