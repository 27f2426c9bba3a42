"""Leaving unused libraries out, with this host's own programs: what goes, what stays, and whether what is left runs."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build.cpio import Initramfs, Member
from anchor_build.elf import dynamic_symbols, needed_libraries, symbol_versions
from anchor_build.placeholder import placeholder
from anchor_build.registry import load_registry
from anchor_build.stage import Unused
from anchor_build.trim import NOTHING, Trimmed, plan_trim

CURL = Unused(
    "libcurl*.so.*", ("librtmp.so.*", "libldap*.so.*", "liblber*.so.*", "libssh2.so.*", "libgssapi_krb5.so.*")
)


def closure(*programs: str) -> list[Path]:
    """Return the programs of this host with all libraries that the dynamic linker would load."""
    found = {program: shutil.which(program) for program in programs}
    if None in found.values():
        pytest.skip(f"{', '.join(program for program, path in found.items() if path is None)} is missing")
    files = [Path(path) for path in found.values() if path]
    for file in tuple(files):
        text = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
        files += [Path(path) for path in re.findall(r"(/\S+) \(0x", text)]
    return list(dict.fromkeys(files))


def initramfs(*files: Path) -> Initramfs:
    """Return an initramfs with these files, and as dracut makes it with what the links among them lead to."""
    members: dict[str, Member] = {}
    for file in files:
        path = str(Path(os.path.realpath(file.parent), file.name)).lstrip("/")
        target = Path(os.path.realpath(file))
        if str(target).lstrip("/") != path:
            inside = os.path.relpath(target, Path("/", path).parent).encode()
            members[path] = Member(path, stat.S_IFLNK | 0o777, len(inside), inside)
        content = target.read_bytes()
        path = str(target).lstrip("/")
        members[path] = Member(path, stat.S_IFREG | 0o755, len(content), content)
    return Initramfs(members, "none")


def names(trimmed: Trimmed) -> set[str]:
    return {path.rpartition("/")[2].partition(".so")[0] for path in (*trimmed.left_out, *trimmed.placeholders)}


@pytest.fixture(scope="module")
def curl() -> Initramfs:
    return initramfs(*closure("curl"))


def test_what_only_unused_libraries_need_is_left_out(curl: Initramfs) -> None:
    trimmed = plan_trim(curl, [CURL], ())
    assert {"librtmp", "libssh2", "libgssapi_krb5"} <= names(trimmed)
    left_out = {path.rpartition("/")[2].partition(".so")[0] for path in trimmed.left_out}
    assert {"libgnutls", "libkrb5", "libnettle"} <= left_out
    # What libcurl itself is linked with cannot go.
    assert not {"librtmp", "libssh2", "libgssapi_krb5"} & left_out
    assert not {"libcurl", "libssl", "libcrypto", "libc", "libz"} & names(trimmed)
    assert trimmed.saved(curl) > 4_000_000


def test_without_a_rule_nothing_goes(curl: Initramfs) -> None:
    assert plan_trim(curl, [], ()) == NOTHING
    assert plan_trim(curl, [Unused("libother.so.*", CURL.libraries)], ()) == NOTHING


def test_a_rule_does_not_count_beside_its_module(curl: Initramfs) -> None:
    rule = replace(CURL, unless="ldap")
    assert plan_trim(curl, [rule], ("base", "ldap")) == NOTHING
    assert names(plan_trim(curl, [rule], ("base",)))


def test_what_another_program_uses_stays() -> None:
    both = initramfs(*closure("curl", "chronyd"))
    trimmed = plan_trim(both, [CURL], ())
    # chronyd is linked with it, and no rule is about chronyd.
    assert "libgnutls" not in names(trimmed)
    assert "librtmp" in names(trimmed)
    assert "libgnutls" in names(plan_trim(both, [CURL, Unused("chronyd", ("libgnutls.so.*",))], ()))


def test_what_a_program_opens_by_its_name_stays(curl: Initramfs) -> None:
    library = next(path for path in curl.members if path.endswith("/libkrb5.so.3"))
    program = "usr/bin/curl"
    content = curl.members[program].content + b"\0dlopen\0\0libkrb5.so.3\0"
    opening = Initramfs({**curl.members, program: replace(curl.members[program], content=content)}, "none")
    trimmed = plan_trim(opening, [CURL], ())
    assert library not in trimmed.left_out
    assert not {"libkrb5", "libk5crypto", "libkrb5support"} & names(trimmed)
    assert "librtmp" in names(trimmed)
    # Unless it is said that it does not use it.
    rule = Unused("curl", ("libkrb5.so.*",))
    assert library in plan_trim(opening, [CURL, rule], ()).left_out


def test_a_file_with_two_names_stays_as_it_is(curl: Initramfs) -> None:
    path = next(path for path in plan_trim(curl, [CURL], ()).placeholders if "librtmp" in path)
    linked = Initramfs({**curl.members, path: replace(curl.members[path], links=2)}, "none")
    trimmed = plan_trim(linked, [CURL], ())
    assert not {"librtmp", "libgnutls"} & names(trimmed)
    assert "libssh2" in names(trimmed)


def test_libraries_that_need_each_other_and_that_nothing_leads_to_stay(curl: Initramfs) -> None:
    """Such as a plugin of two libraries, which a program finds in a directory."""
    needing = {path: member for path, member in curl.members.items() if "librtmp" in path or "libgnutls" in path}
    circle = {
        path: replace(member, content=member.content.replace(b"\0libnettle.so.8\0", b"\0librtmp.so.1\0\0\0"))
        for path, member in needing.items()
    }
    assert any(circle[path] != needing[path] for path in circle)
    assert plan_trim(Initramfs(circle, "none"), [], ()) == NOTHING


def test_what_asks_for_a_symbol_uses_the_library() -> None:
    both = initramfs(*closure("curl", "chronyd"))
    rule = Unused("chronyd", ("libgnutls.so.*",), used_by=("gnutls_hash_init", "gnutls_init"))
    assert "libgnutls" not in names(plan_trim(both, [CURL, rule], ()))
    assert "libgnutls" in names(plan_trim(both, [CURL, replace(rule, used_by=("no_such_symbol",))], ()))


def test_what_is_linked_through_another_library_only_stays(curl: Initramfs) -> None:
    """A plugin that finds the symbols of a library because its program is linked with it."""
    path = next(path for path, member in curl.members.items() if "libldap" in path and member.is_file)
    content = curl.members[path].content
    assert b"\0libsasl2.so.2\0" in content
    plugin = replace(
        curl.members[path], path="usr/lib/plugin.so", content=content.replace(b"sasl2.so.2", b"c.so.6\0\0\0\0")
    )
    trimmed = plan_trim(Initramfs({**curl.members, "usr/lib/plugin.so": plugin}, "none"), [CURL], ())
    assert "libsasl2" not in names(trimmed)
    assert "librtmp" in names(trimmed)
    # Without that plugin it goes.
    assert "libsasl2" in names(plan_trim(curl, [CURL], ()))


@pytest.mark.parametrize("text", [b"/usr/lib64/libkrb5.so.3", b"\xfflibkrb5.so.3"])
def test_a_path_or_the_end_of_another_text_names_a_library_too(curl: Initramfs, text: bytes) -> None:
    program = "usr/bin/curl"
    content = curl.members[program].content + b"x_dlopen\0" + text + b"\0"
    opening = Initramfs({**curl.members, program: replace(curl.members[program], content=content)}, "none")
    assert "libkrb5" not in names(plan_trim(opening, [CURL], ()))


def test_an_unknown_processor_keeps_everything(curl: Initramfs) -> None:
    foreign = {
        path: replace(member, content=member.content[:18] + b"\x15\0" + member.content[20:])
        if member.content.startswith(b"\x7fELF")
        else member
        for path, member in curl.members.items()
    }
    assert plan_trim(Initramfs(foreign, "none"), [CURL], ()) == NOTHING


def test_what_is_left_runs(curl: Initramfs, tmp_path: Path) -> None:
    """In a root of its own, where the dynamic linker finds nothing else."""
    trimmed = plan_trim(curl, [CURL], ())
    for path, member in curl.members.items():
        place = tmp_path / path
        if path in trimmed.left_out:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if member.is_link:
            place.symlink_to(member.content.decode())
        else:
            place.write_bytes(trimmed.placeholders.get(path, member.content))
            place.chmod(0o755)
    for name in ("lib", "lib64"):
        if Path("/", name).is_symlink():
            (tmp_path / name).symlink_to(Path("/", name).readlink())
            (tmp_path / name).resolve().mkdir(parents=True, exist_ok=True)
    for loader in Path("/lib64").glob("ld-*"):
        shutil.copy(loader, tmp_path / "lib64" / loader.name)
    (tmp_path / "hello").write_text("hello\n")
    argv = ["chroot", str(tmp_path), "/usr/bin/curl", "-q", "--silent", "--show-error", "file:///hello"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("hello\n", "", 0)


def test_a_variable_that_a_program_copies_is_in_the_placeholder() -> None:
    """Such a one is defined in the program's own table of symbols (a copy relocation)."""
    socat = initramfs(*closure("socat"))
    [made] = plan_trim(socat, [Unused("socat", ("libwrap.so.*",))], ()).placeholders.values()
    assert b"\0hosts_allow_table\0" in made


