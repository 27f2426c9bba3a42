"""image oci: real images in a real registry, mounted in a mount namespace, compared with what umoci unpacks."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contrib.site import pki
from contrib.site.registry import CONFIG, INDEX, MANIFEST, PASSWORD, USER, Registry, registry
from tests.shell.conftest import SHELLS, TOP, Shell
from tests.shell.downloads import processes_of
from tests.stages import hostile_http as fake
from tests.stages.hostile_http import hostile
from tests.stages.oci_image import TAR, Layer, config_of, facts_of, push, unpacked_by_umoci

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("docker-registry", "umoci", "tar2sqfs"))),
    reason="needs root, docker-registry, umoci and tar2sqfs",
)

STAGE = TOP / "dracut-modules/image-oci/stage.sh"
WRONG = "not " + PASSWORD
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
SCRIPT = """
for lib in report params mounts memory fetch fetch-mirrors fetch-digest fetch-room stream http oci registry; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGE" || exit 9
LC_ALL=C
export LC_ALL
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10 LOWER=$ANCHOR_ROOT/run/anchor/lower
mkdir -p "$LOWER" || exit 9
anchor_stage_for_scheme() { return 1; }
anchor_oci_run && anchor_oci_mount "$LOWER" || exit 1
"""
SHOW = """
PYTHONPATH="$TOP" "$PYTHON" -m tests.stages.oci_image "$LOWER"
"""
PARAMETERS = ("image", "mirrors", "platform", "user", "password", "proxy")
FETCH = {"timeout": 30, "connect_timeout": 3, "stall": 5, "attempts": 3, "reserve": 1 << 20}
# Of what has to succeed, however busy this machine is: five TLS connections and a token that a program signs.
PATIENCE = {"anchor_fetch_timeout": "50", "anchor_fetch_connect_timeout": "20", "anchor_fetch_stall": "20"}


@dataclass(frozen=True)
class Site:
    """A CA, a node's certificate, and registries over one storage: open, with client certificates, and by password."""

    authority: pki.Authority
    node: pki.Leaf
    plain: Registry
    mutual: Registry
    basic: Registry
    token: Registry


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    top = tmp_path_factory.mktemp("site")
    authority = pki.make_authority(top / "ca")
    leaf = pki.issue(authority, top, "store")
    node = pki.issue(authority, top, "node17", client=True)
    storage = top / "storage"
    with (
        registry(top / "plain", storage=storage) as plain,
        registry(top / "mutual", storage=storage, leaf=leaf, client_ca=authority.certificate) as mutual,
        registry(top / "basic", storage=storage, leaf=leaf, auth="basic") as basic,
        registry(top / "token", storage=storage, leaf=leaf, auth="token", authority=authority) as token,
    ):
        yield Site(authority, node, plain, mutual, basic, token)


