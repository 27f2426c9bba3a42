"""image buildah: images in a real registry, pulled by the real buildah; compared with oci, and buildah on a host."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from contrib.site import pki, servers
from contrib.site.registry import PASSWORD, USER
from tests.shell.conftest import SHELLS, TOP, Shell
from tests.stages import test_image_oci as oci
from tests.stages.oci_image import Layer, push
from tests.stages.test_image_oci import base_layer, changing_layer, last_layer, site  # noqa: F401 - site is a fixture

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("docker-registry", "buildah", "mksquashfs", "tar2sqfs"))),
    reason="needs root, docker-registry, buildah, mksquashfs and tar2sqfs",
)

SCRIPT = """
for lib in report mounts memory fetch fetch-mirrors fetch-digest fetch-room http oci registry; do
    . "$LIB/anchor-$lib.sh" || exit 9
done
. "$STAGE" || exit 9
LC_ALL=C
export LC_ALL
# The next is not hidden from a node, whose environment may hold anything; and nothing of it reaches buildah.
REGISTRY_AUTH_FILE=/nonexistent BUILDAH_ISOLATION=none HTTPS_PROXY=http://127.0.0.1:9
export REGISTRY_AUTH_FILE BUILDAH_ISOLATION HTTPS_PROXY
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10 LOWER=$ANCHOR_ROOT/run/anchor/lower
mkdir -p "$LOWER" || exit 9
anchor_stage_for_scheme() { return 1; }
"""
RUN = """
anchor_buildah_run && anchor_buildah_mount "$LOWER" || exit 1
"""
PARAMETERS = ("registry", "image", "policy", "lookaside", "platform", "user", "password", "proxy")
# What only buildah meets: what is asked before it is left out.
UNASKED = """anchor_oci_resolve() { anchor_oci_wanted=linux/amd64 anchor_oci_count=1; : >"$anchor_oci_dir/layers"; }"""
REJECT = '{"default":[{"type":"reject"}]}'
# What an engine makes of its own changes: whiteouts, an opaque directory, a hard link, a capability, a long name.
ON_HOST = """
set -e
mkdir -p "$TOP_DIR/b"
mount -t tmpfs tmpfs "$TOP_DIR/b"
b() { buildah --root "$TOP_DIR/b/root" --runroot "$TOP_DIR/b/run" --storage-driver overlay "$@"; }
"""
MAKE = r"""
b from -q --name one scratch >/dev/null
root=$(b mount one)
tar -C "$root" --xattrs --xattrs-include='*' -xpf "$TOP_DIR/base.tar"
b commit -q one first >/dev/null
b from -q --name two localhost/first >/dev/null
root=$(b mount two)
rm -r "$root/opt/old" "$root/usr/bin/three" "$root/was/link" "$root/odd/a -> b" "$root/srv/deep/er" "$root"/odd/dir*
mkdir -m 0711 "$root/opt/old"
printf new >"$root/opt/old/new"
ln "$root/usr/bin/ping" "$root/usr/bin/ping6"
chmod 0700 "$root/srv"
rm -r "$root/was/dir"
printf file >"$root/was/dir"
b commit -q two second >/dev/null
b from -q --name three localhost/second >/dev/null
root=$(b mount three)
rm "$root/opt/old/new"
printf '%s' "$root" >"$root/etc/$(printf '%0250d' 7)"
chown 5:6 "$root/etc/kept"
setfattr -n user.mark -v yes "$root/etc/kept"
b commit -q three third >/dev/null
b push -q --tls-verify=false --digestfile "$TOP_DIR/digest" localhost/third "docker://$IMAGE"
"""
SHOW_ON_HOST = """
b from -q --name back --tls-verify=false "docker://$IMAGE" >/dev/null
"$PYTHON" -m tests.stages.oci_image "$(b mount back)"
"""


@dataclass(frozen=True)
class Node(oci.Node):
    """A node of the site that boots with buildah."""

    def run(
        self,
        image: str,
        more: str = oci.SHOW,
        *,
        setup: str = "",
        given: Mapping[str, str] | None = None,
        **parameters: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `setup` once all is loaded, the step and the mount, then `more`; keyword arguments are the parameters."""
        scheme, _, rest = image.rpartition("://")
        registry, _, name = rest.partition("/")
        values = {**dict.fromkeys(PARAMETERS, ""), "registry": f"{scheme}://{registry}", "image": name, **parameters}
        env = {f"anchor_buildah_{key}": value for key, value in values.items()}
        env |= {f"anchor_fetch_{key}": str(value) for key, value in oci.FETCH.items()}
        env |= {"STAGE": str(TOP / "dracut-modules/image-buildah/stage.sh"), "TOP": str(TOP), "PYTHON": sys.executable}
        return self.shell.run(SCRIPT + setup + RUN + more, env=env | dict(given or {}), unshare=("--mount",))

    def refused(self, image: str, *messages: str, given: Mapping[str, str] | None = None, **parameters: str) -> str:
        """Make sure that nothing is mounted or left, and that the step's error and hint hold all messages."""
        said = super().refused(image, *messages, given=given, **parameters)
        assert not list((self.shell.root / "run/anchor").glob("buildah*"))
        return said


