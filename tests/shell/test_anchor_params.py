"""The node's parser and `anchor-build check` give the same answers: the same lines, refusals, choices and values.

The rendered files lie below a node's root as in an initramfs; every line goes through the node's proc/cmdline. One
shell process reads them all. The lines follow from the declarations of all stages, the site's too.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from anchor_build.check import check_command_line
from anchor_build.cmdline import COMMAND_LINE_MAX as LONGEST
from anchor_build.plan import Plan, make_plan, whole_plan
from anchor_build.registry import load_registry
from anchor_build.settings import Setting
from anchor_build.stage import PREFIX, Param, shell_word
from tests.conftest import SITE_STAGES, LayOut
from tests.shell.conftest import SHELLS, Shell

SHA = "0123456789abcdef" * 4
BASE = "root=anchor acme_server=ca.example rd.anchor.local-file.directory=/c squashfs_server=https://store/i"
# What may stand after @sha256: and is no digest.
NO_DIGESTS = ["", "abc", SHA[1:], f"{SHA}0", SHA.upper(), f"{SHA[1:]}g", f"{SHA}:t", f"{SHA}/", f"{SHA}@sha256:{SHA}"]
# One value that a type accepts in a form that has to be normalised, and some that it refuses.
RIGHT = {
    "string": "any=text",
    "name": "a.b-c",
    "bool": "Yes",
    "int": "017",
    "size": "10m",
    "size-or-percent": "007%",
    "duration": "2m",
    "host": "NTP.Example",
    "port": "0080",
    "email": "Ops@example.org",
    "url": "HTTPS://Store.Example:8443/a?b=c",
    "path": "//a//b/",
    "sha256": f"sha256:{SHA.upper()}",
    "mac": "01-AA-bb-CC-00-11-22",
    "disk": "/dev//vda",
    "tty": "/dev/ttyS1",
    "nfs-export": "nfs4:server:/export",
    "secret": "hunter2",
}
WRONG = {
    "string": ["\x01", "x\x02y", "\x7f"],
    "name": ["a b", "-a", "a/b", "x" * 65, "é"],
    "bool": ["maybe", "2", " yes"],
    "int": ["x", "1.5", "-1", "0", "9" * 19, "0x10", "99999", "1 2"],
    "size": ["x", "-1", "1X", "99999999T", "5%"],
    "size-or-percent": ["0%", "101%", "%", "1X"],
    "duration": ["x", "0", "-5", "1w", "9999d"],
    "choice": ["", "nothing", "SHELL", "*", "a b"],
    "host": ["a_b..c", "-a", "1.2.3", "256.1.1.1", "a b", "$(reboot)", "*"],
    "port": ["0", "65536", "x"],
    "email": ["ops", "@example", "a@b@c", "a b@c"],
    "url": ["ftp://x/y", "https://", "https://a b/", "https://a/'b", "$(reboot)", "://x", "https://h:99999/"],
    "path": ["a/b", "/a/../b", "/./a"],
    "sha256": ["x", SHA[1:], SHA + "0"],
    "mac": ["aa:bb", "*"],
    "disk": ["/etc/passwd", "vda", "serial:", "any"],
    "tty": ["/etc/passwd", "tty", "ttyS1/../x", "null"],
    "nfs-export": ["server:/x", "nfs:/x"],
    "secret": [""],
}
HOSTILE = [
    "$(reboot)",
    "`reboot`",
    "; reboot;",
    "a;b",
    "'",
    "\\",
    "*",
    "a|b&c>d",
    "${PATH}",
    "é\udcff",
    "-n",
    "%s%n",
    "!!",
]
LEGACY = (
    "root=anchor acme_server=acme.example/directory acme_email=ops@example.org "
    "squashfs_server=https://store/i.squashfs squashfs_curl=1 overlayfs_write=/etc,/var overlayfs_size=50%"
)
EXTRA = [
    "",
    "root=anchor",
    "root=live:x",
    "root",
    "quiet root=UUID=x ro",
    BASE,
    f"{BASE} root=/dev/sda1",
    f"root=/dev/sda1 {BASE}",
    LEGACY,
    LEGACY.replace("https://store", "store"),
    LEGACY.replace("acme.example", "https://acme.example"),
    LEGACY.replace("acme_email", "acme_mail"),
    LEGACY.replace("50%", "150%"),
    "root=anchor acme_server=bad(host squashfs_server=https://store/i",
    "root=anchor squashfs_server=https://store/i",
    "root=anchor rd.anchor.auth=none squashfs_server=https://store/i",
    f"{BASE} rd.anchor.auth=acme",
    f"{BASE} rd.anchor.auth=local-file",
    f"{BASE} rd.anchor.auth=local_file",
    f"{BASE} rd.anchor.auth=nobody",
    f"{BASE} rd.anchor.auth=",
    f"{BASE} rd.anchor.auth",
    f"{BASE} rd.anchor.image=plain-file",
    f"{BASE} rd.anchor.image=plain-file rd.anchor.plain-file.source=http://x/y",
    f"{BASE} rd.anchor.image=plain-file rd.anchor.plain-file.source=ftp://x/y",
    f"{BASE} rd.anchor.image=squashfs",
    f"{BASE} rd.anchor.image=https",
    f"{BASE} squashfs_server=http://store/i",
    f"{BASE} squashfs_server=http://store/i rd.anchor.squashfs.sha256={SHA}",
    f"{BASE} squashfs_server=http://store/i rd.anchor.squashfs.sha256=bad",
    f"{BASE} squashfs_server=gopher://store/i rd.anchor.squashfs.sha256={SHA}",
    f"{BASE} squashfs_server=nfs://store/i rd.anchor.squashfs.verity={SHA}",
    f"{BASE} squashfs_server=nfs://store/i rd.anchor.squashfs.verity={SHA} rd.anchor.squashfs.sha256={SHA}",
    f"{BASE} squashfs_server=nfs://store/i rd.anchor.squashfs.verity=bad",
    f"{BASE} rd.anchor.squashfs.mirrors=nfs://a/i,http://b/i",
    f"{BASE} rd.anchor.squashfs.mirrors=nfs://a/i,http://b/i rd.anchor.squashfs.verity={SHA}",
    f"{BASE} rd.anchor.manifest=https://h/m rd.anchor.squashfs.verity={SHA}",
    f"root=anchor acme_server=c rd.anchor.manifest=https://h/m rd.anchor.squashfs.verity={SHA}",
    f"{BASE} squashfs_server=HTTP://store/i",
    f"{BASE} squashfs_server=",
    f"{BASE} squashfs_server",
    f"{BASE} rd.anchor.nothing=1 rd.anchor. rd.anchor.acme. rd.anchor=1 RD.ANCHOR.AUTH=x rd.anchor.acme.SERVER=x",
    f"{BASE} rd.anchor.acme.server=a rd.anchor.acme.server=b acme_server=c",
    f"{BASE} rd.anchor.acme.server=bad( rd.anchor.acme.server=good.example",
    f"{BASE} rd.anchor.acme.server=good.example acme_server=bad(",
    f'{BASE} "rd.anchor.local-file.note=two words"',
    f'{BASE} rd.anchor.local-file.note="two words" rd.anchor.events="ttyS1"',
    f'{BASE} rd.anchor.local-file.note="never closed rd.anchor.auth=nobody',
    f'{BASE} rd.anchor.local-file.note=a"b c"d',
    f"{BASE} -- rd.anchor.auth=nobody",
    f"{BASE} --rd.anchor.auth=nobody",
    f"{BASE} =rd.anchor.auth=nobody",
    f"{BASE}\trd.anchor.auth=none \t",
    f'{BASE} rd.anchor.local-file.note="tab\there"',
    f"{BASE} rd.anchor.local-file.pin=1234",
    f"{BASE} rd.anchor.local-file.pin=",
    f"{BASE} rd.anchor.local-file.pin",
    f"{BASE} rd.anchor.acme.eab_kid=x rd.anchor.acme.eab_key=y",
    f"{BASE} rd.anchor.squashfs.curl=0 squashfs_curl",
    f"{BASE} rd.anchor.squashfs.curl=",
    *(
        f"root=anchor acme_server=ca.example rd.anchor.image=disk {words}"
        for words in (
            "dd.of=/dev/vda",
            "dd.of=/dev/vda rd.anchor.disk.url=https://h/x",
            "dd.of=/dev/vda oci.tag=h/x:y",
            "dd.of=/dev/vda oci.tag=h/x:y oci.blob=h/x@y rd.anchor.disk.url=https://h/x",
            "dd.of=/dev/vda oci.blob=h/x@y rd.anchor.disk.url=bad(",
            "dd.of=/dev/vda rd.anchor.disk.url=bad(",
            "oci.tag=h/x:y",
        )
    ),
    # Without rd.anchor.image=, a disk is a choice only with a place of its image.
    "root=anchor acme_server=ca.example dd.of=/dev/vda",
    "root=anchor acme_server=ca.example dd.of=/dev/vda oci.tag=h/x:y",
    "root=anchor acme_server=ca.example rd.anchor.manifest=https://h/m dd.of=/dev/vda",
    "root=anchor acme_server=ca.example rd.anchor.manifest=https://h/m dd.of=/dev/vda oci.tag=h/x:y",
    f"root=anchor acme_server=ca.example rd.anchor.manifest=https://h/m dd.of=/dev/vda rd.anchor.disk.sha256={SHA}",
    *(
        f"root=anchor acme_server=ca.example rd.anchor.image={words}"
        for words in (
            "oci rd.anchor.oci.image=HTTP://h/x:y",
            f"oci rd.anchor.oci.image=http://h/x:y@sha256:{SHA}",
            "oci rd.anchor.oci.image=h/x rd.anchor.oci.mirrors=http://near/x",
            "buildah buildah_registry=http://h buildah_image=x",
            f"buildah buildah_registry=http://h buildah_image=x@sha256:{SHA}",
            "buildah buildah_registry=h buildah_image=x",
        )
    ),
    "root=anchor acme_server=ca.example rd.anchor.manifest=https://h/m rd.anchor.oci.image=http://h/x:y",
    # What a kernel hands to its first process as a variable must not become a parameter.
    f"{BASE} anchor_acme_server=evil.example anchor_squashfs_url=http://evil/ anchor_auth=none",
]

# Prints a record for each line of the file $1: whether root= is anchor, the stages, each value, each refusal.
NODE = """
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-report.sh"
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-params.sh"
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-types.sh"
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-cmdline.sh"
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-boot.sh"
LC_ALL=C
export LC_ALL
anchor_say() { printf 'refused %s\\n' "$2"; }
# A process less for each of a thousand lines; test_anchor_cmdline.py reads files with the real one.
cat() {
    local text
    while IFS= read -r text || [ -n "$text" ]; do printf '%s\\n' "$text"; done <"$2"
}
anchor_params_load
while IFS= read -r line; do
    printf '%s\\n' "$line" >"$ANCHOR_ROOT/proc/cmdline"
    (
        anchor_boot_wanted && printf 'ours\\n'
        anchor_params_parse && printf 'accepted\\n'
        printf 'chosen %s %s\\n' "$anchor_auth" "$anchor_image"
        values
        printf 'end\\n'
    )
