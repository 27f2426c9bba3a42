"""A plan: the stages chosen for one build, checked against each other and ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anchor_build.errors import UsageError
from anchor_build.registry import Registry
from anchor_build.stage import KINDS, Param, Stage

# The stage of a kind that a build has where none is named; an image has to be named.
DEFAULTS = {"auth": "none", "transport": "https"}


@dataclass(frozen=True)
class Plan:
    """The core and the chosen stages, auth first, then transports, then images.

    `known` are all stages that could have been chosen: what asks for one of them is told from a misspelling.
    """

    core: Stage
    stages: tuple[Stage, ...]
    known: tuple[Stage, ...] = ()

    @property
    def all(self) -> tuple[Stage, ...]:
        """The core and every stage, in the order in which they are built in."""
        return (self.core, *self.stages)

    @property
    def params(self) -> tuple[tuple[Stage, Param], ...]:
        """Every parameter that a node with this plan understands."""
        return tuple((stage, param) for stage in self.all for param in stage.params)

    @property
    def choosers(self) -> Mapping[str, str]:
        """Every spelling of a parameter that chooses a stage, and the stage's id, or "" for a stage of Anchor 0.1.5.

        A stage is chosen by its required parameters. A node that lacks the stage must not boot without it as if nothing
        had been asked for.
        """
        found = dict.fromkeys((word for stage in self.all for word in stage.refused), "")
        for stage in self.known:
            chooses = [param for param in stage.params if param.required or stage.places == (param,)]
            found |= {name: stage.id for param in chooses for name in param.names}
        return found

    def of_kind(self, kind: str) -> tuple[Stage, ...]:
        """Return the plan's stages of one kind."""
        return tuple(stage for stage in self.stages if stage.kind == kind)

    def transport_for(self, scheme: str) -> Stage | None:
        """Return the transport that carries a URL scheme."""
        return next((stage for stage in self.of_kind("transport") if scheme in stage.schemes), None)


def make_plan(
    registry: Registry,
    *,
    auth: Sequence[str] = (),
    transport: Sequence[str] = (),
    image: Sequence[str] = (),
) -> Plan:
    """Choose stages by name; without a name, those of DEFAULTS.

    Raises UsageError for an unknown stage, stages that exclude each other, or no image.
    """
    chosen: list[Stage] = []
    named = {"auth": auth, "transport": transport, "image": image}
    wanted = {kind: names or tuple(filter(None, [DEFAULTS.get(kind)])) for kind, names in named.items()}
    for kind in KINDS:
        found = {name: registry.find(kind, name) for name in wanted[kind]}
        chosen += sorted(found.values(), key=lambda stage: stage.rank)
    if not image:
        names = ", ".join(stage.name for stage in registry.of_kind("image"))
        raise UsageError("no image stage was chosen", f"add --image with one of: {names}")
    for stage in chosen:
        rivals = [other.id for other in chosen if stage.id != other.id and other.id in stage.conflicts]
        if rivals:
            raise UsageError(f"{stage.id} excludes {', '.join(rivals)}", "choose one of them")
    schemes: dict[str, Stage] = {}
    for stage in chosen:
        for scheme in stage.schemes:
            other = schemes.setdefault(scheme, stage)
            if other is not stage:
                raise UsageError(f"{stage.id} and {other.id} both carry {scheme}://", "choose one of them")
    return Plan(registry.core, tuple(chosen), registry.stages)


def chooses_absent(asked: str) -> str:
    """Say, after a parameter's name, that it chooses a stage that is not there; `asked` is a value of choosers."""
    kind, _, name = asked.partition("-")
    remedy = f": build it with --{kind} {name}" if asked else ""
    return f"chooses a stage that this initramfs does not hold{remedy}"


def whole_plan(registry: Registry) -> Plan:
    """Return a plan with every stage, for checks that name none."""
    return Plan(registry.core, registry.stages, registry.stages)
