"""anchor-boot.sh: the order of the steps, what a failure leads to, and what is handed over to the booted root.

Stand-ins for what the steps do lie beside the libraries, where the boot loads them last; each writes down that it ran
and fails once for each line in a file of its name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from anchor_build.manifest import Manifest, manifest_text
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from contrib.site import pki
from tests.conftest import OLDER_CHOICES, SITE_STAGES, TOP, LayOut
from tests.shell.conftest import Shell

LINE = "root=anchor rd.anchor.local-file.directory=/c squashfs_server=https://store/i.squashfs"

STAND_INS = """
stand_in() {
    printf '%s\\n' "$*" >>"$ANCHOR_ROOT/calls"
    [ -s "$ANCHOR_ROOT/fail-$1" ] || return 0
    sed -i 1d "$ANCHOR_ROOT/fail-$1"
    anchor_fail "the $1 is broken" "mend the $1"
}
anchor_net_run() { stand_in network; }
anchor_net_hostname() { printf 'node17\\n'; }
anchor_clock_run() { stand_in clock; }
anchor_overlay_run() { stand_in overlay "$@"; }
modprobe() { printf '%s\n' "$*" >>"$ANCHOR_ROOT/modprobe"; }
mend() {
    [ ! -e "$ANCHOR_ROOT/mended" ] || cat "$ANCHOR_ROOT/mended" >"$ANCHOR_ROOT/proc/cmdline"
}
anchor_boot_shell() {
    printf 'shell %s\\n' "$1" >>"$ANCHOR_ROOT/calls"
    mend
}
sleep() {
    printf 'sleep %s\\n' "$1" >>"$ANCHOR_ROOT/calls"
    mend
}
"""
STAGES = {
    "auth/20-local-file": """
