"""`check`: what only the build host says; tests/shell/test_anchor_params.py holds it to the node's answers."""

from __future__ import annotations

import pytest

from anchor_build.check import check_command_line
from anchor_build.plan import Plan, make_plan, whole_plan
from anchor_build.registry import load_registry
from tests.conftest import OLDER_CHOICES, TOP

TRUSTED = f"rd.anchor.squashfs.sha256={'0' * 64}"
GOOD = f"root=anchor acme_server=ca.example squashfs_server=https://store/i.squashfs {TRUSTED}"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return whole_plan(load_registry())


def test_a_right_line(plan: Plan) -> None:
    result = check_command_line(plan, f"quiet console=ttyS0 ip=dhcp {GOOD}")
    assert (result.errors, result.warnings) == ((), ())
    assert result.chosen == {"auth": "acme", "image": "squashfs"}
    assert result.values["rd.anchor.acme.server"] == "https://ca.example"


MANIFEST = "root=anchor acme_server=ca.example rd.anchor.manifest="


def test_a_manifest_takes_the_place_of_url_and_digest(plan: Plan) -> None:
    result = check_command_line(plan, f"{MANIFEST}https://a/m,store.example/m", signed=True)
    assert (result.errors, result.warnings) == ((), ())
    assert result.values["rd.anchor.manifest"] == "https://a/m,https://store.example/m"
    assert check_command_line(plan, f"{MANIFEST}http://a/m", signed=True).errors == ()
    unsigned = check_command_line(plan, f"{MANIFEST}https://a/m,http://a/m")
    assert unsigned.errors == ("rd.anchor.manifest: http:// is not protected: use https://",)
    assert "only TLS vouches for it" in unsigned.warnings[0]
    both = check_command_line(plan, f"{GOOD} rd.anchor.manifest=https://a/m", signed=True)
    assert [error.partition(":")[0] for error in both.errors] == ["rd.anchor.squashfs.sha256", "rd.anchor.squashfs.url"]
    assert check_command_line(plan, f"{MANIFEST}gopher://a/m").errors[0].endswith("carries gopher://")


def test_with_a_key_a_manifest_is_required(plan: Plan) -> None:
    (error,) = check_command_line(plan, GOOD, signed=True).errors
    assert error.startswith("rd.anchor.manifest: is required")


@pytest.mark.parametrize("line", ["", "root=/dev/sda1", f"{GOOD} root=live:x", "root"])
def test_a_line_for_another_root(plan: Plan, line: str) -> None:
    assert check_command_line(plan, line).errors[0].startswith("root=anchor: is missing")


def test_everything_wrong_at_once(plan: Plan) -> None:
    line = "rd.anchor.acme.sevrer=x rd.anchor.on_failure=panic acme_email=nobody overlayfs_size "
    line += "rd.anchor.acme.eab_key=hunter2"
    errors = check_command_line(plan, line).errors
    assert [error.partition(":")[0] for error in errors] == [
        "root=anchor",
        "rd.anchor.acme.sevrer",
        "overlayfs_size",
        "rd.anchor.acme.eab_key",
        "rd.anchor.on_failure",
        "acme_email",
        "rd.anchor.squashfs.url",
    ]
    assert "hunter2" not in "".join(errors)


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("rd.anchor.acme.sevrer", "rd.anchor.acme.server"),
        ("rd.anchor.squashfs.sha25", "rd.anchor.squashfs.sha256"),
        ("rd.anchor.onfailure", "rd.anchor.on_failure"),
    ],
)
def test_a_misspelt_parameter_is_an_error_with_the_nearest_name(plan: Plan, word: str, near: str) -> None:
    errors = check_command_line(plan, f"{GOOD} {word}=x").errors
    assert errors == (f"{word}: is not a parameter of these stages; did you mean {near}?",)


def test_a_misspelt_older_name_is_a_warning(plan: Plan) -> None:
    result = check_command_line(plan, f"{GOOD} squashfs_sever=x overlayfs_sizes=1")
    assert result.errors == ()
    assert [warning.rpartition(" ")[2] for warning in result.warnings] == ["squashfs_server?", "overlayfs_size?"]


