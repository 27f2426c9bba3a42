"""Signs packages and makes a repository of them, with the programs of rpm, GnuPG and createrepo_c.

The private key stays with gpg-agent: neither it nor a passphrase passes through here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.run import run, which
from anchor_build.stage import Binary

LIMIT_S = 120
CREATEREPO = Binary("createrepo_c", "createrepo_c", "createrepo-c")
RPMSIGN = Binary("rpmsign", "rpm-sign", "rpm")
GPG = Binary("gpg", "gnupg2", "gpg")
KEY_FILE = "repodata/repomd.xml.key"
NO_TERMINAL = "there is no terminal to ask for a passphrase: unlock the key in gpg-agent first, or use one without"


def find_key(name: str) -> str:
    """Return the fingerprint of the secret key that `name` means: a key ID, a fingerprint or an address.

    Raises AnchorError when gpg knows no such key that can sign, or several. The fields are those of GnuPG's
    doc/DETAILS.
    """
    listing = run(["gpg", "--batch", "--with-colons", "--list-secret-keys", "--", name], check=False, timeout=LIMIT_S)
    rows = [line.split(":") for line in listing.stdout.splitlines()]
    found = []
    for row, following in pairwise(rows):
        # Field 12 has the abilities of the whole key in capitals; field 2 is e, r or i for one that may not be used.
        if row[0] == "sec" and following[0] == "fpr" and "S" in row[11] and row[1] not in ("e", "r", "i"):
            found.append(following[9])
    if len(found) == 1:
        return found[0]
    if found:
        raise AnchorError(f"--sign {name}: means several keys: {', '.join(found)}", "name one of these fingerprints")
    raise AnchorError(
        f"--sign {name}: gpg has no secret key of that name that can sign",
        "`gpg --list-secret-keys` lists them; GNUPGHOME says where gpg looks",
    )


def sign_packages(files: Sequence[Path], fingerprint: str, seconds: int, work: Path) -> None:
    """Sign packages in place, and check the signatures against the public key alone."""
    try:
        # Debian's rpm does not look for gpg on PATH.
        defines = ["--define", f"_gpg_name {fingerprint}", "--define", f"__gpg {which('gpg')}"]
        run(["rpmsign", *defines, "--addsign", *files], timeout=LIMIT_S)
    except ProcessError as error:
        raise ProcessError(["rpmsign", "--addsign"], error.status, error.tail, NO_TERMINAL) from None
    public, database = work / "key.asc", work / "keys"
    public.write_text(_public_key(fingerprint), encoding="ascii")
    database.mkdir()
    keys = ["rpmkeys", "--define", "_keyring rpmdb", "--dbpath", str(database)]
    run([*keys, "--import", public], timeout=LIMIT_S)
    checked = run([*keys, "--checksig", *files], check=False, timeout=LIMIT_S)
    unsigned = [line for line in checked.stdout.splitlines() if "signatures OK" not in line]
    if checked.status != 0 or unsigned:
        raise AnchorError("packages do not carry a good signature:\n  " + "\n  ".join(unsigned or [checked.stderr]))
    for file in files:
        os.utime(file, (seconds, seconds))


def _public_key(fingerprint: str) -> str:
    return run(["gpg", "--batch", "--armor", "--export", fingerprint], timeout=LIMIT_S).stdout


def version() -> str:
    """Return the version of createrepo_c, which decides the index's bytes."""
    return run(["createrepo_c", "--version"], timeout=LIMIT_S).stdout.strip()


def make_index(directory: Path, seconds: int, fingerprint: str | None) -> None:
    """Make repodata/ for the packages in a directory; with a key, sign it and put the public key beside it.

    zypper looks for the key there (repomd.xml.key); dnf is given its address with gpgkey=.
    """
    argv = ["createrepo_c", "--quiet", "--no-database", "--simple-md-filenames", "--general-compress-type", "gz"]
    argv += ["--revision", str(seconds), "--set-timestamp-to-revision", str(directory)]
    run(argv, env={"SOURCE_DATE_EPOCH": str(seconds)}, timeout=LIMIT_S, umask=0o022)
    if fingerprint is None:
        return
    index = directory / "repodata" / "repomd.xml"
    signing = ["gpg", "--batch", "--yes", "--armor", "--local-user", fingerprint, "--detach-sign", str(index)]
    run(signing, timeout=LIMIT_S, hint=NO_TERMINAL, umask=0o022)
    run(["gpg", "--batch", "--verify", f"{index}.asc", str(index)], timeout=LIMIT_S)
    (directory / KEY_FILE).write_text(_public_key(fingerprint), encoding="ascii")
