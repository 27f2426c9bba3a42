"""anchor-credentials.sh: real keys and certificates, whole and as they look while somebody copies them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from contrib.site import pki
from tests.shell.conftest import Shell

LOAD = '. "$LIB/anchor-report.sh" && . "$LIB/anchor-credentials.sh" || exit 9\n'
# Prints each file's verdict on a line of its own.
JUDGE = (
    LOAD
    + """
kind=$1
shift
for file; do
    if anchor_credentials_whole "$file" "$kind"; then
        printf 'whole\\n'
    else
        printf '%s\\n' "${anchor_credentials_error:-no reason}"
    fi
done
"""
)


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], capture_output=True, timeout=60, check=True)


def judge(shell: Shell, kind: str, **contents: bytes) -> dict[str, str]:
    """Return the verdict on each file by its name."""
    files = [shell.root / name for name in contents]
    for file in files:
        file.write_bytes(contents[file.name])
    done = shell.run(JUDGE, kind, *map(str, files))
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip(contents, done.stdout.splitlines(), strict=True))


def test_whole_certificates(shell: Shell, leaf: pki.Leaf, site_ca: Path) -> None:
    cert, ca = leaf.certificate.read_bytes(), site_ca.read_bytes()
    verdicts = judge(
        shell,
        "cert",
        one=cert,
        chain=cert + ca,
        without_last_newline=cert.rstrip(),
        with_blank_lines=cert + b"\n \n",
        of_windows=cert.replace(b"\n", b"\r\n"),
        with_text_before=b"subject=/O=Universit\xc3\xa4t\n" + cert + b"# issued by\n" + ca,
    )
    assert set(verdicts.values()) == {"whole"}, verdicts


@pytest.mark.parametrize("share", [0, 1, 30, 50, 99])
def test_half_copied_files_are_not_whole(shell: Shell, leaf: pki.Leaf, share: int) -> None:
    for kind, path in (("cert", leaf.certificate), ("key", leaf.key), ("any", leaf.key)):
        whole = path.read_bytes().rstrip()
        cut = whole[: len(whole) * share // 100]
        if kind == "any" and share == 1:
            continue  # not even "-----BEGIN ": nothing tells that this is PEM
        verdict = judge(shell, kind, file=cut)["file"]
        assert verdict.startswith("file "), verdict
        assert judge(shell, kind, file=whole[:-1])["file"] == "file is not whole: a PEM block in it is broken"


def test_what_is_no_certificate(shell: Shell, leaf: pki.Leaf, other: pki.Leaf) -> None:
    cert, key, longer = leaf.certificate.read_bytes(), leaf.key.read_bytes(), other.certificate.read_bytes() * 2
    broken = cert.splitlines(keepends=True)
    verdicts = judge(
        shell,
        "cert",
        empty=b"",
        page=b"<html>404</html>\n",
        key=key,
        both=cert + key,
        written_over=cert + longer[len(cert) + 40 :],
        end_of_another=cert + longer[-len(b"-----END CERTIFICATE-----\n") :],
        a_line_lost=b"".join(broken[:2]) + b"\x00\x01\n" + b"".join(broken[3:]),
        block_in_block=b"".join(broken[:3]) + cert,
        empty_block=b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n",
        large=cert * 400,
    )
    assert verdicts == {
        "empty": "empty is missing or empty",
        "page": "page holds no certificate",
        "key": "key holds a private key, which does not belong beside a certificate",
        "both": "both holds a private key, which does not belong beside a certificate",
        "written_over": "written_over has the end of a PEM block without its beginning",
        "end_of_another": "end_of_another has the end of a PEM block without its beginning",
        "a_line_lost": "a_line_lost is not whole: a PEM block in it is broken",
        "block_in_block": "block_in_block is not whole: a PEM block in it is broken",
        "empty_block": "empty_block has an empty PEM block",
        "large": f"large is larger than any certificate or key ({len(cert) * 400} bytes)",
    }
    tail = judge(shell, "cert", tail=cert + longer[30:90])["tail"]
    assert tail == "tail has something after its last PEM block, as if one file was written over another"


def test_keys(shell: Shell, leaf: pki.Leaf, tmp_path: Path) -> None:
    locked, old_locked, old = (tmp_path / name for name in ("locked.pem", "old-locked.pem", "old.pem"))
    openssl("pkey", "-in", leaf.key, "-aes256", "-passout", "pass:secret", "-out", locked)
    openssl("ec", "-in", leaf.key, "-aes256", "-passout", "pass:secret", "-out", old_locked)
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-out", old)
    verdicts = judge(
        shell,
        "key",
        plain=leaf.key.read_bytes(),
        with_parameters=old.read_bytes(),
        locked=locked.read_bytes(),
        old_locked=old_locked.read_bytes(),
        certificate=leaf.certificate.read_bytes(),
        two=leaf.key.read_bytes() * 2,
        both=leaf.certificate.read_bytes() + leaf.key.read_bytes(),
    )
    encrypted = "is encrypted, and nobody is there to give its password"
    assert verdicts == {
        "plain": "whole",
        "with_parameters": "whole",
        "locked": f"locked {encrypted}",
        "old_locked": f"old_locked {encrypted}",
        "certificate": "certificate holds no private key",
        "two": "two holds more than one private key",
        "both": "both holds a certificate, which does not belong beside a private key",
    }
    hidden = judge(shell, "any", locked=locked.read_bytes(), old=old_locked.read_bytes(), text=b"a token\n", no=b"")
    assert hidden == {"locked": "whole", "old": "whole", "text": "whole", "no": "no is missing or empty"}


PAIR = (
    LOAD
    + """