done <"$1"
"""


@dataclass(frozen=True)
class Answer:
    """What either side says of one line."""

    ours: bool
    accepted: bool
    chosen: tuple[str, str]
    values: tuple[tuple[str, str], ...]
    refused: tuple[str, ...]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Every stage in one initramfs, the site's too: selection has something to choose from."""
    registry = load_registry([SITE_STAGES])
    stages = [stage for stage in registry.stages if stage.id != "image-plain-file"]
    extra = [stage for stage in registry.stages if stage.id == "image-plain-file"]
    # Without a required parameter it would always win: it comes last here, as a site would have it.
    return Plan(registry.core, (*stages, *(replace(stage, order=80) for stage in extra)))


def wrong_values(param: Param) -> Iterator[str]:
    kind = str(param.options.get("of", param.type))
    for value in WRONG[kind]:
        yield value
        if param.type == "list":
            yield f"{right_value(param)},{value}"
    if param.type == "list":
        yield from (",", f"{right_value(param)},", f",{right_value(param)}")


def right_value(param: Param) -> str:
    kind = str(param.options.get("of", param.type))
    choices = param.options.get("choices")
    value = str(choices[-1]) if choices else RIGHT[kind]
    if kind == "url" and param.options.get("schemes"):
        value = value.replace("HTTPS", param.options["schemes"][0].upper())
    return f"{value},{value}" if param.type == "list" else value


