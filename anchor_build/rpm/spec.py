"""The packages of rendered dracut modules: names, relations, spec and source archive, as data without side effects."""

from __future__ import annotations

import re
import tarfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from anchor_build import __version__
from anchor_build.describe import stage_reference
from anchor_build.dracut import module_packages
from anchor_build.errors import AnchorError, InvalidFilesError
from anchor_build.plan import DEFAULTS, Plan
from anchor_build.registry import Registry, data_directory
from anchor_build.render import RenderedModule, render_plan
from anchor_build.rpm import changelog
from anchor_build.rpm.archive import pack
from anchor_build.stage import DECLARATION, NO_PACKAGE, Binary, Stage

FAMILIES = ("fedora", "suse")
NAME = "anchor-dracut-module"
LICENSE_NAME = "Apache-2.0"
TEMPLATE = f"{NAME}.spec.j2"
EXAMPLE = "dracut-anchor.conf"
MODULES = "/usr/lib/dracut/modules.d"
# What may stand in Version and Release: rpm.org/docs, "Spec file format"; `-` parts the two in file names.
VERSION = re.compile(r"[A-Za-z0-9._+~^]+")
# What begins with a letter or a digit would run into the release: 1el9.
DIST = re.compile(r"([._+~^][A-Za-z0-9._+~^]*)?")
SUMMARY_WIDTH = 79  # rpmlint's limits
TEXT_WIDTH = 76

PURPOSE = """\
Anchor boots nodes without a disk: in the initramfs the node proves who it is, fetches its root image over the network,
verifies it, mounts it below a writable layer in memory, and switches to it."""
ADVICE = """\
dracut takes the module only where it is asked for (dracut --add "{module}"); an installed package changes no initramfs
by itself."""


@dataclass(frozen=True)
class Package:
    """One binary package: a rendered module, what it needs, and its documents by file name.

    `relations` are tags and their values as in a spec, such as ("Requires", "socat").
    """

    name: str
    module: RenderedModule
    summary: str
    description: str
    relations: tuple[tuple[str, str], ...]
    documents: Mapping[str, bytes]

    @property
    def directory(self) -> str:
        """The name of the module's directory."""
        return self.module.name

    @property
    def modes(self) -> tuple[tuple[str, str], ...]:
        """Each file of the module with its permission bits as octal text, sorted by name."""
        return tuple((name, f"{file.mode:04o}") for name, file in sorted(self.module.files.items()))


@dataclass(frozen=True)
class Packaging:
    """Everything that the spec and the source archive say; `time` is in seconds since the epoch."""

    packages: tuple[Package, ...]
    version: str
    release: str
    time: int
    changes: tuple[changelog.Release, ...]

    @property
    def source_name(self) -> str:
        """The name of the source archive."""
        return f"{NAME}-{self.version}.tar.gz"


def package_name(stage: Stage) -> str:
    """Return the name of a stage's package."""
    return NAME if stage.is_core else f"anchor-dracut-{stage.id}"


def choose_stages(registry: Registry, names: Sequence[Stage] = ()) -> tuple[Stage, ...]:
    """Return the core and the chosen stages, by default all, with the transport without which an image stage is idle.

    The order is that of the registry.
    """
    wanted = {stage.id for stage in names or registry.stages}
    if any(stage.fetches for stage in registry.stages if stage.id in wanted):
        wanted.add(f"transport-{DEFAULTS['transport']}")
    return (registry.core, *(stage for stage in registry.stages if stage.id in wanted))


def make_packages(
    stages: Sequence[Stage], family: str, known: Sequence[Stage] = (), version: str = __version__
) -> tuple[Package, ...]:
    """Render each stage, the core first, and say what its package needs in a family of distributions.

    `known` are all stages that could have been chosen: the core refuses what asks for one that is not installed.
    `version` is what nodes say they were built with.
    Raises InvalidFilesError with every program that has no package there, as ``file: key: reason``.
    """
    problems = [text for stage in stages for text in _without_package(stage, family)]
    if problems:
        raise InvalidFilesError(
            problems, "name the package there, mark the program as optional, or leave the stage out with --stage"
        )
    modules = render_plan(Plan(stages[0], tuple(stages[1:]), tuple(known)), version)
    return tuple(_package(module, family) for module in modules)


def _without_package(stage: Stage, family: str) -> Iterator[str]:
    for n, binary in enumerate(stage.binaries):
        if not binary.optional and _package_of(binary, family) == NO_PACKAGE:
            key = "suse" if family == "suse" and binary.suse else "rpm"
            file = stage.directory / DECLARATION
            yield f"{file}: stage.binaries[{n}].{key}: names no package of {binary.name} for the family {family}"


def _package_of(binary: Binary, family: str) -> str:
    return (binary.suse or binary.rpm) if family == "suse" else binary.rpm


