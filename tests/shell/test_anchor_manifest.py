"""anchor-manifest.sh: what a node believes; real openssl, and other clocks by faketime.

The download is a stand-in that copies files of the test, which a URL names by its last part.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from subprocess import CompletedProcess

import pytest

from anchor_build.errors import AnchorError
from anchor_build.manifest import Manifest, manifest_text, parse_manifest, split_manifest
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from anchor_build.signing import open_key, sign_text
from tests.conftest import TOP, LayOut
from tests.shell.conftest import Shell, other_clock

VECTORS = json.loads((TOP / "tests/vectors/manifest.json").read_text(encoding="utf-8"))
KERNEL = Path("/proc/sys/kernel/osrelease").read_text().strip()
MANIFEST = Manifest(
    image="squashfs",
    sha256="a" * 64,
    size=1234,
    created=int(time.time()) - 60,
    format="erofs",
    file="node-1.erofs",
    expires=int(time.time()) + 3600,
    mirrors=("https://m1/i", "http://m2/i"),
    kernels=("5.0.0", KERNEL),
)
JUDGE = """
. "$LIB/anchor-report.sh" && . "$LIB/anchor-types.sh" && . "$LIB/anchor-params.sh" && . "$LIB/anchor-manifest.sh"
anchor_step_dir=$ANCHOR_ROOT
for file in "$ANCHOR_ROOT"/vectors/*/manifest; do
    anchor_manifest_judge "$file" M >/dev/null 2>&1
    printf '%s ' $?
    anchor_recall "$ANCHOR_ROOT/error"
    printf '%s\\n' "$anchor_recall"
done
"""


def test_vectors(shell: Shell) -> None:
    texts = [(text, "") for text in VECTORS["accept"].values()]
    texts += [(text, reason) for reason, group in VECTORS["refuse"].items() for text in group]
    for n, (text, _) in enumerate(texts):
        directory = shell.root / "vectors" / f"{n:04}"
        directory.mkdir(parents=True)
        (directory / "manifest").write_bytes(text.encode())
    done = shell.run(JUDGE)
    assert done.stderr == ""
    answers = done.stdout.splitlines()
    assert len(answers) == len(texts)
    for (text, reason), answer in zip(texts, answers, strict=True):
        if reason:
            assert answer == f"1 M is not a manifest that this node accepts: {reason}", text
        else:
            assert answer.startswith("0 "), (text, answer)


# What a hostile server may do to lines of a manifest.
PIECES = (
    *(
        "",
        "\0",
        " ",
        "-n",
        "08",
        "9" * 19,
        "-1",
        "0x10",
        "$(reboot)",
        "*",
        "\\",
        "\x1b[2J",
        "é",
        "\t",
        "\r",
        "=",
        "QUJD",
    ),
    *(
        "a" * 64,
        "https://",
        "file:///",
        "/../",
        "anchor-manifest",
        "signature",
        "size",
        "sha256",
        "verity",
        "mirror",
        "x-",
    ),
)
SPLIT = """
. "$LIB/anchor-report.sh" && . "$LIB/anchor-types.sh" && . "$LIB/anchor-params.sh" && . "$LIB/anchor-manifest.sh"
name=M
for dir in "$ANCHOR_ROOT"/random/*; do
    anchor_manifest__split "$dir/manifest" "$dir" 2>/dev/null && anchor_manifest_parse "$dir/body" M 2>/dev/null
    printf '%s\\n' $?
done
"""


def changed(random: Random, text: str) -> str:
    """Return a manifest after one to three changes."""
    lines = text.split("\n")
    for _ in range(random.randint(1, 3)):
        at, line = random.randrange(len(lines)), random.choice(lines)
        place = random.randint(0, len(lines[at]))
        match random.randrange(5):
            case 0:
                lines[at : at + 1] = []
            case 1:
                lines.insert(at, line)
            case 2:
                lines[at] = lines[at].partition(" ")[0] + " " + "".join(random.choices(PIECES, k=2))
            case 3:
                lines[at] = lines[at][:place] + random.choice(PIECES) + lines[at][place:]
            case 4:
                lines[at], lines[-1] = lines[-1], lines[at]
        lines = lines or [""]
    return "\n".join(lines)


def test_the_node_and_the_build_host_agree_on_what_is_a_manifest(shell: Shell) -> None:
    """Whatever is done to one: what either half takes, the other has to understand in the same way."""
    seed = 5
    random = Random(seed)  # noqa: S311 # not for a secret
    good = manifest_text(replace(MANIFEST, created=1700000000, expires=1800000000)) + "signature QUJD\n"
    texts = [good, *(changed(random, good) for _ in range(150))]
    for n, text in enumerate(texts):
        directory = shell.root / "random" / f"{n:04}"
        directory.mkdir(parents=True)
        (directory / "manifest").write_bytes(text.encode())
    done = shell.run(SPLIT)
    answers = done.stdout.splitlines()
    assert len(answers) == len(texts), done.stderr
    accepted = 0
    for n, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        try:
            body, signature = split_manifest(text.encode())
            parse_manifest(body)
        except AnchorError:
            assert answer != "0", (seed, n, text)
            continue
        assert answer == "0", (seed, n, text)
        directory = shell.root / "random" / f"{n:04}"
        assert ((directory / "body").read_bytes(), (directory / "signature").read_bytes()) == (body, signature), (
            seed,
            n,
        )
        accepted += 1
    assert 5 < accepted < len(texts) - 50


STAND_INS = """
anchor_fetch() {
    printf '%s\\n' "$*" "limit=$anchor_fetch_limit signed=$anchor_fetch_signed attempts=$anchor_fetch_attempts" \\
        >>"$ANCHOR_ROOT/asked"
    set -- "$1" "$2" "${1%%\\?*}"
    case ${3#*://} in
        */*) set -- "$1" "$2" "${3##*/}" ;;
        *) set -- "$1" "$2" m ;;
    esac
    anchor_fetch_plain "$1"
    anchor_note url "$anchor_fetch_url"
    [ -e "$ANCHOR_ROOT/www/$3" ] || { anchor_fail "$1 is away" "wait"; return 1; }
    anchor_note_number bytes "$(stat -c %s "$ANCHOR_ROOT/www/$3")"
    cat "$ANCHOR_ROOT/www/$3" >"$2"
}
"""
RUN = """
. "$ANCHOR_ROOT/usr/lib/anchor/lib/anchor-boot.sh" && anchor_boot_load && . "$ANCHOR_ROOT/stand-ins.sh"
mkdir -p "$ANCHOR_ROOT/run/anchor/steps/10"
anchor_params_parse || { printf 'bad: %s\\n' "$anchor_params_error"; exit 3; }
anchor_step_dir="$ANCHOR_ROOT/run/anchor/steps/10"
anchor_manifest_forget
(anchor_manifest_run) || exit 1
anchor_manifest_use || exit 2
printf '%s\\n' "$anchor_image" "$anchor_manifest_urls" "$anchor_manifest_sha256" "$anchor_manifest_size"
"""


@dataclass
class Node:
    """A node with squashfs and https; `www` is what it can fetch."""

    shell: Shell

    @property
    def www(self) -> Path:
        """The files of the server."""
        return self.shell.root / "www"

    def run(self, line: str = "rd.anchor.manifest=https://s/d/m", clock: str = "") -> CompletedProcess[str]:
        """Run the step with a command line, as parameters, fetching and choosing would."""
        (self.shell.root / "proc/cmdline").write_text(f"root=anchor {line}\n")
        env = {}
        if clock:
            env = {"PATH": other_clock(self.shell.root / "bin", clock, "date")}
        return self.shell.run(RUN, env=env)

    def told(self, name: str) -> str:
        """Return what the step noted."""
        file = self.shell.root / "run/anchor/steps/10" / name
        return file.read_text().strip() if file.exists() else ""

    def bake(self, name: str, text: str) -> None:
        """Write a file of /etc/anchor."""
        (self.shell.root / "etc/anchor" / name).write_text(text)


@dataclass(frozen=True)
class Keys:
    """Key pairs: the site's own, and others."""

    top: Path

    def sign(self, manifest: Manifest, key: str = "site") -> str:
        """Return the text of a signed manifest."""
        return sign_text(manifest_text(manifest), open_key(str(self.top / f"{key}.key")))

    def public(self, name: str = "site") -> str:
        """Return a public key."""
        return (self.top / f"{name}.pub").read_text()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    top = tmp_path_factory.mktemp("keys")
    for name in ("site", "next", "thief"):
        argv = ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]
        subprocess.run([*argv, top / f"{name}.key"], check=True, capture_output=True)
        subprocess.run(
            ["openssl", "pkey", "-in", top / f"{name}.key", "-pubout", "-out", top / f"{name}.pub"], check=True
        )
    return Keys(top)


