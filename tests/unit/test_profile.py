"""Profiles: what a file may hold, what wins, and what reaches the commands. All through the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from anchor_build import cli, profile
from anchor_build.errors import UsageError
from tests.conftest import SITE_STAGES, TOP
from tests.unit.conftest import Anchor, Said

GOOD = "root=anchor squashfs_server=https://store/i.squashfs"


Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in an empty directory, where no other file is found."""
    monkeypatch.delenv("ANCHOR_BUILD_CONFIG", raising=False)
    monkeypatch.setattr(profile, "SYSTEM_FILE", tmp_path / "etc" / "anchor.toml")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def write(anchor: Anchor, tmp_path: Path) -> Write:
    """Write the anchor.toml of the working directory."""

    def put(text: str) -> Path:
        path = tmp_path / "here" / "anchor.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return put


def values(said: Said) -> dict[str, str]:
    assert said.status == 0, said.err
    found: dict[str, str] = json.loads(said.out)["values"]
    return found


# --- Keys -------------------------------------------------------------------------------------------------


def test_the_keys_are_the_options_of_initramfs() -> None:
    command = cli.cli.get_command(click.Context(cli.cli), "initramfs")
    assert command is not None
    names = {opt.removeprefix("--") for param in command.params for opt in param.opts if opt.startswith("--")}
    assert set(profile.all_keys()) == names - {"json"}
    assert {"auth", "stage-dir", "set", "add-drivers", "output"} <= set(profile.all_keys())


def test_other_commands_take_what_means_the_same_there() -> None:
    context = click.Context(cli.cli)
    stages = {"auth", "transport", "image", "stage-dir"}
    expected = {
        "check": {*stages, "set", "network", "systemd"},
        "render": stages,
        "doctor": stages,
        "stages": {"stage-dir"},
        "rpm": {"stage-dir"},
        "boot": set(),
    }
    for name, keys in expected.items():
        command = cli.cli.get_command(context, name)
        assert command is not None
        assert set(profile.keys_of(name, command)) == keys, name


# --- What reaches a command -------------------------------------------------------------------------------


def test_a_profile_chooses_the_stages_of_render(anchor: Anchor, write: Write) -> None:
    write('[profile.default]\nauth = "acme"\nimage = ["squashfs"]\noutput = "not-for-render"\nca = "x"')
    said = anchor("render", "-o", "out")
    assert said.status == 0
    names = [path.name for path in Path("out").iterdir()]
    assert sorted(names) == ["50anchor", "51anchor-auth-acme", "52anchor-transport-https", "53anchor-image-squashfs"]
    assert said.err == "profile default of anchor.toml: auth, image\n"


def test_the_command_line_replaces_what_a_profile_lists(anchor: Anchor, write: Write) -> None:
    write('[profile.default]\nauth = ["acme"]\nimage = "squashfs"')
    said = anchor("render", "--auth", "none", "-o", "out")
    assert (said.status, Path("out/51anchor-auth-acme").exists()) == (0, False)
    assert Path("out/51anchor-auth-none").is_dir()


def test_settings_are_added_up_by_name(anchor: Anchor, write: Write) -> None:
    write(
        '[profile.base]\nset = { "rd.anchor.acme.server" = "base", "rd.anchor.acme.timeout" = 60 }\n'
        '[profile.default]\ninherits = "base"\n[profile.default.set]\nrd.anchor.acme.server = "default"\n'
        "rd.anchor.fetch.attempts = 3\nrd.anchor.acme.email = 'a@example.org'\n"
    )
    given = ["--set", "rd.anchor.fetch.attempts=4", "--set", "acme_email=b@example.org"]
    found = values(anchor("check", "--json", *given, GOOD))
    assert found["rd.anchor.acme.server"] == "https://default"
    assert found["rd.anchor.acme.timeout"] == "60"
    assert found["rd.anchor.fetch.attempts"] == "4"
    assert found["rd.anchor.acme.email"] == "b@example.org"


def test_settings_as_a_list(anchor: Anchor, write: Write) -> None:
    write('[profile.default]\nset = ["acme_server=a", "rd.anchor.acme.timeout=61"]')
    found = values(anchor("check", "--json", GOOD))
    assert (found["rd.anchor.acme.server"], found["rd.anchor.acme.timeout"]) == ("https://a", "61")


