"""Three sources of stages, one loader; stages that cannot live together are refused before anything is built."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_build.errors import InvalidFilesError, UsageError
from anchor_build.registry import CORE_WORDS, load_registry
from tests.conftest import SITE_STAGES, TOP, WriteStage

BUILT_IN = ["auth-acme", "auth-none", "transport-https", "image-squashfs"]
PARAM = '[[param]]\nname = "p"\ntype = "string"\nhelp = "A parameter."\n'


def ids(*stage_dirs: Path) -> list[str]:
    return [stage.id for stage in load_registry(stage_dirs).stages]


def test_the_built_in_stages_in_the_order_of_kinds_and_of_choice() -> None:
    found = [name for name in ids() if name in BUILT_IN]
    assert found == BUILT_IN


@pytest.mark.parametrize("given", [SITE_STAGES, SITE_STAGES / "auth-local-file"], ids=["directory", "stage"])
def test_a_stage_dir_is_a_stage_or_holds_stages(given: Path) -> None:
    registry = load_registry([given])
    stage = registry.find("auth", "local-file")
    assert stage.origin == f"--stage-dir {given}"
    assert [s.id for s in registry.of_kind("auth")].index("auth-local-file") == 1


def test_a_package_with_an_entry_point(installed_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed_package))
    stage = load_registry().find("auth", "local-file")
    assert stage.origin == "entry point site"
    assert stage.directory.parent == installed_package / "site_stages"


def test_a_package_without_code(installed_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (installed_package / "site_stages" / "__init__.py").unlink()
    sys.modules.pop("site_stages", None)
    monkeypatch.syspath_prepend(str(installed_package))
    assert load_registry().find("image", "plain-file").origin == "entry point site"


def test_a_package_is_not_run_for_its_stages(installed_package: Path) -> None:
    (installed_package / "site_stages" / "__init__.py").write_text("raise SystemExit('was run')\n", encoding="utf-8")
    script = "from anchor_build.registry import load_registry; print(load_registry().find('auth', 'local-file').id)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TOP,
        env={"PYTHONPATH": str(installed_package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("auth-local-file\n", "")


def test_an_entry_point_that_leads_nowhere(installed_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[anchor_build.stages]\ngone = no_such_package\nempty = empty_package\nlost = no_such.package\n"
    (installed_package / "site_stages-1.0.dist-info" / "entry_points.txt").write_text(points, encoding="utf-8")
    (installed_package / "empty_package").mkdir()
    monkeypatch.syspath_prepend(str(installed_package))
    with pytest.raises(InvalidFilesError) as caught:
        load_registry()
    empty, gone, lost = caught.value.problems
    assert empty.startswith("entry point empty = empty_package: ")
    assert empty.endswith("holds no stage directory")
    assert gone.startswith("entry point gone = no_such_package: cannot be found")
    assert lost.startswith("entry point lost = no_such.package: cannot be found")


def test_a_stage_dir_without_stages(tmp_path: Path) -> None:
    with pytest.raises(InvalidFilesError, match=r"holds no stage\.toml, nor a directory that does"):
        load_registry([tmp_path])


def test_the_problems_of_all_stages_at_once(write_stage: WriteStage) -> None:
    one, two = write_stage("one", header="a = 1"), write_stage("two", header="b = 1")
    with pytest.raises(InvalidFilesError) as caught:
        load_registry([one, two])
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "stage.a: is not a known key",
        "stage.b: is not a known key",
    ]
    assert "doc/" in caught.value.hint


def alias(name: str) -> str:
    return f'{PARAM}alias = ["{name}"]\n'


CLASHES = [
    (("acme", "auth", ""), "stage.name: auth-acme is already defined in"),
    (("x", "auth", alias("acme_server")), "param: acme_server is already declared in"),
    (("x", "auth", alias("rd.anchor.acme.email")), "param: rd.anchor.acme.email is already declared in"),
    (("x", "auth", alias("overlayfs_size")), "param: overlayfs_size is already declared in"),
    (("key", "core", ""), "stage.kind: there is one core only"),
    (("https", "image", ""), "stage.name: anchor_https_run is already a function of"),
    (("net", "auth", ""), "stage.name: net is a word of the core's own functions"),
    (("fetch", "transport", ""), "stage.name: fetch is a word of the core's own functions"),
    (("step", "auth", ""), "stage.name: step is a word of the core's own functions"),
]


@pytest.mark.parametrize(("declared", "problem"), CLASHES, ids=[problem for _, problem in CLASHES])
def test_a_clash_with_a_built_in_stage(write_stage: WriteStage, declared: tuple[str, str, str], problem: str) -> None:
    name, kind, body = declared
    with pytest.raises(InvalidFilesError) as caught:
        load_registry([write_stage(name, kind=kind, body=body)])
    assert any(problem in text for text in caught.value.problems), caught.value.problems


def test_the_words_of_the_core_are_all_refused_as_names() -> None:
    core = load_registry().core
    text = "".join((TOP / "lib" / lib).read_text(encoding="utf-8") for lib in core.libs)
    text += "".join(param.variable + "()\n" for param in core.params if "." not in param.name)
    words = set(re.findall(r"^anchor_([a-z]+)\w*\(\)", text, re.MULTILINE))
    assert words <= CORE_WORDS


def test_two_parameters_that_would_be_one_shell_variable(write_stage: WriteStage) -> None:
    one = write_stage("a", body=PARAM.replace('"p"', '"b_c"'))
    two = write_stage("a-b", body=PARAM.replace('"p"', '"c"'))
    with pytest.raises(InvalidFilesError, match=r"rd\.anchor\.a-b\.c and rd\.anchor\.a\.b_c are both \$anchor_a_b_c"):
        load_registry([one, two])


def test_a_library_that_does_not_exist(write_stage: WriteStage) -> None:
    with pytest.raises(InvalidFilesError) as caught:
        load_registry([write_stage("x", header='libs = ["anchor-fetch.sh", "anchor-gone.sh"]')])
    (problem,) = caught.value.problems
    assert problem.endswith("stage.toml: stage.libs: anchor-gone.sh is neither beside it nor in lib/")


def test_a_library_of_the_same_name_with_other_content(write_stage: WriteStage) -> None:
    directory = write_stage("x", header='libs = ["anchor-fetch.sh"]')
    (directory / "anchor-fetch.sh").write_text("# another one\n", encoding="utf-8")
    with pytest.raises(InvalidFilesError) as caught:
        load_registry([directory])
    (problem,) = caught.value.problems
    assert "stage.libs: anchor-fetch.sh is another file than" in problem


def test_two_stages_that_install_different_files_in_one_place(write_stage: WriteStage) -> None:
    body = '[[file]]\nsource = "a"\ntarget = "/etc/a"\n'
    one, two = write_stage("one", body=body), write_stage("two", body=body)
    (one / "a").write_text("one", encoding="utf-8")
    (two / "a").write_text("two", encoding="utf-8")
    with pytest.raises(InvalidFilesError, match=r"file: /etc/a is another file than"):
        load_registry([one, two])
    shutil.copyfile(one / "a", two / "a")
    assert {"auth-one", "auth-two"} <= set(ids(one, two))


def test_an_unknown_stage_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        load_registry().find("auth", "acne")
    assert caught.value.message.startswith("--auth acne: no such stage; there are: acme")
    assert caught.value.hint == "did you mean acme?"


def test_a_stage_of_another_kind_is_not_found() -> None:
    with pytest.raises(UsageError, match="--image acme: no such stage; there are:"):
        load_registry().find("image", "acme")