@pytest.fixture
def node(shell: Shell, lay_out: LayOut) -> Node:
    lay_out(make_plan(load_registry(), image=["squashfs"]), shell.root)
    (shell.root / "stand-ins.sh").write_text(STAND_INS)
    (shell.root / "proc").mkdir()
    (shell.root / "www").mkdir()
    return Node(shell)


@pytest.fixture
def signed(node: Node, keys: Keys) -> Node:
    """Make a node that holds the site's manifest key, and whose server has a signed manifest."""
    node.bake("manifest.pub", keys.public())
    (node.www / "m").write_text(keys.sign(MANIFEST))
    return node


OK = ["squashfs", "https://m1/i http://m2/i https://s/d/node-1.erofs", "a" * 64, "1234"]


def test_a_signed_manifest_says_what_to_boot(signed: Node) -> None:
    done = signed.run()
    assert done.stdout.splitlines() == OK, done.stderr
    assert (signed.shell.root / "asked").read_text().splitlines()[1] == "limit=65536 signed=1 attempts=8"
    assert len(signed.told("note-key")) == 64
    assert signed.told("note-image_sha256") == "a" * 64
    assert signed.told("error") == ""
    assert "no modules" not in done.stderr


@pytest.mark.parametrize(
    ("url", "beside"),
    [
        ("https://s", "https://s/node-1.erofs"),
        ("https://s:8443?v=1/2", "https://s:8443/node-1.erofs"),
        ("https://s/m", "https://s/node-1.erofs"),
        ("https://s/d/m?x=/y", "https://s/d/node-1.erofs"),
    ],
)
def test_the_image_is_beside_the_manifest_wherever_that_is(signed: Node, keys: Keys, url: str, beside: str) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, mirrors=())))
    done = signed.run(f"rd.anchor.manifest={url}")
    assert done.stdout.splitlines()[1] == beside, done.stderr