anchor_local_file_run() {
    stand_in auth "$anchor_local_file_directory" || return 1
    printf 'a certificate\\n' >"$ANCHOR_ROOT/run/anchor/credentials/client.crt"
    printf 'a key\\n' >"$ANCHOR_ROOT/run/anchor/credentials/client.key"
    chmod 0666 "$ANCHOR_ROOT"/run/anchor/credentials/*
    anchor_note subject node17
    anchor_local_file_directory=changed
    cd /
}
""",
    "image/10-squashfs": """
anchor_squashfs_run() { stand_in image "$anchor_squashfs_url" "$(anchor_https_scheme_there && echo with transports)"; }
anchor_squashfs_mount() { stand_in mount "$@"; }
anchor_https_scheme_there() { command -v anchor_https_run >/dev/null; }
""",
}
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def node(shell: Shell, lay_out: LayOut) -> Shell:
    """Make a node whose initramfs holds the core, two auth stages and squashfs."""
    plan = make_plan(load_registry([SITE_STAGES]), auth=["local-file", "none"], image=["squashfs"])
    lay_out(plan, shell.root)
    libraries = shell.root / "usr/lib/anchor"
    (libraries / "lib" / "zz-stand-ins.sh").write_text(STAND_INS)
    for stage, text in STAGES.items():
        (libraries / "stages" / stage / "stage.sh").write_text(text)
    for directory in ("proc/sys/kernel", "etc"):
        (shell.root / directory).mkdir(parents=True, exist_ok=True)
    (shell.root / "proc/cmdline").write_text(f"{LINE}\n")
    return shell


@pytest.fixture
def run(node: Shell) -> Run:
    def run(script: str = "anchor_boot_cmdline && anchor_boot_main", line: str = "") -> CompletedProcess[str]:
        if line:
            (node.root / "proc/cmdline").write_text(f"{line}\n")
        return node.run(f'NEWROOT=/newroot; . "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-boot.sh"; {script}')

    return run


def calls(node: Shell) -> list[str]:
    file = node.root / "calls"
    return file.read_text().replace(str(node.root), "").splitlines() if file.exists() else []


def report(node: Shell) -> dict[str, Any]:
    found = json.loads((node.root / "run/anchor/boot.json").read_text())
    assert isinstance(found, dict)
    return found


def stand_in(node: Shell, functions: str) -> None:
    """Let the node have these instead of its own: whatever it sources, it sources them last."""
    with (node.root / "usr/lib/anchor/lib/zz-stand-ins.sh").open("a") as file:
        file.write(functions)


def fail(node: Shell, step: str, times: int = 1) -> None:
    (node.root / f"fail-{step}").write_text("once\n" * times)


def keep_report(node: Shell) -> None:
    """Keep the boot.json of the moment in which a failed boot waits, as `then`."""
    text = STAND_INS.replace(
        "sleep() {\n", 'sleep() {\n    cp "$ANCHOR_ROOT/run/anchor/boot.json" "$ANCHOR_ROOT/then"\n'
    )
    (node.root / "usr/lib/anchor/lib/zz-stand-ins.sh").write_text(text)


STEPS = ["network", "clock", "auth", "image", "mount", "overlay"]
CALLS = [
    "network",
    "clock",
    "auth /c",
    "image https://store/i.squashfs with transports",
    "mount /run/anchor/lower",
    "overlay /run/anchor/lower /newroot",
]


def test_the_drivers_of_the_last_steps_are_loaded_beforehand(node: Shell, run: Run) -> None:
    done = run("anchor_boot_cmdline && anchor_boot_main && wait")
    assert done.returncode == 0, done.stderr
    assert (node.root / "modprobe").read_text() == "-q -a overlay loop squashfs loop\n"


def test_the_steps_run_in_their_order_and_are_reported(node: Shell, run: Run) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "")
    assert calls(node) == CALLS
    found = report(node)
    assert (found["result"], found["node"]) == ("ok", "node17")
    assert re.fullmatch(r"\d\S+", found["anchor"])
    assert found["kernel"] == Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert [(step["step"], step["result"]) for step in found["steps"]] == [(step, "ok") for step in STEPS]
    stages = {step["step"]: step["stage"] for step in found["steps"]}
    assert stages == {**dict.fromkeys(STEPS, ""), "auth": "local_file", "image": "squashfs", "mount": "squashfs"}
    assert found["steps"][2]["subject"] == "node17"
    assert "anchor: auth (local_file): done in 0." in done.stderr


def test_credentials_are_for_root_only_and_older_names_lead_to_them(node: Shell, run: Run) -> None:
    run()
    credentials = node.root / "run/anchor/credentials"
    assert credentials.stat().st_mode & 0o777 == 0o700
    for name in ("client.crt", "client.key"):
        assert (credentials / name).stat().st_mode & 0o777 == 0o600
    assert (node.root / "client.cert").readlink() == credentials / "client.crt"
    assert (node.root / "client.key").readlink() == credentials / "client.key"
    assert (node.root / "run/anchor/steps").stat().st_mode & 0o777 == 0o700
    assert (node.root / "run/anchor").stat().st_mode & 0o777 == 0o755


def test_dracut_is_asked_for_the_network(node: Shell, run: Run) -> None:
    assert run("anchor_boot_cmdline").returncode == 0
    assert (node.root / "etc/cmdline.d/50-anchor.conf").read_text() == "rd.neednet=1\n"
    assert calls(node) == []


@pytest.mark.parametrize(
    "line", ["quiet", "root=/dev/sda1", "root=anchor root=live:x", "root", "root=anchored", "-- root=anchor"]
)
def test_another_root_is_none_of_our_business(node: Shell, run: Run, line: str) -> None:
    done = run(
        'anchor_boot_cmdline; printf "%s " $?; anchor_boot_main; printf "%s " $?; anchor_boot_handoff; printf $?', line
    )
    assert (done.stdout, done.stderr) == ("1 0 0", "")
    assert calls(node) == []
    assert not (node.root / "etc/cmdline.d").exists()
    assert not (node.root / "run/anchor/boot.json").exists()
    assert not (node.root / "run/systemd").exists()


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_step_says_why_and_is_tried_again_after_the_shell(node: Shell, run: Run, step: str) -> None:
    fail(node, step)
    done = run()
    assert done.returncode == 0
    made = calls(node)
    before = CALLS[: STEPS.index(step) + 1]
    message, pause = made[len(before)], made[len(before) + 1]
    assert made == [*before, message, pause, *CALLS]
    assert message.startswith("shell ")
    assert f"step {step}" in message
    assert 0 <= int(pause.removeprefix("sleep ")) <= 30
    assert f"error: the {step} is broken" in done.stderr
    assert f"why:        the {step} is broken" in done.stderr
    assert f"what to do: mend the {step}" in done.stderr
    found = report(node)
    assert found["result"] == "ok"
    (failed,) = [s for s in found["steps"] if s["result"] == "failed"]
    assert (failed["step"], failed["error"], failed["hint"]) == (step, f"the {step} is broken", f"mend the {step}")
    assert len(found["steps"]) == len(before) + len(STEPS)


def certificate(directory: Path, minutes: int = 60) -> Path:
    """Make a certificate that ends that many minutes from now."""
    end = (datetime.now(UTC) + timedelta(minutes=minutes)).strftime("%Y%m%d%H%M%SZ")
    return pki.issue(pki.make_authority(directory / "ca"), directory, "node17", not_after=end).certificate


def leave(node: Shell, leaf: Path) -> None:
    """Let the auth stage leave this certificate."""
    stage = node.root / "usr/lib/anchor/stages/auth/20-local-file/stage.sh"
    text = STAGES["auth/20-local-file"].replace("printf 'a certificate\\n' >", f"cat {leaf} >")
    assert str(leaf) in text
    stage.write_text(text)


def test_a_certificate_that_is_still_good_is_not_ordered_again(node: Shell, run: Run, tmp_path: Path) -> None:
    leave(node, certificate(tmp_path))
    fail(node, "image", 2)
    done = run()
    assert [call.split()[0] for call in calls(node)].count("auth") == 1
    assert [call.split()[0] for call in calls(node)].count("image") == 3
    assert done.stderr.count("auth (local_file): the certificate of this boot is still good") == 2
    assert report(node)["result"] == "ok"
    assert [step["step"] for step in report(node)["steps"]].count("auth") == 1


@pytest.mark.parametrize(
    "loss",
    [
        "anchor_reject_credentials",
        'rm "$ANCHOR_ROOT/run/anchor/credentials/client.key"',
        ': >"$ANCHOR_ROOT/run/anchor/credentials/client.crt"',
        'printf "garbage\\n" >"$ANCHOR_ROOT/run/anchor/credentials/client.crt"',
        'printf "none\\n" >"$ANCHOR_ROOT/run/anchor/credentials.from"',
    ],
    ids=["refused", "key gone", "empty", "garbage", "another stage"],
)
def test_what_is_of_no_use_is_ordered_again(node: Shell, run: Run, tmp_path: Path, loss: str) -> None:
    leave(node, certificate(tmp_path))
    text = STAGES["image/10-squashfs"].replace(
        "anchor_squashfs_run() {", f'anchor_squashfs_run() {{\n[ ! -s "$ANCHOR_ROOT/fail-image" ] || {loss}\n'
    )
    (node.root / "usr/lib/anchor/stages/image/10-squashfs/stage.sh").write_text(text)
    fail(node, "image")
    assert run().returncode == 0
    assert [call.split()[0] for call in calls(node)].count("auth") == 2


def test_what_an_earlier_try_left_is_gone_before_auth_runs_again(node: Shell, run: Run) -> None:
    """A stage that takes what it finds must not find what was refused. What was there before the boot is not that."""
    credentials = node.root / "run/anchor/credentials"
    credentials.mkdir(parents=True)
    for name in ("client.crt", "client.key", "s3", "site.token"):
        (credentials / name).write_text("from before\n")
    look = 'for file in "$ANCHOR_ROOT"/run/anchor/credentials/*; do stand_in "saw ${file##*/}"; done\n'
    leave = "printf 'keys\\n' >\"$ANCHOR_ROOT/run/anchor/credentials/s3\"\n"
    begin = "anchor_local_file_run() {\n"
    text = STAGES["auth/20-local-file"].replace(begin, f"{begin}{look}{leave}")
    (node.root / "usr/lib/anchor/stages/auth/20-local-file/stage.sh").write_text(text)
    fail(node, "image")
    assert run().returncode == 0
    made = calls(node)
    again = made.index("auth /c") + 1
    before = [f"saw {name}" for name in ("client.crt", "client.key", "s3", "site.token")]
    assert [call for call in made[:again] if call.startswith("saw")] == before
    assert [call for call in made[again:] if call.startswith("saw")] == ["saw site.token"]