def test_later_parents_win_and_the_profile_wins_over_them(anchor: Anchor, write: Write) -> None:
    path = write(
        '[profile.a]\nca = "a"\nkernel = "a"\ncompress = "a"\nadd-drivers = ["a"]\nauth = "none"\n'
        '[profile.b]\nkernel = "b"\ncompress = "b"\n'
        '[profile.c]\ninherits = ["a", "b"]\ncompress = "c"\nadd-drivers = []\n'
        '[profile.d]\ninherits = ["a", "c"]\n'
    )
    found = profile.read_file(path).profiles
    expected = {"ca": str(path.parent / "a"), "kernel": "b", "compress": "c", "add-drivers": (), "auth": ("none",)}
    assert found["c"].values == expected
    assert found["d"].values == expected


def test_paths_are_relative_to_the_file(anchor: Anchor, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "key").write_text("hunter2\n")
    (site / "stages").symlink_to(SITE_STAGES)
    (site / "vmlinuz").touch()
    (site / "anchor.toml").write_text(
        '[profile.default]\nstage-dir = "stages"\nauth = "acme"\nimage = "squashfs"\nca = "ca.pem"\n'
        'set = { "rd.anchor.acme.eab_key" = "@key", "rd.anchor.acme.server" = "a" }\n'
        '[profile.file]\nkernel = "vmlinuz"\n[profile.path]\nkernel = "boot/x"\n[profile.release]\nkernel = "6.1.0-1"'
    )
    config = ["--config", str(site / "anchor.toml")]
    assert "local-file" in anchor(*config, "stages").out
    assert values(anchor(*config, "check", "--json", GOOD))["rd.anchor.acme.eab_key"] == "(secret)"
    found = profile.read_file(site / "anchor.toml").profiles
    assert found["default"].values["ca"] == str(site / "ca.pem")
    kernels = [found[name].values["kernel"] for name in ("file", "path", "release")]
    assert kernels == [str(site / "vmlinuz"), str(site / "boot/x"), "6.1.0-1"]
    assert "boot/x: no such file" in anchor(*config, "--profile", "path", "initramfs", "--image", "squashfs").err


def test_a_value_is_checked_like_an_option(anchor: Anchor, write: Write) -> None:
    write('[profile.default]\nstage-dir = "gone"')
    said = anchor("stages")
    assert said.status == 2
    assert "Invalid value for '--stage-dir': Directory 'gone' does not exist." in said.err
    assert said.err.startswith("profile default of anchor.toml: stage-dir\n")


# --- Which file, which profile ----------------------------------------------------------------------------


def test_no_file_is_no_error(anchor: Anchor) -> None:
    said = anchor("stages")
    assert (said.status, said.err) == (0, "")


def test_the_nearest_file_and_the_named_profile_are_taken(
    anchor: Anchor, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def server(*words: str) -> str:
        return values(anchor(*words, "check", "--json", "--set", "rd.anchor.acme.timeout=9", GOOD)).get(
            "rd.anchor.acme.server", ""
        )

    text = '[profile.default]\nset = ["acme_server={0}"]\n[profile.x]\nset = ["acme_server={0}x"]\n'
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "anchor.toml").write_text(text.format("etc"))
    assert server() == "https://etc"
    write(text.format("here"))
    assert server() == "https://here"
    (tmp_path / "env.toml").write_text(text.format("env"))
    monkeypatch.setenv("ANCHOR_BUILD_CONFIG", str(tmp_path / "env.toml"))
    monkeypatch.setenv("ANCHOR_BUILD_PROFILE", "x")
    assert server() == "https://envx"
    assert server("--config", "anchor.toml", "--profile", "default") == "https://here"
    assert anchor("boot", "--help").status == 0


def test_a_file_without_a_default_profile_gives_nothing(anchor: Anchor, write: Write) -> None:
    write('[profile.x]\nimage = "squashfs"')
    said = anchor("render", "-o", "out")
    assert (said.status, said.problems) == (2, ["no image stage was chosen"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--profile", "lgin", "stages"],
            "--profile lgin: is not in anchor.toml; there are: login\nhint: did you mean",
        ),
        (["--config", "anchor.toml", "stages"], "anchor.toml: has no profile default\nhint: choose one with --profile"),
        (["--config", "gone.toml", "stages"], "gone.toml: cannot be read: No such file or directory"),
        (["--config", ".", "stages"], ".: cannot be read: Is a directory"),
        (["--config", "/dev/zero", "stages"], "/dev/zero: is larger than 1048576 bytes"),
        (["--profile", "login", "boot"], "--profile: boot takes nothing from a profile"),
        (["stages", "--profile", "login"], "--profile goes before the command: anchor-build --profile ..."),
    ],
)
def test_asked_for_in_vain(anchor: Anchor, write: Write, words: list[str], message: str) -> None:
    write("[profile.login]")
    said = anchor(*words)
    assert (said.status, said.out) == (2, "")
    assert message in said.err