def test_what_is_noted_is_of_the_manifest_that_counts(signed: Node, keys: Keys) -> None:
    (signed.www / "old").write_text(keys.sign(replace(MANIFEST, created=MANIFEST.created - 60, size=9)))
    done = signed.run("rd.anchor.manifest=https://s/d/old,https://s/d/away,https://s/d/m")
    assert done.returncode == 0, done.stderr
    assert signed.told("note-url") == "https://s/d/m"
    assert signed.told("number-bytes") == str((signed.www / "m").stat().st_size)
    assert signed.told("number-image_bytes") == "1234"
    assert len(signed.told("note-key")) == 64
    assert signed.told("error") == ""


def test_an_unsigned_manifest_counts_only_without_a_key(node: Node, keys: Keys) -> None:
    (node.www / "m").write_text(manifest_text(MANIFEST))
    done = node.run()
    assert done.stdout.splitlines() == OK, done.stderr
    assert "nothing but the server vouches for" in done.stderr
    assert "signed=0" in (node.shell.root / "asked").read_text()
    node.bake("manifest.pub", keys.public())
    assert node.run().returncode == 1
    assert "it is not signed" in node.told("error")
    assert "--sign-key" in node.told("hint")


@pytest.mark.parametrize("urls", ["http://s/m", "https://t/m,http://s/m"])
def test_plain_http_needs_a_key(node: Node, keys: Keys, urls: str) -> None:
    (node.www / "m").write_text(keys.sign(MANIFEST))
    done = node.run(f"rd.anchor.manifest={urls}")
    assert "rd.anchor.manifest http:// is not protected: use https://" in done.stdout
    node.bake("manifest.pub", keys.public())
    assert node.run(f"rd.anchor.manifest={urls}").returncode == 0


def test_any_of_several_keys_may_have_signed(signed: Node, keys: Keys) -> None:
    signed.bake("manifest.pub", keys.public("next") + keys.public())
    assert signed.run().returncode == 0
    (signed.www / "m").write_text(keys.sign(MANIFEST, "next"))
    assert signed.run().returncode == 0
    (signed.www / "m").write_text(keys.sign(MANIFEST, "thief"))
    assert signed.run().returncode == 1
    assert "none of the 2 manifest keys in this initramfs made its signature" in signed.told("error")


