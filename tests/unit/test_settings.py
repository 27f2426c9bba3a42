"""What a site bakes in: parameter values, secrets from files only, and its CA."""

from __future__ import annotations

import ssl
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from anchor_build import settings
from anchor_build.errors import AnchorError, UsageError
from anchor_build.plan import Plan, make_plan, whole_plan
from anchor_build.registry import load_registry
from anchor_build.settings import named_files, read_ca, read_settings
from tests.conftest import SITE_STAGES

KEY = "rd.anchor.acme.eab_key"
BROKEN = """-----BEGIN CERTIFICATE-----
MIIBfTCCASOgAwIBAgIUGq0
-----END CERTIFICATE-----
"""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return whole_plan(load_registry([SITE_STAGES]))


def problems(plan: Plan, *texts: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read_settings(plan, texts)
    return caught.value.message.splitlines()


def test_only_a_value_that_begins_with_an_at_names_a_file() -> None:
    url = f"rd.anchor.squashfs.url=https://s/i?sig=@{'x' * 300}"
    assert named_files([url, "acme_server=a=@b", f"{KEY}=@key", "x", "y=@"]) == ["key", ""]


def test_the_last_value_of_a_parameter_counts_whatever_its_spelling(plan: Plan) -> None:
    found = read_settings(plan, ["acme_server=a.example", "overlayfs_size=1G", "rd.anchor.acme.server=b.example"])
    assert [(s.param.key, s.value) for s in found] == [
        ("rd.anchor.acme.server", "b.example"),
        ("rd.anchor.overlay.size", "1G"),
    ]


def test_a_value_is_kept_as_it_is(plan: Plan) -> None:
    (found,) = read_settings(plan, ["rd.anchor.local-file.note= a=b \"c\" $(d) 'é'"])
    assert found.value == " a=b \"c\" $(d) 'é'"
    assert found.shown == found.value


def test_a_value_from_a_file_without_its_final_newline(plan: Plan, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("abc=\n", encoding="utf-8")
    (found,) = read_settings(plan, [f"{KEY}=@{secret}"])
    assert (found.value, found.shown) == ("abc=", "(secret)")


def test_a_list_of_urls_may_hold_secrets(plan: Plan) -> None:
    [mirrors] = read_settings(plan, ["rd.anchor.squashfs.mirrors=https://u:p@a/i,b/i,https://c/i?X-Signature=s"])
    assert (mirrors.is_secret, mirrors.shown) == (True, "https://(secret)@a/i,b/i,https://c/i?(secret)")
    [plain] = read_settings(plan, ["rd.anchor.manifest=https://a/m,https://b/m"])
    assert (plain.is_secret, plain.shown) == (False, plain.value)


def test_a_secret_on_the_command_line_is_refused(plan: Plan) -> None:
    (problem,) = problems(plan, f"{KEY}=hunter2")
    assert problem == f"--set {KEY}: is a secret, and every process can read arguments: give it as {KEY}=@FILE"
    assert "hunter2" not in problem


def test_everything_wrong_at_once(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "two-lines").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "empty").write_bytes(b"\n")
    found = problems(
        plan,
        "rd.anchor.acme.sevrer=x",
        "rd.anchor.nothing.like.it=x",
        "rd.anchor.fetch.attempts",
        "rd.anchor.fetch.attempts=0",
        f"{KEY}=@{tmp_path}/gone",
        f"{KEY}=@{tmp_path}/two-lines",
        f"{KEY}=@{tmp_path}/binary",
        f"{KEY}=@{tmp_path}/empty",
        f"{KEY}=@{tmp_path}",
    )
    assert found == [
        "--set rd.anchor.acme.sevrer: is not a parameter of these stages; did you mean rd.anchor.acme.server?",
        "--set rd.anchor.nothing.like.it: is not a parameter of these stages",
        "--set rd.anchor.fetch.attempts: has no value: --set KEY=VALUE or KEY=@FILE",
        "--set rd.anchor.fetch.attempts: is not a whole number from 1 to 1000",
        f"--set {KEY}: {tmp_path}/gone: No such file or directory",
        f"--set {KEY}: contains a control character",
        f"--set {KEY}: {tmp_path}/binary: is not UTF-8 text",
        f"--set {KEY}: is empty",
        f"--set {KEY}: {tmp_path}: Is a directory",
    ]


def test_a_parameter_of_a_stage_that_is_not_in_the_build() -> None:
    plan = make_plan(load_registry(), image=["squashfs"])
    other = "is not a parameter of these stages"
    assert problems(plan, "rd.anchor.acme.email=a@b.c", "acme_server=ca", "rd.anchor.acme.sever=ca") == [
        f"--set rd.anchor.acme.email: {other}, but of auth-acme, which --auth acme adds",
        f"--set acme_server: {other}, but of auth-acme, which --auth acme adds",
        f"--set rd.anchor.acme.sever: {other}; did you mean rd.anchor.acme.server? It is one of auth-acme, which"
        " --auth acme adds",
    ]


def test_a_parameter_of_a_stage_that_is_not_here_is_meant_only_where_it_looks_the_same() -> None:
    registry = load_registry([SITE_STAGES])
    one = make_plan(registry, auth=["none"], image=["squashfs"])
    assert problems(one, "rd.anchor.file.x=1") == ["--set rd.anchor.file.x: is not a parameter of these stages"]
    assert "did you mean rd.anchor.nfs.files?" in problems(one, "rd.anchor.nfs.file=1")[0]


def test_what_has_no_end_does_not_fill_the_memory(plan: Plan) -> None:
    assert problems(plan, f"{KEY}=@/dev/zero") == [f"--set {KEY}: /dev/zero: has more than 16 MiB"]
    with pytest.raises(AnchorError, match="--ca /dev/zero: cannot be read: has more than 16 MiB"):
        read_ca(Path("/dev/zero"))


def test_a_ca_bundle_is_taken_as_it_is(authority: Path) -> None:
    text = b"# the site's CA\n" + authority.read_bytes()
    authority.write_bytes(text)
    assert read_ca(authority) == (text, "")


def test_a_bundle_with_comments_in_utf8(authority: Path) -> None:
    authority.write_bytes("# Autorité\n".encode() + authority.read_bytes() * 2)
    assert read_ca(authority)[1] == ""


def test_a_ca_with_its_private_key_is_refused(authority: Path) -> None:
    key = authority.with_suffix(".key").read_bytes()
    assert b"PRIVATE KEY" in key
    authority.write_bytes(authority.read_bytes() + key)
    with pytest.raises(AnchorError, match="holds a private key") as caught:
        read_ca(authority)
    assert caught.value.hint == "a CA bundle holds certificates only"


def test_a_ca_whose_time_is_over(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ssl.create_default_context(cafile=authority).get_ca_certs()[0]
    end = ssl.cert_time_to_seconds(str(found["notAfter"]))
    monkeypatch.setattr("time.time", lambda: end - 1)
    assert read_ca(authority)[1] == ""
    monkeypatch.setattr("time.time", lambda: end + 1)
    day = datetime.fromtimestamp(end, UTC).date()
    said = f"--ca {authority}: expired on {day}: nodes will trust no server"
    assert read_ca(authority)[1] == said
    authority.write_bytes(authority.read_bytes() * 2)
    assert read_ca(authority)[1] == said
    # A server's own certificate beside it is trusted, and no CA.
    leaf = authority.with_name("leaf.pem")
    subject = ("-subj", "/CN=store", "-addext", "basicConstraints=critical,CA:FALSE")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-keyout", "/dev/null")
    subprocess.run(["openssl", "req", "-x509", *key, *subject, "-out", leaf], check=True, capture_output=True)
    authority.write_bytes(authority.read_bytes() + leaf.read_bytes())
    assert read_ca(authority)[1] == ""


def test_what_is_no_ca(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    with pytest.raises(AnchorError, match=r"ca\.pem: cannot be read: No such file"):
        read_ca(file)
    with pytest.raises(AnchorError, match="cannot be read: Is a directory"):
        read_ca(tmp_path)
    file.write_bytes(b"\x30\x82DER")
    with pytest.raises(AnchorError, match="holds no certificate in PEM form"):
        read_ca(file)
    file.write_text(BROKEN, encoding="utf-8")
    with pytest.raises(AnchorError, match="holds a certificate that cannot be read"):
        read_ca(file)


def test_without_a_ca_the_hosts_own_with_a_warning(
    tmp_path: Path, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "SYSTEM_BUNDLES", (tmp_path / "gone", authority))
    data, warning = read_ca(None)
    assert data == authority.read_bytes()
    assert warning == "no --ca: nodes trust every public CA that this host trusts"
    monkeypatch.setattr(settings, "SYSTEM_BUNDLES", (tmp_path / "gone",))
    with pytest.raises(AnchorError, match="no CA bundle of its own"):
        read_ca(None)
