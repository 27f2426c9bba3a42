"""The documents say what is true: links lead somewhere, commands parse, parameters exist, examples work."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from anchor_build.cli import COMMANDS, cli
from anchor_build.describe import reference
from anchor_build.plan import make_plan
from anchor_build.registry import ENTRY_POINT_GROUP, load_registry
from anchor_build.render import HOOKS, render_plan, write_modules
from contrib.site.image import ENABLED

TOP = Path(__file__).resolve().parents[2]
DOCUMENTS = [TOP / "README.md", TOP / "CHANGELOG.md", *sorted((TOP / "doc").glob("*.md"))]
STAGES = TOP / "doc" / "stages.md"
FENCE = re.compile(r"^(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
PARAMETER = re.compile(r"rd\.anchor\.[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*")


@dataclass(frozen=True)
class Command:
    """A command line of a document; `output` is what the document shows below it, None if it shows nothing."""

    document: str
    line: str
    output: str | None = None

    @property
    def words(self) -> list[str]:
        """What follows the program's name."""
        return shlex.split(self.line, comments=True)[1:]


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    """Yield the fenced blocks of some languages with their documents."""
    for document in DOCUMENTS:
        for block in FENCE.finditer(document.read_text(encoding="utf-8")):
            if block["language"] in languages:
                yield document, block["text"]


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def examples() -> list[Command]:
    """Return the calls of anchor-build in all shell blocks."""
    found = []
    for document, text in blocks("sh"):
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            match = re.match(r"(?:anchor-build|\./build\.sh(?= [a-z-]+ )) .*", line.strip())
            if match and not re.match(r"\./build\.sh (demo|test|bench)\b", line):
                found.append(Command(document.name, match[0]))
    for document, text in blocks("console"):
        line, _, output = text.removeprefix("$ ").partition("\n")
        found.append(Command(document.name, line, output))
    return found


def parse(words: list[str]) -> tuple[str, dict[str, object]]:
    """Parse a call without running it or looking at files; raise click's error for what does not exist."""
    context = click.Context(cli, info_name="anchor-build", **cli.context_settings)
    _, rest, _ = cli.make_parser(context).parse_args(list(words))
    name = rest[0]
    command = cli.get_command(context, name)
    assert command is not None, f"no command {name}"
    options, left, _ = command.make_parser(click.Context(command, parent=context)).parse_args(rest[1:])
    assert left == []
    for param in command.params:
        assert not param.required or options.get(str(param.name)) is not None, f"{name}: {param.opts} is missing"
        if isinstance(param.type, click.Choice) and param.name in options:
            assert options[param.name] in param.type.choices
    return name, dict(options)


