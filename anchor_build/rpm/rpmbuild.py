"""How the programs of rpm are run: nothing of this host, its clock or who builds gets into packages.

What that takes is described at reproducible-builds.org/docs and in rpm's own macros file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from anchor_build.errors import ProcessError
from anchor_build.run import Completed, run, which
from anchor_build.stage import Binary

LIMIT_S = 300
RPMBUILD = Binary("rpmbuild", "rpm-build", "rpm")
MACROS = {
    "_buildhost": "anchor-build",
    "use_source_date_epoch_as_buildtime": "1",
    "clamp_mtime_to_source_date_epoch": "1",
    "build_mtime_policy": "clamp_to_source_date_epoch",  # rpm 4.20's word for the line before
    "source_date_epoch_from_changelog": "0",
    "_changelog_trimage": "0",
    "_changelog_trimtime": "0",
    "_build_id_links": "none",
    "_srcdefattr": "(0644,root,root)",
    # What every rpm since 4.14 can read and write, whatever this one prefers.
    "_binary_payload": "w9.gzdio",
    "_source_payload": "w9.gzdio",
    "_binary_filedigest_algorithm": "8",
    "_source_filedigest_algorithm": "8",
    "_rpmfilename": "%%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm",
}
# Who distributes packages says so with macros: here nobody does, whatever this host's say.
UNDEFINED = ("vendor", "packager", "distribution", "disturl", "bugurl")
MADE = "made"
PLACES = {
    "_topdir": ".",
    "_sourcedir": ".",
    "_specdir": ".",
    "_rpmdir": MADE,
    "_srcrpmdir": MADE,
    "_builddir": "build",
    "_buildrootdir": "root",
    "_tmppath": "tmp",
}


def missing(programs: Sequence[Binary]) -> list[str]:
    """Return one line for each program that is not here, with the packages that have it."""
    return [f"{one.name} is missing: install {one.where}" for one in programs if which(one.name) is None]


def run_rpm(argv: Sequence[str], seconds: int, work: Path, *, log: Path | None = None) -> Completed:
    """Run a program of rpm without the settings of who runs it: ~/.rpmmacros and its like are not read.

    `seconds` since the epoch is the time of what it makes. Raises as run does.
    """
    home = work / "home"
    home.mkdir(exist_ok=True)
    env = {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "SOURCE_DATE_EPOCH": str(seconds), "TZ": "UTC"}
    return run(argv, env=env, cwd=work, log=log, timeout=LIMIT_S, umask=0o022)


def arguments(mode: str, spec: str, dist: str, top: str) -> list[str]:
    """Return rpmbuild's arguments for a spec in the current directory, below which `top` is."""
    places = {name: f"{top}/{place}" for name, place in PLACES.items()}
    argv = ["rpmbuild", mode, "--target", "noarch"]
    for name, value in {**MACROS, **places, "dist": dist or "%{nil}"}.items():
        argv += ["--define", f"{name} {value}"]
    argv += [word for name in UNDEFINED for word in ("--undefine", name)]
    # What a source package needs for its build is needed where it is built.
    return [*argv, *(["--nodeps"] if mode == "-bs" else []), spec]


def run_rpmbuild(mode: str, spec: Path, dist: str, seconds: int, tell: Callable[[str], None]) -> list[Path]:
    """Make packages (`-bb`) or the source package (`-bs`) of a spec, beside which its sources are; return what is made.

    `tell` is given each line of the log. Raises ProcessError with the end of it when rpmbuild fails.
    """
    work = spec.parent
    for place in PLACES.values():
        (work / place).mkdir(exist_ok=True)
    # A source package keeps its spec with every macro expanded, directories too: there they are relative, which is
    # enough where nothing is built.
    argv = arguments(mode, spec.name, dist, "." if mode == "-bs" else str(work))
    log = work / "rpmbuild.log"
    try:
        run_rpm(argv, seconds, work, log=log)
    except ProcessError as error:
        hint = "run again with -v to see all that rpmbuild says"
        raise ProcessError(["rpmbuild", mode, spec.name], error.status, error.tail, hint) from None
    finally:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            tell(line)
    return sorted((work / MADE).glob("*.rpm"))
