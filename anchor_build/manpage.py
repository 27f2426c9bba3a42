"""Man pages, generated: anchor-build(1) from the commands' options, anchor-build-stages(7) from the declarations.

`python -m anchor_build.manpage DIR` writes both into DIR. The text is roff with the man(7) macros.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import click

from anchor_build import __version__, paramtypes
from anchor_build.cli import COMMANDS, cli
from anchor_build.describe import param_default, param_limits
from anchor_build.registry import Registry, load_registry
from anchor_build.stage import Param, Stage

PROGRAM = "anchor-build"
STAGES_PAGE = "anchor-build-stages"
WIDTH = 70

EXIT_STATUS = {
    "0": "Done.",
    "1": "Failed: a build, a check or a boot did not succeed, or what inspect compares differs. The reason and a hint "
    "are on standard error.",
    "2": "Wrong usage: an unknown command, option, stage or parameter.",
    "130": "Interrupted.",
}
ENVIRONMENT = {
    "SOURCE_DATE_EPOCH": "The time of the build in seconds since the epoch, for builds with the same bytes. "
    "Without it, the time at which the newest input was changed.",
    "ANCHOR_BUILD_PROFILE, ANCHOR_BUILD_CONFIG": "What --profile and --config say, where they are not given.",
    "XDG_CACHE_HOME": "Where the directory anchor-build for temporary work lies. Default: ~/.cache.",
    "NO_COLOR": "If set, nothing is coloured.",
    "_ANCHOR_BUILD_COMPLETE": "bash_source, zsh_source or fish_source: print the shell completion and exit.",
}
HOST_FILES = {
    "FILE.json": "The report of a build, beside the initramfs FILE.",
    "/etc/ssl/certs/ca-certificates.crt, /etc/pki/tls/certs/ca-bundle.crt": "The CA bundle that a build without --ca "
    "takes.",
    "anchor.toml, /etc/anchor-build/anchor.toml": "Profiles: in [profile.NAME] the long options of initramfs as keys, "
    "and inherits. Paths are relative to the file. The first of the two that exists is read.",
    "/etc/anchor/": "ca.pem, params and build-time for modules that were rendered, installed and are run by dracut "
    "without anchor-build.",
}
NODE_FILES = {
    "/etc/anchor/ca.pem": "The CA bundle that the node trusts, also reachable as /ca.pem.",
    "/etc/anchor/params": "The defaults that were baked in with --set, one name=value a line, mode 0600.",
    "/etc/anchor/build-time": "What the clock cannot be before, in seconds since the epoch.",
    "/run/anchor/boot.json": "The report of the boot: each step, its duration and result. It stays after switch_root.",
    "/run/anchor/boot.log": "What the boot said on the console.",
    "/run/anchor/credentials/": "client.crt and client.key, mode 0600, in a directory of mode 0700.",
    "/run/anchor/image/": "The image, in a tmpfs of its own.",
    "/run/anchor/lower": "The mounted image.",
    "/run/anchor/overlay": "The tmpfs that holds what the node writes.",
}


def pages(registry: Registry, date: str) -> dict[str, str]:
    """Return the roff text of each page by its file name; `date` is YYYY-MM-DD."""
    return {
        f"{PROGRAM}.1": _join(_commands_page(date)),
        f"{STAGES_PAGE}.7": _join(_stages_page(registry, date)),
    }


def write_pages(directory: Path) -> list[Path]:
    """Write the pages into `directory`, which is made if need be; their date is SOURCE_DATE_EPOCH or today."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages(load_registry(), time.strftime("%Y-%m-%d", time.gmtime(epoch))).items():
        path = directory / name
        path.write_text(text, encoding="ascii")
        written.append(path)
    return written


# --- The pages --------------------------------------------------------------------------------------------


def _commands_page(date: str) -> list[str]:
    context = click.Context(cli, info_name=PROGRAM, **cli.context_settings)
    out = _head(PROGRAM, 1, date, "build initramfs images for diskless nodes")
    out += [".SH SYNOPSIS", f"{_bold(PROGRAM)} [{_italic('OPTIONS')}] {_italic('COMMAND')} [{_italic('ARGS')}]"]
    out += [".SH DESCRIPTION", *_help(cli)]
    out += [".SH OPTIONS", *_options(cli, context)]
    out += [".SH COMMANDS"]
    for name in COMMANDS:
        command = cli.get_command(context, name)
        if command is not None:
            out += _command(name, command, click.Context(command, info_name=name, parent=context))
    out += [".SH EXIT STATUS", *_terms(EXIT_STATUS)]
    out += [".SH ENVIRONMENT", *_terms(ENVIRONMENT)]
    out += [".SH FILES", *_terms(HOST_FILES)]
    out += [".SH SEE ALSO", _see_also((STAGES_PAGE, 7), ("dracut", 8), ("dracut.cmdline", 7))]
    return out