def slug(heading: str) -> str:
    """Return the anchor that a forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """Write the files that doc/stages.md shows below a directory."""
    for block in FENCE.finditer(STAGES.read_text(encoding="utf-8")):
        if block["file"]:
            path = tmp_path / block["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block["text"], encoding="utf-8")
    return tmp_path


# --- What is derived, and what is named -------------------------------------------------------------------


def test_reference_is_fresh() -> None:
    written = (TOP / "doc" / "reference.md").read_text(encoding="utf-8")
    assert written == reference(load_registry()), "stale: run python -m anchor_build.describe"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(document)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.is_file(), link
        assert target.is_relative_to(TOP), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_parameters_exist(document: Path, example: Path) -> None:
    registry = load_registry([example / "fwcfg"])
    known = {param.key for stage in (registry.core, *registry.stages) for param in stage.params}
    text = document.read_text(encoding="utf-8")
    shown = "".join(block["text"] for block in FENCE.finditer(text) if block["language"] != "console")
    assert set(PARAMETER.findall(prose(document) + shown)) <= known


def test_older_names_are_in_the_migration_table() -> None:
    text = "".join((TOP / "doc" / name).read_text(encoding="utf-8") for name in ("from-anchor-0.1.5.md", "disk.md"))
    registry = load_registry()
    for param in (param for stage in (registry.core, *registry.stages) for param in stage.params):
        assert all(f"| `{name}=" in text for name in param.alias), param.key


def test_readme_names_every_command_and_stage() -> None:
    text = (TOP / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `anchor-build (\S+)` ", text, re.MULTILINE) == list(COMMANDS)
    rows = re.findall(r"^\| (\w+) \| `(\w+)` ", text, re.MULTILINE)
    assert rows == [(stage.kind, stage.name) for stage in load_registry().stages]


def test_hooks_of_the_architecture_are_those_of_the_core() -> None:
    text = (TOP / "doc" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^([a-z-]+) (\d+) +anchor_boot_\w+ ", text, re.MULTILINE)
    assert rows == [(hook, str(number)) for hook, number in HOOKS.items()]


def test_tutorial_makes_the_image_as_the_demo_does() -> None:
    """The files of contrib/site/root are shared: what the demo enables, the tutorial enables."""
    text = (TOP / "doc" / "tutorial.md").read_text(encoding="utf-8")
    [units] = re.findall(r"systemctl --quiet enable ([a-z -]+)'", text)
    assert [f"{unit}.service" for unit in units.split()] == list(ENABLED)


# --- Commands ---------------------------------------------------------------------------------------------


def test_there_are_examples_of_every_kind() -> None:
    names = {parse(command.words)[0] for command in examples()}
    assert {"initramfs", "check", "boot", "doctor", "render", "show", "stages"} <= names


@pytest.mark.parametrize("command", examples(), ids=lambda command: f"{command.document}: {command.line[:60]}")
def test_commands_parse(command: Command) -> None:
    name, _ = parse(command.words)
    assert name in COMMANDS


@pytest.mark.parametrize(
    "command",
    [c for c in examples() if c.words[0] in ("check", "show", "stages") and "$" not in c.line],
    ids=lambda command: f"{command.document}: {command.line[:60]}",
)
def test_commands_without_effects_do_what_is_shown(
    command: Command, example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(example)
    result = CliRunner().invoke(cli, command.words, prog_name="anchor-build")
    if command.output is None:
        assert result.exit_code == 0, result.output
    else:
        assert result.output == command.output


def test_commands_in_sentences_exist() -> None:
    for document in DOCUMENTS:
        for line in re.findall(r"`anchor-build ([^`]+)`", prose(document)):
            words = [word for word in line.split() if word not in ("...", "…")]
            name = next((word for word in words if not word.startswith("-")), "")
            if name.isupper():
                continue
            assert name in COMMANDS, f"{document.name}: {line}"
            command = cli.get_command(click.Context(cli, **cli.context_settings), name)
            assert command is not None
            known = {opt for param in (*cli.params, *command.params) for opt in param.opts}
            assert {word for word in words if re.match("--?[a-z]", word)} <= known, f"{document.name}: {line}"


def test_build_sh_is_called_with_what_it_knows() -> None:
    known = (TOP / "build.sh").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for words in re.findall(r"\./build\.sh((?: [a-z-]+)+)", document.read_text(encoding="utf-8")):
            for word in words.split():
                assert re.search(rf"(?<![\w-]){word}\b", known) or word in COMMANDS, f"{document.name}: {words}"


def test_messages_in_the_troubleshooting_tables_are_those_of_the_code() -> None:
    files = [*TOP.glob("lib/*.sh"), *TOP.glob("dracut-modules/*/*"), *TOP.glob("anchor_build/**/*.py")]
    code = " ".join(file.read_text(encoding="utf-8") for file in files)
    rows = re.findall(r"^\| ([^|]*) \|", prose(TOP / "doc" / "troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall("`([^`]+)`", row)]
    assert len(messages) > 40
    for message in messages:
        for piece in filter(None, (part.strip() for part in message.split("…"))):
            assert piece in code, f"{message}: {piece!r}"


# --- The worked example of doc/stages.md ------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is missing")
def test_example_is_loaded_and_rendered(example: Path) -> None:
    registry = load_registry([example / "fwcfg"])
    plan = make_plan(registry, auth=["fwcfg"], image=["squashfs"])
    write_modules(render_plan(plan), example)
    module = example / "51anchor-auth-fwcfg"
    assert "rd.anchor.fwcfg.prefix" in (module / "params.sh").read_text(encoding="utf-8")
    scripts = [str(module / "stage.sh"), str(module / "params.sh"), str(example / "test-fwcfg.sh")]
    # No configuration, as a reader has none; the libraries lie elsewhere, and parameters are set by the core.
    argv = ["shellcheck", "--norc", "--exclude=SC1091,SC2154,SC3043,SC2034,SC1090", *scripts]
    result = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout == ""


@pytest.mark.parametrize("shell", [["dash"], ["busybox", "sh"], ["bash", "--posix"]], ids=lambda argv: argv[0])
def test_example_passes_its_own_test(example: Path, shell: list[str]) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"{shell[0]} is missing")
    plan = make_plan(load_registry([example / "fwcfg"]), auth=["fwcfg"], image=["squashfs"])
    (example / "modules").mkdir()
    write_modules(render_plan(plan), example / "modules")
    argv = [*shell, "test-fwcfg.sh", "modules"]
    result = subprocess.run(argv, cwd=example, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "passed\n"), result.stderr
    assert "the hypervisor gave this node no client.key" in result.stderr


def test_example_package_brings_the_stage(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((example / "site-stages" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(entry, package)] = project["entry-points"][ENTRY_POINT_GROUP].items()
    site = example / "installed"
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").touch()
    (example / "fwcfg").rename(site / package / "fwcfg")
    metadata = site / f"{package}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{entry} = {package}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    try:
        assert load_registry().find("auth", "fwcfg").origin == f"entry point {entry}"
    finally:
        sys.modules.pop(package, None)


def test_stage_keys_are_documented() -> None:
    """Every key that the loader takes stands in a table of doc/stages.md."""
    source = (TOP / "anchor_build" / "stage.py").read_text(encoding="utf-8")
    keys = set(re.findall(r'(?:header|table)\.(?:text|texts|text_or_texts|number|flag|tables)\("(\w+)"', source))
    keys |= set(re.findall(r'\.data\.pop\("(\w+)"', source))
    assert {"kind", "api", "binaries", "default", "digest", "order"} <= keys
    rows = re.findall(r"^\| `.*$", prose(STAGES), re.MULTILINE)
    assert keys <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_functions_that_stages_may_call_exist() -> None:
    libraries = "".join(file.read_text(encoding="utf-8") for file in sorted(TOP.glob("lib/*.sh")))
    rows = re.findall(r"^\| `(anchor_\w+)(?: [^`]*)?` \|", prose(STAGES), re.MULTILINE)
    names = [name for name in rows if name not in ("anchor_type_",)]
    assert len(names) >= 8
    assert all(re.search(rf"^{name}\(\)", libraries, re.MULTILINE) for name in names), names
