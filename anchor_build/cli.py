"""The command line: one group whose commands are imported only when they are asked for."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import click

from anchor_build import __version__
from anchor_build.console import EVENT_START, Console, Events
from anchor_build.errors import AnchorError

# name -> the line that `anchor-build --help` shows; the command itself is anchor_build.commands.<name>.command.
COMMANDS = {
    "initramfs": "Build an initramfs that boots a diskless node.",
    "image": "Make an image and its signed manifest.",
    "publish": "Put an image and its manifest where nodes fetch them.",
    "render": "Write the dracut modules of a plan into a directory.",
    "rpm": "Package the dracut modules as RPMs.",
    "stages": "List the stages that can be used.",
    "show": "Describe one stage and its parameters.",
    "check": "Check a kernel command line before a node sees it.",
    "drivers": "List driver sets, or the drivers of this host's devices.",
    "doctor": "Say what this host lacks, and which package has it.",
    "inspect": "Show what is inside a package, an initramfs or an image, or compare two.",
    "boot": "Boot a kernel and an initramfs in QEMU and watch the node's steps.",
}


NO_RESULT, NO_RESULT_HINT = "the result cannot be written", "make room where standard output goes"


def complete_profile(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete --profile by the names in the file."""
    from anchor_build.profile import complete

    return complete(ctx.params.get("config"), incomplete)


def use_profile(root: click.Context, name: str | None, config: Path | None) -> None:
    """Let a profile give the defaults of the command that is about to run."""
    from anchor_build import profile

    command = cli.get_command(root, str(root.invoked_subcommand))
    if command is not None:
        profile.use(root, command, name, config)


class GivenPath(click.Path):
    """A path that is not empty, nor where events go.

    A script's unset variable leaves "", which pathlib takes for the working directory.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the empty path, and the file of --events; all else is click's business."""
        if not os.fspath(value):
            self.fail("it is empty", param, ctx)
        told = ctx.find_root().obj if ctx is not None else None
        if isinstance(told, Console) and told.events is not None and told.events.is_in(value):
            self.fail(f"{os.fspath(value)!r} is where --events go", param, ctx)
        return super().convert(value, param, ctx)


class TextOrPath(click.types.StringParamType):
    """A text that may name a file, which a shell completes."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Leave it to the shell, as for a path."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


class LazyGroup(click.Group):
    """A group that knows its commands' names and summaries without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"anchor_build.commands.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"anchor_build.commands.{cmd_name}.command is not a command")
        for param in command.params:
            if type(param.type) is click.Path:
                given = GivenPath()
                vars(given).update(vars(param.type))
                param.type = given
            elif param.type is click.STRING and {"FILE", "DIR"} & set((param.metavar or "").split("|")):
                param.type = TextOrPath()
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Refuse an unknown command with the nearest known one."""
        import difflib

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Say where an option belongs that is a command's and was given before it."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            commands = {name: self.get_command(ctx, name) for name in COMMANDS}
            owners = [
                name
                for name, command in commands.items()
                if command and any(error.option_name in (*p.opts, *p.secondary_opts) for p in command.params)
            ]
            if not owners:
                raise
            owner = next((word for word in given if word in owners), "COMMAND")
            text = f"{error.option_name} goes after the command: anchor-build {owner} {error.option_name} ..."
            raise click.UsageError(text, ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; say where an option belongs that is this group's and was given to the command."""
        ended: dict[str, str] | None = {"error": "this is a bug: see the traceback", "hint": ""}
        try:
            result = super().invoke(ctx)
            ended = None
            return result
        except AnchorError as error:
            ended = {"error": error.message, "hint": error.hint}
            raise
        except (KeyboardInterrupt, click.Abort):
            ended = {"error": "interrupted", "hint": ""}
            raise
        except click.exceptions.Exit as exit_:
            ended = {"error": f"exit status {exit_.exit_code}", "hint": ""} if exit_.exit_code else None
            raise
        except OSError as error:
            if is_full_output(error):
                ended = {"error": f"{NO_RESULT}: {error.strerror}", "hint": NO_RESULT_HINT}
            raise
        except click.NoSuchOption as error:
            if any(error.option_name in param.opts for param in self.params):
                text = f"{error.option_name} goes before the command: anchor-build {error.option_name} ..."
                ended = {"error": text, "hint": ""}
                raise click.UsageError(text, error.ctx) from None
            ended = {"error": error.format_message(), "hint": ""}
            raise
        except click.ClickException as error:
            ended = {"error": error.format_message(), "hint": ""}
            raise
        finally:
            if isinstance(ctx.obj, Console):
                ctx.obj.event("failed" if ended else "done", **(ended or {}))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands with their summaries from COMMANDS."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def is_full_output(error: OSError) -> bool:
    """Whether it is a full disk behind standard output; what else it may be is a bug."""
    return error.errno == errno.ENOSPC and error.filename is None


