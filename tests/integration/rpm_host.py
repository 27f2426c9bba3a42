"""Packages for tests: a build of the project's own, a signing key, stand-ins for a distribution, and private roots."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import TOP

LIMIT_S = 120
TIME = 1_700_000_000
KEY_NAME = "packages@site.example"
MODULES = Path("usr/lib/dracut/modules.d")
NOBODY = 65534
# Root becomes somebody else, who keeps the ability to read this Python, which may be in root's own home.
AS_NOBODY = (
    *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)


@dataclass(frozen=True)
class Ended:
    """A finished program."""

    status: int
    out: str
    err: str


def run(*words: str | Path, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Ended:
    """Run a program with `env` added to its environment."""
    whole = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **(env or {})}
    done = subprocess.run(
        [str(word) for word in words], env=whole, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert not check or done.returncode == 0, f"{words}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return Ended(done.returncode, done.stdout, done.stderr)


def build(
    out: Path,
    *words: str | Path,
    check: bool = True,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Run `anchor-build rpm` as a user does, at a fixed time unless `env` has another."""
    argv = [sys.executable, "-m", "anchor_build", "rpm", "--out", out, *words]
    own = {"PYTHONPATH": str(TOP), "SOURCE_DATE_EPOCH": str(TIME), "XDG_CACHE_HOME": str(out.parent / "cache")}
    return run(*argv, check=check, cwd=cwd or out.parent, env={**own, **(env or {})})


def copy_tree(top: Path, version: str = "") -> Path:
    """Copy what packages are made of, without git; `version` is another one than it declares."""
    for name in ("anchor_build", "dracut-modules", "lib", "specs"):
        shutil.copytree(TOP / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("CHANGELOG.md", "LICENSE"):
        shutil.copy(TOP / name, top / name)
    if version:
        (top / "anchor_build" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    return top


def report(out: Path) -> dict[str, Any]:
    """Return the report beside the packages."""
    return dict(json.loads((out / "packages.json").read_text()))


def contents(top: Path) -> dict[str, bytes]:
    """Return every file below a directory."""
    return {str(path.relative_to(top)): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}


@contextmanager
def signing_key() -> Iterator[Path]:
    """Make a key in a directory of its own, which is what GNUPGHOME names; its agent ends with it."""
    # Not below pytest's directory: the agent's socket has at most 107 characters.
    home = Path(tempfile.mkdtemp(prefix="anchor-gpg-"))
    try:
        words = ["gpg", "--batch", "--passphrase", "", "--quick-gen-key", KEY_NAME, "rsa2048", "sign", "never"]
        run(*words, env={"GNUPGHOME": str(home)})
        yield home
    finally:
        run("gpgconf", "--kill", "gpg-agent", check=False, env={"GNUPGHOME": str(home)})
        shutil.rmtree(home, ignore_errors=True)


def make_rpms(out: Path, spec: str, files: Mapping[str, str] | None = None) -> list[Path]:
    """Build packages from a spec whose sources are `files`."""
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        top = Path(name)
        (top / "it.spec").write_text(spec)
        for source, text in (files or {}).items():
            (top / source).write_text(text)
        out.mkdir(exist_ok=True)
        places = {"_topdir": top, "_tmppath": top, "_sourcedir": top, "_rpmdir": out}
        defines = {**places, "_rpmfilename": "%%{NAME}-%%{VERSION}.rpm"}
        words = [word for key, value in defines.items() for word in ("--define", f"{key} {value}")]
        run("rpmbuild", "-bb", "--target", "noarch", *words, top / "it.spec", env={"HOME": name})
    return sorted(out.glob("*.rpm"))


def stand_ins(out: Path, names: Sequence[str]) -> list[Path]:
    """Build empty packages of these names, such as a distribution would have."""
    head = "Version: 9\nRelease: 1\nSummary: A stand-in\nLicense: CC0-1.0\nBuildArch: noarch\n"
    parts = [f"Name: stand-ins\n{head}%description\nStand-ins.\n"]
    for name in sorted(names):
        parts.append(
            f"%package -n {name}\nSummary: A stand-in\n%description -n {name}\nA stand-in.\n%files -n {name}\n"
        )
    return make_rpms(out, "\n".join(parts))


def old_package(out: Path) -> list[Path]:
    """Build a package such as Anchor 0.1.5 was: everything in 50anchor, without Requires, all of mode 0755."""
    spec = f"""
Name: anchor-dracut-module
Version: 0.1.5
Release: 1
Summary: Anchor
License: MIT
BuildArch: noarch
Source0: module-setup.sh
Source1: parse-anchor.sh
%description
Anchor.
%install
mkdir -p %{{buildroot}}/{MODULES}/50anchor
install -m 755 %{{SOURCE0}} %{{SOURCE1}} %{{buildroot}}/{MODULES}/50anchor
%files
/{MODULES}/50anchor
"""
    return make_rpms(out, spec, {"module-setup.sh": "check() { return 0; }\n", "parse-anchor.sh": "exit\n"})


def rpmlint(packages: Sequence[Path], key: Path, home: Path) -> tuple[int, set[str]]:
    """Return the number of errors and the names of the warnings, with the public key of the packages in `key`."""
    # rpmlint knows the keys that rpm's database holds: it gets one of its own.
    (home / ".rpmmacros").write_text(f"%_dbpath {home / 'database'}\n%_keyring rpmdb\n")
    run("rpmkeys", "--import", key, env={"HOME": str(home)})
    # How it ends says whether there are errors, which its last line tells, too.
    done = run("rpmlint", "-c", TOP / "specs" / "rpmlint.toml", *packages, check=False, env={"HOME": str(home)})
    found = re.search(rf" {len(packages)} packages and .* checked; ([0-9]+) errors,", done.out)
    assert found, done.out + done.err
    warnings = {line.split(": W: ")[1].split()[0] for line in done.out.splitlines() if ": W: " in line}
    return int(found[1]), warnings


@dataclass(frozen=True)
class Root:
    """A private root with a database of its own."""

    path: Path

    def rpm(self, *words: str | Path, check: bool = True) -> Ended:
        """Run rpm on it."""
        # The database belongs to the root; the host's rpm keeps its own elsewhere.
        return run("rpm", "--root", self.path, "--dbpath", "/var/lib/rpm", *words, check=check)

    def packages(self) -> list[str]:
        """Return what is installed, as NAME-VERSION."""
        return sorted(self.rpm("-qa", "--qf", "%{NAME}-%{VERSION}\n").out.split())

    def files(self) -> list[str]:
        """Return every file and directory but those of the database."""
        paths = (path.relative_to(self.path) for path in sorted(self.path.rglob("*")))
        return [str(path) for path in paths if path.parts[:2] not in (("var", "lib"), ("var",))]


def needed(out: Path) -> list[str]:
    """Return the distribution's packages that the built ones require."""
    wanted = {name for package in report(out)["packages"] for name in package["requires"]}
    return sorted(name for name in wanted if "anchor-dracut" not in name)
