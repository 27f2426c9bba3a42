"""Makes the image that nodes boot: source -> tree -> squashfs or erofs -> manifest, with a report beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_build import __version__
from anchor_build.console import Step, printable
from anchor_build.container import PROGRAMS, unpacked
from anchor_build.container import facts as container_facts
from anchor_build.distribution import Distribution, build_tree, distribution_problems
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import (
    beside,
    disk_errors,
    disk_hints,
    file_digest,
    output_problems,
    put_in_place,
    refuse_overwriting,
    work_directory,
)
from anchor_build.manifest import RELEASE, SUFFIX, Manifest, manifest_text, read_manifest
from anchor_build.oci import Access, missing_programs
from anchor_build.root import Root
from anchor_build.run import run, which
from anchor_build.signing import SigningKey, open_key, sign_text, trust_warnings
from anchor_build.verity import PACKAGES as VERITY_PACKAGES
from anchor_build.verity import PROGRAM as VERITYSETUP
from anchor_build.verity import Tree, add_tree, has_tree, read_tree
from anchor_build.version import source_date_epoch

# What the kernel or systemd mounts something on: the directories belong to an image, what is in them does not.
PSEUDO = {"dev": 0o755, "proc": 0o555, "run": 0o755, "sys": 0o555}
# What switches to a root starts one of these (systemd: src/core/main.c; dracut: modules.d/99base/init.sh).
INITS = ("usr/lib/systemd/systemd", "lib/systemd/systemd", "sbin/init", "etc/init", "init", "bin/init")
# format -> its program, the packages of it, and the default compression: fast to make and to read.
FORMATS = {
    "squashfs": ("mksquashfs", "squashfs-tools (deb and rpm)", "zstd:6"),
    "erofs": ("mkfs.erofs", "erofs-utils (deb and rpm)", "lz4hc"),
}
SQUASHFS_COMPRESSIONS = ("zstd", "gzip", "lz4", "xz", "lzo")
EROFS_COMPRESSIONS = ("lz4hc", "lz4", "lzma", "deflate", "zstd", "none")
# For both file systems; lz4hc is what erofs calls the slower lz4.
NO_LEVELS = ("lz4", "xz", "none")
# The image stage of dracut-modules that boots both.
STAGE = "squashfs"
# First bytes of a tar's compression, and the program that undoes it.
COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
)
TAR_MAGIC = (257, b"ustar")
SQUASHFS_MAGIC = (0, b"hsqs")
EROFS_MAGIC = (1024, b"\xe2\xe1\xf5\xe0")
MODULES = re.compile(r"(?:usr/)?lib/modules/([^/]+)/modules\.dep", re.DOTALL)
MAX_TIME = 2**32 - 1
NO_UUID = "00000000-0000-0000-0000-000000000000"
PACK_TIMEOUT = 4 * 3600.0


@dataclass(frozen=True)
class ImageBuild:
    """Everything that decides an image and its manifest. One of `source`, `distribution` and `container` is given.

    `valid_for` is in seconds; `urls` end in a slash for a directory that will hold the image under its published name.
    With `verity` the image gets a hash tree, and the manifest its root hash.
    """

    output: Path
    source: Path | None = None
    distribution: Distribution | None = None
    # A container image, as container.unpacked takes it, for a platform, and what its registry wants to see.
    container: str = ""
    platform: str = ""
    access: Access = field(default_factory=Access)
    format: str = "squashfs"
    compression: str = ""
    urls: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    valid_for: int | None = None
    sign_key: str = ""
    sign_pass_file: Path | None = None
    verity: bool = False

    @property
    def manifest_file(self) -> Path:
        """Where the manifest goes: beside the image."""
        return self.output.with_name(self.output.name + SUFFIX)

    @property
    def report_file(self) -> Path:
        """Where the JSON report goes: beside the image."""
        return self.output.with_name(self.output.name + ".json")


@dataclass(frozen=True)
class Contents:
    """What a tree holds outside of pseudo file systems: `unpacked` bytes of files, the newest time (seconds).

    `newest_file` is that of everything but directories: theirs tell when a tree was unpacked.
    `strange_kernels` are directories of modules with names that no kernel and no manifest has.
    """

    entries: int
    unpacked: int
    newest: int
    newest_file: int
    kernels: tuple[str, ...]
    strange_kernels: tuple[str, ...]


def build_image(build: ImageBuild, step: Step) -> dict[str, Any]:
    """Make the image, its manifest and its report; return the report.

    All three appear whole or not at all, the image first. An image that is there already is only given a new manifest,
    and with `verity` a hash tree if it has none; otherwise, where it stays in its place, it is not touched. Files that
    are replaced leave owner and mode to the new ones.

    Raises AnchorError for whatever is missing or fails, UsageError for what cannot be an image's source.
    """
    with disk_errors(), disk_hints(), ExitStack() as stack:
        kind = _source_kind(build)
        needs_tree = build.verity and not (kind == "image" and build.source is not None and has_tree(build.source))
        _check_host(build, kind, needs_tree=needs_tree)
        in_place = kind == "image" and build.source is not None and build.output.resolve() == build.source.resolve()
        _check_inputs(build, in_place=in_place)
        epoch = source_date_epoch()
        # What is wrong with the key is said before the work, and a passphrase asked for while somebody is there.
        key = open_key(build.sign_key, build.sign_pass_file) if build.sign_key else None
        work = stack.enter_context(work_directory())
        facts: dict[str, Any] = {"source": kind, "warnings": []}
        finished: list[tuple[Path, Path]] = []
        if in_place and build.source and not needs_tree:
            image = build.source
        else:
            image = stack.enter_context(beside(build.output))
            finished.append((image, build.output))
        if kind == "image":
            facts |= _take_over(build, build.source or build.output, image, step)
        else:
            # A distribution is made of files of today.
            epoch = int(time.time()) if epoch is None and kind == "distribution" else epoch
            tree, more = stack.enter_context(_tree(build, kind, work, step, epoch))
            facts |= more | _pack(build, tree, image, work, step, epoch, kind)
        if needs_tree:
            facts |= _tree_facts(add_tree(image, build.output.name, step))
        with step("take the digest"):
            sha256 = file_digest(image)
        manifest = _manifest(build, facts, sha256, image.stat().st_size)
        text = manifest_text(manifest)
        if key is not None:
            with step("sign the manifest"):
                text = sign_text(text, key)
        report = _report(build, facts, manifest, key)
        for path, content in ((build.manifest_file, text), (build.report_file, json.dumps(report, indent=2) + "\n")):
            partial = stack.enter_context(beside(path))
            partial.write_text(content, encoding="ascii")
            finished.append((partial, path))
        for partial, target in finished:
            put_in_place(partial, target)
    return report


def _check_inputs(build: ImageBuild, *, in_place: bool) -> None:
    """Refuse to write over what is read; only an image that stays where it is gets a new manifest in its place."""
    given = [build.sign_pass_file, build.distribution.key if build.distribution else None]
    given += [Path(build.sign_key)] if build.sign_key else []
    if build.source is not None and not in_place:
        given += [build.source, build.source.with_name(build.source.name + SUFFIX)]
    refuse_overwriting("--output", (build.output, build.manifest_file, build.report_file), filter(None, given))


def _source_kind(build: ImageBuild) -> str:
    if build.distribution is not None:
        return "distribution"
    if build.container:
        return "container"
    if build.source is None or not build.source.exists():
        raise UsageError(f"{build.source}: there is no such file or directory")
    if build.source.is_dir():
        return "directory"
    if not build.source.is_file():
        raise UsageError(f"{build.source}: is neither a directory nor a plain file")
    if found := image_format(build.source):
        if build.compression or found != build.format:
            raise UsageError(
                f"{build.source}: is a {found} image already, and only gets a new manifest",
                "--format and --compression are for making an image of something else",
            )
        return "image"
    head = _head(build.source)
    if head[TAR_MAGIC[0] :].startswith(TAR_MAGIC[1]) or any(head.startswith(magic) for magic, _ in COMPRESSED):
        return "tar"
    raise UsageError(
        f"{build.source}: is neither a directory, nor a tar archive, nor an image",
        "a tar may be compressed with gzip, bzip2, xz, zstd or lz4",
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2048)


def image_format(path: Path) -> str:
    """Return `squashfs`, `erofs`, or nothing, by the file's magic number."""
    head = _head(path)
    for name, (offset, magic) in (("squashfs", SQUASHFS_MAGIC), ("erofs", EROFS_MAGIC)):
        if head[offset:].startswith(magic):
            return name
    return ""