def test_a_profile_without_a_file(anchor: Anchor) -> None:
    said = anchor("--profile", "login", "stages")
    assert said.status == 2
    assert said.err.startswith("error: --profile login: there is no anchor.toml here, and no ")


def test_a_file_that_somebody_else_wrote(anchor: Anchor, write: Write) -> None:
    path = write("[profile.default]")
    path.chmod(0o666)
    said = anchor("stages")
    assert (said.status, said.problems) == (2, ["anchor.toml: may be written by everybody"])
    assert anchor("--config", "anchor.toml", "stages").status == 0
    path.chmod(0o644)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        said = anchor("stages")
        assert (said.status, said.problems) == (2, ["anchor.toml: belongs to another user (uid 65534)"])
        assert anchor("--config", "anchor.toml", "stages").status == 0


def test_the_user_before_sudo_is_trusted(anchor: Anchor, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("[profile.default]")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(Path, "stat", lambda _: os.stat_result((0o100644, *[0] * 3, 1000, *[0] * 5)))
    with pytest.raises(UsageError, match="uid 1000"):
        profile._check_owner(path)
    monkeypatch.setenv("SUDO_UID", "1000")
    profile._check_owner(path)


# --- What is wrong with a file ----------------------------------------------------------------------------


def test_all_mistakes_at_once(anchor: Anchor, write: Write) -> None:
    write("""
extra = 1
[profile.a]
imag = "squashfs"
add_drivers = "x"
ca = 5
kernel = ["x"]
output = ""
auth = ["acme", 5]
transport = ["https", "https"]
compress = "a\\u001b[2J"
json = true
set = { "rd.anchor.acme.server" = 1.5, "a=b" = "c", big = 0x10000000000000000 }
inherits = "bb"
[profile.b]
set = ["x", "y=1"]
inherits = ["c"]
[profile.c]
inherits = ["d", "b"]
[profile.d]
inherits = 7
[profile."a b"]
[profile]
e = 5
""")
    said = anchor("stages")
    assert (said.status, said.out) == (2, "")
    assert said.problems == [
        "anchor.toml: extra: is not a known table; there is [profile.NAME] only",
        "anchor.toml: profile.a.imag: is not a known key; did you mean image?",
        "anchor.toml: profile.a.add_drivers: is not a known key; did you mean add-drivers?",
        "anchor.toml: profile.a.ca: is not a text",
        "anchor.toml: profile.a.kernel: is not a text",
        "anchor.toml: profile.a.output: is empty",
        "anchor.toml: profile.a.auth: is not a text or a list of texts",
        "anchor.toml: profile.a.transport: names something twice",
        "anchor.toml: profile.a.compress: holds control characters",
        "anchor.toml: profile.a.json: is not a known key; there are: " + ", ".join(profile.all_keys()),
        "anchor.toml: profile.a.set.rd.anchor.acme.server: is not a text, a whole number, true or false",
        "anchor.toml: profile.a.set.a=b: holds control characters or a = in its name",
        "anchor.toml: profile.a.set.big: is not a text, a whole number, true or false",
        "anchor.toml: profile.b.set: x: has no value: KEY=VALUE or KEY=@FILE",
        "anchor.toml: profile.d.inherits: is not a text or a list of texts",
        "anchor.toml: profile.a b: its name is not of letters, digits, `.`, `-` and `_`, at most 64",
        "anchor.toml: profile.e: is not a table: write [profile.e]",
        "anchor.toml: profile.a.inherits: there is no profile bb; did you mean b?",
        "anchor.toml: profile.c.inherits: goes round in a ring: b -> c -> b",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[profile", "cannot be read: "),
        (b"# \xff", "cannot be read: 'utf-8' codec"),
        (b"a = " + b"[" * 20000, "cannot be read: "),
        (b"a = " + b"9" * 5000, "cannot be read: "),
        (b"[profile.default.set]\n" + b".".join([b"a"] * 500) + b" = 1", "profile.default.set.a.a"),
        (b"profile = 5", "profile: is not a table: write [profile.NAME]"),
        (b'[profile.a]\ninherits = "a"', "profile.a.inherits: goes round in a ring: a -> a"),
    ],
)
def test_a_broken_file_stops_commands_but_not_help(anchor: Anchor, write: Write, content: bytes, reason: str) -> None:
    write("").write_bytes(content)
    said = anchor("render", "-o", "out")
    assert (said.status, said.out) == (2, "")
    assert said.err.startswith(f"error: anchor.toml: {reason}")
    assert "Traceback" not in said.err
    assert anchor("render", "--help").status == 0
    assert anchor("inspect", "--help").status == 0


def test_a_chain_of_parents_has_an_end_and_a_net_of_them_is_quick(anchor: Anchor, write: Write) -> None:
    chain = "".join(f'[profile.p{n}]\ninherits = "p{n + 1}"\n' for n in range(60)) + "[profile.p60]"
    write(chain)
    assert anchor("stages").problems == ["anchor.toml: profile.p0.inherits: goes on for more than 50 profiles"]
    net = "".join(
        f'[profile.{side}{n}]\ninherits = ["a{n + 1}", "b{n + 1}"]\n' for n in range(40) for side in ("a", "b")
    )
    write(f"{net}[profile.a40]\n[profile.b40]")
    assert anchor("--profile", "a0", "stages").status == 0


def test_parameters_are_checked_where_they_stand(anchor: Anchor, write: Write) -> None:
    write(
        '[profile.base]\nset = { "rd.anchor.acme.eab_key" = "hunter2", "rd.anchor.acme.sever" = "x" }\n'
        '[profile.default]\ninherits = "base"\nset = { "acme_email" = "@no", "rd.anchor.acme.timeout" = "x" }'
    )
    said = anchor("check", GOOD)
    assert said.status == 2
    where = "anchor.toml: profile"
    reason = "is a secret, and all who build read this: give it as rd.anchor.acme.eab_key=@FILE"
    assert said.problems == [
        f"{where}.base.set.rd.anchor.acme.eab_key: {reason}",
        f"{where}.base.set.rd.anchor.acme.sever: is not a parameter of these stages; did you mean "
        "rd.anchor.acme.server?",
        f"{where}.default.set.acme_email: no: No such file or directory",
        f"{where}.default.set.rd.anchor.acme.timeout: is not a duration from 5 to 3600 seconds",
    ]
    assert "hunter2" not in said.err


# --- Completion, and the files that come with it ----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("[profile.login]\n[profile.lab]\n[profile.x]", ["login", "lab"]), ("[", [])]
)
def test_bash_completes_the_names_of_profiles(anchor: Anchor, write: Write, text: str, expected: list[str]) -> None:
    path = write(text)
    for words in ("anchor-build --profile l", f"anchor-build --config {path} --profile l"):
        env = {**os.environ, "_ANCHOR_BUILD_COMPLETE": "bash_complete", "COMP_WORDS": words, "PYTHONPATH": str(TOP)}
        env["COMP_CWORD"] = str(len(words.split()) - 1)
        argv = [sys.executable, "-c", "from anchor_build.cli import main; main()"]
        done = subprocess.run(argv, cwd=path.parent, env=env, capture_output=True, text=True, check=False)
        assert [line.partition(",")[2] for line in done.stdout.split()] == expected, done.stderr


def test_the_file_to_start_from_is_harmless_and_its_examples_are_right(anchor: Anchor, write: Write) -> None:
    text = (TOP / "contrib" / "anchor.toml").read_text(encoding="utf-8")
    assert dict(profile.read_file(write(text)).profiles["default"].values) == {}
    examples = profile.read_file(write(re.sub("^#(?=[^ \n])", "", text, flags=re.MULTILINE))).profiles
    assert set(examples) == {"default", "site", "login"}
    Path("eab-key.txt").write_text("a2V5\n")
    assert anchor("--profile", "login", "check", "root=anchor").status == 0


def test_the_examples_of_the_document_are_right(anchor: Anchor, write: Write) -> None:
    [text] = re.findall(r"^```toml\n(.*?)^```", (TOP / "doc" / "profiles.md").read_text(encoding="utf-8"), re.M | re.S)
    write(text)
    Path("eab-key.txt").write_text("a2V5\n")
    given = ["--set", "rd.anchor.acme.eab_kid=k"]
    assert anchor("--profile", "login", "check", *given, "root=anchor").status == 0