anchor_credentials_pair "$1" "$2" && { printf 'a pair\\n'; exit 0; }
printf '%s\\n%s\\n' "$anchor_credentials_error" "$anchor_credentials_hint"
"""
)


def pair(shell: Shell, certificate: Path, key: Path, env: dict[str, str] | None = None) -> list[str]:
    done = shell.run(PAIR, str(certificate), str(key), env=env, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("algorithm", ["ec", "rsa", "ed25519"])
def test_a_key_belongs_to_its_own_certificate_only(
    shell: Shell, leaf: pki.Leaf, tmp_path: Path, algorithm: str
) -> None:
    words = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:P-384"], "rsa": ["rsa:2048"], "ed25519": ["ed25519"]}[
        algorithm
    ]
    certificate, key = tmp_path / "client.cert", tmp_path / "client.key"
    openssl("req", "-x509", "-newkey", *words, "-noenc", "-subj", "/CN=n", "-keyout", key, "-out", certificate)
    assert pair(shell, certificate, key) == ["a pair"]
    chain = tmp_path / "chain.pem"
    chain.write_bytes(certificate.read_bytes() + leaf.certificate.read_bytes())
    assert pair(shell, chain, key) == ["a pair"]
    wrong = f"the key {leaf.key.name} does not belong to the certificate client.cert"
    assert pair(shell, certificate, leaf.key)[0] == wrong
    chain.write_bytes(leaf.certificate.read_bytes() + certificate.read_bytes())
    assert pair(shell, chain, key)[0] == "the key client.key does not belong to the certificate chain.pem"


def test_what_openssl_cannot_read_is_no_pair(shell: Shell, leaf: pki.Leaf, tmp_path: Path) -> None:
    # Room that was made for a file before its bytes came: complete to look at, and zero inside.
    holes = tmp_path / "holes.pem"
    whole = leaf.key.read_bytes()
    holes.write_bytes(whole[:60] + b"\0" * 40 + whole[100:])
    assert pair(shell, leaf.certificate, holes)[0] == "holes.pem holds no key that openssl can read"
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", leaf.key, "-aes256", "-passout", "pass:secret", "-out", locked)
    assert pair(shell, leaf.certificate, locked)[0] == "locked.pem holds no key that openssl can read"
    holes.write_bytes(leaf.certificate.read_bytes().replace(b"A", b"B"))
    assert pair(shell, holes, leaf.key)[0] == "holes.pem holds no certificate that openssl can read"


def test_an_initramfs_without_openssl_says_so(shell: Shell, leaf: pki.Leaf, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("unshare", "timeout", "bash", "dash", "busybox"):
        (tools / name).symlink_to(str(shutil.which(name)))
    error, hint = pair(shell, leaf.certificate, leaf.key, env={"PATH": str(tools)})
    assert error == "a certificate and its key cannot be compared: openssl is not in the initramfs"
    assert hint == "build it anew: every initramfs has openssl"


KEEP = (
    LOAD
    + """
anchor_credentials_keep "$1" "$2" && exit 0
printf '%s\\n' "$anchor_credentials_error"
exit 1
"""
)


def test_both_are_kept_for_root_alone(shell: Shell, leaf: pki.Leaf, tmp_path: Path) -> None:
    credentials = shell.root / "run/anchor/credentials"
    for _ in range(2):  # a step may run again
        for path in (leaf.certificate, leaf.key):
            shutil.copy(path, tmp_path)
            (tmp_path / path.name).chmod(0o644)
        done = shell.run(KEEP, str(tmp_path / leaf.certificate.name), str(tmp_path / leaf.key.name))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name: path.stat().st_mode & 0o777 for path in credentials.iterdir()} == {
        "client.crt": 0o600,
        "client.key": 0o600,
    }
    assert credentials.stat().st_mode & 0o777 == 0o700
    assert (credentials / "client.key").read_bytes() == leaf.key.read_bytes()
    assert (credentials / "client.crt").read_bytes() == leaf.certificate.read_bytes()
    assert not (tmp_path / leaf.key.name).exists()


def test_nothing_is_kept_by_halves(shell: Shell, leaf: pki.Leaf, tmp_path: Path) -> None:
    credentials = shell.root / "run/anchor/credentials"
    credentials.mkdir(parents=True)
    (credentials / "client.crt").write_text("of an earlier try")
    shutil.copy(leaf.key, tmp_path)
    done = shell.run(KEEP, str(tmp_path / "absent"), str(tmp_path / leaf.key.name))
    assert (done.returncode, done.stdout) == (1, f"cannot write the certificate and its key to {credentials}\n")
    assert [path.name for path in credentials.iterdir() if path.name != "client.crt"] == []