def test_a_stage_that_is_not_in_the_plan_has_no_parameters() -> None:
    plan = make_plan(load_registry(), image=["squashfs"])
    (error,) = check_command_line(plan, "root=anchor squashfs_server=x rd.anchor.acme.server=y").errors
    remedy = "chooses a stage that this initramfs does not hold: build it with --auth acme"
    assert error == f"rd.anchor.acme.server: {remedy}"
    (error,) = check_command_line(plan, "root=anchor squashfs_server=x rd.anchor.acme.email=a@b.c").errors
    assert error.startswith("rd.anchor.acme.email: is not a parameter of these stages, but of auth-acme, which --auth")


def test_what_to_add_to_a_plain_url(plan: Plan) -> None:
    (error,) = check_command_line(plan, GOOD.replace("https", "http").replace(TRUSTED, "")).errors
    remedy = "add rd.anchor.squashfs.sha256= or rd.anchor.squashfs.verity= or use https://"
    assert error == f"rd.anchor.squashfs.url: http:// is not protected: {remedy}"
    (warning,) = check_command_line(plan, GOOD.replace(TRUSTED, "")).warnings
    assert warning.endswith("rd.anchor.squashfs.sha256= or rd.anchor.squashfs.verity= would too")


@pytest.mark.parametrize("url", ["http://store/i", "nfs://store/i", "https://store/i", "file:///i"])
def test_a_root_hash_makes_any_url_trusted(plan: Plan, url: str) -> None:
    root_hash = TRUSTED.replace("sha256", "verity")
    result = check_command_line(plan, f"root=anchor acme_server=ca.example squashfs_server={url} {root_hash}")
    assert (result.errors, result.warnings) == ((), ())


@pytest.mark.parametrize("word", OLDER_CHOICES)
def test_an_older_entry_that_asks_for_what_is_not_there_is_refused(word: str) -> None:
    plan = make_plan(load_registry(), auth=["none"], image=["squashfs"])
    line = f"root=anchor squashfs_server=https://store/i.squashfs {TRUSTED}"
    [error] = check_command_line(plan, f"{line} {word}=x").errors
    assert error.startswith(f"{word}: chooses a stage that this initramfs does not hold")
    for off in (word, f"{word}=", f"{word}=0"):
        assert check_command_line(plan, f"{line} {off}").errors == ()


def test_an_image_at_a_registry_is_named_by_the_line_or_by_a_manifest() -> None:
    plan = make_plan(load_registry(), auth=["none"], image=["oci"])
    line = "root=anchor rd.anchor.manifest=https://store/m"
    assert check_command_line(plan, line, signed=True).errors == ()
    assert check_command_line(plan, f"{line} rd.anchor.oci.mirrors=near/x", signed=True).errors == ()
    [error] = check_command_line(plan, f"{line} rd.anchor.oci.image=registry/x", signed=True).errors
    assert error.startswith("rd.anchor.oci.image: is not for a boot with rd.anchor.manifest=")
    [error] = check_command_line(plan, "root=anchor rd.anchor.oci.platform=linux/arm64").errors
    assert error == "rd.anchor.oci.image: is required by the stage oci"
    [error] = check_command_line(plan, "root=anchor rd.anchor.oci.image=http://registry/x:1").errors
    reason = "nothing protects http://: add the manifest's digest (@sha256:...) or use https://"
    assert error == f"rd.anchor.oci.image: {reason}"
    # The node says so of what a manifest names, too.
    assert reason in (TOP / "lib/anchor-oci.sh").read_text(encoding="utf-8")
    plan = make_plan(load_registry(), auth=["none"], image=["squashfs"])
    [error, *_] = check_command_line(plan, "root=anchor rd.anchor.oci.image=registry/x").errors
    assert error.startswith("rd.anchor.oci.image: chooses a stage that this initramfs does not hold")
