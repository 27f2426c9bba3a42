"""image oci: real images in a real registry, mounted in a namespace of each test's own, compared with what umoci unpacks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contrib.site import pki
from contrib.site import registry as site_registry
from contrib.site.registry import CONFIG, INDEX, MANIFEST, PASSWORD, USER, Registry, registry
from tests.shell.conftest import SHELLS, TOP, Shell
from tests.stages.oci_image import TAR, Layer, config_of, facts_of, push, unpacked_by_umoci

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("docker-registry", "umoci", "sqfstar"))),
    reason="needs root, docker-registry, umoci and sqfstar",
)

STAGE = TOP / "dracut-modules/image-oci/stage.sh"
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
SCRIPT = """
. "$LIB/anchor-report.sh" && . "$LIB/anchor-fetch.sh" && . "$LIB/anchor-http.sh" && . "$LIB/anchor-oci.sh" && . "$STAGE" || exit 9
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

    def run(self, image: str, more: str = SHOW, **parameters: str) -> subprocess.CompletedProcess[str]:
        """Run and mount, then the script `more`; keyword arguments are the stage's parameters."""
        values = {**dict.fromkeys(PARAMETERS, ""), "image": image, **parameters}
        env = {f"anchor_oci_{name}": value for name, value in values.items()}
        env |= {f"anchor_fetch_{name}": str(value) for name, value in FETCH.items()}
        env |= {"STAGE": str(STAGE), "TOP": str(TOP), "PYTHON": sys.executable}
        return self.shell.run(SCRIPT + more, env=env, unshare=("--mount",))

    def facts(self, image: str, **parameters: str) -> dict[str, Any]:
        """Return the facts of the mounted image."""
        done = self.run(image, **parameters)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def refused(self, image: str, *messages: str, **parameters: str) -> str:
        """Make sure that nothing is mounted, and that the step's error and hint hold all messages."""
        done = self.run(image, **parameters)
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
