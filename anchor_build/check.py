"""Checks a kernel command line on the build host, with the rules that the node applies (lib/anchor-params.sh)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from anchor_build import paramtypes
from anchor_build.cmdline import COMMAND_LINE_MAX, Word, split
from anchor_build.network import remarks
from anchor_build.plan import Plan, chooses_absent
from anchor_build.settings import Setting, unknown_parameter
from anchor_build.stage import PREFIX, Param, Stage, digest_holders, missing_of, unprotected

MANIFEST = f"{PREFIX}manifest"
BESIDE_MANIFEST = f"is not for a boot with {MANIFEST}=, which says what to boot: give one of the two"


@dataclass(frozen=True)
class Given:
    """A value that was given for a parameter, under which spelling, and whether on the command line."""

    spelling: str
    value: str
    baked: bool = False


@dataclass(frozen=True)
class CheckResult:
    """What is wrong, what looks wrong, which stages the node would choose, and its effective values by key."""

    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    chosen: Mapping[str, str]
    values: Mapping[str, str]


@dataclass
class _Check:
    plan: Plan
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    given: dict[str, Given] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


def check_command_line(
    plan: Plan,
    line: str,
    baked: Sequence[Setting] = (),
    *,
    signed: bool = False,
    back_end: str = "",
    impossible: Sequence[str] = (),
) -> CheckResult:
    """Find everything wrong with a kernel command line at once.

    `signed` says that the initramfs holds a manifest key, `back_end` what brings up its network, if that is known;
    `impossible` says why there can be no such initramfs.
    """
    state = _Check(plan, list(impossible))
    for setting in baked:
        state.given[setting.param.key] = Given(setting.param.key, setting.value, baked=True)
    if len(line.encode(errors="surrogateescape")) > COMMAND_LINE_MAX:
        state.errors.append(f"the line is longer than {COMMAND_LINE_MAX} bytes: x86 kernels cut off the rest")
    words = split(line)
    roots = [word.value for word in words if word.name == "root"]
    if not roots or roots[-1] != "anchor":
        state.errors.append("root=anchor: is missing, so the node would not use anchor at all")
    spellings = {name: param for _, param in plan.params for name in param.names}
    for word in words:
        _take(state, word, spellings)
    for remark in remarks(words, back_end):
        (state.errors if remark.is_error else state.warnings).append(remark.text)
    for _, param in plan.params:
        _normalise(state, param)
    manifest = state.values.get(MANIFEST, "")
    for kind in ("auth", "image"):
        if kind == "image" and (manifest or signed):
            _check_manifest(state, manifest, signed=signed)
            continue
        stage = _choose(state, kind)
        if stage is not None:
            state.chosen[kind] = stage.name
            _require(state, stage)
            _require_one(state, stage)
            _require_digests(state, stage)
    _warn_of_unused(state)
    return CheckResult(tuple(state.errors), tuple(state.warnings), state.chosen, state.values)


def _take(state: _Check, word: Word, spellings: Mapping[str, Param]) -> None:
    param = spellings.get(word.name)
    if param is None:
        asked = state.plan.choosers.get(word.name)
        if asked is not None and word.value not in (None, "", "0"):
            state.errors.append(f"{word.name}: {chooses_absent(asked)}")
        elif word.name.startswith(PREFIX):
            state.errors.append(f"{word.name}: {unknown_parameter(word.name, state.plan)}")
        else:
            near = difflib.get_close_matches(word.name, spellings, n=1, cutoff=0.85)
            if near:
                state.warnings.append(f"{word.name}: is not a parameter of these stages; did you mean {near[0]}?")
            elif difflib.get_close_matches(_prefix(word.name), [PREFIX], cutoff=0.85):
                state.warnings.append(f"{word.name}: is not a parameter of these stages; theirs begin with {PREFIX}")
    elif param.type == "bool":
        state.given[param.key] = Given(word.name, "1" if word.value is None else word.value)
    elif word.value is None:
        state.errors.append(f"{word.name}: needs a value: {word.name}=...")
    elif param.type == "secret":
        state.errors.append(
            f"{word.name}: is a secret and every process can read the kernel command line: "
            f"bake it in with --set {word.name}=@FILE"
        )
    else:
        state.given[param.key] = Given(word.name, word.value)


def _prefix(name: str) -> str:
    """Return the first two parts of a dotted name, as long as PREFIX."""
    return ".".join([*name.split(".")[:2], ""])


def _normalise(state: _Check, param: Param) -> None:
    given = state.given.get(param.key)
    state.values[param.key] = param.default or ""
    if given is None or given.value == "":
        return
    try:
        state.values[param.key] = paramtypes.check_value(param.type, given.value, param.options)
    except paramtypes.InvalidValueError as error:
        state.errors.append(f"{given.spelling}: {error}")


def _choose(state: _Check, kind: str) -> Stage | None:
    stages = state.plan.of_kind(kind)
    wanted = state.values.get(f"{PREFIX}{kind}", "")
    if wanted:
        # As on the node, where a stage goes by the name that it has in shell functions.
        named = next((stage for stage in stages if stage.word == wanted.replace("-", "_")), None)
        if named is None:
            names = ", ".join(stage.name for stage in stages)
            state.errors.append(f"{PREFIX}{kind}: names no {kind} stage of this initramfs, which has: {names}")
        return named
    complete = (s for s in stages if _is_complete(state, s))
    return next(complete, stages[0] if stages else None)


def _is_complete(state: _Check, stage: Stage) -> bool:
    places = [state.values[param.key] for param in stage.places]
    return all(state.values[param.key] for param in stage.params if param.required) and (any(places) or not places)


def _require(state: _Check, stage: Stage) -> None:
    for param in stage.params:
        value = state.values[param.key]
        if param.required and not value and not _was_wrong(state, param):
            state.errors.append(f"{param.key}: is required by the stage {stage.name}")
        if param.source and value:
            for url in value.split(",") if param.type == "list" else [value]:
                _check_source(state, stage, param, url)


def _require_one(state: _Check, stage: Stage) -> None:
    """Check that exactly one of the parameters is given that exclude each other."""
    given = [param.key for param in stage.places if state.values[param.key] or _was_wrong(state, param)]
    state.errors += [f"{key}: is given beside {given[0]}: give one of the two" for key in given[1:]]
    if stage.places and not given:
        state.errors.append(f"{stage.places[0].key}: {missing_of(stage)}")


def _require_digests(state: _Check, stage: Stage) -> None:
    for param, scheme, holder in digest_holders(stage):
        reference = state.values[param.key]
        if reference.startswith(f"{scheme}://") and not is_pinned(state.values[holder.key]):
            state.errors.append(f"{param.key}: {unprotected(scheme)}")


def is_pinned(reference: str) -> bool:
    """Whether a reference ends in a digest."""
    return re.fullmatch("[0-9a-f]{64}", reference.partition("@sha256:")[2]) is not None


def _check_manifest(state: _Check, manifest: str, *, signed: bool) -> None:
    """Check what replaces an image's own URL: where the manifest is, and that nothing else says what to boot."""
    if not manifest:
        state.errors.append(f"{MANIFEST}: is required: this initramfs boots only what a signed manifest names")
        return
    for url in manifest.split(","):
        scheme = url.partition("://")[0]
        transport = state.plan.transport_for(scheme)
        if transport is None:
            state.errors.append(f"{MANIFEST}: no transport in this initramfs carries {scheme}://")
        elif scheme in transport.digest_schemes and not signed:
            state.errors.append(f"{MANIFEST}: {scheme}:// is not protected: use https://")
    if not signed:
        state.warnings.append(f"{MANIFEST}: only TLS vouches for it; a manifest key in the initramfs would too")
    for stage in state.plan.of_kind("image"):
        sources = [param for param in stage.params if param.source]
        keys = {param.key for param in sources}
        keys |= {digest.key for param in sources for digest in stage.digests_of(param)}
        keys |= {param.key for param in stage.places}
        state.errors += [f"{key}: {BESIDE_MANIFEST}" for key in sorted(keys) if state.values[key]]