def open_events(ctx: click.Context, path: Path | None) -> Events | None:
    """Open what --events names, to add to it until the context ends; raises UsageError.

    A plain file has to be empty or to hold events: another one was named by mistake.
    """
    if path is None:
        return None
    try:
        # A pipe without a reader would be waited for.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        file = ctx.with_resource(os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0))
        found = os.fstat(file.fileno())
        # Whoever opened a descriptor knows what it leads to, such as a log.
        opened = any(path.is_relative_to(place) for place in ("/dev", "/proc"))
        if stat.S_ISREG(found.st_mode) and found.st_size and not opened:
            with path.open("rb") as before:
                if not before.read(len(EVENT_START)).startswith(EVENT_START):
                    raise click.UsageError(f"--events {path}: is there and holds something else. Name another file.")
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise click.UsageError(f"--events {path}: nobody reads from it. Start its reader first.") from None
        raise click.UsageError(f"--events {path}: {error.strerror}.") from None
    return Events(file)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Shell completion: eval "$(_ANCHOR_BUILD_COMPLETE=bash_source anchor-build)" (also zsh, fish).',
)
@click.option("-v", "--verbose", count=True, help="Show what the programs that are run print.")
@click.option("-q", "--quiet", is_flag=True, help="Show errors and warnings only.")
@click.option(
    "--events",
    type=GivenPath(path_type=Path),
    metavar="FILE",
    help="Add what is being done to FILE, a JSON object on each line, while it goes on: /dev/fd/3, a pipe or a file.",
)
@click.option(
    "--profile",
    metavar="NAME",
    envvar="ANCHOR_BUILD_PROFILE",
    show_envvar=True,
    shell_complete=complete_profile,
    help="The profile that gives what the command line does not. Default: default, if the file has it.",
)
@click.option(
    "--config",
    type=GivenPath(path_type=Path),
    metavar="FILE",
    envvar="ANCHOR_BUILD_CONFIG",
    show_envvar=True,
    help="The file of profiles. Default: anchor.toml here, else /etc/anchor-build/anchor.toml.",
)
@click.version_option(__version__, "-V", "--version", prog_name="anchor-build")
@click.pass_context
def cli(
    ctx: click.Context, verbose: int, quiet: bool, events: Path | None, profile: str | None, config: Path | None
) -> None:
    """Build small, verified initramfs images for nodes without a disk.

    \b
    Examples:
      anchor-build initramfs --auth acme --image squashfs --ca site-ca.pem -o initramfs.img
      anchor-build --profile compute initramfs
      anchor-build check "root=anchor rd.anchor.acme.server=ca.example rd.anchor.squashfs.url=https://store/i.sqsh"
      anchor-build boot --kernel vmlinuz --initrd initramfs.img --append "root=anchor ..."
    """  # noqa: D301 - \b is click's mark for text that must not be wrapped
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other.")
    try:
        Path.cwd()
    except FileNotFoundError:
        raise AnchorError("the working directory is not there any more", "change to one that is") from None
    ctx.obj = Console(-1 if quiet else verbose, open_events(ctx, events))
    use_profile(ctx, profile, config)


def main(args: list[str] | None = None, **kwargs: Any) -> None:
    """Run the command line: exit 0 when done, 1 on an expected failure, 2 on wrong usage, 130 when interrupted."""
    console = Console()
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A pipeline that gives up sends these: then, too, nothing may be left behind.
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        cli.main(args=args, prog_name="anchor-build", standalone_mode=False, **kwargs)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        console.error("interrupted")
        sys.exit(130)
    except AnchorError as error:
        console.error(error.message, error.hint)
        sys.exit(error.exit_status)
    except OSError as error:
        if not is_full_output(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes what is left when it ends
        console.error(f"{NO_RESULT}: {error.strerror}", NO_RESULT_HINT)
        sys.exit(1)