def _check_host(build: ImageBuild, kind: str, *, needs_tree: bool) -> None:
    problems = output_problems(build.output, build.manifest_file, build.report_file)
    if needs_tree and which(VERITYSETUP) is None:
        problems.append(f"{VERITYSETUP} is missing: install {VERITY_PACKAGES}")
    if kind != "image":
        program, packages, _ = FORMATS[build.format]
        if which(program) is None:
            problems.append(f"{program} is missing: install {packages}")
        if os.geteuid() != 0:
            problems.append("only root can keep owners, capabilities and device files: run it as root")
        _compression(build)
    if build.source and kind == "directory" and build.output.resolve().is_relative_to(build.source.resolve()):
        problems.append(f"--output {build.output}: lies inside {build.source}")
    if build.sign_key and which("openssl") is None:
        problems.append("openssl is missing: install openssl (deb and rpm)")
    if build.distribution is not None:
        problems += distribution_problems(build.distribution)
    if build.container:
        problems += missing_programs(*PROGRAMS)
    if problems:
        raise AnchorError("\n".join(problems))


def _compression(build: ImageBuild) -> tuple[str, str]:
    """Return the compression's name and its level, which may be empty; raises UsageError for an unknown one."""
    name, _, level = (build.compression or FORMATS[build.format][2]).partition(":")
    known = SQUASHFS_COMPRESSIONS if build.format == "squashfs" else EROFS_COMPRESSIONS
    if name not in known or (level and (name in NO_LEVELS or not re.fullmatch(r"[0-9]{1,3}", level))):
        plain = [one for one in known if one in NO_LEVELS]
        raise UsageError(
            f"--compression {build.compression}: {build.format} has {', '.join(known)}, with a level after a colon",
            f"{' and '.join(plain)} have no levels",
        )
    return name, level


