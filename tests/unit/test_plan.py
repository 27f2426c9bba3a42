"""A plan: what is chosen without a name, in which order, and what excludes what."""

from __future__ import annotations

import pytest

from anchor_build.errors import UsageError
from anchor_build.plan import make_plan, whole_plan
from anchor_build.registry import load_registry
from tests.conftest import SITE_STAGES, WriteStage


def test_what_is_not_named_is_none_and_https() -> None:
    plan = make_plan(load_registry(), image=["squashfs"])
    assert [stage.id for stage in plan.all] == ["anchor", "auth-none", "transport-https", "image-squashfs"]


def test_stages_come_in_the_order_of_choice_and_once() -> None:
    registry = load_registry([SITE_STAGES])
    plan = make_plan(registry, auth=["none", "local-file", "none"], image=["squashfs", "plain-file"])
    assert [stage.id for stage in plan.of_kind("auth")] == ["auth-local-file", "auth-none"]
    assert [stage.id for stage in plan.of_kind("image")] == ["image-plain-file", "image-squashfs"]


def test_stages_of_one_order_come_as_the_nodes_shell_sorts_their_paths(write_stage: WriteStage) -> None:
    # "image/50-a-b/params.sh" sorts before "image/50-a/params.sh": "-" comes before "/".
    registry = load_registry([write_stage("a", kind="image"), write_stage("a-b", kind="image")])
    plan = make_plan(registry, image=["a", "a-b"])
    assert [stage.name for stage in plan.of_kind("image")] == ["a-b", "a"]
    assert [stage.name for stage in registry.of_kind("image") if stage.order == 50] == ["a-b", "a"]


def test_an_image_is_needed() -> None:
    with pytest.raises(UsageError, match="no image stage was chosen") as caught:
        make_plan(load_registry())
    assert caught.value.hint == "add --image with one of: squashfs, oci, buildah, disk"


@pytest.mark.parametrize("auth", [["acme", "local-file"], ["local-file", "acme"]])
def test_stages_that_exclude_each_other(auth: list[str]) -> None:
    with pytest.raises(UsageError, match="auth-local-file excludes auth-acme"):
        make_plan(load_registry([SITE_STAGES]), auth=auth, image=["squashfs"])


def test_two_transports_for_one_scheme(write_stage: WriteStage) -> None:
    other = write_stage("web", kind="transport", header='schemes = ["http"]')
    registry = load_registry([other])
    with pytest.raises(UsageError, match="transport-web and transport-https both carry http://"):
        make_plan(registry, transport=["https", "web"], image=["squashfs"])
    assert make_plan(registry, transport=["web"], image=["squashfs"]).transport_for("https") is None


def test_the_transport_of_a_scheme() -> None:
    plan = whole_plan(load_registry())
    transport = plan.transport_for("http")
    assert transport is not None
    assert transport.name == "https"
    assert plan.transport_for("gopher") is None


def test_the_parameters_of_a_plan_are_those_of_its_stages() -> None:
    plan = make_plan(load_registry(), image=["squashfs"])
    keys = {param.key for _, param in plan.params}
    assert "rd.anchor.squashfs.url" in keys
    assert "rd.anchor.on_failure" in keys
    assert "rd.anchor.acme.server" not in keys