Change = Callable[[str, Keys], str]
CHANGES: dict[str, Change] = {
    "another key": lambda text, keys: keys.sign(MANIFEST, "thief"),
    "a byte": lambda text, keys: text.replace("size 1234", "size 1235"),
    "a line less": lambda text, keys: text.replace("mirror http://m2/i\n", ""),
    "a line more": lambda text, keys: text.replace("signature", "mirror http://evil/\nsignature"),
    "another signature": lambda text, keys: (
        text[: text.index("signature")] + keys.sign(MANIFEST, "thief").splitlines()[-1] + "\n"
    ),
    "no signature": lambda text, keys: text[: text.index("signature")],
    "an empty signature": lambda text, keys: text[: text.index("signature")] + "signature \n",
    "cut off": lambda text, keys: text[:-20],
    "cut in two": lambda text, keys: text[: len(text) // 2],
    "text behind": lambda text, keys: text + "mirror http://evil/\n",
    "two": lambda text, keys: text + text,
    "empty": lambda text, keys: "",
    "an error page": lambda text, keys: "<html>\n" + text,
    "large": lambda text, keys: text + "x-a b\n" * 20000,
    "binary": lambda text, keys: "\x7fELF\x01\x02\n" + text,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_manifest_is_refused(signed: Node, keys: Keys, change: str) -> None:
    text = (signed.www / "m").read_text()
    (signed.www / "m").write_text(CHANGES[change](text, keys))
    done = signed.run()
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not a manifest that this node accepts: " in signed.told("error")
    assert signed.told("hint")
    assert "evil" not in done.stderr


def test_bytes_that_a_shell_does_not_see_change_nothing(signed: Node) -> None:
    """A NUL, which `read` drops or refuses: what was verified is what is used."""
    data = (signed.www / "m").read_bytes()
    (signed.www / "m").write_bytes(data.replace(b"squashfs", b"squa\0shfs"))
    done = signed.run()
    assert done.returncode == 1 or done.stdout.splitlines() == OK


def test_an_expired_manifest_is_refused_with_the_clock(signed: Node, keys: Keys) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, expires=int(time.time()) - 1)))
    assert signed.run().returncode == 1
    assert "it expired at 20" in signed.told("error")
    assert "the clock says 20" in signed.told("error")
    assert "rd.anchor.clock.ntp=" in signed.told("hint")


def test_without_a_clock_no_manifest_is_taken_for_timely(signed: Node, keys: Keys) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, expires=int(time.time()) - 1)))
    with (signed.shell.root / "stand-ins.sh").open("a") as file:
        file.write("date() { return 1; }\n")
    assert signed.run().returncode == 1
    assert "whether it is of this time cannot be told" in signed.told("error")


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is missing")
@pytest.mark.parametrize(
    ("clock", "words"),
    [("@1970-01-02 00:00:00", "but the clock says 1970-01-02"), ("@2099-01-01 00:00:00", "the clock says 2099-01-01")],
)
def test_a_wrong_clock_is_named(signed: Node, clock: str, words: str) -> None:
    assert signed.run(clock=clock).returncode == 1
    assert words in signed.told("error")
    assert "clock.ntp=" in signed.told("hint")


def test_an_older_manifest_than_the_initramfs_allows_is_refused(signed: Node) -> None:
    signed.bake("manifest-since", f"{MANIFEST.created}\n")
    assert signed.run().returncode == 0
    signed.bake("manifest-since", f"{MANIFEST.created + 1}\n")
    assert signed.run().returncode == 1
    assert "older than this initramfs allows (--manifest-since)" in signed.told("error")
    signed.bake("manifest-since", "a[$(reboot)]\n")
    assert signed.run().returncode == 1
    assert "manifest-since does not hold a time" in signed.told("error")


def test_the_newest_of_several_counts(signed: Node, keys: Keys) -> None:
    newer = replace(MANIFEST, created=MANIFEST.created + 30, sha256="b" * 64, file="node-2.erofs", mirrors=())
    (signed.www / "m2").write_text(keys.sign(newer))
    (signed.www / "m3").write_text(keys.sign(replace(newer, created=newer.created + 10), "thief"))
    done = signed.run("rd.anchor.manifest=https://a/m,https://b/m2,https://c/m3,https://d/away,https://e/x/m2?q=1")
    beside = "https://b/node-2.erofs https://e/x/node-2.erofs"
    assert done.stdout.splitlines() == ["squashfs", beside, "b" * 64, "1234"], done.stderr
    assert "2 of 5 URLs had no manifest that can be used" in done.stderr
    assert signed.told("error") == ""
    assert "attempts=2" in (signed.shell.root / "asked").read_text()