@contextmanager
def _tree(
    build: ImageBuild, kind: str, work: Path, step: Step, epoch: int | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the directory to pack, and what the report says about where it came from."""
    source = build.source or Path()  # a distribution has none
    if kind == "directory":
        yield source, {}
        return
    if kind == "container":
        with unpacked(build.container, f"--from {build.container}", build.access, build.platform, step) as container:
            yield container.directory, container_facts(container, build.container)
        return
    tree = work / "tree"
    tree.mkdir(mode=0o755)
    if build.distribution is not None:
        with step(f"build a tree of {build.distribution.name}"):
            facts = build_tree(build.distribution, tree, work, unpack, epoch or 0)
        yield tree, {"distribution": build.distribution.name, **facts}
        return
    with step(f"unpack {source.name}"):
        unpack(source, tree)
    yield tree, {"source_sha256": file_digest(source)}


def unpack(archive: Path, tree: Path) -> None:
    """Unpack a tar, compressed or not, as it is: owners by number, xattrs, capabilities, ACLs.

    Raises AnchorError when a program is missing or the archive is damaged.
    """
    head = _head(archive)
    program = next((name for magic, name in COMPRESSED if head.startswith(magic)), "")
    argv = ["tar", "--extract", "--file", str(archive), "--directory", str(tree), "--numeric-owner", "--same-owner"]
    argv += ["--preserve-permissions", "--xattrs", "--xattrs-include=*", "--delay-directory-restore"]
    # What is not packed need not be unpacked: devices and sockets of a pseudo file system.
    argv += ["--anchored", *(f"--exclude={prefix}{name}/*" for name in PSEUDO for prefix in ("", "./"))]
    if program:
        argv.append(f"--use-compress-program={program}")
    run(argv, timeout=PACK_TIMEOUT, hint=f"is {archive} whole?")


def _walk(tree: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each path below a tree but those of pseudo file systems, in order, relative to it."""
    yield "", tree.lstat()
    pending = [""]
    try:
        while pending:
            directory = pending.pop()
            for entry in sorted(os.scandir(tree / directory), key=lambda e: e.name):
                path = f"{directory}/{entry.name}" if directory else entry.name
                yield path, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False) and path not in PSEUDO:
                    pending.append(path)
    except OSError as error:
        raise AnchorError(
            f"{printable(str(error.filename))}: {error.strerror}", "does something change or protect the tree?"
        ) from None


def examine(tree: Path) -> Contents:
    """Look at everything that will be packed."""
    entries = unpacked = newest = newest_file = 0
    linked, found = set(), set()
    for path, facts in _walk(tree):
        entries += 1
        if modules := MODULES.fullmatch(path):
            found.add(modules[1])
        newest = max(newest, int(facts.st_mtime))
        if not stat.S_ISDIR(facts.st_mode):
            newest_file = max(newest_file, int(facts.st_mtime))
        if not stat.S_ISREG(facts.st_mode) or (facts.st_dev, facts.st_ino) in linked:
            continue
        if facts.st_nlink > 1:
            linked.add((facts.st_dev, facts.st_ino))
        unpacked += facts.st_size
    kernels = {name for name in found if RELEASE.fullmatch(name)}
    return Contents(entries, unpacked, newest, newest_file, tuple(sorted(kernels)), tuple(sorted(found - kernels)))


