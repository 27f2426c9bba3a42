"""Leaves out of an initramfs the libraries that its programs are linked with and do not use.

curl speaks LDAP, RTMP, SCP and Kerberos, and a distribution's curl loads the libraries for all of that each time it
starts; a node fetches over HTTPS. The stages' declarations say so ([[unused]]). The libraries that nothing else needs
are left out, and those that a program is linked with itself become placeholders, without which it would not start.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from anchor_build.cpio import Initramfs, Member
from anchor_build.elf import MAGIC, defined_symbols, dynamic_symbols, needed_libraries, undefined_symbols
from anchor_build.placeholder import placeholder
from anchor_build.stage import Unused


@dataclass(frozen=True)
class Trimmed:
    """What to change in an initramfs: the paths to leave out, and the new contents of those to replace."""

    left_out: frozenset[str]
    placeholders: Mapping[str, bytes]

    def saved(self, initramfs: Initramfs) -> int:
        """Return the bytes that this saves, unpacked."""
        before = sum(initramfs.members[path].size for path in (*self.left_out, *self.placeholders))
        return before - sum(map(len, self.placeholders.values()))


# A library's name in a program's texts, each of which ends with a zero; it may be the end of another, such as a path.
LIBRARY = re.compile(rb"lib[A-Za-z0-9._+-]{1,100}(?=\0)")
OPENS = (b"dlopen\0", b"dlmopen\0", b"dlopen_mode\0")

NOTHING = Trimmed(frozenset(), {})


def plan_trim(initramfs: Initramfs, rules: Iterable[Unused], modules: Collection[str]) -> Trimmed:
    """Say what can go: what is reached through unused links alone, and is opened by no program by its name.

    Where a placeholder cannot be made, nothing goes that the library in its place would need. `modules` are those of
    dracut that the initramfs has.
    """
    objects = _Objects(initramfs, [rule for rule in rules if rule.unless not in modules])
    # A file with several names is left as it is, and one that programs may open by a name that is not looked for.
    refused = {
        path
        for path, member in objects.members.items()
        if member.links > 1 or not all(name.startswith("lib") for name in objects.names[path])
    }
    while True:
        kept = objects.reached(refused)
        # Not what nothing leads to at all: that came for a reason that is not to be seen here.
        gone = objects.reached(refused, whole=True) - kept
        if not gone:
            return NOTHING
        opened = objects.opened(kept, gone)
        linked = {path for each in kept for path in objects.needs[each]} & gone
        made = {path: objects.placeholder(path, kept) for path in sorted(linked - opened)}
        if more := opened | {path for path, content in made.items() if content is None}:
            refused |= more
            continue
        left_out = gone - linked
        if more := objects.missed(kept, left_out):
            refused |= more
            continue
        placeholders = {path: content for path, content in made.items() if content is not None}
        return Trimmed(frozenset(left_out | objects.links_to(left_out)), placeholders)


class _Objects:
    """The programs and libraries of an initramfs: by their paths, what each is linked with."""

    def __init__(self, initramfs: Initramfs, rules: Sequence[Unused]) -> None:
        self.members: dict[str, Member] = {}
        self.names: dict[str, set[str]] = {}
        self._links: dict[str, str] = {}
        for path, member in initramfs.members.items():
            found = initramfs.resolve(path) if member.is_link else member
            if found is None or not found.is_file or not found.content.startswith(MAGIC) or ".ko" in path:
                continue
            self.members[found.path] = found
            self.names.setdefault(found.path, set()).update({path.rpartition("/")[2], found.path.rpartition("/")[2]})
            if member.is_link:
                self._links[path] = found.path
        by_name: dict[str, set[str]] = {}
        for path, names in self.names.items():
            for name in names:
                by_name.setdefault(name, set()).add(path)
        # A name may lead to several files, for processors of different abilities: then to all of them.
        self.links = {
            path: {name: by_name[name] for name in needed_libraries(member.content) if name in by_name}
            for path, member in self.members.items()
        }
        self.needs = {path: set().union(*names.values()) for path, names in self.links.items()}
        self._unused = {
            path: [pattern for rule in rules if self._is_about(rule, path) for pattern in rule.libraries]
            for path in self.names
        }

    def _is_about(self, rule: Unused, path: str) -> bool:
        if not any(fnmatchcase(name, rule.by) for name in self.names[path]):
            return False
        return not rule.used_by or not undefined_symbols(self.members[path].content).intersection(
            symbol.encode() for symbol in rule.used_by
        )

    def reached(self, refused: set[str], *, whole: bool = False) -> set[str]:
        """Return what is needed: what nothing is linked with, such as programs, what is refused, and what these use.

        With `whole` also what they do not use.
        """
        linked = set().union(*self.needs.values())
        todo = [path for path in self.members if path not in linked or path in refused]
        kept: set[str] = set()
        while todo:
            path = todo.pop()
            if path in kept:
                continue
            kept.add(path)
            for name, targets in self.links[path].items():
                if whole or not self._is_unused(path, name):
                    todo += targets
        return kept

    def _is_unused(self, by: str, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._unused[by])

    def opened(self, kept: set[str], gone: set[str]) -> set[str]:
        """Return those of `gone` whose names are in a program that opens libraries while it runs (dlopen(3))."""
        by_name = {name: path for path in gone for name in self.names[path]}
        found = set()
        for each in kept:
            content = self.members[each].content
            if not any(word in content for word in OPENS):
                continue
            named = Counter(name for found in LIBRARY.findall(content) if (name := found.decode("ascii")) in by_name)
            for name, times in named.items():
                # It is there once for the link.
                if times > (name in self.links[each]) and not self._is_unused(each, name):
                    found.add(by_name[name])
        return found

    def placeholder(self, path: str, kept: set[str]) -> bytes | None:
        """Return what stands in for a library, with all that those which are kept and linked with it ask for."""
        users = [each for each in kept if path in self.needs[each]]
        # Under which name it is linked with; one file under two names would have to have both.
        names = {name for each in users for name, targets in self.links[each].items() if path in targets}
        asked: set[bytes] = set()
        for each in users:
            symbols = dynamic_symbols(self.members[each].content)
            if symbols is None:
                return None
            # Also what a program has itself: for a variable of a library that is where it is copied to.
            asked.update(symbol.name for symbol in symbols)
        return placeholder(names.pop(), self.members[path].content, asked) if len(names) == 1 else None

    def missed(self, kept: set[str], left_out: set[str]) -> set[str]:
        """Return those of `left_out` that have a symbol for what stays and is linked with them only through others."""
        offered = {path: defined_symbols(self.members[path].content) for path in left_out}
        every = set().union(*offered.values())
        asked = [undefined_symbols(self.members[path].content) & every for path in kept]
        missing = set().union(*asked)
        if missing:
            missing -= set().union(*(defined_symbols(self.members[path].content) for path in kept))
        return {path for path, symbols in offered.items() if symbols & missing}

    def links_to(self, paths: set[str]) -> set[str]:
        """Return the symbolic links that lead to these."""
        return {link for link, target in self._links.items() if target in paths}