def quoted(value: str) -> str:
    return f'"{value}"' if set(value) & set(" \t") else value


def lines_of(plan: Plan) -> Iterator[str]:
    """Make the lines that follow from the declarations."""
    for _, param in plan.params:
        for name in param.names:
            yield f"{BASE} {name}={quoted(right_value(param))}"
            yield f"{BASE} {name}"
            yield f"{BASE} {name}="
        yield f"{BASE} {param.key[:-1]}x={right_value(param)}"
        for value in wrong_values(param):
            yield f"{BASE} {param.names[-1]}={quoted(value)}"
        if param.type in ("string", "secret", "url", "path", "name", "choice", "list"):
            for value in HOSTILE if param.type == "string" else HOSTILE[:3]:
                yield f"{BASE} {param.key}={quoted(value)}"
    for name in plan.core.refused:
        yield from (f"{BASE} {name}", *(f"{BASE} {name}={value}" for value in ("", "0", "1", "/x y", "nfs:a:/b")))
    yield from EXTRA


def of_check(plan: Plan, line: str, baked: tuple[Setting, ...] = ()) -> Answer:
    result = check_command_line(plan, line, baked)
    errors = [error for error in result.errors if not error.startswith("root=anchor:")]
    return Answer(
        ours=len(errors) == len(result.errors),
        accepted=not errors,
        chosen=(shell_word(result.chosen.get("auth", "")), shell_word(result.chosen.get("image", ""))),
        values=tuple(sorted((k, v) for k, v in result.values.items() if k not in (f"{PREFIX}auth", f"{PREFIX}image"))),
        refused=tuple(sorted(comparable(error) for error in errors)),
    )


