"""What a program says about itself: its processor, its dynamic linker, and which shared libraries it needs (elf(5))."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\x7fELF"
# e_machine (elf.h) of the processors that distributions support, as uname names them.
MACHINES = {3: "i386", 8: "mips", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
MACHINES[258] = "loongarch64"
PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NULL, DT_NEEDED, DT_STRTAB = 0, 1, 5
# What reading a file that is no such file, or is cut off, may raise.
DAMAGED = (struct.error, ValueError, IndexError, OverflowError)
SHT_DYNSYM, SHT_GNU_VERDEF, SHT_GNU_VERSYM = 11, 0x6FFFFFFD, 0x6FFFFFFF

# The names of a library's versions of symbols, by number; number 1 is the library itself and not among them.
Versions = Mapping[int, bytes]


@dataclass(frozen=True)
class Symbol:
    """An entry of a dynamic symbol table: binding and kind are STB_* and STT_*, `size` is in bytes.

    `version` is its entry in the table of versions, with the bit 0x8000 where that is not the default one.
    """

    name: bytes
    binding: int
    kind: int
    defined: bool
    size: int
    version: int


def machine_of(program: Path) -> str:
    """Return the processor that a program is for, as uname names it; nothing for what is no ELF file."""
    try:
        with program.open("rb") as file:
            head = file.read(20)
    except OSError:
        return ""
    if head[:4] != MAGIC or len(head) < 20:
        return ""
    little = head[5] == 1
    number = int.from_bytes(head[18:20], "little" if little else "big")
    name = MACHINES.get(number, f"the processor {number} (e_machine)")
    return "ppc64le" if name == "ppc64" and little else name


def needed_libraries(data: bytes) -> list[str]:
    """Return the names of the shared libraries that a program or library needs itself; none for what is no ELF file."""
    if data[:4] != MAGIC:
        return []
    try:
        return _needed(data)
    except DAMAGED:
        return []  # damaged or strange: it needs nothing that could be found


def dynamic_linker(program: Path) -> str:
    """Return the path of the dynamic linker that a program names; nothing where it names none or is no ELF file."""
    try:
        data = program.read_bytes()
        if data[:4] != MAGIC:
            return ""
        found = [data[start : start + length] for kind, start, _, length in _segments(data) if kind == PT_INTERP]
        return found[0].rstrip(b"\0").decode("ascii") if found else ""
    except (OSError, *DAMAGED):
        return ""


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield the type of each segment, its place in the file, its address and its bytes in the file."""
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    offset = struct.unpack_from(order + ("Q" if wide else "I"), data, 32 if wide else 28)[0]
    size, count = struct.unpack_from(order + "HH", data, 54 if wide else 42)
    for n in range(count):
        # p_type, then p_offset, p_vaddr, p_filesz: their places differ between the two classes
        place = offset + n * size
        kind = struct.unpack_from(order + "I", data, place)[0]
        if wide:
            start, address, length = struct.unpack_from(order + "QQ8xQ", data, place + 8)
        else:
            start, address, length = struct.unpack_from(order + "II4xI", data, place + 4)
        yield kind, start, address, length


def _needed(data: bytes) -> list[str]:
    wide, order = data[4] == 2, "<" if data[5] == 1 else ">"
    loads, dynamic = [], (0, 0)
    for kind, start, address, length in _segments(data):
        if kind == PT_LOAD:
            loads.append((address, start, length))
        elif kind == PT_DYNAMIC:
            dynamic = (start, length)
    entry = struct.Struct(order + ("qQ" if wide else "iI"))
    names, strings = [], 0
    for tag, value in entry.iter_unpack(data[dynamic[0] : dynamic[0] + dynamic[1] // entry.size * entry.size]):
        if tag == DT_NULL:
            break
        if tag == DT_NEEDED:
            names.append(value)
        elif tag == DT_STRTAB:
            strings = next(start + value - address for address, start, length in loads if 0 <= value - address < length)
    return [data[strings + name : data.index(b"\0", strings + name)].decode("utf-8", "replace") for name in names]


def dynamic_symbols(data: bytes) -> list[Symbol] | None:
    """Return the symbols that a 64-bit little-endian program or library offers and asks for.

    None where it has no table of them, or is damaged.
    """
    try:
        sections = _sections(data)
        tables = [section for section in sections if section.kind == SHT_DYNSYM]
        if not tables:
            return None
        strings = sections[tables[0].link]
        versions = next((section for section in sections if section.kind == SHT_GNU_VERSYM), None)
        found = []
        for n, (name, info, _, section, _, size) in enumerate(struct.iter_unpack("<IBBHQQ", tables[0].of(data))):
            start = strings.start + name
            version = struct.unpack_from("<H", data, versions.start + 2 * n)[0] if versions else 1
            text = data[start : data.index(b"\0", start)]
            found.append(Symbol(text, info >> 4, info & 15, section != 0, size, version))
    except DAMAGED:
        return None
    return found[1:]


def undefined_symbols(data: bytes) -> set[bytes]:
    """Return the names of the symbols that a program or library cannot start without and has not itself."""
    # Weak ones (STB_WEAK) may be absent.
    return _names(data, lambda info, section: not section and info >> 4 != 2)


def defined_symbols(data: bytes) -> set[bytes]:
    """Return the names of the symbols that a program or library offers."""
    return _names(data, lambda info, section: section != 0)


def _names(data: bytes, wanted: Callable[[int, int], bool]) -> set[bytes]:
    """Return the names of the symbols whose st_info and st_shndx are wanted; none where dynamic_symbols knows none."""
    try:
        sections = _sections(data)
        table = next((section for section in sections if section.kind == SHT_DYNSYM), None)
        if table is None:
            return set()
        start = sections[table.link].start
        rows = list(struct.iter_unpack("<IBBH16x", table.of(data)))[1:]
        places = [start + name for name, info, _, section in rows if wanted(info, section)]
        return {data[place : data.index(b"\0", place)] for place in places}
    except DAMAGED:
        return set()


def symbol_versions(data: bytes) -> Versions:
    """Return the versions that a 64-bit little-endian library defines."""
    found: dict[int, bytes] = {}
    try:
        sections = _sections(data)
        table = next((section for section in sections if section.kind == SHT_GNU_VERDEF), None)
        place = table.start if table else 0
        while table:
            _, flags, number, _, _, first, following = struct.unpack_from("<HHHHIII", data, place)
            start = sections[table.link].start + struct.unpack_from("<I", data, place + first)[0]
            if not flags & 1:
                found[number] = data[start : data.index(b"\0", start)]
            place += following
            if not following:
                break
    except DAMAGED:
        return {}
    return found


@dataclass(frozen=True)
class _Section:
    """A section header: its kind (SHT_*), place and bytes in the file, and the section that it is linked with."""

    kind: int
    start: int
    length: int
    link: int

    def of(self, data: bytes) -> bytes:
        return data[self.start : self.start + self.length]


def _sections(data: bytes) -> list[_Section]:
    if data[:6] != MAGIC + b"\2\1":
        return []
    offset = struct.unpack_from("<Q", data, 40)[0]
    size, count = struct.unpack_from("<HH", data, 58)
    rows = (struct.unpack_from("<4xI16xQQI", data, offset + n * size) for n in range(count))
    return [_Section(kind, start, length, link) for kind, start, length, link in rows]
