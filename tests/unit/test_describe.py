"""Stages described for people and machines."""

from __future__ import annotations

import json

import pytest

from anchor_build.describe import find_stage, param_default, reference, stage_facts, stage_text
from anchor_build.errors import UsageError
from anchor_build.paramtypes import TYPES
from anchor_build.registry import Registry, load_registry
from tests.conftest import SITE_STAGES, WriteStage


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_registry([SITE_STAGES])


@pytest.mark.parametrize(
    ("text", "found"),
    [("acme", "auth-acme"), ("auth-acme", "auth-acme"), ("anchor", "anchor"), ("local-file", "auth-local-file")],
)
def test_a_stage_by_its_name(registry: Registry, text: str, found: str) -> None:
    assert find_stage(registry, text).id == found


def test_a_name_of_two_kinds(write_stage: WriteStage) -> None:
    registry = load_registry([write_stage("acme", kind="image")])
    with pytest.raises(UsageError, match="acme: is the name of several stages") as caught:
        find_stage(registry, "acme")
    assert caught.value.hint == "say which: auth-acme, image-acme"
    assert find_stage(registry, "image-acme").kind == "image"


@pytest.mark.parametrize(
    ("text", "hint"), [("acne", "did you mean acme?"), ("zzz", "`anchor-build stages` lists them")]
)
def test_an_unknown_name(registry: Registry, text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"{text}: no such stage") as caught:
        find_stage(registry, text)
    assert caught.value.hint == hint


def test_the_text_says_everything_about_each_parameter(registry: Registry) -> None:
    for stage in (registry.core, *registry.stages):
        text = stage_text(stage)
        assert stage.summary in text
        for param in stage.params:
            assert f"\n  {param.key}=\n      {param.help}\n      {param.type}" in text
            assert all(name in text for name in param.alias)
            assert param_default(param) in text
        assert all(binary.name in text for binary in stage.binaries)


def test_facts_are_plain_data(registry: Registry) -> None:
    facts = json.loads(json.dumps(stage_facts(find_stage(registry, "local-file"))))
    assert facts["dracut_module"] == "anchor-auth-local-file"
    assert facts["conflicts"] == ["auth-acme"]
    assert facts["parameters"][0]["key"] == "rd.anchor.local-file.directory"


def test_the_reference_has_a_row_for_each_parameter_and_type(registry: Registry) -> None:
    rows = [line for line in reference(registry).splitlines() if line.startswith("| ")]
    cells = [line.replace("\\|", "").count("|") for line in rows]
    assert set(cells) == {3, 5}
    for stage in (registry.core, *registry.stages):
        for param in stage.params:
            assert any(line.startswith(f"| `{param.key}` |") for line in rows)
    assert all(any(line.startswith(f"| {name} |") for line in rows) for name in TYPES)