@dataclass(frozen=True)
class Node:
    """A node of the site with a client certificate."""

    shell: Shell
    site: Site

    def run(
        self,
        image: str,
        more: str = SHOW,
        *,
        setup: str = "",
        given: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run and mount, then the script `more`; keyword arguments are the stage's parameters, `given` variables."""
        values = {**dict.fromkeys(PARAMETERS, ""), "image": image, "max_entries": "500000", **parameters}
        env = {f"anchor_oci_{name}": value for name, value in values.items()}
        env |= {f"anchor_fetch_{name}": str(value) for name, value in FETCH.items()}
        env |= {"STAGE": str(STAGE), "TOP": str(TOP), "PYTHON": sys.executable}
        return self.shell.run(setup + SCRIPT + more, env=env | dict(given or {}), unshare=("--mount",))

    def facts(self, image: str, **parameters: str) -> dict[str, Any]:
        """Return the facts of the mounted image."""
        done = self.run(image, SHOW, setup="", given=PATIENCE, **parameters)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def refused(
        self,
        image: str,
        *messages: str,
        setup: str = "",
        given: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> str:
        """Make sure that nothing is mounted, and that the step's error and hint hold all messages."""
        done = self.run(image, setup=setup, given=given, **parameters)
        assert done.returncode == 1, done.stderr
        step = self.shell.root / "run/anchor/steps/10"
        said = (step / "error").read_text() + (step / "hint").read_text()
        assert [message for message in messages if message not in said] == [], done.stderr
        assert not list((self.shell.root / "run/anchor").glob("image/*"))
        assert not (self.shell.root / "run/anchor/oci").exists()
        assert "not found" not in done.stderr and "rithmetic" not in done.stderr
        return said

    def note(self, name: str) -> str:
        """Return what the step noted."""
        return (self.shell.root / "run/anchor/steps/10" / name).read_text().rstrip("\n")


def prepared(shell: Shell, site: Site) -> Node:
    for name in ("run/anchor/steps/10", "run/anchor/credentials", "etc/anchor", "proc"):
        (shell.root / name).mkdir(parents=True)
    (shell.root / "proc/meminfo").write_text("MemAvailable: 400000 kB\n")
    shutil.copy(site.authority.certificate, shell.root / "etc/anchor/ca.pem")
    shutil.copy(site.node.certificate, shell.root / "run/anchor/credentials/client.crt")
    shutil.copy(site.node.key, shell.root / "run/anchor/credentials/client.key")
    return Node(shell, site)


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, site: Site) -> Node:
    root = tmp_path / "node"
    root.mkdir()
    return prepared(Shell(request.param, root), site)


@pytest.fixture
def dash(tmp_path: Path, site: Site) -> Node:
    """One shell only, for what is the same in all."""
    root = tmp_path / "node"
    root.mkdir()
    return prepared(Shell("dash", root), site)


def base_layer() -> Layer:
    """Return a layer with at least one of everything."""
    long = "/".join(["d" * 200, "e" * 200])
    layer = Layer().directory("./", 0o751, uid=7, gid=8)
    layer.directory("etc/").add("etc/passwd", b"root::0:0\n").add("etc/gone", b"x").add("etc/kept", b"kept")
    layer.directory("opt/").directory("opt/old/", 0o700, uid=3).add("opt/old/a", b"a").directory("opt/old/b/").add(
        "opt/old/b/c"
    )
    layer.directory("srv/", 0o2750, uid=12, gid=34, xattrs={"security.mark": b"of srv", "trusted.mark": b"\x01\x00"})
    layer.add("srv/old", b"1").directory("srv/deep/", 0o711, gid=9).directory("srv/deep/er/", 0o1777)
    layer.directory("usr/").directory("usr/bin/").add("usr/bin/one", b"program", mode=0o4755)
    layer.link("usr/bin/two", "usr/bin/one", tarfile.LNKTYPE).link("usr/bin/three", "usr/bin/one", tarfile.LNKTYPE)
    layer.add("usr/bin/ping", b"ping", mode=0o755, xattrs={"security.capability": CAPABILITY})
    layer.link("etc/mtab", "/proc/mounts").link("usr/up", "../../../../etc/passwd").link("bin", "usr/bin")
    layer.directory("dev/").add("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    layer.add("dev/disk", type=tarfile.BLKTYPE, devmajor=8, devminor=1).add("dev/pipe", type=tarfile.FIFOTYPE)
    layer.directory("d" * 200 + "/").directory(long + "/").add(f"{long}/{'f' * 250}", b"long")
    layer.directory("odd/").add("odd/a\nb", b"1").add("odd/back\\slash", b"2").add("odd/a -> b", b"3").add(
        "odd/uml\xe4ut", b"4"
    )
    layer.add("odd/* [x]", b"5").add("odd/\\101", b"6").directory("odd/dir\n/", 0o710).add("odd/dir\n/gone", b"7")
    layer.directory("was/").add("was/file", b"file").directory("was/dir/", 0o700).add("was/dir/x", b"x").link(
        "was/link", "dir"
    )
    return layer.add("sparse", bytes(500_000)).add("big", os.urandom(400_000))


def changing_layer() -> Layer:
    """Return a layer that takes away, replaces and adds, partly without entries for its directories."""
    layer = Layer().add("etc/.wh.gone").add("etc/.wh.never-there").directory("opt/").directory("opt/old/", 0o755, uid=4)
    layer.add("opt/old/.wh..wh..opq").add("opt/old/new", b"new")
    layer.add("srv/new", b"2").add("srv/deep/er/new", b"3")
    layer.add("odd/.wh.a\nb").add("odd/.wh.back\\slash").add("odd/.wh.* [x]").add("odd/.wh.\\101").add(
        "odd/dir\n/.wh.gone"
    )
    layer.add("was/.wh.file").directory("was/file/", 0o711).add("was/file/now", b"dir").add("was/.wh.dir").add(
        "was/dir", b"file"
    )
    return layer.add("usr/bin/.wh.three").add("added/deep/ly", b"implied")


def last_layer() -> Layer:
    """Return a layer that takes away a directory that another had added, and whose root has other attributes."""
    layer = (
        Layer()
        .directory("./", 0o755)
        .add(".wh.added")
        .directory("srv/", 0o700)
        .add("srv/deep/.wh.er")
        .add("last", b"3")
    )
    return layer.directory("etc/", 0o755, xattrs={"security.mark": b"of etc"})


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    return [base_layer(), changing_layer(), last_layer()]


@pytest.fixture(scope="module")
def expected(layers: list[Layer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return facts_of(str(unpacked_by_umoci(layers, tmp_path_factory.mktemp("umoci"))))


def test_an_image_is_what_umoci_unpacks_entry_by_entry(
    node: Node, layers: list[Layer], expected: dict[str, Any]
) -> None:
    push(node.site.plain, "team/full", layers, ("gzip", "zstd", ""))
    found = node.facts(f"https://{node.site.mutual.host}/team/full:v1")
    assert sorted(found) == sorted(expected)
    assert {name: (found[name], expected[name]) for name in found if found[name] != expected[name]} == {}


def test_the_step_says_what_was_booted(dash: Node, layers: list[Layer]) -> None:
    digest = push(dash.site.plain, "team/noted", layers)
    dash.facts(f"https://{dash.site.mutual.host}/team/noted:v1")
    assert dash.note("note-digest") == f"sha256:{digest}"
    assert dash.note("note-manifest") == f"sha256:{digest}"
    assert dash.note("note-reference") == f"{dash.site.mutual.host}/team/noted:v1"
    assert dash.note("number-layers") == "3"
    assert "nothing but the registry's certificate vouches" in (dash.shell.root / "run/anchor/boot.log").read_text()


def test_running_again_changes_nothing_and_no_secret_is_left(dash: Node, layers: list[Layer]) -> None:
    digest = push(dash.site.plain, "team/again", layers)
    again = """
    anchor_oci_run && anchor_oci_mount "$LOWER" || exit 1
    ls -A "$ANCHOR_ROOT/run/anchor"; cat "$LOWER/last"; touch "$LOWER/x"
    """
    image = f"https://{dash.site.token.host}/team/again@sha256:{digest}"
    done = dash.run(image, again, user=USER, password=PASSWORD)
    assert done.stdout.split() == ["boot.log", "credentials", "image", "lower", "steps", "3"], done.stderr
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("fetched ") == 1 + 1 + 3
    for file in (dash.shell.root / "run/anchor").rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes()


def test_forty_layers_fit_into_one_mount(dash: Node, tmp_path: Path) -> None:
    layers = [Layer().directory("./").directory("etc/").add("etc/0", b"0")]
    for number in range(1, 40):
        gone = Layer().add(f"etc/.wh.{number - 1}").add(f"etc/{number}", b"%d" % number)
        layers.append(gone.directory(f"in{number}/", 0o700 + number % 8).add(f"in{number - 1}/of{number}"))
    push(dash.site.plain, "team/forty", layers)
    assert dash.facts(f"https://{dash.site.mutual.host}/team/forty:v1") == facts_of(
        str(unpacked_by_umoci(layers, tmp_path))
    )


def test_directories_without_an_entry_are_as_below_and_the_others_as_they_say(node: Node, tmp_path: Path) -> None:
    first = Layer().directory("./").directory("a/", 0o711, uid=3).directory("a/b/", 0o750, gid=4).add("a/b/old", b"1")
    first.add("new/of/first", b"1").add(".wh.nothing").directory("c/", 0o700, uid=5).add("c/old", b"1")
    first.add("empty/.wh.x").link("to", "a")
    second = Layer().directory("a/", 0o701, uid=6).add("a/b/new", b"2").add("a/b/.wh.old").add("new/of/second", b"2")
    second.add("c/.wh..wh..opq").add("c/new/er", b"2").add("never/was/.wh.there").add("c/.wh..wh.aufs", b"none")
    second.add("to/.wh.there")
    second.add("back\\slash/.wh.x", b"").add("back\\slash/line\nend/x", b"2")
    layers = [first, second]
    push(node.site.plain, "team/implied", layers)
    found = node.facts(f"https://{node.site.mutual.host}/team/implied:v1")
    expected = facts_of(str(unpacked_by_umoci(layers, tmp_path)))
    assert {name: (found.get(name), expected.get(name)) for name in found | expected} == {
        name: (facts, facts) for name, facts in expected.items()
    }


@pytest.mark.parametrize("zstd", ["", "zstd() { [ $1 != -vV ] || printf 'zstd only\\n'; }\n"])
def test_a_layer_of_several_gzip_members_is_taken_to_its_end(dash: Node, layers: list[Layer], zstd: str) -> None:
    tar, name = layers[0].tar, "team/members"
    members = b"".join(gzip.compress(tar[at : at + 100_000]) for at in range(0, len(tar), 100_000))
    digest = manifest_of(
        dash.site, name, layers=[{"mediaType": f"{TAR}+gzip", **dash.site.plain.put_blob(name, members)}]
    )
    done = dash.run(f"https://{dash.site.mutual.host}/{name}@sha256:{digest}", setup=zstd)
    assert done.returncode == 0, done.stderr
    assert "big" in json.loads(done.stdout)


@pytest.mark.parametrize("make", ["mksquashfs", "mkfs.erofs"])
def test_layers_that_are_file_systems_are_mounted_as_they_are(dash: Node, tmp_path: Path, make: str) -> None:
    plain, blobs = dash.site.plain, []
    for number in (1, 2):
        tree = tmp_path / f"tree{number}"
        tree.mkdir(mode=0o751)
        (tree / f"file{number}").write_text("1")
        (tree / "both").write_text(str(number))
        image = tmp_path / f"{number}.img"
        argv = [make, str(tree), str(image), "-quiet"] if make == "mksquashfs" else [make, str(image), str(tree)]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
        kind = f"application/vnd.anchor.image.layer.v1.{'squashfs' if make == 'mksquashfs' else 'erofs'}"
        blobs.append({"mediaType": kind, **plain.put_blob("team/files", image.read_bytes())})
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", **plain.put_blob("team/files", b"{}")}
    for count in (1, 2):
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": empty, "layers": blobs[:count]}
        digest = plain.put_manifest("team/files", f"v{count}", document)
        show = 'cat "$LOWER/both"; stat -c %a "$LOWER"; ls "$LOWER"'
        done = dash.run(f"http://{plain.host}/team/files@sha256:{digest}", show)
        files = [f"file{number}" for number in range(1, count + 1)]
        assert done.stdout.split() == [f"{count}751", "both", *files], done.stderr


@pytest.mark.parametrize("how", ["basic", "token"])
def test_a_registry_that_asks_who_pulls_is_told(node: Node, layers: list[Layer], how: str) -> None:
    push(node.site.plain, "team/private", layers[:1])
    server: Registry = getattr(node.site, how)
    image = f"https://{server.host}/team/private:v1"
    assert "etc/passwd" in node.facts(image, user=USER, password=PASSWORD)


def test_credentials_from_auth_come_first(dash: Node, layers: list[Layer]) -> None:
    push(dash.site.plain, "team/private", layers[:1])
    import base64

    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    file = dash.shell.root / "run/anchor/credentials/registry.json"
    file.write_text(json.dumps({"auths": {dash.site.token.host: {"auth": secret}}}))
    assert "etc/passwd" in dash.facts(f"https://{dash.site.token.host}/team/private:v1", user="other", password=WRONG)


def test_without_the_right_credentials_the_reason_is_said(dash: Node, layers: list[Layer]) -> None:
    push(dash.site.plain, "team/private", layers[:1])
    image = f"https://{dash.site.basic.host}/team/private:v1"
    dash.refused(image, "wants a user and a password", "doc/oci.md")
    dash.refused(image, "other credentials than the user node17", user=USER, password=WRONG)
    image = f"https://{dash.site.token.host}/team/private:v1"
    dash.refused(image, "gives no token to the user node17", user=USER, password=WRONG)


def test_the_nodes_platform_is_taken_from_an_index(dash: Node, layers: list[Layer]) -> None:
    plain = dash.site.plain
    entries = []
    for architecture, layer in (("arm64", layers[1]), ("amd64", layers[0])):
        config = plain.put_blob("team/index", json.dumps(config_of([layer.tar], architecture)).encode())
        blob = {"mediaType": TAR, **plain.put_blob("team/index", layer.tar)}
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, **config},
            "layers": [blob],
        }
        digest = plain.put_manifest("team/index", architecture, document)
        size = len(json.dumps(document).encode())
        entry = {"mediaType": MANIFEST, "digest": f"sha256:{digest}", "size": size}
        entries.append({**entry, "platform": {"os": "linux", "architecture": architecture}})
    index = plain.put_manifest(
        "team/index", "v1", {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}, INDEX
    )
    image = f"https://{dash.site.mutual.host}/team/index:v1@sha256:{index}"
    assert "etc/passwd" in dash.facts(image, platform="linux/amd64")
    assert dash.note("note-digest") == f"sha256:{index}" and dash.note("note-manifest") != f"sha256:{index}"
    assert "etc/passwd" not in dash.facts(image, platform="linux/arm64")
    dash.refused(image, "no manifest for linux/s390x: it has linux/arm64, linux/amd64", platform="linux/s390x")
    alone = f"https://{dash.site.mutual.host}/team/index:arm64"
    dash.refused(alone, "is for linux/arm64, and this node wants linux/amd64", platform="linux/amd64")


def test_a_layer_may_come_in_odd_pieces(dash: Node, layers: list[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    digest = push(dash.site.plain, "team/odd", layers[:1])
    pieces = "anchor_oci__unpack() { gzip -dc | dd bs=3001 status=none; }\nLC_ALL=C\n"
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPT.replace("LC_ALL=C\n", pieces))
    assert "etc/passwd" in dash.facts(f"https://{dash.site.mutual.host}/team/odd@sha256:{digest}")


NOISY = [Layer().add(f"noise{number}", os.urandom(1_500_000)) for number in range(4)]


@pytest.mark.parametrize(
    ("kind", "megabytes", "files"), [("gzip", 60, 4), ("zstd", 60, 4), ("gzip", 7, 0), ("", 60, 0)], ids=str
)
def test_layers_come_as_files_where_memory_is_left_for_them(
    dash: Node, monkeypatch: pytest.MonkeyPatch, kind: str, megabytes: int, files: int
) -> None:
    digest = push(dash.site.plain, f"team/noisy{kind}", NOISY, (kind,))
    seen = f"""
anchor_oci__release() {{ : >"$ANCHOR_ROOT/file$anchor_oci__n"; }}
anchor_memory_available() {{ anchor_memory_available={megabytes}000000; }}
LC_ALL=C
"""
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPT.replace("LC_ALL=C\n", seen))
    assert len(dash.facts(f"https://{dash.site.mutual.host}/team/noisy{kind}@sha256:{digest}")) == 4 + 1
    assert len(list(dash.shell.root.glob("file?"))) == files


def test_a_mirror_brings_what_the_registry_lacks(dash: Node, layers: list[Layer]) -> None:
    digest = push(dash.site.plain, "team/mirrored", layers)
    image = f"https://127.0.0.1:9/team/elsewhere@sha256:{digest}"
    assert "last" in dash.facts(image, mirrors=f"https://{dash.site.mutual.host}/team/mirrored")


BAD_LAYERS: dict[str, tuple[Layer | bytes, str]] = {
    "up": (Layer().add("../up", b"x"), "leads out of the image"),
    "inner": (Layer().add("a/../../up", b"x"), "leads out of the image"),
    "whiteout": (Layer().add("etc/.wh..."), "leads out of the image"),
    "hard": (Layer().link("shadow", "/etc/shadow", tarfile.LNKTYPE), "cannot be made a squashfs"),
    "through": (Layer().link("l", "/etc").add("l/passwd", b"x"), "cannot be made a squashfs"),
    "twice": (Layer().add("x", b"1").add("x", b"2"), "the same file twice: x"),
    "again": (Layer().directory("x/").add("x/y").directory("x/"), "the same file twice: x"),
    "nameless": (Layer().add("etc/.wh."), "leads out of the image"),
    "text": (b"this is no archive" * 999, "cannot be made a squashfs"),
    "short": (Layer().add("x", bytes(4000)).stream.getvalue()[:2000], "cannot be made a squashfs"),
}


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_layers_that_no_image_may_have_are_refused(dash: Node, layers: list[Layer], name: str) -> None:
    bad, message = BAD_LAYERS[name]
    push(dash.site.plain, f"bad/{name}", [layers[0], bad])
    dash.refused(f"https://{dash.site.mutual.host}/bad/{name}:v1", "layer 2 of 2", message)


def test_a_layer_bomb_ends_at_the_memory_that_there_is(dash: Node) -> None:
    (dash.shell.root / "proc/meminfo").write_text("MemAvailable: 5000 kB\n")
    noise = os.urandom(1 << 16)  # further apart than gzip or a block can see again, it does not compress twice
    bomb = Layer()
    for number in range(200):
        bomb.add(str(number), noise[number:] + noise[:number])
    push(dash.site.plain, "bad/bomb", [bomb], ("zstd",))
    done = dash.refused(f"https://{dash.site.mutual.host}/bad/bomb:v1")
    assert "memory" in done


def test_a_bomb_of_empty_files_ends_at_their_number(dash: Node, layers: list[Layer]) -> None:
    bomb = Layer()
    for number in range(20000):
        bomb.add(f"d/{number}")
    push(dash.site.plain, "bad/entries", [layers[0], bomb])
    image = f"https://{dash.site.mutual.host}/bad/entries:v1"
    dash.refused(image, "layer 2 of 2", "more than 500 files and directories", "max_entries", max_entries="500")


def test_a_bomb_of_directories_that_have_no_entry_ends_at_their_memory(dash: Node) -> None:
    bomb = Layer()
    for number in range(500):
        bomb.add(f"{number}/{'a/' * 1500}f")
    push(dash.site.plain, "bad/deep", [bomb])
    image = f"https://{dash.site.mutual.host}/bad/deep:v1"
    dash.refused(image, "it needs more memory than the node has for it", max_entries="1000")


@pytest.mark.parametrize("pipe", ["", "trap '' PIPE\n"])
def test_a_file_twice_is_told_as_such(dash: Node, pipe: str) -> None:
    """Also where nothing ends a program whose reader has gone, as systemd has it."""
    twice = Layer()
    for name in ("a", "a"):
        twice.add(name, os.urandom(1 << 20))
    for number in range(20):
        twice.add(str(number), os.urandom(1 << 20))
    push(dash.site.plain, "bad/twice", [twice])
    dash.refused(f"https://{dash.site.mutual.host}/bad/twice:v1", "it has the same file twice: a", setup=pipe)


def served(layers: list[Layer | bytes], **instead: fake.Fault) -> tuple[fake.Fault, str]:
    """Return a registry that has one image, and the image's digest; `instead`, layer1 and so on, are its faults."""
    tars = [layer.tar if isinstance(layer, Layer) else layer for layer in layers]
    described: dict[str, fake.Fault] = {}

    def put(data: bytes, kind: str, fault: fake.Fault | None = None) -> dict[str, Any]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        described[digest] = fault or fake.whole(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    config = put(json.dumps(config_of(tars)).encode(), CONFIG)
    blobs = [put(tar, TAR, instead.get(f"layer{number}")) for number, tar in enumerate(tars, 1)]
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": blobs}
    digest = put(json.dumps(document).encode(), MANIFEST)["digest"]
    return lambda exchange: described[exchange.path.rpartition("/")[2]](exchange), digest


def cut(data: bytes, *sent: int) -> fake.Fault:
    """Break off after so many bytes, one time after the other, and then for ever at once."""
    faults = [fake.whole(data, sent=number) for number in (*sent, 0)]
    return lambda exchange: (faults.pop(0) if len(faults) > 1 else faults[0])(exchange)


def ranges(server: fake.Hostile, size: int = 1) -> list[str]:
    """Return the ranges of the requests for blobs, without the first: it is the configuration."""
    return [headers.get("Range", "") for path, headers in server.requests if "/blobs/" in path][size:]


NOISE = Layer().directory("./").add("noise", os.urandom(3_000_000))


def test_a_registry_that_goes_away_in_a_layer_is_asked_again(dash: Node) -> None:
    tar = NOISE.tar
    registry, digest = served([tar], layer1=cut(tar, 1_000_000, len(tar)))
    with hostile(registry) as server:
        assert "noise" in dash.facts(server.url(f"/a/b@{digest}"))
        assert ranges(server) == ["", "bytes=1000000-"]


def test_a_layer_that_breaks_off_goes_on_at_another_registry(dash: Node) -> None:
    tar = NOISE.tar
    registry, digest = served([tar], layer1=cut(tar, 1_000_000))
    mirror, _ = served([tar])
    first = "od() { case $* in *urandom) printf '0\\n' ;; *) command od \"$@\" ;; esac; }\n"
    with hostile(registry) as server, hostile(mirror) as other:
        done = dash.run(server.url(f"/a/b@{digest}"), setup=first, mirrors=other.url("/c/d"))
        assert done.returncode == 0, done.stderr
        assert "noise" in json.loads(done.stdout)
        assert ranges(other, 0) == ["bytes=1000000-"]


def test_a_layer_that_nobody_has_to_its_end_leaves_nothing(dash: Node) -> None:
    tar = NOISE.tar
    registry, digest = served([tar], layer1=cut(tar, 1_000_000))
    with hostile(registry) as server:
        dash.refused(server.url(f"/a/b@{digest}"), "layer 1 of 1: gave up on", "after attempt 3 of 3")
    assert processes_of(dash.shell.root) == []


def test_a_plain_layer_is_whole_where_busybox_copies_it(
    dash: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cat of busybox passes pages on (sendfile): of a large one, what was taken out comes as zeros."""
    busybox = shutil.which("busybox")
    assert busybox, "contrib/packages.txt lists it"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cat").symlink_to(busybox)
    # Kernels without CONFIG_TRANSPARENT_HUGEPAGE have no such file, and some are told to use none.
    enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    pages = "huge" if enabled.is_file() and "[deny]" not in enabled.read_text() else "plain"
    digest = push(dash.site.plain, "team/plain", NOISY, ("",))
    # Large pages, where this kernel has them, and as many holes as there can be in all that comes as a file.
    holes = (
        f"pages={pages}"
        + """
mount() {
    case $pages:$* in
        huge:'-t tmpfs '*) command mount -o huge=always "$@" ;;
        *) command mount "$@" ;;
    esac || return
    case $* in
        '-t tmpfs '*) grep ' tmpfs .*huge=always' /proc/mounts >/dev/null && echo huge || echo plain ;;
    esac >>"$ANCHOR_ROOT/pages"
}
sleep() { command sleep 0.01; }
ANCHOR_OCI_FREE=1 LC_ALL=C
"""
    )
    monkeypatch.setattr(sys.modules[__name__], "SCRIPT", SCRIPT.replace("LC_ALL=C\n", holes))
    given = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **PATIENCE}
    done = dash.run(f"https://{dash.site.mutual.host}/team/plain@sha256:{digest}", given=given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == facts_of(str(unpacked_by_umoci(NOISY, tmp_path)))
    assert set((dash.shell.root / "pages").read_text().split()) == {pages}


RELEASE = """
ANCHOR_OCI_FREE=1
mount -t tmpfs tmpfs "$LOWER" && head -c 12000000 /dev/urandom >"$LOWER/c1" && exec 4<"$LOWER/c1" || exit 9
tail -c +8388609 "$LOWER/c1" >"$LOWER/rest"
anchor_oci__release "$LOWER/c1" 12000000 "$$" &
dd bs=1048576 count=8 <&4 2>/dev/null | cat >/dev/null
n=0
until [ "$(stat -c %b "$LOWER/c1")" -lt 8000 ] || [ "$n" -gt 200 ]; do n=$((n + 1)); sleep 0.1; done
stat -c '%s %b' "$LOWER/c1"
cat <&4 | cmp - "$LOWER/rest" && echo same
kill "$!"
wait "$!"
"""


def test_what_has_been_read_of_a_layer_is_given_back_and_the_rest_is_as_it_was(node: Node) -> None:
    script = SCRIPT.partition("anchor_oci_run")[0] + RELEASE
    values = {"STAGE": str(STAGE), "anchor_fetch_timeout": "30"}
    done = node.shell.run(script, env=values, unshare=("--mount",))
    size, blocks, compared = done.stdout.split()
    # 12 MB are 23438 blocks of 512 bytes; what has been read is 16384 of them.
    assert (size, compared) == ("12000000", "same") and 7000 < int(blocks) < 7200, done.stdout + done.stderr
    assert processes_of(node.shell.root) == []


def test_a_layer_that_fails_ends_the_others_at_once(node: Node) -> None:
    tar = NOISE.tar
    registry, digest = served([tar, b"this is no archive" * 999], layer1=fake.whole(tar, sent=100_000, stall=True))
    with hostile(registry) as server:
        node.refused(server.url(f"/a/b@{digest}"), "layer 2 of 2", "cannot be made a squashfs")
        # The layer that stalls was not asked for again, as it would be after a while.
        assert len(ranges(server)) == 2
    assert processes_of(node.shell.root) == []


def named(urls: str, digest: str, size: int | str = "") -> dict[str, str]:
    """Return what a manifest of Anchor leaves for the stage."""
    return {"anchor_manifest_urls": urls, "anchor_manifest_sha256": digest, "anchor_manifest_size": str(size)}


def test_a_manifest_of_anchor_names_the_image_by_its_digest(node: Node, layers: list[Layer]) -> None:
    host = node.site.mutual.host
    digest = push(node.site.plain, "team/named", layers[:1])
    # Where the tag leads now does not matter, nor that the first place has it no more.
    push(node.site.plain, "team/named", layers[1:2])
    given = named(f"https://127.0.0.1:9/gone https://{host}/team/named:v1 http://{node.site.plain.host}/x/y", digest)
    done = node.run("", given=given)
    assert done.returncode == 0, done.stderr
    assert "etc/passwd" in json.loads(done.stdout)
    assert node.note("note-digest") == f"sha256:{digest}"
    assert "has no digest" not in done.stderr


def test_only_a_signed_manifest_says_who_gets_the_password(dash: Node, layers: list[Layer]) -> None:
    digest = push(dash.site.plain, "team/named", layers[:1])
    given = named(f"https://{dash.site.basic.host}/team/named", digest)
    dash.refused("", "wants a user and a password", given=given, user=USER, password=PASSWORD)
    (dash.shell.root / "etc/anchor/manifest.pub").write_text("a key")
    done = dash.run("", given=given, user=USER, password=PASSWORD)
    assert done.returncode == 0, done.stderr


def test_what_a_manifest_of_anchor_does_not_name_is_refused(dash: Node, layers: list[Layer]) -> None:
    plain, host = dash.site.plain, dash.site.plain.host
    digest = push(plain, "team/named", layers[:1])
    name = f"http://{host}/team/named:v1"
    dash.refused("", "the registry has no such image or tag", given=named(name, "0" * 64))
    dash.refused("", given=named(name, digest, 17))
    for url in (f"{name}@sha256:{digest}", f"s3://{host}/x", f"https://user@{host}/x"):
        dash.refused(
            "", "the manifest names no image at a registry", "anchor-build image --at", given=named(url, digest)
        )
    # A mirror that gives something else under the digest.
    other = json.dumps({"schemaVersion": 2}).encode()
    with hostile(fake.whole(other)) as server:
        dash.refused("", given=named(server.url("/a/b"), digest))


def manifest_of(site: Site, name: str, **changes: Any) -> str:
    """Push the manifest of a small image with `changes`, past the registry's own checks; return its digest."""
    layer = Layer().directory("./").add("x")
    config = {"mediaType": CONFIG, **site.plain.put_blob(name, json.dumps(config_of([layer.tar])).encode())}
    blob = {"mediaType": TAR, **site.plain.put_blob(name, layer.tar)}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [blob]}
    return site.plain.put_manifest(name, "v1", document | changes)