def comparable(error: str) -> str:
    """Cut what the build host says better: the nearest name, and how stages are spelt."""
    name, _, reason = error.partition(": ")
    reason = reason.partition(" of these stages")[0].partition(" of any stage")[0]
    return f"{name}: {reason.partition(' of this initramfs')[0]}"


def of_node(plan: Plan, record: list[str]) -> Answer:
    facts = [line.partition(" ") for line in record]
    auth, _, image = next((rest for word, _, rest in facts if word == "chosen"), "").partition(" ")
    # A name that was refused stays in the variable.
    known = {kind: {stage.word for stage in plan.of_kind(kind)} for kind in ("auth", "image")}
    values = [rest.partition("=") for word, _, rest in facts if word == "value"]
    return Answer(
        ours="ours" in record,
        accepted="accepted" in record,
        chosen=(auth if auth in known["auth"] else "", image if image in known["image"] else ""),
        values=tuple(sorted((key, value) for key, _, value in values)),
        refused=tuple(sorted(comparable(rest) for word, _, rest in facts if word == "refused")),
    )


def ask_node(shell: Shell, plan: Plan, lay_out: LayOut, lines: list[str], env: dict[str, str]) -> list[Answer]:
    lay_out(plan, shell.root)
    (shell.root / "proc").mkdir(exist_ok=True)
    (shell.root / "etc").mkdir(exist_ok=True)
    file = shell.root / "lines"
    file.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))
    params = [param for _, param in plan.params if param.key not in (f"{PREFIX}auth", f"{PREFIX}image")]
    printed = "".join(f"printf 'value %s=%s\\n' {p.key} \"${p.variable}\"\n" for p in params)
    done = shell.run(f"values() {{\n{printed}}}\n{NODE}", str(file), env=env, timeout=300)
    assert done.stderr == ""
    records = done.stdout.split("end\n")
    assert records.pop() == ""
    return [of_node(plan, record.splitlines()) for record in records]


def test_the_node_and_the_build_host_agree(shell: Shell, plan: Plan, lay_out: LayOut) -> None:
    # x86 kernels cut longer lines off, which `check` refuses beforehand.
    lines = [line for line in dict.fromkeys(lines_of(plan)) if len(line.encode(errors="surrogateescape")) < LONGEST]
    # The kernel gives words that it does not know to its first process as variables.
    env = {"anchor_acme_server": "evil.example", "anchor_https_proxy": "evil", "anchor_auth": "none"}
    answers = ask_node(shell, plan, lay_out, lines, env)
    assert len(answers) == len(lines) > 400
    for line, answer in zip(lines, answers, strict=True):
        assert answer == of_check(plan, line), line
    accepted = [answer.accepted for answer in answers]
    assert 100 < sum(accepted) < len(lines) - 50
    assert not (shell.root / "reboot").exists()


