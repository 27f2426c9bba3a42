"""The command line: exit statuses, what goes to stdout and what to stderr, JSON, suggestions, completion, bugs."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_build import cli
from tests.conftest import SITE_STAGES, TOP
from tests.unit.conftest import Anchor

GOOD = "root=anchor acme_server=ca.example squashfs_server=https://store/i.squashfs"


def test_every_command_has_its_module_its_summary_and_an_example() -> None:
    for name, summary in cli.COMMANDS.items():
        command = importlib.import_module(f"anchor_build.commands.{name}").command
        assert command.get_short_help_str(200) == summary
        assert re.search(r"Examples?:\n +anchor-build", command.help), name
    files = {path.stem for path in (TOP / "anchor_build" / "commands").glob("[a-z]*.py")}
    assert files == set(cli.COMMANDS)


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_goes_to_stdout(anchor: Anchor, command: str | None) -> None:
    said = anchor(*([command] if command else []), "--help")
    assert (said.status, said.err) == (0, "")
    assert f"Usage: anchor-build {command or ''}".strip() in said.out
    assert said.out == anchor(*([command] if command else []), "-h").out


def test_the_examples_of_the_help_are_right(anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("check", "show", "render", "stages"):
        for line in re.findall(r"^ +anchor-build (.*)$", anchor(command, "--help").out, re.MULTILINE):
            if "$(" not in line and "--stage-dir" not in line:
                assert anchor(*shlex.split(line)).status == 0, line


def test_no_command_is_wrong_usage_and_shows_the_commands(anchor: Anchor) -> None:
    said = anchor()
    assert (said.status, said.out) == (2, "")
    assert "initramfs" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["initramf"], "No such command 'initramf'. Did you mean 'initramfs'?"),
        (["zzz"], "No such command 'zzz'. Commands: initramfs, "),
        (["render", "--ouput", "x"], "--output"),
        (["--verbos", "stages"], "--verbose"),
        (["--json", "stages"], "--json goes after the command: anchor-build stages --json ..."),
        (["--image", "squashfs"], "--image goes after the command: anchor-build COMMAND --image ..."),
        (["-o", "x", "image"], "-o goes after the command: anchor-build image -o ..."),
        (["-v", "-q", "stages"], "--verbose and --quiet exclude each other."),
        (["render", "--image", "squashfs"], "Missing option '-o' / '--output'."),
        (["check"], "Missing argument 'CMDLINE...'."),
        (["stages", "--stage-dir", "/no/such"], "Directory '/no/such' does not exist."),
        (["show", "acne"], "acne: no such stage\nhint: did you mean acme?"),
        (["render", "-o", "x"], "no image stage was chosen\nhint: add --image with one of: squashfs"),
        (["render", "--auth", "acne", "--image", "squashfs", "-o", "x"], "--auth acne: no such stage; there are:"),
        (["check", "--set", "nothing", GOOD], "--set nothing: has no value"),
    ],
)
def test_wrong_usage_exits_2(anchor: Anchor, words: list[str], message: str) -> None:
    said = anchor(*words)
    assert (said.status, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err


def test_events_end_with_how_the_command_did(anchor: Anchor, tmp_path: Path) -> None:
    file = tmp_path / "events"

    def last(*words: str) -> dict[str, object]:
        anchor("--events", str(file), *words)
        return dict(json.loads(file.read_text().splitlines()[-1]))

    assert last("stages", "--json")["event"] == "done"
    failed = last("show", "acne")
    assert (failed["event"], failed["error"], failed["hint"]) == ("failed", "acne: no such stage", "did you mean acme?")
    assert last("check")["error"] == "Missing argument 'CMDLINE...'."
    assert len(file.read_text().splitlines()) == 3
    said = anchor("--events", str(tmp_path / "no/such"), "stages")
    assert (said.status, said.out) == (2, "") and "--events" in said.err and "No such file" in said.err


def test_events_go_to_no_file_of_another_sort(anchor: Anchor, tmp_path: Path) -> None:
    bundle, events = tmp_path / "ca.pem", tmp_path / "events"
    bundle.write_text("-----BEGIN CERTIFICATE-----\n")
    said = anchor("--events", str(bundle), "stages")
    assert (said.status, said.out) == (2, "")
    assert f"--events {bundle}: is there and holds something else. Name another file." in said.err
    assert bundle.read_text() == "-----BEGIN CERTIFICATE-----\n"
    with (tmp_path / "log").open("w+", encoding="utf-8") as log:
        log.write("begun\n")
        log.flush()
        assert anchor("--events", f"/dev/fd/{log.fileno()}", "stages").status == 0
        assert log.read().startswith('{"event": "done"')
    # Nor to what the command writes or reads.
    for words in (["render", "--all", "-o", str(events)], ["image", str(events)], ["initramfs", "--ca", str(events)]):
        said = anchor("--events", str(events), *words)
        assert (said.status, said.out) == (2, "")
        assert f"'{events}' is where --events go" in said.err
        assert json.loads(events.read_text().splitlines()[-1])["event"] == "failed"


def test_events_go_to_nothing_that_is_made(anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no option names it."""
    monkeypatch.chdir(tmp_path)
    modules, tree = Path("6.1.0-9-amd64"), Path("tree")
    modules.mkdir()
    tree.mkdir()
    (modules / "modules.dep").touch()
    (modules / "vmlinuz").write_bytes(b"kernel")
    initramfs = ["initramfs", "--image", "squashfs", "--kernel", modules.name, "--modules", str(modules)]
    made = {f"initramfs-{modules}.img{end}": initramfs for end in ("", ".json")} | {f"vmlinuz-{modules}": initramfs}
    made |= {f"tree.squashfs{end}": ["image", "tree"] for end in ("", ".json", ".manifest")}
    made["x.manifest"] = ["image", "--at", "registry.example/x:1"]
    made["x.oci.manifest"] = ["publish", "x", "--to", "oci://registry.example/x:1", "--sign-key", "k"]
    for name, words in made.items():
        said = anchor("--events", name, *words)
        assert (said.status, said.out) == (2, ""), said.err
        assert f"error: --events: {name} is what this command makes\nhint: name another file for the events" in said.err


