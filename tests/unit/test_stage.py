"""stage.toml: everything wrong is refused at once, as `file: key: reason`, and hostile texts stay texts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anchor_build.errors import InvalidFilesError
from anchor_build.stage import load_stage
from tests.conftest import SITE_STAGES, WriteStage

PARAM = '[[param]]\nname = "p"\nhelp = "A parameter."\n'
TEXT = f'{PARAM}type = "string"\n'
OTHER = TEXT.replace('"p"', '"q"')


def problems_of(directory: Path) -> tuple[str, ...]:
    """Return what the loader says, checking that each problem names a file and a key."""
    with pytest.raises(InvalidFilesError) as caught:
        load_stage(directory, "a test")
    for problem in caught.value.problems:
        assert re.match(rf"{re.escape(str(directory))}/[a-z.]+: \S", problem), problem
    return caught.value.problems


REFUSED_HEADERS = {
    "order = 100": "stage.order: is not a whole number from 0 to 99",
    "order = true": "stage.order: is not a whole number",
    'order = "1"': "stage.order: is not a whole number",
    'dracut = "network"': "stage.dracut: is not a list of texts",
    'dracut = ["$(reboot)"]': "stage.dracut: '$(reboot)' does not match",
    'drivers = ["a b"]': "stage.drivers: 'a b' does not match",
    'drivers = ["nfs", "nfs"]': "stage.drivers: names something twice",
    "drivers = [1]": "stage.drivers: is not a list of texts",
    'libs = ["../x.sh"]': "stage.libs: '../x.sh' does not match",
    'conflicts = ["a;b"]': "stage.conflicts: 'a;b' does not match",
    'schemes = ["ftp"]': "stage.schemes: names the URL schemes of a transport",
    'digest_schemes = ["http"]': "stage.digest_schemes: holds a scheme that schemes does not",
    "binaries = 5": "stage.binaries: is not a list of tables",
    'binaries = ["curl"]': "stage.binaries: is not a list of tables",
    'binaries = [{ name = "curl", rpm = "curl" }]': "stage.binaries[0].deb: is missing",
    'binaries = [{ name = "a;b", rpm = "a", deb = "a" }]': "stage.binaries[0].name: 'a;b' does not match",
    'binaries = [{ name = "a", rpm = "a", deb = "a\\nb" }]': "stage.binaries[0].deb: 'a\\nb' does not match",
    'binaries = [{ name = "a", rpm = "a", deb = "a", suse = "a;b" }]': "stage.binaries[0].suse: 'a;b' does not match",
    'binaries = [{ name = "a", rpm = "a", deb = "a", optional = 1 }]': "stage.binaries[0].optional: is not true",
    'binaries = [{ name = "a", rpm = "a", deb = "a", without = "" }]': "stage.binaries[0].without: is not a",
    'binaries = [{ name = "a", rpm = "-", deb = "a", optional = true, without = "b" }]': "stage.binaries[0].without: ",
    'obsoletes = ["older"]': "stage.obsoletes: 'older' does not match",
    'obsoletes = ["older < 1 %(touch /x)"]': "stage.obsoletes: 'older < 1 %(touch /x)' does not match",
    'binaries = [{ name = "a", rpm = "a", deb = "a", apt = "a" }]': "stage.binaries[0].apt: is not a known key",
    'sumary = "x"': "stage.sumary: is not a known key",
}


@pytest.mark.parametrize(
    ("packages", "where"),
    [
        ('rpm = "r", deb = "d"', "d (deb) or r (rpm)"),
        ('rpm = "r", suse = "s", deb = "d"', "d (deb), r (rpm) or s (suse)"),
        ('rpm = "-", deb = "d"', "d (deb)"),
        ('rpm = "-", deb = "-"', "it yourself"),
        ('rpm = "r", deb = "d", since = "4.5"', "d (deb) or r (rpm), version 4.5 or later"),
    ],
)
def test_packages_of_a_program(write_stage: WriteStage, packages: str, where: str) -> None:
    stage = load_stage(write_stage(header=f'binaries = [{{ name = "a", {packages} }}]'), "a test")
    assert stage.binaries[0].where == where


def test_one_of_names_parameters_that_may_be_left_out(write_stage: WriteStage) -> None:
    unknown, single = problems_of(write_stage(header='one_of = ["none"]'))
    assert "stage.one_of: 'none' names no parameter that is neither required nor has a default" in unknown
    assert "stage.one_of: names a single parameter: make that one required" in single
    # A manifest takes the place of an image stage's.
    assert not any(
        "single" in problem for problem in problems_of(write_stage(header='one_of = ["none"]', kind="image"))
    )


@pytest.mark.parametrize("header", REFUSED_HEADERS)
def test_a_header_is_refused(write_stage: WriteStage, header: str) -> None:
    problems = problems_of(write_stage(header=header))
    assert len(problems) == 1
    assert f"/stage.toml: {REFUSED_HEADERS[header]}" in problems[0]


REFUSED_BODIES = {
    "[stages]": "stages: is not a known table",
    "param = 1": "stage.param: is not a known key",
    '[[file]]\nsource = "x"': "file[0].target: is missing",
    '[[file]]\nsource = "../x"\ntarget = "/x"': "file[0].source: '../x' does not match",
    '[[file]]\nsource = "x"\ntarget = "/a/../b"': "file[0].target: '/a/../b' does not match",
    '[[file]]\nsource = "x"\ntarget = "b"': "file[0].target: 'b' does not match",
    '[[file]]\nsource = "x"\ntarget = "/b c"': "file[0].target: '/b c' does not match",
    '[[file]]\nsource = "x"\ntarget = "/b"\nmode = "4755"': "file[0].mode: '4755' does not match",
    '[[file]]\nsource = "x"\ntarget = "/b"\nowner = "root"': "file[0].owner: is not a known key",
    f'{PARAM}type = "sting"': "param[0].type: 'sting' is none of",
    f"{PARAM}type = 5": "param[0].type: is not a text",
    f'{PARAM}type = "int"\nmin = 5\nmax = 1': "param[0].type: min is greater than max",
    f'{PARAM}type = "int"\nmin = "x"\ndefault = "3"': "param[0].type: min must be a whole number",
    f'{PARAM}type = "choice"\ndefault = "a"': "param[0].type: choices",
    f'{PARAM}type = "choice"\nchoices = ["a", "$(b) c"]': "param[0].type: choices",
    f'{PARAM}type = "choice"\nchoices = ["a"]\ndefault = "b"': "param[0].default: is not one of: a",
    f'{PARAM}type = "list"\ndefault = "a"': "param[0].type: of does not name",
    f'{PARAM}type = "list"\nof = "list"': "param[0].type: of does not name",
    f'{PARAM}type = "list"\nof = "secret"': "param[0].type: a list of secrets",
    f'{PARAM}type = "url"\nschemes = ["HTTP"]': "param[0].type: schemes",
    f'{PARAM}type = "secret"\ndefault = "x"': "param[0].default: a secret has no default",
    f"{TEXT}default = 5": "param[0].default: is not a text",
    f'{TEXT}default = "a\\nb"': "param[0].default: contains a control character",
    f'{TEXT}required = true\ndefault = "x"': "param[0].default: makes no sense for a required parameter",
    f'{TEXT}required = "yes"': "param[0].required: is not true or false",
    f"{TEXT}source = true": "param[0].source: is for a parameter of type url",
    f'{TEXT}digest = "sum"': "param[0].digest: 'sum' names no parameter of type sha256",
    f"{TEXT}digest = 5": "param[0].digest: is not a list of texts",
    f'{TEXT}digest_schemes = ["http"]': "param[0].digest_schemes: is for a parameter of type url",
    f'{TEXT}digest_in = "p"': "param[0].digest_in: makes no sense without digest_schemes",
    f'{PARAM}type = "url"\ndigest_schemes = ["http"]\ndigest_in = "q"': "param[0].digest_in: 'q' names no parameter",
    f'{TEXT}alias = ["a b"]': "param[0].alias: 'a b' does not match",
    f'{TEXT}alias = ["a)"]': "param[0].alias: 'a)' does not match",
    f"{TEXT}min = 1": "param[0].min: is not a known key",
    f'{TEXT}defualt = "x"': "param[0].defualt: is not a known key",
    TEXT.replace('"p"', '"P"'): "param[0].name: 'P' does not match",
    TEXT.replace('"p"', '"a.b"'): "param[0].name: 'a.b' does not match",
    TEXT.replace('"p"', '"a-b"'): "param[0].name: 'a-b' does not match",
    # anchor_demo_p__as is where the parser keeps the spelling, and double underscores mark private helpers.
    TEXT.replace('"p"', '"p__as"'): "param[0].name: 'p__as' does not match",
    TEXT + TEXT: "param[1]: rd.anchor.demo.p is declared twice",
    f'{TEXT}alias = ["old"]\n{OTHER}alias = ["old"]': "param[1]: old is declared twice",
    TEXT.replace('A parameter."', '\\u001b[2J"'): "param[0].help: holds control characters",
    TEXT.replace('A parameter."', '\\u009b2J"'): "param[0].help: holds control characters",
    TEXT.replace('A parameter."', 'a\\nb"'): "param[0].help: holds control characters",
    TEXT.replace('help = "A parameter."\n', ""): "param[0].help: is missing",
}


@pytest.mark.parametrize("body", REFUSED_BODIES)
def test_a_table_is_refused(write_stage: WriteStage, body: str) -> None:
    directory = write_stage(body=body)
    (directory / "x").touch()
    problems = problems_of(directory)
    assert len(problems) == 1
    assert f"/stage.toml: {REFUSED_BODIES[body]}" in problems[0]


REFUSED_FILES = {
    'source = "gone.txt"': "is missing",
    'source = "stage.sh"': "has the name of a file of the rendered module",
    'source = "params.sh"': "has the name of a file of the rendered module",
    'source = "module-setup.sh"': "has the name of a file of the rendered module",
}


@pytest.mark.parametrize("source", REFUSED_FILES)
def test_a_file_that_cannot_be_installed_is_refused(write_stage: WriteStage, source: str) -> None:
    directory = write_stage(body=f'[[file]]\n{source}\ntarget = "/x"\n')
    for name in ("params.sh", "module-setup.sh"):
        (directory / name).touch()
    (problem,) = problems_of(directory)
    assert REFUSED_FILES[source] in problem


@pytest.mark.parametrize("name", ["module-setup.sh", "params.sh", "stage.sh"])
def test_a_library_cannot_replace_a_rendered_file(write_stage: WriteStage, name: str) -> None:
    (problem,) = problems_of(write_stage(header=f'libs = ["{name}"]'))
    assert problem.endswith(f"stage.libs: {name} has the name of a file of the rendered module")


@pytest.mark.parametrize(
    ("kind", "script", "lacking"),
    [
        ("auth", "", ["run"]),
        ("auth", "anchor_demo_mount() {\n", ["run"]),
        ("auth", "# anchor_demo_run()\n", ["run"]),
        ("image", "anchor_demo_run() {\n    :\n}\n", ["mount"]),
        ("image", "", ["run", "mount"]),
        ("image", "anchor_demo_root() {\n    :\n}\n", ["run"]),
    ],
)
def test_functions_that_are_missing(write_stage: WriteStage, kind: str, script: str, lacking: list[str]) -> None:
    directory = write_stage(kind=kind, script=script)
    expected = [f"{directory}/stage.sh: does not define anchor_demo_{name}()" for name in lacking]
    assert list(problems_of(directory)) == expected


def test_a_script_that_is_missing(write_stage: WriteStage) -> None:
    directory = write_stage()
    (directory / "stage.sh").unlink()
    (problem,) = problems_of(directory)
    assert "stage.sh: cannot be read" in problem


def test_everything_wrong_is_said_at_once(write_stage: WriteStage) -> None:
    directory = write_stage(
        header='order = -1\nwhat = 1\nbinaries = [{ name = "a" }]',
        body=f'{PARAM}type = "nope"\n[[param]]\n[other]\n',
        script="",
    )
    keys = [problem.split(": ")[1] for problem in problems_of(directory)]
    assert keys == [
        *("stage.order", "stage.binaries[0].rpm", "stage.binaries[0].deb", "param[0].type"),
        *("param[1].name", "param[1].type", "param[1].help", "stage.what", "other"),
        "does not define anchor_demo_run()",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "stage: the [stage] table is missing"),
        ("stage = 1", "stage: the [stage] table is missing"),
        ("[stage", "cannot be read: "),
        ("[stage]\nkind = 'auth'\nkind = 'auth'", "cannot be read: "),
    ],
)
def test_a_file_that_is_no_declaration(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "stage.toml").write_text(text, encoding="utf-8")
    (problem,) = problems_of(tmp_path)
    assert reason in problem


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "stage.toml").write_bytes(b"[stage]\nsummary = '\xff'\n")
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('kind = "boot"', "stage.kind: 'boot' is none of auth, transport, image"),
        ("api = 2", "stage.api: is not 1"),
        ("api = true", "stage.api: is not 1"),
        ('name = "Demo"', "stage.name: 'Demo' does not match"),
        ('name = "a_b"', "stage.name: 'a_b' does not match"),
        ('name = "a-"', "stage.name: 'a-' does not match"),
        ('summary = " "', "stage.summary: is not a text"),
        ('summary = "a\\u0007"', "stage.summary: holds control characters"),
    ],
)
def test_the_identity_of_a_stage(write_stage: WriteStage, line: str, reason: str) -> None:
    directory = write_stage()
    declaration = directory / "stage.toml"
    key = line.split()[0]
    text = re.sub(rf"^{key} = .*$", lambda _: line, declaration.read_text(), flags=re.MULTILINE)
    declaration.write_text(text)
    assert any(reason in problem for problem in problems_of(directory))


def test_a_transport_needs_schemes(write_stage: WriteStage) -> None:
    (problem,) = problems_of(write_stage("ftp", kind="transport", header="schemes = []"))
    assert "stage.schemes: names the URL schemes of a transport" in problem


def test_a_stage_is_what_its_declaration_says() -> None:
    stage = load_stage(SITE_STAGES / "auth-local-file", "a test")
    assert (stage.id, stage.module) == ("auth-local-file", "anchor-auth-local-file")
    assert (stage.word, stage.order) == ("local_file", 20)
    directory, note, pin, strict, names = stage.params
    assert directory.names == ("rd.anchor.local-file.directory", "local_directory", "Site.dir")
    assert directory.variable == "anchor_local_file_directory"
    assert note.default == 'it\'s $(reboot); `id` "here" \\'
    assert (pin.type, pin.default, strict.default) == ("secret", None, "1")
    assert names.options == {"of": "choice", "choices": ["client.crt", "client.key", "a*b", "$x;"]}
    assert stage.files[0].mode == "0640"


def test_a_default_is_kept_in_its_normal_form(write_stage: WriteStage) -> None:
    stage = load_stage(write_stage(body=f'{PARAM}type = "duration"\ndefault = "010m"\n'), "a test")
    assert stage.params[0].default == "600"
