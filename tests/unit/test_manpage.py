"""The man pages: complete, and without a warning from the formatter."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from anchor_build import manpage
from anchor_build.cli import COMMANDS, cli
from anchor_build.registry import load_registry

NAMES = ("anchor-build.1", "anchor-build-stages.7")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the pages once."""
    target = tmp_path_factory.mktemp("man")
    assert [path.name for path in manpage.write_pages(target)] == list(NAMES)
    return target


def shown(page: Path) -> str:
    """Return what a reader sees, as plain text in lines that are not broken."""
    argv = ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=1000n", str(page)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.parametrize("name", NAMES)
def test_formatter_has_nothing_to_complain_about(directory: Path, name: str) -> None:
    argv = ["groff", "-man", "-ww", "-z", "-Tutf8", str(directory / name)]
    result = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30)
    assert result.stderr == ""


def test_every_command_and_every_option_is_described(directory: Path) -> None:
    text = shown(directory / "anchor-build.1")
    root = click.Context(cli, info_name="anchor-build", **cli.context_settings)
    for param in cli.get_params(root):
        assert all(re.search(rf"^ +.*{re.escape(opt)}\b", text, re.MULTILINE) for opt in param.opts), param.opts
    for name in COMMANDS:
        section = re.search(rf"^   anchor-build {name}\n(.*?)(?=^   ?\S|^\S)", text, re.MULTILINE | re.DOTALL)
        assert section, name
        command = cli.get_command(root, name)
        assert command is not None
        for option in (param for param in command.params if isinstance(param, click.Option)):
            line = re.search(rf"^ {{7}}{re.escape(', '.join(option.opts))}( .*)?$", section[1], re.MULTILINE)
            assert line, f"{name} {option.opts}"
            assert option.help and option.help.split()[0] in section[1]


def test_every_parameter_and_older_name_is_described(directory: Path) -> None:
    text = shown(directory / "anchor-build-stages.7")
    registry = load_registry()
    for stage in (registry.core, *registry.stages):
        assert f"\n   {stage.id}\n" in text
        for param in stage.params:
            assert f"\n       {param.key}=" in text
            assert all(f"older name: {alias}" in text for alias in param.alias)


def test_examples_and_sections_are_there(directory: Path) -> None:
    text = shown(directory / "anchor-build.1")
    assert "anchor-build initramfs --auth acme --image squashfs --ca site-ca.pem\n" in text
    headings = re.findall(r"^[A-Z][A-Z ]+$", text, re.MULTILINE)
    wanted = [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "COMMANDS",
        "EXIT STATUS",
        "ENVIRONMENT",
        "FILES",
        "SEE ALSO",
    ]
    assert headings == wanted


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = tmp_path / "page.1"
    texts = [".so /etc/passwd", "'br", r"\fBnot bold\fP", "é, €", "'quoted' `code` ~/x ^y"]
    lines = [line for text in texts for line in manpage._paragraphs(text)]
    page.write_text("\n".join([".TH X 1 2000-01-01", ".SH NAME", "x", *lines, ""]), encoding="ascii")
    argv = ["groff", "-man", "-Tutf8", "-P-cbou", str(page)]
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30).stdout
    assert [line.strip() for line in text.splitlines() if line.strip()][3:-1] == texts


def test_same_time_same_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    first, second = manpage.write_pages(tmp_path / "a"), manpage.write_pages(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "1970-01-02" in first[0].read_text(encoding="ascii").splitlines()[0]
