"""Images with a hash tree by the real veritysetup, and stand-ins for what a host's kernel may lack: dm-verity.

The one stand-in is `dmsetup`: found first on PATH, it records the table that it was given, has veritysetup check the
whole file against it, and makes /dev/mapper/anchor-image of the node's root a link to a real loop device of the data;
or, where the check fails, to a file that cannot be read, as the kernel's device could not. (With it goes losetup, which
lets a loop device be while that stand-in reads it.) Superblocks, loop devices and mounts are real. How the kernel's
dm-verity behaves is tested on a booted node (tests/integration/test_node_nfs.py).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096

DMSETUP = r"""#!/bin/sh
state=$ANCHOR_ROOT/dm
case $1 in
    info) [ -e "$state" ] || exit 1 ;;
    remove)
        read -r data file <"$state"
        [ ! -e "$ANCHOR_ROOT/dm-busy" ] || exit 1
        [ "$data" = none ] || losetup -d "$data"
        losetup -d "$file" 2>/dev/null
        rm -f "$state" "$ANCHOR_ROOT/dev/mapper/anchor-image"
        ;;
    create)
        printf '%s\n' "$*" >>"$ANCHOR_ROOT/dm-calls"
        [ "$1 $2 $3 $4 $5" = 'create anchor-image --readonly --noudevsync --table' ] || exit 2
        [ ! -e "$ANCHOR_ROOT/dm-refuses" ] || { echo 'device-mapper: reload ioctl on anchor-image failed' >&2; exit 1; }
        set -- $6
        [ "$1 $3 $4 $6 $7 $8 ${11}" = "0 verity 1 $5 4096 4096 sha256" ] || exit 2
        shift 4
        read -r file <"/sys/block/${1#/dev/}/loop/backing_file" || exit 3
        [ "$6" = $(($5 + 1)) ] || exit 2
        data=none
        mkdir -p "$ANCHOR_ROOT/dev/mapper"
        if veritysetup verify "$file" "$file" "$8" --no-superblock --format=1 --hash=sha256 --salt="$9" \
            --data-block-size=4096 --hash-block-size=4096 --data-blocks="$5" --hash-offset=$(($6 * 4096)) \
            >/dev/null 2>&1; then
            data=$(losetup -r -f --show --sizelimit $(($5 * 4096)) "$file") || exit 3
            ln -s "$data" "$ANCHOR_ROOT/dev/mapper/anchor-image"
        else
            ln -s /proc/self/mem "$ANCHOR_ROOT/dev/mapper/anchor-image"
        fi
        printf '%s %s\n' "$data" "$1" >"$state"
        ;;
esac
"""
# What reads a loop device keeps it: only without it does losetup -d free one at once.
LOSETUP = '#!/bin/sh\n[ "$1" != -d ] || [ ! -e "$ANCHOR_ROOT/dm" ] || exit 0\nexec /sbin/losetup "$@"\n'


@dataclass(frozen=True)
class VerityImage:
    """A file with a tree behind its file system, and the root hash."""

    file: Path
    root_hash: str
    data_size: int


def add_tree(image: Path, target: Path, *options: str) -> VerityImage:
    """Copy a file system to `target`, pad it, and put a hash tree behind it, as a site would by hand."""
    shutil.copyfile(image, target)
    size = -(-image.stat().st_size // BLOCK) * BLOCK
    with target.open("r+b") as file:
        file.truncate(size)
    salt = hashlib.sha256(target.read_bytes()).hexdigest()
    argv = ["veritysetup", "format", "--data-block-size=4096", "--hash-block-size=4096", "--hash=sha256", "--format=1"]
    argv += [f"--data-blocks={size // BLOCK}", f"--hash-offset={size}", f"--salt={salt}"]
    argv += ["--uuid=00000000-0000-0000-0000-000000000000", *options, str(target), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    (root_hash,) = (line.split()[-1] for line in done.stdout.splitlines() if line.startswith("Root hash:"))
    return VerityImage(target, root_hash, size)


def stand_in(root: Path) -> str:
    """Put the stand-ins below a node's root, whose kernel then has dm-verity; return the PATH that finds them."""
    directory = root / "bin"
    directory.mkdir(exist_ok=True)
    for name, text in (("dmsetup", DMSETUP.replace("losetup", "/sbin/losetup")), ("losetup", LOSETUP)):
        (directory / name).write_text(text)
        (directory / name).chmod(0o755)
    (root / "sys/module/dm_verity").mkdir(parents=True)
    return str(directory)