def prepared(shell: Shell, servers: oci.Site) -> Node:
    node = oci.prepared(shell, servers)
    (shell.root / "proc/meminfo").write_text("MemAvailable: 600000 kB\n")
    return Node(node.shell, servers)


@pytest.fixture
def dash(tmp_path: Path, site: oci.Site) -> Node:  # noqa: F811 - the fixture
    root = tmp_path / "node"
    root.mkdir()
    return prepared(Shell("dash", root), site)


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path, site: oci.Site) -> Node:  # noqa: F811 - the fixture
    root = tmp_path / "node"
    root.mkdir()
    return prepared(Shell(request.param, root), site)


def other(node: Node, tmp_path: Path) -> oci.Node:
    """Return a node beside it that boots with the image stage oci."""
    root = tmp_path / "other"
    root.mkdir()
    return oci.prepared(Shell("dash", root), node.site)


def on_host(script: str, image: str, directory: Path) -> dict[str, Any]:
    """Run `script`, then return the facts of what buildah mounts of the image on this host, in a namespace."""
    env = {**os.environ, "TOP_DIR": str(directory), "IMAGE": image, "PYTHON": sys.executable}
    argv = ["unshare", "--mount", "sh", "-c", ON_HOST + script + SHOW_ON_HOST]
    done = subprocess.run(argv, env=env, cwd=TOP, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def full(site: oci.Site, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:  # noqa: F811
    """Return the digest of an image of handmade layers, and what buildah mounts of it on this host."""
    layers = [base_layer(), changing_layer(), last_layer()]
    digest = push(site.plain, "team/full", layers, ("gzip", "zstd", ""))
    return digest, on_host("", f"{site.plain.host}/team/full:v1", tmp_path_factory.mktemp("host"))


def different(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (found.get(name), expected.get(name))
        for name in found | expected
        if found.get(name) != expected.get(name)
    }


def small(node: Node, name: str) -> str:
    """Push a small image; return its digest."""
    return push(node.site.plain, name, [Layer().directory("./").directory("etc/").add("etc/passwd", b"root")])


def test_what_buildah_made_is_the_same_here_as_on_a_host_and_with_oci(dash: Node, tmp_path: Path) -> None:
    (tmp_path / "base.tar").write_bytes(base_layer().tar)
    expected = on_host(MAKE, f"{dash.site.plain.host}/team/made:v1", tmp_path)
    assert "opt/old/a" not in expected and "usr/bin/ping6" in expected and len(expected) > 30
    image = f"https://{dash.site.mutual.host}/team/made:v1"
    assert different(dash.facts(image), expected) == {}
    assert dash.note("note-manifest") == (tmp_path / "digest").read_text()
    # No layer that buildah makes has an entry for the root itself: its mode is 0755 here, and 0555 with buildah.
    assert set(different(other(dash, tmp_path).facts(image), expected)) <= {"."}


def test_layers_made_by_others_are_what_buildah_mounts_on_a_host(node: Node, full: tuple[str, dict[str, Any]]) -> None:
    digest, on_host = full
    found = node.facts(f"https://{node.site.mutual.host}/team/full:v1")
    assert different(found, on_host) == {} and "last" in found
    assert node.note("note-manifest") == f"sha256:{digest}"
    assert node.note("note-reference") == f"{node.site.mutual.host}/team/full:v1"
    assert node.note("number-layers") == "3"


def test_running_again_changes_nothing_and_only_the_squashfs_is_left(dash: Node) -> None:
    digest = small(dash, "team/again")
    again = """
    before=$(stat -c %i "$ANCHOR_ROOT/run/anchor/image/image")
    anchor_buildah_run && anchor_buildah_mount "$LOWER" || exit 1
    [ "$before" = "$(stat -c %i "$ANCHOR_ROOT/run/anchor/image/image")" ] && echo same
    ls -A "$ANCHOR_ROOT/run/anchor"; cat "$LOWER/etc/passwd"; grep -c "$ANCHOR_ROOT" /proc/self/mounts; touch "$LOWER/x"
    """
    image = f"https://{dash.site.token.host}/team/again:v1@sha256:{digest}"
    done = dash.run(image, again, user=USER, password=PASSWORD)
    kept = ["boot.log", "credentials", "image", "lower", "steps"]
    assert done.stdout.split() == ["same", *kept, "root2"], done.stderr
    assert "Read-only file system" in done.stderr
    for file in (dash.shell.root / "run/anchor").rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes()


def test_no_argument_of_any_program_has_the_password(dash: Node, tmp_path: Path) -> None:
    small(dash, "team/private")
    seen = tmp_path / "arguments"
    wrappers = tmp_path / "bin"
    wrappers.mkdir()
    for name in ("buildah", "env", "timeout"):
        (wrappers / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$0" "$@" >>{seen}\nexec {shutil.which(name)} "$@"\n')
        (wrappers / name).chmod(0o755)
    image = f"https://{dash.site.basic.host}/team/private:v1"
    proxy = f"http://node17:{PASSWORD}@127.0.0.1:9"
    done = dash.run(image, "", setup=f"PATH={wrappers}:$PATH", user=USER, password=PASSWORD)
    assert done.returncode == 0, done.stderr
    # A proxy that is not there: that buildah asks for it shows that it was told.
    told = f"PATH={wrappers}:$PATH anchor_fetch_attempts=1\n{UNASKED}"
    elsewhere = image.replace("127.0.0.1", "registry.example")
    done = dash.run(elsewhere, "", setup=told, proxy=proxy, user=USER, password=PASSWORD)
    assert done.returncode == 1 and "proxyconnect" in done.stderr
    texts = seen.read_text()
    assert "docker://" in texts and PASSWORD not in texts
    assert base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode() not in texts
    assert PASSWORD not in done.stderr


@pytest.mark.parametrize("how", ["basic", "token"])
def test_credentials_from_auth_come_first(dash: Node, how: str) -> None:
    small(dash, "team/private")
    server = getattr(dash.site, how)
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    file = dash.shell.root / "run/anchor/credentials/registry.json"
    file.write_text(json.dumps({"auths": {server.host: {"auth": secret}}}))
    assert "etc/passwd" in dash.facts(f"https://{server.host}/team/private:v1", user="other", password=oci.WRONG)


def test_a_digest_is_enough_over_http_and_without_it_http_is_refused(dash: Node) -> None:
    digest = small(dash, "team/open")
    assert "etc/passwd" in dash.facts(f"http://{dash.site.plain.host}/team/open@sha256:{digest}")


def test_http_without_a_digest_is_refused_before_any_connection(node: Node) -> None:
    node.refused("http://127.0.0.1:9/team/open:v1", "nothing protects http://")


def test_what_the_registry_lacks_is_said(dash: Node) -> None:
    digest = small(dash, "team/small")
    host = dash.site.mutual.host
    dash.refused(f"https://{host}/team/small:v2", "no such image or tag")
    wrong = hashlib.sha256(digest.encode()).hexdigest()
    dash.refused(f"https://{host}/team/small@sha256:{wrong}", "no such image or tag")
    dash.refused(f"https://{dash.site.basic.host}/team/small:v1", "wants a user and a password")


def test_a_registry_of_another_ca_is_not_believed(dash: Node, tmp_path: Path) -> None:
    small(dash, "team/small")

    shutil.copy(pki.make_authority(tmp_path / "other-ca").certificate, dash.shell.root / "etc/anchor/ca.pem")
    image = f"https://{dash.site.mutual.host}/team/small:v1"
    dash.refused(image, "is not trusted", "/etc/anchor/ca.pem")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ca", "certificate signed by unknown authority"),
        ("tag", "manifest unknown"),
        ("user", "uthenticat"),
    ],
)
def test_what_buildah_says_is_reported(dash: Node, tmp_path: Path, place: str, message: str) -> None:
    small(dash, "team/small")
    host = dash.site.mutual.host
    image = {
        "tag": f"https://{host}/team/small:v2",
        "user": f"https://{dash.site.basic.host}/team/small:v1",
    }.get(place, f"https://{host}/team/small:v1")
    if place == "ca":
        shutil.copy(pki.make_authority(tmp_path / "other-ca").certificate, dash.shell.root / "etc/anchor/ca.pem")
    done = dash.run(image, "", setup=UNASKED)
    assert done.returncode == 1
    error = (dash.shell.root / "run/anchor/steps/10/error").read_text()
    assert message in error and error.startswith("buildah cannot pull 127.0.0.1:"), done.stderr
    assert not list((dash.shell.root / "run/anchor").glob("buildah*"))
    assert "next in" not in done.stderr


SIGN = """
set -e
gpg() { command gpg --homedir "$KEYS" --batch --quiet "$@"; }
gpg --passphrase '' --quick-generate-key site@example ed25519 sign never
gpg --export site@example
gpg --sign --output "$KEYS/signature" <<EOT
{"critical": {"type": "atomic container signature", "image": {"docker-manifest-digest": "sha256:$DIGEST"},
"identity": {"docker-reference": "$IMAGE"}}, "optional": {}}
EOT
"""


def signed(image: str, digest: str, directory: Path) -> tuple[bytes, bytes]:
    """Sign an image with a new GPG key; return the public key and the signature (containers-signature(5))."""
    env = {"PATH": os.environ["PATH"], "KEYS": str(directory), "IMAGE": image, "DIGEST": digest}
    try:
        done = subprocess.run(["sh", "-c", SIGN], env=env, capture_output=True, timeout=60, check=True)
    finally:
        subprocess.run(
            ["gpgconf", "--homedir", directory, "--kill", "all"], capture_output=True, timeout=20, check=True
        )
    return done.stdout, (directory / "signature").read_bytes()


def test_a_policy_decides_which_signature_an_image_needs(dash: Node, tmp_path: Path) -> None:
    digest = small(dash, "team/signed")
    host = dash.site.mutual.host
    keys = Path(tempfile.mkdtemp(prefix="anchor-gpg-"))  # of sockets, whose paths have to be short
    try:
        public, signature = signed(f"{host}/team/signed:v1", digest, keys)
    finally:
        shutil.rmtree(keys)
    rule = {"type": "signedBy", "keyType": "GPGKeys", "keyData": base64.b64encode(public).decode()}
    policy = json.dumps({"default": [{"type": "reject"}], "transports": {"docker": {host: [rule]}}})
    place = tmp_path / f"www/team/signed@sha256={digest}"
    place.mkdir(parents=True)
    leaf = pki.issue(dash.site.authority, tmp_path, "signatures")
    with servers.nginx(tmp_path / "nginx", root=tmp_path / "www", leaf=leaf, plain=False) as store:
        given: dict[str, Any] = {"policy": policy, "lookaside": f"https://127.0.0.1:{store.https_port}"}
        image = f"https://{host}/team/signed:v1"
        dash.refused(image, "buildah cannot pull", "ignature", "rd.anchor.buildah.policy", **given)
        (place / "signature-1").write_bytes(signature)
        assert "etc/passwd" in dash.facts(image, **given)
    (dash.shell.root / "etc/policy.json").write_text(json.dumps(json.loads(REJECT), indent=2))
    dash.refused(image, "ource image rejected", "rd.anchor.buildah.policy", policy="/etc/policy.json")


def test_a_policy_that_is_none_is_refused(dash: Node) -> None:
    dash.refused("https://127.0.0.1:9/x:v1", "is not a JSON object", policy="{'default'}")
    dash.refused("https://127.0.0.1:9/x:v1", "/etc/none is not in this initramfs", policy="/etc/none")


def test_too_little_memory_is_known_before_the_pull_or_told_by_it(dash: Node) -> None:
    noise = os.urandom(1 << 16)  # further apart than gzip can see again, it does not compress
    layer = Layer().add("noise", b"".join(noise[n:] + noise[:n] for n in range(0, 3000, 100)))
    push(dash.site.plain, "team/large", [layer], ("zstd",))
    image = f"https://{dash.site.mutual.host}/team/large:v1"
    meminfo = dash.shell.root / "proc/meminfo"
    meminfo.write_text("MemAvailable: 1100 kB\n")
    dash.refused(image, "the image is too large", "more than twice that", "the image stage oci")
    meminfo.write_text("MemAvailable: 2700 kB\n")
    dash.refused(image, "buildah cannot pull", "no space left on device", "the image stage oci")


def test_a_registry_that_goes_away_meanwhile_ends_the_step_and_leaves_nothing(dash: Node) -> None:
    """The blobs are gone when buildah asks for them, and the manifest was there."""
    layer = Layer().directory("./").add("only-here", os.urandom(5000))
    push(dash.site.plain, "team/going", [layer])
    gone = """
    anchor_fetch_attempts=2
    anchor_memory_space() {
        mkdir -p "$1" && mount -t tmpfs tmpfs "$1"
        anchor_oci_bases=https://127.0.0.1:9/v2/team/going
    }
    """
    done = dash.run(f"https://{dash.site.mutual.host}/team/going:v1", "", setup=gone)
    assert done.returncode == 1
    assert done.stderr.count("next in") == 1, done.stderr
    assert "connection refused" in (dash.shell.root / "run/anchor/steps/10/error").read_text()
    assert not list((dash.shell.root / "run/anchor").glob("buildah*"))


def test_a_manifest_of_anchor_cannot_name_it(dash: Node) -> None:
    done = dash.run("https://127.0.0.1:9/x:v1", "", setup="anchor_manifest_urls=https://127.0.0.1:9/image")
    assert done.returncode == 1
    assert "which knows no manifests" in (dash.shell.root / "run/anchor/steps/10/error").read_text()