def _warn_of_unused(state: _Check) -> None:
    """Warn of parameters of a stage that the node will not choose: most often its required one is misspelt."""
    for stage in state.plan.stages:
        # Where a manifest chooses the image stage, none is known here.
        if state.chosen.get(stage.kind, stage.name) == stage.name:
            continue
        for param in stage.params:
            if param.key in state.given and not state.given[param.key].baked:
                chosen = state.chosen[stage.kind]
                state.warnings.append(f"{param.key}: has no effect, because the {stage.kind} stage will be {chosen}")


def _was_wrong(state: _Check, param: Param) -> bool:
    """Whether a value was given and refused, which has been said already."""
    given = state.given.get(param.key)
    return given is not None and given.value != ""


def _check_source(state: _Check, stage: Stage, param: Param, url: str) -> None:
    scheme = url.partition("://")[0]
    transport = state.plan.transport_for(scheme)
    digests = stage.digests_of(param)
    is_known = any(state.values[digest.key] for digest in digests)
    if transport is None:
        state.errors.append(f"{param.key}: no transport in this initramfs carries {scheme}://")
    elif scheme in transport.digest_schemes and not is_known:
        remedy = f"{'add ' if digests else ''}{''.join(f'{digest.key}= or ' for digest in digests)}use https://"
        state.errors.append(f"{param.key}: {scheme}:// is not protected: {remedy}")
    elif digests and not is_known:
        named = " or ".join(f"{digest.key}=" for digest in digests)
        state.warnings.append(f"{param.key}: only TLS vouches for what comes from there; {named} would too")