def _pack(
    build: ImageBuild, tree: Path, output: Path, work: Path, step: Step, epoch: int | None, kind: str
) -> dict[str, Any]:
    """Write the file system of a tree that came from a `kind` of source. Return facts for manifest and report."""
    contents = examine(tree)
    owned = kind != "directory"  # so it is ours to change
    found = {name: (tree / name).lstat().st_mode for name in PSEUDO if os.path.lexists(tree / name)}
    # A link is no place to mount something on: it may lead out of the image.
    if wrong := [f"/{name}" for name, mode in found.items() if not stat.S_ISDIR(mode)]:
        raise AnchorError(
            f"{build.source or build.container or tree}: {' and '.join(wrong)} must be a directory, which a root mounts"
            " something on",
            "is this the root of a system?",
        )
    lacking = {name: mode for name, mode in PSEUDO.items() if name not in found}
    if owned:
        for name, mode in lacking.items():
            (tree / name).mkdir(mode=mode)
        lacking = {}
    if lacking and build.format == "erofs":
        raise AnchorError(
            f"{build.source}: has no directory {', '.join(f'/{name}' for name in lacking)}, which a root needs",
            "make it (mkfs.erofs cannot add one), or use --format squashfs",
        )
    # The time that no file in the image is newer than. A clock reading would make two images of the same input differ.
    # Both file systems count from 1970; squashfs ends in 2106.
    newest = contents.newest_file if kind == "container" else contents.newest
    when = min(max(newest, 0), MAX_TIME) if epoch is None else epoch
    if owned and tree.stat().st_mtime > when:
        os.utime(tree, (when, when))
    argv = pack_arguments(build, tree, output, lacking, _erofs_options() if build.format == "erofs" else ())
    log = work / "pack.log"
    # A file that is there would be added to (mksquashfs).
    output.unlink()
    title = f"pack {contents.entries} entries, {contents.unpacked / 1e6:.0f} MB, as {build.format}"
    with step(title, lambda: _progress(log, output)):
        # Both programs give files that are newer than SOURCE_DATE_EPOCH that time.
        run(argv, env={"SOURCE_DATE_EPOCH": str(when)}, log=log, timeout=PACK_TIMEOUT)
    warnings = [
        f"lib/modules/{printable(name)}: is not the name of a kernel release, so the manifest does not have it"
        for name in contents.strange_kernels
    ]
    root = Root(tree.resolve())
    inits = (root.find(name, follow_last=False) for name in INITS)
    if not any(place is not None and os.path.lexists(place) for place in inits):
        warnings.append(
            "the image holds no init such as /sbin/init: a node that boots it needs init= on its command line"
        )
    return {
        "warnings": warnings,
        "format": build.format,
        "compression": ":".join(filter(None, _compression(build))),
        "entries": contents.entries,
        "unpacked": contents.unpacked,
        "kernels": contents.kernels,
        "source_date_epoch": when,
    }


def _erofs_options() -> list[str]:
    """Return what the mkfs.erofs of this host has to be told."""
    done = run(["mkfs.erofs", "--help"], check=False)
    # Since 1.6 blocks are as large as this host's pages; a kernel with smaller ones does not mount them.
    return ["-b4096"] if "\n -b#" in done.stdout + done.stderr else []


def pack_arguments(
    build: ImageBuild, tree: Path, output: Path, lacking: Mapping[str, int], erofs_options: Sequence[str] = ()
) -> list[str]:
    """Return the command that packs a tree: all processors, xattrs kept, nothing from pseudo file systems.

    `lacking` are directories to add, with their modes; `erofs_options` come before the others.
    """
    name, level = _compression(build)
    if build.format == "erofs":
        # mkfs.erofs uses all processors by itself since 1.8, and one before.
        argv = [
            "mkfs.erofs",
            "-U",
            NO_UUID,
            *erofs_options,
            *(f"--exclude-regex=^{directory}/" for directory in PSEUDO),
        ]
        argv += [] if name == "none" else [f"-z{name}{',' if level else ''}{level}"]
        return [*argv, str(output), str(tree)]
    argv = ["mksquashfs", str(tree), str(output), "-noappend", "-xattrs", "-progress", "-comp", name]
    argv += ["-Xcompression-level", level] if level else []
    for directory, mode in lacking.items():
        argv += ["-p", f"{directory} d {mode:o} 0 0"]
    # A star does not stand for the dot of a hidden file.
    patterns = [f"{directory}/{pattern}" for directory in PSEUDO for pattern in ("*", ".*")]
    return [*argv, "-wildcards", "-e", *patterns]