def _command(name: str, command: click.Command, context: click.Context) -> list[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    out = [f".SS {_escape(f'{PROGRAM} {name}')}", f"{_bold(f'{PROGRAM} {name}')} {_italic(usage)}"]
    return [*out, ".PP", *_help(command), *_options(command, context)]


def _stages_page(registry: Registry, date: str) -> list[str]:
    out = _head(STAGES_PAGE, 7, date, "stages and kernel command-line parameters of anchor-build")
    out += [".SH DESCRIPTION"]
    out += _paragraphs(
        "A node uses what is described here if its kernel command line has root=anchor. Parameters are written as "
        "name=value; the last one of a name counts, and a value with blanks is put in double quotes. Values that "
        "were baked in with --set are defaults. A name that begins with rd.anchor. and belongs to no stage of the "
        "initramfs is an error.",
        "The stages of third parties are described by: anchor-build show STAGE --stage-dir DIR",
    )
    out += [".SH STAGES"]
    for stage in (registry.core, *registry.stages):
        out += _stage(stage)
    out += [".SH TYPES", *_terms({name: _plain(kind.summary) for name, kind in sorted(paramtypes.TYPES.items())})]
    out += [".SH FILES", *_paragraphs("On the node:"), *_terms(NODE_FILES)]
    out += [".SH SEE ALSO", _see_also((PROGRAM, 1), ("dracut.cmdline", 7), ("bootparam", 7))]
    return out


def _stage(stage: Stage) -> list[str]:
    out = [f".SS {_escape(stage.id)}", *_paragraphs(stage.summary)]
    if stage.schemes:
        out += _paragraphs(f"URL schemes: {', '.join(stage.schemes)}.")
    return [*out, *(line for param in stage.params for line in _param(param))]


def _param(param: Param) -> list[str]:
    default = param_default(param)
    limits = param_limits(param)
    facts = [param.type + (f" ({limits})" if limits else "")]
    facts += ["required"] if param.required else [f"default {default}"] if default else []
    facts += [f"older name: {name}" for name in param.alias]
    head = f"{_bold(param.key)}={_italic(paramtypes.TYPES[param.type].metavar)}"
    return [".TP", head, *_fill(param.help), ".br", *_fill("Type " + "; ".join(facts) + ".")]


# --- Parts of a page --------------------------------------------------------------------------------------


def _head(name: str, section: int, date: str, summary: str) -> list[str]:
    title = f'.TH {_escape(name.upper())} {section} {date} "{PROGRAM} {__version__}"'
    # Shell text is neither hyphenated nor spread out to the margin.
    return [title, ".nh", ".ad l", ".SH NAME", f"{_escape(name)} \\- {summary}"]


def _help(command: click.Command) -> list[str]:
    """Return a command's help; a paragraph that begins with a backspace, click's mark, is an example block."""
    out: list[str] = []
    for block in inspect.cleandoc(command.help or "").split("\n\n"):
        if not block.startswith("\b"):
            out += _paragraphs(block)
            continue
        title, *lines = block.removeprefix("\b").strip("\n").splitlines()
        out += [*_paragraphs(title), ".RS 4", ".nf", *(_escape_line(line.strip()) for line in lines), ".fi", ".RE"]
    return out


def _options(command: click.Command, context: click.Context) -> list[str]:
    out: list[str] = []
    help_option = command.get_help_option(context)
    for param in command.get_params(context):
        record = param.get_help_record(context)
        # --help is the same everywhere, and described once.
        if record is not None and (param is not help_option or context.parent is None):
            names = re.sub(r"(?<![\w-])(--?[A-Za-z][A-Za-z-]*)", lambda match: _bold(match[1], escape=False), record[0])
            out += [".TP", names.replace("-", "\\-"), *_fill(record[1])]
    return out


def _terms(terms: Mapping[str, str]) -> list[str]:
    return [line for term, text in terms.items() for line in (".TP", _bold(term), *_fill(text))]


def _see_also(*references: tuple[str, int]) -> str:
    return ", ".join(f"{_bold(name)}({section})" for name, section in references)


def _paragraphs(*texts: str) -> list[str]:
    return [line for text in texts for line in (".PP", *_fill(text))]


def _fill(text: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
    return [_escape_line(line) for line in lines]


def _plain(markdown: str) -> str:
    return markdown.replace("`", "")


# --- roff -------------------------------------------------------------------------------------------------

SPECIAL = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti"}


def _escape(text: str) -> str:
    """Escape what roff would take for its own or print as another character; the result is ASCII."""
    return "".join(SPECIAL.get(c) or (c if c.isascii() else f"\\[u{ord(c):04X}]") for c in text)


def _escape_line(text: str) -> str:
    """Escape a whole line: a dot at its start would make it a request (a quote is escaped anyway)."""
    return ("\\&" if text.startswith(".") else "") + _escape(text)


def _bold(text: str, *, escape: bool = True) -> str:
    return f"\\fB{_escape(text) if escape else text}\\fP"


def _italic(text: str) -> str:
    return f"\\fI{_escape(text)}\\fP"


def _join(lines: Iterable[str]) -> str:
    """Join the lines; a paragraph mark right after a heading would be an empty paragraph."""
    out: list[str] = []
    for line in lines:
        if line == ".PP" and out and out[-1].startswith((".SH", ".SS", ".PP")):
            continue
        out.append(line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m anchor_build.manpage DIR")
    try:
        for page in write_pages(Path(sys.argv[1])):
            click.echo(page)
    except OSError as problem:
        sys.exit(f"error: {problem.filename or sys.argv[1]}: {problem.strerror}")
