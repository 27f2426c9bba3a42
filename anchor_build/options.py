"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from anchor_build.plan import DEFAULTS, Plan, make_plan, whole_plan
from anchor_build.registry import load_registry
from anchor_build.stage import KINDS

F = TypeVar("F", bound=Callable[..., Any])


class SharedOption(click.Option):
    """An option that means the same in every command that has it, so that a profile gives it to each of them."""


class SetOption(SharedOption):
    """--set: what the command line gives is added to what the profile gives."""


def add_settings(inherited: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """Return the KEY=VALUE of both, without those of `inherited` whose KEY is in `given`."""
    names = {text.partition("=")[0] for text in given}
    return (*(text for text in inherited if text.partition("=")[0] not in names), *given)


def _add_profile(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    name = str(param.name)
    inherited = ctx.lookup_default(name) or ()
    given = value if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE else ()
    return add_settings(inherited, given)


def set_option(help_text: str) -> Callable[[F], F]:
    """Add --set, which reaches the function as `settings`."""
    return click.option(
        "--set",
        "settings",
        cls=SetOption,
        multiple=True,
        metavar="KEY=VALUE",
        callback=_add_profile,
        shell_complete=_complete_setting,
        help=help_text,
    )


def complete_stage(
    kind: str,
) -> Callable[[click.Context, click.Parameter, str], list[click.shell_completion.CompletionItem]]:
    """Return a shell completion over the names of one kind of stage."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        registry = load_registry(ctx.params.get("stage_dir") or ())
        stages = registry.of_kind(kind) if kind else registry.stages
        once = [name for name, count in Counter(stage.name for stage in stages).items() if count == 1]
        # Where all kinds go, a name does if it is that of one stage; what begins with a kind asks for ids.
        names = [(stage.name if kind or stage.name in once else stage.id, stage.summary) for stage in stages]
        found = [CompletionItem(name, help=summary) for name, summary in names if name.startswith(incomplete)]
        if kind or (found and not incomplete.startswith(tuple(KINDS))):
            return found
        return [CompletionItem(s.id, help=s.summary) for s in stages if s.id.startswith(incomplete)]

    return complete


def complete_or_path(
    words: Callable[[click.Context], Iterable[str]],
) -> Callable[[click.Context, click.Parameter, str], list[click.shell_completion.CompletionItem]]:
    """Return a shell completion over words, and over files where none of them fits."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(word) for word in words(ctx) if word.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]

    return complete


def _complete_setting(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[click.shell_completion.CompletionItem]:
    from click.shell_completion import CompletionItem

    plan = whole_plan(load_registry(ctx.params.get("stage_dir") or ()))
    found = [(f"{param.key}=", param.help) for _, param in plan.params]
    return [CompletionItem(text, help=about) for text, about in found if text.startswith(incomplete)]


def stage_dir_option(function: F) -> F:
    """Add --stage-dir."""
    return click.option(
        "--stage-dir",
        cls=SharedOption,
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        multiple=True,
        help="A stage of your own, or a directory of them; may be repeated.",
    )(function)


@dataclass(frozen=True)
class Choice:
    """What --auth, --transport, --image and --stage-dir said."""

    auth: tuple[str, ...]
    transport: tuple[str, ...]
    image: tuple[str, ...]
    stage_dir: tuple[Path, ...]

    def plan(self) -> Plan:
        """Return the plan of the chosen stages; raises as make_plan and load_registry do."""
        registry = load_registry(self.stage_dir)
        return make_plan(registry, auth=self.auth, transport=self.transport, image=self.image)

    def plan_or_all(self) -> Plan:
        """Return the plan of the chosen stages, or of every stage where none was named."""
        return self.plan() if self.auth or self.transport or self.image else self.everything()

    def everything(self) -> Plan:
        """Return the plan of every stage there is."""
        return whole_plan(load_registry(self.stage_dir))


def stage_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --auth, --transport, --image and --stage-dir, which reach the function together as `choice`."""

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        chosen = {name: kwargs.pop(name) for name in (*KINDS, "stage_dir")}
        return function(*args, choice=Choice(**chosen), **kwargs)

    command: Callable[..., Any] = gather
    for kind in reversed(KINDS):
        default = f" Default: {DEFAULTS[kind]}." if kind in DEFAULTS else ""
        command = click.option(
            f"--{kind}",
            cls=SharedOption,
            multiple=True,
            metavar="STAGE",
            shell_complete=complete_stage(kind),
            help=f"An {kind} stage to include; may be repeated.{default}".replace("An transport", "A transport"),
        )(command)
    return stage_dir_option(command)


def network_options(function: F) -> F:
    """Add --network and --systemd."""
    function = click.option(
        "--systemd/--no-systemd",
        cls=SharedOption,
        default=True,
        help="Whether systemd runs in the initramfs, where it is installed, or dracut's own script. Default: it does.",
    )(function)
    return click.option(
        "--network",
        cls=SharedOption,
        type=click.Choice(["systemd-networkd", "network-manager", "network-legacy"]),
        help="What brings up the network. Default: systemd-networkd where it is installed, else what dracut takes.",
    )(function)


def json_option(function: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def valid_seconds(text: str | None) -> int | None:
    """Return what --valid-for says in seconds, of which a manifest has at least 60; nothing where it was not given."""
    from anchor_build.paramtypes import InvalidValueError, check_value

    if text is None:
        return None
    try:
        return int(check_value("duration", text, {"min": 60}))
    except InvalidValueError as error:
        raise click.UsageError(f"--valid-for {text}: {error}.") from None


def registry_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add what a registry may want to see; it reaches the function as `access` (oci.Access)."""

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        from anchor_build.oci import Access

        ca, certificate, key = (kwargs.pop(f"registry_{name}") for name in ("ca", "cert", "key"))
        if (certificate is None) != (key is None):
            raise click.UsageError("--registry-cert and --registry-key belong together.")
        access = Access(ca, certificate, key, kwargs.pop("authfile"))
        return function(*args, access=access, **kwargs)

    command: Callable[..., Any] = gather
    for name, text in (
        ("--authfile", "Logins at registries: containers-auth.json(5). Default: where `skopeo login` leaves them."),
        ("--registry-key", "The client certificate's private key (PEM)."),
        ("--registry-cert", "A client certificate (PEM) for the registry."),
        ("--registry-ca", "The registry's CA (PEM), beside those that this host trusts."),
    ):
        kind = click.Path(path_type=Path, exists=True, dir_okay=False)
        command = click.option(name, type=kind, metavar="FILE", help=text)(command)
    return command