def test_with_none_of_several_the_first_reason_is_told(signed: Node) -> None:
    assert signed.run("rd.anchor.manifest=https://a/away,https://b/away").returncode == 1
    assert signed.told("error") == "none of 2 URLs has a manifest that can be used; the first: https://a/away is away"
    assert signed.told("hint") == "wait"


def test_missing_modules_for_the_running_kernel_are_told(signed: Node, keys: Keys) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, kernels=("5.0.0",))))
    done = signed.run()
    assert done.returncode == 0
    assert f"warning: the image has no modules for this kernel, {KERNEL}; it has them for: 5.0.0" in done.stderr


def test_the_image_stage_must_be_there(signed: Node, keys: Keys) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, image="oci")))
    assert signed.run().returncode == 1
    assert "this node cannot boot an image of type oci" in signed.told("error")
    assert "--image oci" in signed.told("hint")


def test_an_image_at_a_registry_has_places_and_no_kernels(shell: Shell, lay_out: LayOut, keys: Keys) -> None:
    lay_out(make_plan(load_registry(), image=["oci"]), shell.root)
    (shell.root / "stand-ins.sh").write_text(STAND_INS)
    for name in ("proc", "www"):
        (shell.root / name).mkdir()
    node = Node(shell)
    node.bake("manifest.pub", keys.public())
    places = ("https://registry.example:5000/nodes/compute:v1", "http://near/nodes/compute")
    manifest = Manifest("oci", "a" * 64, 1234, MANIFEST.created, mirrors=places)
    (node.www / "m").write_text(keys.sign(manifest))
    done = node.run()
    assert done.stdout.splitlines() == ["oci", " ".join(places), "a" * 64, "1234"], done.stderr
    assert "no modules" not in done.stderr
    assert node.run("rd.anchor.manifest=https://s/d/m rd.anchor.oci.image=registry.example/x").returncode == 3


def test_a_manifest_without_a_place_is_refused(signed: Node, keys: Keys) -> None:
    (signed.www / "m").write_text(keys.sign(replace(MANIFEST, file="", mirrors=())))
    assert signed.run().returncode == 1
    assert "does not say where the image is" in signed.told("error")


def test_the_image_stage_may_be_named_too(signed: Node, keys: Keys) -> None:
    line = "rd.anchor.manifest=https://s/d/m rd.anchor.image="
    assert signed.run(f"{line}squashfs").returncode == 0
    assert signed.run(f"{line}other").returncode == 1
    assert "name different image stages: other, squashfs" in signed.told("error")


def test_with_a_key_only_a_manifest_is_accepted(signed: Node) -> None:
    done = signed.run(f"rd.anchor.squashfs.url=https://s/i rd.anchor.squashfs.sha256={'b' * 64}")
    assert done.returncode == 3
    assert "rd.anchor.manifest is required: this initramfs boots only what a signed manifest names" in done.stdout


@pytest.mark.parametrize(
    "word",
    ["url=https://s/i", f"sha256={'b' * 64}", "mirrors=https://s/i,https://t/i"],
)
def test_a_manifest_and_an_image_exclude_each_other(node: Node, word: str) -> None:
    done = node.run(f"rd.anchor.manifest=https://s/m rd.anchor.squashfs.{word}")
    assert done.returncode == 3
    assert f"rd.anchor.squashfs.{word.partition('=')[0]} is not for a boot with rd.anchor.manifest=" in done.stdout


def test_neither_is_explained(node: Node) -> None:
    done = node.run("quiet")
    assert done.returncode == 3
    assert "rd.anchor.squashfs.url is required by the stage squashfs" in done.stdout


def test_what_the_environment_holds_does_not_count(signed: Node) -> None:
    (signed.www / "m").unlink()
    (signed.shell.root / "proc/cmdline").write_text("root=anchor rd.anchor.manifest=https://s/m\n")
    env = {"anchor_manifest_urls": "http://evil/i", "anchor_manifest_sha256": "e" * 64, "anchor_fetch_signed": "1"}
    show = 'printf "<%s>" "$anchor_manifest_urls$anchor_manifest_sha256$anchor_fetch_signed"; exit 0'
    done = signed.shell.run(RUN.replace("(anchor_manifest_run) || exit 1", show), env=env)
    assert done.stdout == "<>"