def library(curl: Initramfs, name: str) -> bytes:
    found = curl.resolve(next(path for path in curl.members if path.endswith(f"/{name}")))
    assert found is not None
    return found.content


def test_a_placeholder_has_the_name_symbols_and_versions(curl: Initramfs, tmp_path: Path) -> None:
    real = library(curl, "libgssapi_krb5.so.2")
    wanted = {b"gss_release_buffer", b"GSS_C_NT_HOSTBASED_SERVICE", b"malloc"}
    made = placeholder("libgssapi_krb5.so.2", real, wanted)
    assert made is not None
    assert len(made) < 2000
    assert needed_libraries(made) == []
    # It has no sections, so a linker of programs sees nothing in it; the dynamic one does.
    assert dynamic_symbols(made) is None
    assert symbol_versions(real)[2] == b"gssapi_krb5_2_MIT"
    file = tmp_path / "placeholder.so"
    file.write_bytes(made)
    loaded = ctypes.CDLL(str(file))
    assert loaded.gss_release_buffer(1, 2) == 0
    assert ctypes.c_void_p.in_dll(loaded, "GSS_C_NT_HOSTBASED_SERVICE").value is None
    with pytest.raises(AttributeError):
        loaded.gss_acquire_cred  # noqa: B018 - looking it up is the test


def test_no_placeholder_for_what_is_no_such_library(curl: Initramfs) -> None:
    real = library(curl, "librtmp.so.1")
    assert placeholder("librtmp.so.1", real, {b"RTMP_Alloc"}) is not None
    assert placeholder("librtmp.so.1", b"#!/bin/sh\n" + real, {b"RTMP_Alloc"}) is None
    assert placeholder("librtmp.so.1", real[:200], {b"RTMP_Alloc"}) is None
    # A section header that leads out of the file.
    assert placeholder("librtmp.so.1", real[:40] + b"\xff" * 8 + real[48:], {b"RTMP_Alloc"}) is None
    # errno is a variable of each thread.
    assert placeholder("libc.so.6", library(curl, "libc.so.6"), {b"errno"}) is None


def test_the_rules_of_the_stages_are_about_their_programs_and_libraries() -> None:
    registry = load_registry()
    for stage in (registry.core, *registry.stages):
        programs = {binary.name for binary in stage.binaries}
        for rule in stage.unused:
            assert rule.by.startswith("lib") or rule.by in programs | {"systemctl"}
