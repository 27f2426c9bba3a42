"""A node's shell with an NFS export, on a host whose kernel may have no NFS client.

The one stand-in is `mount`: found first on PATH, it records its arguments and, instead of mounting NFS, binds a
directory of the test in a mount namespace of its own. Files, links, copies and the unmount are real. How the kernel's
client behaves is tested on a booted node (tests/integration/test_node_nfs.py).
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS, TOP, Shell

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts in a namespace")

# "$EXPORT.says" holds what mount says of each version, as VERSION|TEXT; without a line for a version, it mounts.
# "$EXPORT.do" is sourced before, with the number of this call in $call.
MOUNT = r"""#!/bin/sh
printf '%s\n' "$*" >>"$EXPORT.mounts"
call=$(wc -l <"$EXPORT.mounts")
[ ! -e "$EXPORT.do" ] || . "$EXPORT.do"
version=${4##*vers=}
version=${version%%,*}
[ -e "$EXPORT.says" ] || : >"$EXPORT.says"
while IFS='|' read -r key text; do
    [ "$key" != "$version" ] && [ "$key" != any ] || { printf '%s\n' "$text" >&2; exit 32; }
done <"$EXPORT.says"
for where; do :; done
exec /bin/mount --bind "$EXPORT" "$where"
"""
LOAD = """
for lib in report mounts fetch fetch-mirrors fetch-digest fetch-room credentials nfs; do . "$LIB/anchor-$lib.sh"; done
. "$STAGE"
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10
"""
# Prints what is still mounted below the node's root.
AFTER = """
status=$?
while read -r device dir rest; do
    case $dir in "$ANCHOR_ROOT"/*) printf 'left mounted: %s\\n' "$dir" ;; esac
done </proc/self/mounts
exit "$status"
"""


@dataclass(frozen=True)
class Node:
    """A node whose `export` is what its NFS server has."""

    shell: Shell
    stage: Path
    export: Path

    @property
    def credentials(self) -> Path:
        """What auth leaves."""
        return self.shell.root / "run/anchor/credentials"

    def run(self, script: str, *arguments: str, **parameters: str | int) -> subprocess.CompletedProcess[str]:
        """Run a script after the libraries and the stage, with its parameters."""
        env = {f"anchor_{name}": str(value) for name, value in parameters.items()}
        env |= {"STAGE": str(self.stage), "EXPORT": str(self.export)}
        env["PATH"] = f"{self.shell.root}/bin:{os.environ['PATH']}"
        return self.shell.run(LOAD + script + AFTER, *arguments, env=env, unshare=("--mount",))

    def mounts(self) -> list[str]:
        """Return the arguments of each call of mount."""
        record = Path(f"{self.export}.mounts")
        return record.read_text().splitlines() if record.exists() else []

    def mount_says(self, text: str) -> None:
        """Let mount refuse: lines of VERSION|TEXT."""
        Path(f"{self.export}.says").write_text(text)

    def mount_does(self, script: str) -> None:
        """Let mount do something first."""
        Path(f"{self.export}.do").write_text(script)

    def noted(self, name: str) -> str:
        """Return what the step noted."""
        return (self.shell.root / "run/anchor/steps/10" / name).read_text().strip()


def make_node(name: str, top: Path, stage: str) -> Node:
    """Lay a node out below `top`."""
    root = top / "node"
    for directory in ("run/anchor/credentials", "run/anchor/image", "run/anchor/steps/10", "etc", "bin"):
        (root / directory).mkdir(parents=True)
    (root / "bin/mount").write_text(MOUNT)
    (root / "bin/mount").chmod(0o755)
    (top / "export").mkdir()
    assert name in SHELLS
    return Node(Shell(name, root), TOP / "dracut-modules" / stage / "stage.sh", top / "export")