def _package(module: RenderedModule, family: str) -> Package:
    stage = module.stage
    documents = {"reference.md": stage_reference(stage).encode()}
    if stage.is_core:
        documents[EXAMPLE] = (data_directory() / "specs" / EXAMPLE).read_bytes()
    text = f"{PURPOSE} This package holds the dracut module {stage.module}: {stage.summary}"
    paragraphs = (text, ADVICE.format(module=stage.module))
    return Package(
        package_name(stage),
        module,
        _summary(stage.summary),
        "\n\n".join(textwrap.fill(paragraph, TEXT_WIDTH, break_on_hyphens=False) for paragraph in paragraphs),
        tuple(_relations(stage, family)),
        documents,
    )


def _relations(stage: Stage, family: str) -> Iterator[tuple[str, str]]:
    """Say what a stage's package needs of other packages, from the declaration alone."""
    required = {_package_of(binary, family) for binary in stage.binaries if not binary.optional}
    recommended = {_package_of(binary, family) for binary in stage.binaries if binary.optional}
    # A module with a ? is not in every dracut; where it is, it is in this package.
    required |= {"dracut" if family == "suse" else module_packages(name.rstrip("?"))[1] for name in stage.dracut}
    if stage.fetches:
        yield "Requires", f"anchor-dracut-transport-{DEFAULTS['transport']} = %{{version}}-%{{release}}"
    yield from (("Requires", name) for name in sorted(required))
    yield from (("Recommends", name) for name in sorted(recommended - required - {NO_PACKAGE}))
    yield from (("Obsoletes", relation) for relation in stage.obsoletes)


def _summary(text: str) -> str:
    """Shorten a sentence to what a package's summary may have, at a comma, semicolon or colon."""
    text = text.rstrip(".")
    if len(text) <= SUMMARY_WIDTH:
        return text
    ends = [found.start() for found in re.finditer(r"[,;:] ", text) if found.start() <= SUMMARY_WIDTH]
    return text[: ends[-1]] if ends else textwrap.shorten(text, SUMMARY_WIDTH, placeholder=" ...")


def make_packaging(packages: tuple[Package, ...], version: str, release: str, time: int) -> Packaging:
    """Put together what the spec says; raises AnchorError for a version or release that RPM does not allow."""
    for what, text in (("version", version), ("release", release)):
        if not VERSION.fullmatch(text):
            raise AnchorError(
                f"{what} {text!r}: RPM allows letters, digits and . _ + ~ ^ only"
                + (", and takes - as the sign between version and release" if "-" in text else ""),
                "a pre-release is written 1.2~rc1",
            )
    changes = changelog.read_changelog(data_directory() / "CHANGELOG.md")
    return Packaging(packages, version, release, time, changes)


def environment(directory: Path) -> jinja2.Environment:
    """Return what renders the specs of a directory: no name may be missing, and texts go through the filter `rpm`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # {# can stand in a macro
        comment_end_string="#>",
        autoescape=False,  # noqa: S701 - the output is a spec, and every text goes through the rpm filter
    )
    made.filters["rpm"] = _escape
    return made


def render_spec(packaging: Packaging) -> str:
    """Return the text of the spec."""
    core, *stages = packaging.packages
    template = environment(data_directory() / "specs").get_template(TEMPLATE)
    return template.render(
        core=core,
        stages=stages,
        packages=packaging.packages,
        version=packaging.version,
        release=packaging.release,
        license=LICENSE_NAME,
        changelog=changelog.rpm_entries(packaging.changes, packaging.version, packaging.release, packaging.time),
    )


def _escape(text: str) -> str:
    """Keep rpm from expanding anything in a text."""
    return text.replace("%", "%%")


def source_archive(packaging: Packaging) -> bytes:
    """Return the source archive (tar.gz): the modules as they are installed, documents and licence; always the same."""
    return pack(_entries(packaging), packaging.time)


def _entries(packaging: Packaging) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    top = f"{NAME}-{packaging.version}"
    for name, content, mode in sorted(_sources(packaging)):
        entry = tarfile.TarInfo(f"{top}/{name}" if name else top)
        entry.mode, entry.type = mode, tarfile.DIRTYPE if content is None else tarfile.REGTYPE
        yield entry, content or b""


def license_text() -> bytes:
    """Return the licence."""
    return (data_directory() / "LICENSE").read_bytes()


def _sources(packaging: Packaging) -> Iterator[tuple[str, bytes | None, int]]:
    """Yield each file and directory (without content) of the archive with its permission bits."""
    yield from (("", None, 0o755), ("modules.d", None, 0o755), ("doc", None, 0o755), ("LICENSE", license_text(), 0o644))
    for package in packaging.packages:
        yield f"doc/{package.name}", None, 0o755
        for name, content in package.documents.items():
            yield f"doc/{package.name}/{name}", content, 0o644
        yield f"modules.d/{package.directory}", None, 0o755
        for name, file in package.module.files.items():
            yield f"modules.d/{package.directory}/{name}", file.content, file.mode