def test_each_parameter_is_refused_for_each_wrong_value(plan: Plan) -> None:
    for _, param in plan.params:
        refused = [v for v in wrong_values(param) if not of_check(plan, f"{BASE} {param.key}={quoted(v)}").accepted]
        assert refused, param.key


def test_defaults_are_baked_in_and_the_command_line_overrides_them(shell: Shell, plan: Plan, lay_out: LayOut) -> None:
    values = {
        "rd.anchor.local-file.pin": 'it\'s a "secret" $(reboot)',
        "rd.anchor.local-file.note": "two  words=more",
        "rd.anchor.fetch.attempts": "007",
        "rd.anchor.on_failure": "reboot",
        "rd.anchor.squashfs.curl": "yes",
    }
    params = {param.key: param for _, param in plan.params}
    baked = tuple(Setting(params[key], value) for key, value in values.items())
    (shell.root / "etc" / "anchor").mkdir(parents=True)
    text = "".join(f"{setting.param.key}={setting.value}\n" for setting in baked)
    (shell.root / "etc" / "anchor" / "params").write_text(text, encoding="utf-8")
    lines = [
        BASE,
        f"{BASE} rd.anchor.on_failure=poweroff rd.anchor.local-file.note=",
        f"{BASE} rd.anchor.local-file.pin=1234",
        f"{BASE} rd.anchor.fetch.attempts=0 rd.anchor.squashfs.curl=no",
    ]
    answers = ask_node(shell, plan, lay_out, lines, {})
    assert answers == [of_check(plan, line, baked) for line in lines]
    assert [answer.accepted for answer in answers] == [True, True, False, False]
    assert dict(answers[0].values)["rd.anchor.local-file.pin"] == values["rd.anchor.local-file.pin"]
    assert dict(answers[1].values)["rd.anchor.on_failure"] == "poweroff"


def test_the_first_stage_that_has_what_it_needs_is_chosen(shell: Shell, lay_out: LayOut) -> None:
    plan = make_plan(load_registry(), auth=["none", "acme"], image=["squashfs"])
    lines = ["root=anchor squashfs_server=s", "root=anchor squashfs_server=s acme_server=a"]
    answers = ask_node(shell, plan, lay_out, lines, {})
    assert answers == [of_check(plan, line) for line in lines]
    assert [answer.chosen for answer in answers] == [("none", "squashfs"), ("acme", "squashfs")]


def test_over_http_a_reference_ends_in_a_digest(shell: Shell, plan: Plan, lay_out: LayOut) -> None:
    oci, buildah = "oci rd.anchor.oci.image=http://h/x", "buildah buildah_registry=http://h buildah_image=x"
    base = "root=anchor acme_server=ca.example rd.anchor.image="
    lines = [f"{base}{words}@sha256:{digest}" for words in (oci, buildah) for digest in (SHA, *NO_DIGESTS)]
    lines += [f"{base}buildah buildah_registry=http://h/@sha256:{SHA} buildah_image=x", f"{base}{buildah}{SHA}"]
    answers = ask_node(shell, plan, lay_out, lines, {})
    assert answers == [of_check(plan, line) for line in lines]
    assert [line for line, answer in zip(lines, answers, strict=True) if answer.accepted] == [
        f"{base}{words}@sha256:{SHA}" for words in (oci, buildah)
    ]


