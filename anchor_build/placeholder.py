"""Makes a shared library that stands in for one that is linked with and never called.

A program does not start without a library that it, or another library, is linked with, even for a part of it that it
never uses. A placeholder has the library's name, versions and those of its symbols that are asked for; all functions
return 0, all data is zero. Nothing else is in it, and it needs no other library.

The format is that of elf(5), "System V Application Binary Interface" and, for the versions of symbols, "ELF Symbol
Versioning" (akkadia.org/drepper/symbol-versioning).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

from anchor_build.elf import Symbol, Versions, dynamic_symbols, symbol_versions

# "return 0" in the code of each processor, by e_machine; after what branch protection wants to see first.
RETURN_ZERO = {
    62: bytes.fromhex("f30f1efa 31c0 c3"),  # endbr64; xor %eax,%eax; ret
    183: bytes.fromhex("5f2403d5 000080d2 c0035fd6"),  # bti c; mov x0,#0; ret
}
# The largest page that any of these processors has, in bytes: segments of different rights must not share one.
PAGE = 0x10000
PT_LOAD, PT_DYNAMIC, PT_GNU_STACK = 1, 2, 0x6474E551
DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 4, 5, 6, 10, 11, 14
DT_VERSYM, DT_VERDEF, DT_VERDEFNUM = 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
STT_OBJECT, STT_FUNC, STT_TLS, STT_IFUNC = 1, 2, 6, 10
# Any section's number: what counts is that the symbol is defined here, and not absolute.
SHN_SOME = 1
ENTRY = struct.Struct("<QQ")


def placeholder(name: str, library: bytes, wanted: Collection[bytes]) -> bytes | None:
    """Return a placeholder for a library (its file's content) of this DT_SONAME, with those symbols that are wanted.

    None where it cannot be made: for a processor that is not known here, for a library without the table of its
    symbols, and for variables of threads.
    """
    little64 = library[4:6] == b"\2\1"
    code = RETURN_ZERO.get(struct.unpack_from("<H", library, 18)[0]) if little64 else None
    exported = dynamic_symbols(library)
    if code is None or exported is None:
        return None
    symbols = [symbol for symbol in exported if symbol.defined and symbol.name in wanted]
    if any(symbol.kind == STT_TLS for symbol in symbols):
        return None
    return _assemble(name.encode(), library, code, symbols, symbol_versions(library))


def _assemble(name: bytes, library: bytes, code: bytes, symbols: Sequence[Symbol], versions: Versions) -> bytes:
    """Lay out two segments: headers, tables and code; what the dynamic linker writes to, and the data."""
    strings = _Strings()
    soname = strings.add(name)
    names = [strings.add(symbol.name) for symbol in symbols]
    definitions = _definitions(strings, name, versions)
    tables = {
        DT_HASH: _hash_table([symbol.name for symbol in symbols]),
        DT_SYMTAB: bytes(24 * (len(symbols) + 1)),
        DT_STRTAB: strings.data(),
        **({DT_VERSYM: _numbers(symbols), DT_VERDEF: definitions} if versions else {}),
    }
    place = 64 + 4 * 56
    where: dict[int, int] = {}
    for tag, table in tables.items():
        where[tag] = place
        place += -(-len(table) // 8) * 8
    code_at = place
    first = code_at + -(-len(code) // 8) * 8
    # One page further than it lies in the file, so that it is in a page of its own.
    dynamic_at = first + PAGE
    numbers = {**where, DT_STRSZ: len(tables[DT_STRTAB]), DT_SYMENT: 24, DT_SONAME: soname}
    if versions:
        numbers[DT_VERDEFNUM] = len(versions) + 1
    dynamic = b"".join(ENTRY.pack(tag, value) for tag, value in sorted(numbers.items())) + ENTRY.pack(0, 0)
    data_at = dynamic_at + len(dynamic)
    data_size = max((symbol.size for symbol in symbols if symbol.kind == STT_OBJECT), default=0)
    tables[DT_SYMTAB] = bytes(24) + b"".join(
        struct.pack(
            "<IBBHQQ",
            at,
            symbol.binding << 4 | (STT_OBJECT if symbol.kind == STT_OBJECT else STT_FUNC),
            0,
            SHN_SOME,
            data_at if symbol.kind == STT_OBJECT else code_at,
            symbol.size if symbol.kind == STT_OBJECT else len(code),
        )
        for at, symbol in zip(names, symbols, strict=True)
    )
    segments = [
        (PT_LOAD, 5, 0, 0, first, first, PAGE),
        (PT_LOAD, 6, first, dynamic_at, len(dynamic), len(dynamic) + data_size, PAGE),
        (PT_DYNAMIC, 6, first, dynamic_at, len(dynamic), len(dynamic), 8),
        (PT_GNU_STACK, 6, 0, 0, 0, 0, 16),
    ]
    # e_ident, e_machine and e_flags are the library's own: it is for the same processor.
    machine, flags = struct.unpack_from("<H", library, 18)[0], struct.unpack_from("<I", library, 48)[0]
    header = library[:16] + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, flags, 64, 56, len(segments), 64, 0, 0
    )
    header += b"".join(
        struct.pack("<IIQQQQQQ", kind, rights, offset, address, address, size, memory, align)
        for kind, rights, offset, address, size, memory, align in segments
    )
    body = b"".join(table + bytes(-len(table) % 8) for table in tables.values())
    return header + body + code + bytes(-len(code) % 8) + dynamic


class _Strings:
    """A string table: the names, each with a zero after it."""

    def __init__(self) -> None:
        self._data = bytearray(1)

    def add(self, text: bytes) -> int:
        place = len(self._data)
        self._data += text + b"\0"
        return place

    def data(self) -> bytes:
        return bytes(self._data)


def _hash(name: bytes) -> int:
    """Return the hash of a symbol's name that the System V ABI defines."""
    value = 0
    for byte in name:
        value = (value << 4) + byte
        value ^= value >> 24 & 0xF0
        value &= 0x0FFFFFFF
    return value


def _hash_table(names: Sequence[bytes]) -> bytes:
    """Return DT_HASH for symbols 1, 2, ...: one bucket for some of them, and chains."""
    buckets = [0] * max(1, len(names) // 2)
    chains = [0] * (len(names) + 1)
    for number, name in enumerate(names, start=1):
        bucket = _hash(name) % len(buckets)
        chains[number], buckets[bucket] = buckets[bucket], number
    return struct.pack(f"<II{len(buckets)}I{len(chains)}I", len(buckets), len(chains), *buckets, *chains)


def _numbers(symbols: Sequence[Symbol]) -> bytes:
    """Return DT_VERSYM: the version of each symbol, with the bit that hides one that is not the default."""
    return struct.pack(f"<{len(symbols) + 1}H", 0, *(symbol.version for symbol in symbols))


def _definitions(strings: _Strings, name: bytes, versions: Versions) -> bytes:
    """Return DT_VERDEF: the file itself as number 1, and the library's versions under their numbers."""
    every = [(1, 1, name), *((0, number, version) for number, version in sorted(versions.items()))]
    return b"".join(
        struct.pack(
            "<HHHHIIIII", 1, flags, number, 1, _hash(version), 20, 28 if n < len(every) else 0, strings.add(version), 0
        )
        for n, (flags, number, version) in enumerate(every, start=1)
    )
