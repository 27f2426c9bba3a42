"""Source archives that are the same bytes whenever and by whomever they are made."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable


def pack(entries: Iterable[tuple[tarfile.TarInfo, bytes]], seconds: int) -> bytes:
    """Return a tar.gz of entries and their contents in this order, dated `seconds` since the epoch, owned by root."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry, content in entries:
            entry.mtime, entry.size = seconds, len(content)
            entry.uname = entry.gname = "root"
            tar.addfile(entry, io.BytesIO(content))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=seconds) as stream:
        stream.write(plain.getvalue())
    return packed.getvalue()