def test_what_chooses_an_absent_stage_is_refused(shell: Shell, lay_out: LayOut) -> None:
    registry = load_registry([SITE_STAGES])
    plan = make_plan(registry, image=["squashfs"])
    base = "root=anchor rd.anchor.auth=none squashfs_server=s"
    words = [
        name
        for stage in registry.stages
        for param in stage.params
        if param.required and stage not in plan.stages
        for name in param.names
    ]
    assert {"acme_server", "rd.anchor.acme.server", "nfs_mount", "nfs_files", "rd.anchor.nfs.export"} <= set(words)
    values = ("1", "nfs4:a:/b", "", "0")
    lines = [f"{base} {word}={value}" for word in words for value in values] + [f"{base} {word}" for word in words]
    # An option of an absent stage asks for nothing by itself, and is no word of this node's either.
    lines += [f"{base} acme_email=a@b.c", f"{base} rd.anchor.acme.email=a@b.c"]
    answers = dict(zip(lines, ask_node(shell, plan, lay_out, lines, {}), strict=True))
    for line, answer in answers.items():
        assert answer == of_check(plan, line), line
    remedy = "chooses a stage that this initramfs does not hold: build it with --auth acme"
    assert answers[f"{base} acme_server=1"].refused == (f"acme_server: {remedy}",)
    assert answers[f"{base} rd.anchor.acme.server=1"].refused == (f"rd.anchor.acme.server: {remedy}",)
    assert answers[f"{base} nfs_mount=nfs4:a:/b"].refused == (
        "nfs_mount: chooses a stage that this initramfs does not hold: build it with --auth nfs",
    )
    assert [answers[f"{base} acme_server={value}"].accepted for value in ("", "0")] == [True, True]
    assert answers[f"{base} acme_email=a@b.c"].accepted
    refused = [line for line, answer in answers.items() if not answer.accepted]
    assert {f"{base} {word}={value}" for word in words for value in values[:2]} < set(refused)
    assert {f"{base} {word}=" for word in words if word.startswith(PREFIX)} < set(refused)


def test_a_word_of_a_stage_that_is_there_is_that_stage_s(shell: Shell, lay_out: LayOut) -> None:
    """The core's own list may name what a stage that came later takes."""
    registry = load_registry()
    core = replace(registry.core, refused=(*registry.core.refused, "nfs_mount"))
    plan = replace(make_plan(registry, auth=["nfs"], image=["squashfs"]), core=core)
    line = "root=anchor nfs_mount=nfs4:a:/b nfs_files=c:/client.cert,k:/client.key squashfs_server=s"
    (answer,) = ask_node(shell, plan, lay_out, [line], {})
    assert answer == of_check(plan, line)
    assert (answer.accepted, answer.chosen) == (True, ("nfs", "squashfs"))


def test_a_legacy_command_line_is_right(plan: Plan) -> None:
    answer = of_check(whole_plan(load_registry()), LEGACY)
    assert answer.accepted
    assert answer.chosen == ("acme", "squashfs")
    assert dict(answer.values)["rd.anchor.acme.server"] == "https://acme.example/directory"
    assert dict(answer.values)["rd.anchor.overlay.write"] == "/etc,/var"


def test_parsing_again_forgets_what_was_given_before(shell: Shell, plan: Plan, lay_out: LayOut) -> None:
    lay_out(plan, shell.root)
    (shell.root / "proc").mkdir()
    script = """
    . "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-boot.sh"
    anchor_boot_load 2>/dev/null
    printf '%s' "root=anchor rd.anchor.auth=acme rd.anchor.acme.email=bad" >"$ANCHOR_ROOT/proc/cmdline"
    anchor_params_parse 2>/dev/null
    printf '%s\\n' "$?"
    printf '%s' "root=anchor rd.anchor.local-file.directory=/c squashfs_server=x" >"$ANCHOR_ROOT/proc/cmdline"
    anchor_params_parse
    printf '%s %s <%s>\\n' "$?" "$anchor_auth" "$anchor_acme_email"
    """
    done = shell.run(script)
    assert (done.stdout, done.stderr) == ("1\n0 local_file <>\n", "")


def test_a_long_line_is_read_in_good_time(shell: Shell, plan: Plan, lay_out: LayOut) -> None:
    line = f"{BASE} " + " ".join(f"some.module.option{n}=value" for n in range(60))
    assert 1500 < len(line) < LONGEST
    assert ask_node(shell, plan, lay_out, [line], {}) == [of_check(plan, line)]


def test_the_stages_directory_may_be_empty(shell: Shell) -> None:
    library = Path(__file__).parents[2] / "lib" / "anchor-params.sh"
    done = shell.run(f'. {library}; anchor_params_load; printf "<%s>" "$anchor_stages"')
    assert (done.stdout, done.stderr, done.returncode) == ("<>", "", 0)


def test_every_shell_is_there() -> None:
    for argv in SHELLS.values():
        assert subprocess.run([*argv, "-c", "exit 0"], check=False).returncode == 0