def test_the_manifest_vouches_for_a_layer_and_the_configuration_does_not(dash: Node) -> None:
    name, plain = "bad/diff", dash.site.plain
    other = plain.put_blob(name, json.dumps(config_of([b"other"])).encode())
    manifest_of(dash.site, name, config={"mediaType": CONFIG, **other})
    assert dash.facts(f"https://{dash.site.mutual.host}/{name}:v1")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("application/x-unheard-of", "a layer of a type that cannot be booted: application/x-unheard-of"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar", "bytes are not in the registry"),
        (f"{TAR}+gzip", "compression that its media type says"),
    ],
)
def test_media_types_count(dash: Node, kind: str, message: str) -> None:
    layer = Layer().directory("./").add("x").tar
    blob = dash.site.plain.put_blob("bad/type", layer)
    manifest_of(dash.site, "bad/type", layers=[{"mediaType": kind, **blob}])
    dash.refused(f"https://{dash.site.mutual.host}/bad/type:v1", message)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("http://127.0.0.1:9/team/node:v1", "nothing protects http://"),
        ("https://127.0.0.1:9/", "names no image"),
        ("https://user@127.0.0.1:9/x", "has a user in it"),
        ("https://127.0.0.1:9/team/../x", "its name is none"),
        ("https://127.0.0.1:9/Team/x", "its name is none"),
        ("https://127.0.0.1:9/x@sha256:12", "its digest is not SHA-256"),
        ("https://127.0.0.1:9/x:" + "t" * 129, "its tag is none"),
        ("https://127.0.0.1:9/x:", "its tag is none"),
        ("https://127.0.0.1:9/x?y=z", "its name is none"),
    ],
)
def test_what_is_no_reference_is_refused_before_any_connection(node: Node, image: str, message: str) -> None:
    node.refused(image, message)