def test_events_wait_for_no_reader(anchor: Anchor, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = anchor("--events", str(tmp_path / "pipe"), "stages")
    assert (said.status, said.out) == (2, "")
    assert f"--events {tmp_path}/pipe: nobody reads from it. Start its reader first." in said.err
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert anchor("--events", str(tmp_path / "pipe"), "stages", "--json").status == 0
        assert json.loads(os.read(reader, 4096))["event"] == "done"
    finally:
        os.close(reader)


def test_an_expected_failure_exits_1_without_a_traceback(anchor: Anchor, tmp_path: Path) -> None:
    said = anchor("initramfs", "--image", "squashfs", "--kernel", "/no/such/kernel", "-o", str(tmp_path / "x"))
    assert (said.status, said.out) == (1, "")
    assert said.err == "error: --kernel /no/such/kernel: no such file\n"
    said = anchor("stages", "--stage-dir", str(tmp_path))
    assert (said.status, said.out) == (1, "")
    assert "holds no stage.toml" in said.err


def test_a_bug_keeps_its_traceback(anchor: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("anchor_build.describe.find_stage", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        anchor("show", "acme")


def test_what_an_unset_variable_leaves_is_no_path(
    anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["render", "--image", "squashfs", "-o", ""],
        ["publish", "", "--to", "."],
        ["boot", "--kernel", ""],
        ["--config", "", "stages"],
        ["--events", "", "stages"],
    ):
        said = anchor(*words)
        assert (said.status, said.out) == (2, "")
        assert "it is empty" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_result_on_a_full_disk(tmp_path: Path) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        argv = [sys.executable, "-m", "anchor_build", "--events", f"{tmp_path}/events", "show", "anchor"]
        done = subprocess.run(argv, cwd=TOP, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        1,
        "error: the result cannot be written: No space left on device",
    )
    ended = json.loads((tmp_path / "events").read_text())
    assert (ended["event"], ended["error"]) == ("failed", "the result cannot be written: No space left on device")


def test_a_directory_that_was_removed_meanwhile(
    anchor: Anchor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    said = anchor("image", "tree")
    assert (said.status, said.problems) == (1, ["the working directory is not there any more"])


def test_ctrl_c_exits_130(anchor: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anchor_build.describe.find_stage", interrupted)
    said = anchor("show", "acme")
    assert said.status == 130
    assert said.err.strip() == "error: interrupted"


def test_stages_from_all_sources(anchor: Anchor, installed_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(installed_package))
    rows = json.loads(anchor("stages", "--json").out)
    assert {(row["kind"], row["name"]): row["origin"] for row in rows} == {
        ("auth", "acme"): "built in",
        ("auth", "local-file"): "entry point site",
        ("auth", "nfs"): "built in",
        ("auth", "none"): "built in",
        ("auth", "ssh"): "built in",
        ("transport", "https"): "built in",
        ("transport", "nfs"): "built in",
        ("transport", "file"): "built in",
        ("transport", "rsync"): "built in",
        ("auth", "token"): "built in",
        ("transport", "s3"): "built in",
        ("image", "buildah"): "built in",
        ("image", "disk"): "built in",
        ("image", "oci"): "built in",
        ("image", "plain-file"): "entry point site",
        ("image", "squashfs"): "built in",
    }


@pytest.mark.parametrize("words", [["show", "local-file"], ["show", "auth-local-file"]])
def test_a_stage_of_ones_own_is_shown(anchor: Anchor, words: list[str]) -> None:
    said = anchor(*words, "--stage-dir", str(SITE_STAGES))
    assert (said.status, said.err) == (0, "")
    assert "rd.anchor.local-file.directory=" in said.out
    facts = json.loads(anchor(*words, "--stage-dir", str(SITE_STAGES), "--json").out)
    assert facts["name"] == "local-file"


def test_a_stage_of_ones_own_is_checked_and_rendered(anchor: Anchor, tmp_path: Path) -> None:
    own = ["--stage-dir", str(SITE_STAGES), "--auth", "local-file", "--image", "squashfs"]
    line = "root=anchor local_directory=/c squashfs_server=s"
    assert anchor("check", *own, line).status == 0
    said = anchor("check", *own, line.replace("/c", "c"))
    assert said.status == 1
    assert "local_directory: is not an absolute path" in said.err
    said = anchor("render", *own, "-o", str(tmp_path / "out"))
    assert said.status == 0
    assert said.out.splitlines()[1] == str(tmp_path / "out" / "51anchor-auth-local-file")
    assert (tmp_path / "out" / "51anchor-auth-local-file" / "notice.txt").is_file()


def test_check_says_everything_at_once_on_stderr(anchor: Anchor) -> None:
    said = anchor("check", "rd.anchor.acme.sevrer=x", "acme_email=nobody", "squashfs_server=http://x/y")
    assert (said.status, said.out) == (1, "")
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    assert "did you mean rd.anchor.acme.server?" in said.err


def test_check_prints_what_the_node_would_use(anchor: Anchor) -> None:
    said = anchor("check", GOOD)
    assert said.status == 0
    values = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert values["rd.anchor.acme.server"] == "https://ca.example"
    assert values["rd.anchor.fetch.timeout"] == "900"


@pytest.mark.parametrize("as_json", [True, False])
def test_check_survives_any_bytes(anchor: Anchor, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    line = f"{GOOD} rd.anchor.acme.eab_kid=\udcff\x1b[2Jé rd.anchor.x\udcff\x9b=1 squashfs_severr=\udcff"
    for words in ([line], ["-"]):
        stdin = io.TextIOWrapper(io.BytesIO(line.encode("utf-8", "surrogateescape")), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        said = anchor("check", *words, *(["--json"] if as_json else []))
        assert said.status == 1
        for text in (said.out, said.err):
            assert all(c == "\n" or c.isprintable() for c in text)
        if as_json:
            assert json.loads(said.out)["ok"] is False


def test_check_reads_standard_input(anchor: Anchor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{GOOD}\n".encode()), encoding="utf-8"))
    assert anchor("check", "-").status == 0


def test_a_baked_in_secret_is_not_shown(anchor: Anchor, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("hunter2")
    baked = ["--set", f"rd.anchor.acme.eab_key=@{tmp_path}/key"]
    for words in (["--json"], []):
        said = anchor("check", *baked, *words, GOOD)
        assert said.status == 0
        assert "hunter2" not in said.out + said.err
        assert "rd.anchor.acme.eab_key" in said.out


def test_render_refuses_to_mix_with_what_is_there(anchor: Anchor, tmp_path: Path) -> None:
    words = ["render", "--image", "squashfs", "-o", str(tmp_path / "out")]
    said = anchor(*words, "--json")
    assert json.loads(said.out)["50anchor"] == sorted(path.name for path in (tmp_path / "out" / "50anchor").iterdir())
    said = anchor(*words)
    assert said.status == 1
    assert "already holds 50anchor, " in said.err


def test_render_where_nothing_may_be_written(anchor: Anchor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = anchor("render", "--all", "-o", str(tmp_path / "file" / "out"))
    assert said.status == 1
    assert "cannot be written: Not a directory" in said.err


def test_json_is_valid_on_each_command(anchor: Anchor, tmp_path: Path) -> None:
    for words in (
        ["stages"],
        ["show", "anchor"],
        ["check", GOOD],
        ["doctor"],
        ["render", "--all", "-o", f"{tmp_path}/o"],
    ):
        said = anchor("-q", *words, "--json")
        assert isinstance(json.loads(said.out), dict | list), words


def test_doctor_names_what_is_missing_and_exits_by_it(anchor: Anchor) -> None:
    said = anchor("doctor", "--json")
    found = json.loads(said.out)
    assert said.status == (0 if found["ok"] else 1)
    assert {"what", "ok", "detail", "needed", "rpm", "deb"} == set(found["findings"][0])


def test_nothing_is_coloured_when_nobody_looks(anchor: Anchor, tmp_path: Path) -> None:
    for words in (
        ["stages"],
        ["check", "x"],
        ["doctor"],
        ["show", "acme"],
        ["zzz"],
        ["render", "--all", "-o", f"{tmp_path}/o"],
    ):
        said = anchor(*words)
        assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_for_each_shell(shell: str) -> None:
    env = {**os.environ, "_ANCHOR_BUILD_COMPLETE": f"{shell}_source"}
    done = subprocess.run(
        [sys.executable, "-m", "anchor_build"], cwd=TOP, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "_ANCHOR_BUILD_COMPLETE" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("anchor-build initramfs --auth a", ["acme"]),
        ("anchor-build initramfs --auth n", ["nfs", "none"]),
        ("anchor-build render --image s", ["squashfs"]),
        ("anchor-build show auth", ["auth-acme", "auth-ssh", "auth-token", "auth-nfs", "auth-none"]),
        ("anchor-build show auth-s", ["auth-ssh"]),
        ("anchor-build show s", ["ssh", "s3", "squashfs"]),
        ("anchor-build rpm --stage n", ["none"]),
        ("anchor-build rpm --stage transport-n", ["transport-nfs"]),
        ("anchor-build initramfs --set rd.anchor.acme.eab", ["rd.anchor.acme.eab_kid=", "rd.anchor.acme.eab_key="]),
        ("anchor-build initramfs --drivers ge", ["generic"]),
        ("anchor-build initr", ["initramfs"]),
        (f"anchor-build initramfs --stage-dir {SITE_STAGES} --auth l", ["local-file"]),
    ],
)
def test_bash_completes(words: str, expected: list[str]) -> None:
    env = {
        **os.environ,
        "_ANCHOR_BUILD_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    argv = [sys.executable, "-c", "from anchor_build.cli import main; main()"]
    done = subprocess.run(argv, cwd=TOP, env=env, capture_output=True, text=True, check=False)
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(
    "words",
    [
        *("initramfs --drivers ./x", "initramfs --kernel boot/vm", "initramfs --container no", "initramfs --ca s"),
        *("image --from x", "image --sign-key m", "publish --to /sr"),
    ],
)
def test_bash_completes_files_where_one_may_be_named(words: str) -> None:
    env = {"_ANCHOR_BUILD_COMPLETE": "bash_complete", "COMP_WORDS": f"anchor-build {words}", "COMP_CWORD": "3"}
    argv = [sys.executable, "-c", "from anchor_build.cli import main; main()"]
    done = subprocess.run(argv, cwd=TOP, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.stdout == f"file,{words.split()[-1]}\n"


def test_a_reader_that_goes_away_is_no_bug() -> None:
    script = f"set -o pipefail; {shlex.quote(sys.executable)} -m anchor_build show anchor | true"
    done = subprocess.run(["bash", "-c", script], cwd=TOP, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_a_command_imports_only_what_it_needs() -> None:
    script = (
        "import sys; sys.argv = ['anchor-build', '--help']\n"
        "from anchor_build.cli import main\n"
        "try: main()\n"
        "finally: assert not {'jinja2', 'rpmfile', 'tomllib', 'anchor_build.build'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=TOP, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
