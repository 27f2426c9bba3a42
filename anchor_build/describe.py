"""Describes stages for people and machines: `show`, the reference documentation and the man pages share this."""

from __future__ import annotations

from typing import Any

from anchor_build import paramtypes
from anchor_build.errors import UsageError
from anchor_build.registry import Registry
from anchor_build.stage import Param, Stage


def find_stage(registry: Registry, text: str) -> Stage:
    """Find a stage by name or kind-name; raises UsageError when there is none or more than one."""
    import difflib

    every = (registry.core, *registry.stages)
    found = [stage for stage in every if text in (stage.name, stage.id)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{text}: is the name of several stages", f"say which: {', '.join(s.id for s in found)}")
    names = [name for stage in every for name in (stage.name, stage.id)]
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`anchor-build stages` lists them"
    raise UsageError(f"{text}: no such stage", hint)


def param_limits(param: Param) -> str:
    """Say what narrows a parameter's type: choices, bounds, schemes."""
    words = []
    for key, value in param.options.items():
        shown = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
        words.append(shown if key == "choices" else f"{key} {shown}")
    return ", ".join(words)


def param_facts(param: Param) -> dict[str, Any]:
    """Return a parameter's declaration as plain data."""
    return {
        "key": param.key,
        "type": param.type,
        "options": dict(param.options),
        "required": param.required,
        "default": param.default,
        "aliases": list(param.alias),
        "help": param.help,
    }


def stage_facts(stage: Stage) -> dict[str, Any]:
    """Return a stage's declaration as plain data."""
    return {
        "kind": stage.kind,
        "name": stage.name,
        "summary": stage.summary,
        "origin": stage.origin,
        "dracut_module": stage.module,
        "dracut": list(stage.dracut),
        "drivers": list(stage.drivers),
        "binaries": [{"name": b.name, "rpm": b.rpm, "deb": b.deb} for b in stage.binaries],
        "schemes": list(stage.schemes),
        "conflicts": list(stage.conflicts),
        "parameters": [param_facts(param) for param in stage.params],
    }


def stage_text(stage: Stage) -> str:
    """Return a stage's description for a terminal."""
    facts = [
        ("dracut module", stage.module),
        ("needs dracut", ", ".join(stage.dracut)),
        ("drivers", ", ".join(stage.drivers)),
        ("programs", ", ".join(binary.name for binary in stage.binaries)),
        ("URL schemes", ", ".join(stage.schemes)),
        ("excludes", ", ".join(stage.conflicts)),
        ("comes from", stage.origin),
    ]
    lines = [f"{stage.id}: {stage.summary}", ""]
    lines += [f"  {name + ':':<15}{value}" for name, value in facts if value]
    for param in stage.params:
        state = "required" if param.required else f"default {param.default}" if param.default else "optional"
        limits = param_limits(param)
        lines += ["", f"  {param.key}=", f"      {param.help}"]
        lines += [f"      {param.type}{f' ({limits})' if limits else ''}, {state}"]
        if param.alias:
            lines += [f"      also accepted: {', '.join(param.alias)}"]
    return "\n".join(lines)


def reference(registry: Registry) -> str:
    """Return the reference documentation of all stages, parameters and types as Markdown."""
    out = [
        "# Reference: stages and parameters",
        "",
        "Generated from each stage's `stage.toml` by `python -m anchor_build.describe`; a test fails when it is stale.",
        "",
    ]
    for stage in (registry.core, *registry.stages):
        out += [f"## {stage.id}", "", stage.summary, ""]
        facts = [
            ("drivers", ", ".join(f"`{d}`" for d in stage.drivers)),
            ("programs", ", ".join(f"`{b.name}` ({b.deb} / {b.rpm})" for b in stage.binaries)),
            ("URL schemes", ", ".join(f"`{s}`" for s in stage.schemes)),
        ]
        out += [f"- {name}: {value}" for name, value in facts if value]
        if any(value for _, value in facts):
            out.append("")
        if stage.params:
            out += ["| parameter | type | default | meaning |", "|---|---|---|---|"]
            out += [_reference_row(param) for param in stage.params]
            out.append("")
    out += ["## Parameter types", "", "| type | what it accepts |", "|---|---|"]
    out += [f"| {name} | {_cell(kind.summary)} |" for name, kind in sorted(paramtypes.TYPES.items())]
    return "\n".join([*out, ""])


def _reference_row(param: Param) -> str:
    limits = param_limits(param)
    kind = param.type + (f" ({limits})" if limits else "")
    default = "**required**" if param.required else f"`{param.default}`" if param.default else ""
    older = f" Also accepted: {', '.join(f'`{name}`' for name in param.alias)}." if param.alias else ""
    return f"| `{param.key}` | {_cell(kind)} | {default} | {_cell(param.help + older)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def write_reference() -> None:
    """Bring doc/reference.md up to date."""
    from anchor_build.registry import data_directory, load_registry

    file = data_directory() / "doc" / "reference.md"
    file.write_text(reference(load_registry()), encoding="utf-8")


if __name__ == "__main__":
    write_reference()