SECRET = "hunter2"  # noqa: S105 - nobody's
PLACES = {
    "url": f"rd.anchor.squashfs.url=https://u:{SECRET}@s/i?token={SECRET} "
    f"rd.anchor.squashfs.mirrors=https://u:{SECRET}@t/i",
    "manifest": f"rd.anchor.manifest=https://u:{SECRET}@s/d/m,https://u:{SECRET}@t/m?token={SECRET}",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_traced_boot_shows_no_password(node: Shell, run: Run, place: str) -> None:
    """With rd.debug; the real image stage, and a download that fails, so that what is said of failures is seen too."""
    stage = node.root / "usr/lib/anchor/stages/image/10-squashfs/stage.sh"
    stage.write_text((TOP / "dracut-modules/image-squashfs/stage.sh").read_text())
    manifest = manifest_text(Manifest(image="squashfs", sha256="a" * 64, size=9, created=1, file="image"))
    (node.root / "manifest").write_text(manifest)
    stand_ins = """
    anchor_fetch() {
        case $2 in
            */manifest) cat "$ANCHOR_ROOT/manifest" >"$2" ;;
            *) anchor_fetch_plain "${1%% *}"; anchor_fail "$anchor_fetch_url is away" ;;
        esac
    }
    anchor_post_start() { :; }
    anchor_memory_space() { :; }
    anchor_memory_free() { :; }
    anchor_boot_shell() { exit 0; }
    """
    stand_in(node, stand_ins)
    report_to = f"rd.anchor.report=https://u:{SECRET}@r/"
    line = f"root=anchor rd.anchor.local-file.directory=/c {report_to} {PLACES[place]}"
    done = run("set -x; anchor_boot_cmdline && anchor_boot_main", line)
    assert "this node could not boot: step image (squashfs) failed" in done.stderr
    assert "/i is away" in done.stderr or "/image is away" in done.stderr
    # The boot itself is still traced after what is not.
    assert "+ anchor_step image image/squashfs" in done.stderr
    assert [text for text in done.stderr.splitlines() if SECRET in text] == []
    for name in ("boot.json", "boot.log"):
        assert SECRET not in (node.root / "run/anchor" / name).read_text()


@pytest.mark.parametrize("minutes", [4, -5])
def test_a_certificate_near_its_end_is_ordered_again(node: Shell, run: Run, tmp_path: Path, minutes: int) -> None:
    leave(node, certificate(tmp_path, minutes))
    fail(node, "image")
    assert run().returncode == 0
    assert [call.split()[0] for call in calls(node)].count("auth") == 2


def test_a_credential_that_cannot_be_protected_fails_the_step(node: Shell, run: Run) -> None:
    stand_ins = node.root / "usr/lib/anchor/lib/zz-stand-ins.sh"
    failing = '[ "$1" != 0600 ] || [ -e "$ANCHOR_ROOT/once" ] || { touch "$ANCHOR_ROOT/once"; return 1; }'
    stand_ins.write_text(STAND_INS + f'chmod() {{ {failing}; command chmod "$@"; }}\n')
    done = run()
    assert "why:        cannot keep the credentials from others" in done.stderr
    assert [call.split()[0] for call in calls(node)].count("auth") == 2
    (failed,) = [step for step in report(node)["steps"] if step["result"] == "failed"]
    assert failed["step"] == "auth"


def test_many_tries_leave_few_records(node: Shell, run: Run) -> None:
    fail(node, "image", 34)
    done = run("ANCHOR_BOOT_LOG_LINES=50; anchor_boot_cmdline && anchor_boot_main")
    assert done.returncode == 0
    assert "the records of earlier tries were dropped" in done.stderr
    assert len(report(node)["steps"]) < 75
    assert [step["step"] for step in report(node)["steps"][-6:]] == STEPS
    log = (node.root / "run/anchor/boot.log").read_text().splitlines()
    assert len(log) < len(done.stderr.splitlines()) - 50


def test_a_failure_tells_its_last_lines(node: Shell, run: Run) -> None:
    fail(node, "clock")
    script = 'anchor_post_start() { :; }; anchor_boot_cmdline && anchor_boot_main; cat "$ANCHOR_REPORT"/[0-9]*'
    done = run(script, f"{LINE} rd.anchor.report=http://127.0.0.1:9/")
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    [failed] = [event for event in events if event["event"] == "failed"]
    assert failed["at_ms"] > 0
    assert any(line.endswith("error: the clock is broken") for line in failed["log"])
    assert failed["log"][-1].endswith("boot.log and boot.json")


def test_the_report_tells_of_a_failure_while_the_shell_waits(node: Shell, run: Run) -> None:
    fail(node, "auth")
    keep_report(node)
    run()
    then = json.loads((node.root / "then").read_text())
    assert then["result"] == "failed"
    assert then["steps"][-1]["error"] == "the auth is broken"


def test_a_step_that_fails_silently_is_named(node: Shell, run: Run) -> None:
    (node.root / "usr/lib/anchor/stages/auth/20-local-file/stage.sh").write_text(
        'anchor_local_file_run() { [ -e "$ANCHOR_ROOT/tried" ] || { touch "$ANCHOR_ROOT/tried"; return 7; }; }\n'
    )
    assert "why:        the auth step failed without saying why" in run().stderr


def test_a_stage_that_exits_ends_its_step_only(node: Shell, run: Run) -> None:
    (node.root / "usr/lib/anchor/stages/auth/20-local-file/stage.sh").write_text(
        "anchor_local_file_run() { exit 0; }\n"
    )
    assert run().returncode == 0
    assert calls(node) == [call for call in CALLS if not call.startswith("auth")]


def test_a_step_does_not_read_the_console(node: Shell, run: Run) -> None:
    (node.root / "usr/lib/anchor/stages/auth/20-local-file/stage.sh").write_text(
        'anchor_local_file_run() { read -r line; printf "<%s>" "$line" >"$ANCHOR_ROOT/read"; }\n'
    )
    assert run("anchor_boot_cmdline && printf 'typed\\n' | anchor_boot_main").returncode == 0
    assert (node.root / "read").read_text() == "<>"


EFIVARS = "sys/firmware/efi/efivars"
REBOOT = f"{LINE} rd.anchor.on_failure=reboot rd.anchor.reboot_delay=5 rd.anchor.reboot_delay_max=30"


def count_file(node: Shell) -> Path:
    """Give the node a directory that stands in for efivarfs; return where the count goes."""
    directory = node.root / EFIVARS
    directory.mkdir(parents=True)
    (directory / "BootOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(b"\7\0\0\0\1\0")
    return directory / "AnchorFailedBoots-6f1d5a0c-93f6-4c1b-9c55-0d4a1e4c7b36"


def pauses(node: Shell) -> list[int]:
    return [int(call.removeprefix("sleep ")) for call in calls(node) if call.startswith("sleep ")]


def test_a_firmware_that_counts_makes_each_reboot_later(node: Shell, run: Run) -> None:
    counter = count_file(node)
    counter.write_bytes(b"\7\0\0\0\2")
    fail(node, "network")
    done = run(line=REBOOT)
    # The stand-in for the kernel does not reboot, so the boot goes on, and its success ends the count.
    assert (node.root / "proc/sys/kernel/sysrq").read_text() == "1\n"
    assert (node.root / "proc/sysrq-trigger").read_text() == "b\n"
    assert calls(node)[0] == "network"
    assert 0 <= pauses(node)[0] <= 20
    assert pauses(node)[1] == 30
    assert "the network is broken" in done.stderr
    assert "failure 3 in a row, as the firmware counts" in done.stderr
    assert not counter.exists()


@pytest.mark.parametrize(
    ("failures", "window"), [("1", 5), ("2", 10), ("3", 20), ("4", 30), ("15", 30)], ids=lambda value: str(value)
)
def test_the_wait_doubles_up_to_its_limit(node: Shell, run: Run, failures: str, window: int) -> None:
    script = f"anchor_boot_load; anchor_boot_parse; anchor_count_up() {{ anchor_count={failures}; }}\n"
    script += 'anchor_boot_pause() { printf "%s " "$1"; }; anchor_boot_sysrq() { printf "%s" "$1"; }\n'
    assert run(script + "anchor_boot_reboot", REBOOT).stdout == f"{window} b"


def test_without_such_a_firmware_it_tries_again_in_place_before_the_reboot(node: Shell, run: Run) -> None:
    fail(node, "network", 4)
    done = run(line=REBOOT)
    waits = pauses(node)
    assert all(0 <= wait <= most for wait, most in zip(waits, (5, 10, 20, 30), strict=False))
    assert len(waits) == 5  # the last one is for the kernel to act
    assert calls(node)[:8:2] == ["network"] * 4
    assert (node.root / "proc/sysrq-trigger").read_text() == "b\n"
    assert [f"failure {n} in a row\n" in done.stderr for n in (1, 2, 3, 4, 5)] == [True] * 4 + [False]


def test_three_failures_in_place_need_no_reboot(node: Shell, run: Run) -> None:
    fail(node, "network", 3)
    assert run(line=REBOOT).returncode == 0
    assert not (node.root / "proc/sysrq-trigger").exists()
    assert report(node)["result"] == "ok"


def test_poweroff_at_once(node: Shell, run: Run) -> None:
    fail(node, "clock")
    run(line=f"{LINE} rd.anchor.on_failure=poweroff")
    assert (node.root / "proc/sysrq-trigger").read_text() == "o\n"
    assert calls(node)[:3] == ["network", "clock", "sleep 30"]


@pytest.mark.parametrize(("word", "key"), [("reboot", "b"), ("poweroff", "o")])
def test_an_image_stage_may_end_the_boot_as_a_success(node: Shell, run: Run, word: str, key: str) -> None:
    stage = node.root / "usr/lib/anchor/stages/image/10-squashfs/stage.sh"
    stage.write_text(f"anchor_squashfs_run() {{ stand_in image; anchor_finish {word}; }}\n")
    stand_in(node, 'anchor_boot_sysrq() { printf "%s" "$1"; exit 7; }\n')
    done = run()
    assert (done.returncode, done.stdout) == (7, key), done.stderr
    assert f"done what it was booted for; next: {word}" in done.stderr
    assert report(node)["result"] == "ok"
    assert [call for call in calls(node) if call.startswith(("mount", "overlay"))] == []


@pytest.mark.parametrize(("works", "status", "key"), [(True, 6, ""), (False, 7, "b")])
def test_an_image_stage_may_end_the_boot_with_another_kernel(
    node: Shell, run: Run, works: bool, status: int, key: str
) -> None:
    stage = node.root / "usr/lib/anchor/stages/image/10-squashfs/stage.sh"
    stage.write_text("anchor_squashfs_run() { stand_in image; anchor_finish kexec; }\n")
    kexec = 'kexec() { [ "$*" = -e ] && exit 6; }' if works else "kexec() { return 1; }"
    stand_in(node, f'anchor_boot_sysrq() {{ printf "%s" "$1"; exit 7; }}\n{kexec}\n')
    done = run()
    assert (done.returncode, done.stdout) == (status, key), done.stderr
    assert "done what it was booted for; next: kexec" in done.stderr
    assert works or "it reboots instead" in done.stderr
    assert report(node)["result"] == "ok"


def test_an_image_stage_may_mount_the_root_itself(node: Shell, run: Run) -> None:
    stage = node.root / "usr/lib/anchor/stages/image/10-squashfs/stage.sh"
    stage.write_text('anchor_squashfs_run() { anchor_finish root; }\nanchor_squashfs_root() { stand_in root "$@"; }\n')
    assert run().returncode == 0
    assert calls(node)[-1] == "root /newroot"
    assert [step["step"] for step in report(node)["steps"]][-2:] == ["image", "root"]


def test_a_kernel_that_ignores_sysrq_leads_to_another_try_and_no_shell(node: Shell, run: Run) -> None:
    fail(node, "clock")
    done = run(line=f"{LINE} rd.anchor.on_failure=poweroff")
    assert "the kernel did not act on sysrq o" in done.stderr
    assert calls(node)[:4] == ["network", "clock", "sleep 30", "network"]
    assert not [call for call in calls(node) if call.startswith("shell ")]


def test_wrong_parameters_stop_the_boot_before_its_first_step(node: Shell, run: Run) -> None:
    (node.root / "mended").write_text(LINE)
    done = run(line=f"{LINE} rd.anchor.fetch.attempts=0 rd.anchor.nothing=1 acme_server=x")
    made = calls(node)
    assert made[0].startswith("shell step parameters failed")
    assert made[2:] == CALLS
    assert "error: rd.anchor.fetch.attempts: is not a whole number from 1 to 1000" in done.stderr
    assert "error: rd.anchor.nothing: is not a parameter of any stage in this initramfs" in done.stderr
    assert "what to do: correct the kernel command line" in done.stderr
    assert report(node)["result"] == "ok"


def test_wrong_parameters_are_in_the_report(node: Shell, run: Run) -> None:
    keep_report(node)
    (node.root / "mended").write_text(LINE)
    run("anchor_boot_cmdline", line=f"{LINE} rd.anchor.fetch.attempts=0")
    then = json.loads((node.root / "then").read_text())
    assert then["result"] == "failed"
    assert "rd.anchor.fetch.attempts" in json.dumps(then)


def test_wrong_parameters_power_off_where_that_is_asked(node: Shell, run: Run) -> None:
    (node.root / "mended").write_text(LINE)
    run(line=f"{LINE} rd.anchor.on_failure=poweroff rd.anchor.nothing=1")
    assert (node.root / "proc/sysrq-trigger").read_text() == "o\n"


@pytest.mark.parametrize("word", OLDER_CHOICES)
def test_an_older_entry_that_asks_for_what_is_not_there_does_not_boot(node: Shell, run: Run, word: str) -> None:
    (node.root / "mended").write_text(f"{LINE} {word}=0")
    done = run(line=f"{LINE} {word}=x")
    assert calls(node)[0].startswith("shell step parameters failed")
    assert f"error: {word}: chooses a stage that this initramfs does not hold" in done.stderr
    assert report(node)["result"] == "ok"


def test_hooks_may_run_again(node: Shell, run: Run) -> None:
    run()
    before = (node.root / "run/anchor/boot.json").read_text()
    assert run("anchor_boot_main && anchor_boot_main").returncode == 0
    assert calls(node) == CALLS
    assert (node.root / "run/anchor/boot.json").read_text() == before


def test_all_hooks_at_once_hand_off_and_do_it_once(node: Shell, run: Run) -> None:
    handed_off = node.root / "run/anchor/steps/handed-off"
    assert run("anchor_boot_cmdline; anchor_boot_main").returncode == 0
    assert not handed_off.exists()
    # The last of dracut's hooks will do that.
    assert report(node).get("switch_root_ms") is None
    shutil.rmtree(node.root / "run/anchor")
    done = run("anchor_boot_direct")
    assert (done.returncode, handed_off.exists()) == (0, True)
    found = report(node)
    assert (found["result"], found["switch_root_ms"] > 0) == ("ok", True)
    assert [step["step"] for step in found["steps"]] == STEPS
    before = calls(node)
    assert run("anchor_boot_direct").returncode == 0
    assert calls(node) == before


def test_the_hand_off_completes_the_report_in_the_booted_root(node: Shell, run: Run) -> None:
    run()
    for _ in range(2):
        assert run("anchor_boot_handoff").returncode == 0
    found = report(node)
    assert found["switch_root_ms"] > 0
    assert "ready_ms" not in found
    units = node.root / "run/systemd/system"
    assert (units / "multi-user.target.wants/anchor-ready.service").resolve() == units / "anchor-ready.service"
    start = next(
        line for line in (units / "anchor-ready.service").read_text().splitlines() if line.startswith("ExecStart")
    )
    command = re.fullmatch(r'ExecStart=/bin/sh -c "(.*)"', start)
    assert command is not None
    # Only what lies below /run is left after switch_root.
    script = command[1].replace("/run/anchor", f"{node.root}/run/anchor")
    done = node.run(script)
    assert (done.returncode, done.stderr) == (0, "")
    found = report(node)
    assert found["ready_ms"] >= found["switch_root_ms"]
    assert [step["step"] for step in found["steps"]] == STEPS


def test_the_cmdline_hook_changes_only_dracuts_variables(node: Shell, run: Run) -> None:
    hook = (TOP / "dracut-modules/anchor/hook-cmdline.sh").read_text()
    (node.root / "hook.sh").write_text(hook.replace(". /usr", f". {node.root}/usr"))
    script = """
    root=live:x
    set >"$ANCHOR_ROOT/before"
    . "$ANCHOR_ROOT/hook.sh"
    set >"$ANCHOR_ROOT/after"
    printf '%s %s' "$root" "${rootok:-}"
    """
    assert node.run(script).stdout == "anchor 1"
    names = [
        {line.partition("=")[0] for line in (node.root / name).read_text().splitlines() if re.match(r"\w+=", line)}
        for name in ("before", "after")
    ]
    assert names[1] - names[0] <= {"rootok", "BASH_LINENO", "PIPESTATUS", "_"}
    (node.root / "proc/cmdline").write_text("root=live:x\n")
    assert node.run(script).stdout == "live:x "


@pytest.mark.parametrize("hook", ["pre-mount", "cleanup"])
def test_the_other_hooks_leave_no_variables(node: Shell, run: Run, hook: str) -> None:
    run("anchor_boot_cmdline")
    text = (TOP / f"dracut-modules/anchor/hook-{hook}.sh").read_text()
    (node.root / "hook.sh").write_text(text.replace(". /usr", f". {node.root}/usr"))
    done = node.run('. "$ANCHOR_ROOT/hook.sh"; printf "%s <%s>" "$?" "${anchor_auth:-}${ANCHOR_LIB:-}"')
    assert done.stdout == "0 <>"


@pytest.mark.parametrize("name", ["local-file", "local_file"])
def test_a_stage_is_found_by_either_spelling(node: Shell, run: Run, name: str) -> None:
    assert run(line=f"{LINE} rd.anchor.auth={name}").returncode == 0
    assert calls(node) == CALLS


def test_a_stage_that_has_gone_says_how_to_build_it_in(node: Shell, run: Run) -> None:
    script = "anchor_boot_load; anchor_boot_source auth/gone-stage; printf '%s' $?"
    done = run(script)
    assert done.stdout == "1"
    assert "the stage auth/gone-stage is not in this initramfs" in done.stderr
    assert "build it with --auth gone-stage" in done.stderr