def _progress(log: Path, output: Path) -> str:
    """Return the last percentage in a log; mkfs.erofs tells none, but what it has written can be seen."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 300))
            found = re.findall(rb"(\d+)%", file.read())
        return f"{found[-1].decode()} %" if found else f"{output.stat().st_blocks * 512 / 1e6:.0f} MB written"
    except OSError:
        return ""


def _take_over(build: ImageBuild, source: Path, image: Path, step: Step) -> dict[str, Any]:
    """Copy an image that is there already, unless it stays; what its manifest says of its contents still holds.

    A hash tree that it has stays, and its root hash is named if the old manifest named one, or with `build.verity`.
    """
    if image != source:
        with step(f"copy {source.name}, {source.stat().st_size / 1e6:.0f} MB"):
            shutil.copyfile(source, image)
    facts: dict[str, Any] = {"format": image_format(source), "warnings": []}
    old = _old_manifest(source, facts["warnings"])
    if old is not None:
        facts |= {name: getattr(old, name) for name in ("unpacked", "kernels", "mirrors", "peers", "notes")}
    if not has_tree(source):
        if old is not None and old.verity and not build.verity:
            raise AnchorError(
                f"{source}: its manifest names a root hash, and it has no hash tree", "make one: add --verity"
            )
        if old is not None and build.verity:
            # With a tree it is published under another name.
            facts |= {"mirrors": _without(old.mirrors, old.file), "peers": _without(old.peers, old.file)}
        return facts
    if build.verity or (old is not None and old.verity):
        return facts | _tree_facts(read_tree(source, step))
    facts["warnings"].append(
        f"{source.name} has a hash tree and the manifest does not name its root hash, so that nodes copy the image: to"
        " have it read in place, add --verity"
    )
    return facts


def _old_manifest(source: Path, warnings: list[str]) -> Manifest | None:
    """Return the manifest beside an image; None, with a warning where one is lost, if there is none that is its own."""
    file = source.with_name(source.name + SUFFIX)
    if not file.is_file():
        return None
    try:
        old, _ = read_manifest(file)
    except AnchorError as error:
        warnings.append(f"{error.message}; kernels and places that it named are lost")
        return None
    if (old.size, old.sha256) != (source.stat().st_size, file_digest(source)):
        warnings.append(f"{file}: was the manifest of another image; nothing is taken from it")
        return None
    return old


def _tree_facts(tree: Tree) -> dict[str, Any]:
    return {"verity": tree.root_hash, "data_bytes": tree.data_bytes, "tree_bytes": tree.tree_bytes}


def published_name(output: Path, sha256: str) -> str:
    """Return the name under which an image is published: its own, with the digest's start in it."""
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", output.stem).lstrip("._-")[:32] or "image"
    suffix = re.sub(r"[^A-Za-z0-9.]", "", output.suffix)[:12]
    return f"{stem}-{sha256[:12]}{suffix}"


def _manifest(build: ImageBuild, facts: Mapping[str, Any], sha256: str, size: int) -> Manifest:
    now = int(time.time())
    name = published_name(build.output, sha256)
    return Manifest(
        image=STAGE,
        format=facts["format"],
        file=name,
        sha256=sha256,
        size=size,
        unpacked=facts.get("unpacked"),
        created=now,
        expires=now + build.valid_for if build.valid_for is not None else None,
        verity=facts.get("verity", ""),
        kernels=tuple(facts.get("kernels", ())),
        mirrors=_places(build.urls or facts.get("mirrors", ()), name),
        peers=_places(build.peers or facts.get("peers", ()), name),
        notes=tuple(facts.get("notes", ())),
    )


def _places(urls: Sequence[str], name: str) -> tuple[str, ...]:
    return tuple(f"{url}{name}" if url.endswith("/") else url for url in urls)


def _without(urls: Sequence[str], name: str) -> tuple[str, ...]:
    """Return the directories of URLs that end in a published name; others as they are."""
    return tuple(url.removesuffix(name) if url.endswith(f"/{name}") else url for url in urls)


def _report(build: ImageBuild, facts: Mapping[str, Any], manifest: Manifest, key: SigningKey | None) -> dict[str, Any]:
    warnings = [*facts["warnings"], *trust_warnings(signed=key is not None, ends=build.valid_for is not None)]
    if not manifest.kernels:
        warnings.append("the image holds no kernel modules")
    return {
        "file": build.output.name,
        "manifest": build.manifest_file.name,
        "published_name": manifest.file,
        "sha256": manifest.sha256,
        "bytes": manifest.size,
        "created": manifest.created,
        "expires": manifest.expires,
        "signed": key is not None,
        "signed_by": key.public.fingerprint if key else None,
        "urls": [*manifest.mirrors, *manifest.peers],
        "anchor_build": __version__,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()},
        "warnings": warnings,
    }
