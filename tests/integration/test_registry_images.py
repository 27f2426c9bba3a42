"""The build host and a registry: `image --from` makes what an engine mounts, `publish` pushes what nodes boot."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from anchor_build.container import unpacked
from anchor_build.embed import pack, resolve
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import file_digest, sha256
from anchor_build.image import ImageBuild, build_image
from anchor_build.manifest import DAY_S, manifest_text, read_manifest
from anchor_build.oci import Access, Skopeo
from anchor_build.publish_oci import Push, parse_target, publish_oci
from anchor_build.signing import open_key, read_public_keys, sign_text
from contrib.site import pki
from contrib.site.registry import CONFIG, MANIFEST, PASSWORD, USER, Registry, registry
from tests.integration.test_manifest_signing import make_key
from tests.stages import test_image_oci as stage
from tests.stages.oci_image import TAR, Layer, config_of, facts_of, push

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("docker-registry", "skopeo", "umoci", "buildah", "tar2sqfs"))),
    reason="needs root, docker-registry, skopeo, umoci, buildah and tar2sqfs",
)
# The registries of the stage's tests, and a node with its shell library.
site, dash = stage.site, stage.dash

Run = Callable[..., CompletedProcess[str]]


@contextmanager
def quiet(title: str, progress: Callable[[], str] | None = None) -> Iterator[None]:
    """Show no step."""
    yield


@contextmanager
def quiet_unpack(reference: str) -> Iterator[Path]:
    """Unpack what is for one platform, whatever this host is."""
    with unpacked(reference, f"--from {reference}", Access(), "linux/amd64", quiet) as container:
        yield container.directory


@pytest.fixture
def run(tmp_path: Path, site: stage.Site) -> Run:
    """Run anchor-build in a directory of its own, with a login that every registry of the site takes."""
    secret = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    hosts = (site.basic.host, site.token.host)
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {host: {"auth": secret} for host in hosts}}))

    def anchor_build(*words: str | Path, **env: str) -> CompletedProcess[str]:
        argv = [sys.executable, "-m", "anchor_build", *map(str, words)]
        found = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "REGISTRY_AUTH_FILE": str(tmp_path / "auth.json"), **env}
        done = subprocess.run(
            argv, cwd=tmp_path, env={**os.environ, **found}, capture_output=True, text=True, timeout=120, check=False
        )
        assert not list((tmp_path / "cache/anchor-build").glob("build-*"))
        assert PASSWORD not in done.stdout + done.stderr
        return done

    return anchor_build


def trust(site: stage.Site) -> tuple[str | Path, ...]:
    """Return the options for the site's CA and the node's certificate."""
    return (
        "--registry-ca",
        site.authority.certificate,
        "--registry-cert",
        site.node.certificate,
        "--registry-key",
        site.node.key,
    )


def facts_in(image: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the facts of what is in a squashfs, without those of the pseudo file systems."""
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "tree", image], check=True, timeout=60)
    return facts_of(str(tmp_path / "tree"))


# --- Images from container images -------------------------------------------------------------------------

layers, expected = stage.layers, stage.expected


def test_an_image_has_what_umoci_unpacks_and_is_the_same_each_time(
    run: Run, site: stage.Site, layers: list[Layer], expected: dict[str, Any], tmp_path: Path
) -> None:
    digest = push(site.plain, "team/from", layers, ("gzip", "zstd", ""))
    made = run("image", "--from", f"{site.mutual.host}/team/from:v1", *trust(site), "-o", "a.squashfs", "--json")
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert (report["source"], report["container_digest"]) == ("container", f"sha256:{digest}")
    manifest, _ = read_manifest(tmp_path / "a.squashfs.manifest")
    assert manifest.sha256 == file_digest(tmp_path / "a.squashfs") == report["sha256"]
    found = facts_in(tmp_path / "a.squashfs", tmp_path)
    pseudo = {name for name in {*found, *expected} if name.split("/")[0] in ("dev", "proc", "run", "sys")}
    assert {
        name: (found.get(name), expected.get(name))
        for name in {*found, *expected} - pseudo
        if found.get(name) != expected.get(name)
    } == {}
    assert "dev" in found and "dev/null" not in found
    again = run("image", "--from", f"http://{site.plain.host}/team/from@sha256:{digest}", "-o", "b.squashfs", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["sha256"] == report["sha256"]


def test_what_buildah_makes_is_what_buildah_mounts(run: Run, tmp_path: Path) -> None:
    own = [
        "buildah",
        "--root",
        str(tmp_path / "storage"),
        "--runroot",
        str(tmp_path / "run"),
        "--storage-driver",
        "vfs",
    ]

    def buildah(*words: str) -> str:
        env = {**os.environ, "TMPDIR": str(tmp_path)}
        return subprocess.run(
            [*own, *words], env=env, capture_output=True, text=True, check=True, timeout=100
        ).stdout.strip()

    image = ""
    changes = (
        'mkdir -p etc opt/old usr/bin "d$(printf %0200d 1)"; printf 1 >etc/a; printf 2 >etc/gone; printf 3 >opt/old/x;'
        "printf 4 >usr/bin/ping; ln usr/bin/ping usr/bin/ping6; setcap cap_net_raw+ep usr/bin/ping; chmod 4755 usr/bin;"
        "ln -s /etc/passwd etc/link; mkfifo opt/pipe; chown -R 7:8 opt",
        "rm etc/gone; rm -r opt/old; mkdir opt/old; printf 5 >opt/old/new; rm etc/link; mkdir etc/link",
        "rm usr/bin/ping6; setfattr -n user.mark -v x etc/a",
    )
    for change in changes:
        name = buildah("from", image or "scratch")
        subprocess.run(["sh", "-ec", change], cwd=buildah("mount", name), check=True, timeout=20)
        image = f"localhost/step:{len(change)}"
        buildah("commit", "--quiet", name, image)
    mounted = facts_of(buildah("mount", buildah("from", image)))
    buildah("push", "--quiet", image, f"oci-archive:{tmp_path}/node.tar")
    made = run("image", "--from", "node.tar", "-o", "node.squashfs")
    assert made.returncode == 0, made.stderr
    found = facts_in(tmp_path / "node.squashfs", tmp_path)
    found = {name: facts for name, facts in found.items() if name not in ("dev", "proc", "run", "sys")}
    assert sorted(found) == sorted(mounted)
    # No layer has an entry for the root: then its mode is the engine's own.
    del found["."], mounted["."]
    assert {name: (found[name], mounted[name]) for name in found if found[name] != mounted[name]} == {}


@pytest.mark.parametrize("name", ["up", "inner", "whiteout", "hard", "text", "short"])
def test_layers_that_no_image_may_have_are_refused(site: stage.Site, name: str) -> None:
    digest = push(site.plain, f"host/{name}", [Layer().directory("./").add("x"), stage.BAD_LAYERS[name][0]])
    reason = {"hard": "cannot be unpacked", "text": "no tar archive", "short": "no tar archive"}
    with (
        pytest.raises(AnchorError, match=reason.get(name, "leads out of the image")),
        quiet_unpack(f"http://{site.plain.host}/host/{name}@sha256:{digest}"),
    ):
        pass


def test_links_do_not_lead_a_layer_out_of_the_image(run: Run, site: stage.Site, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    bad = Layer().directory("./").link("way", str(outside)).link("up", "../" * 20 + str(outside)[1:])
    more = Layer().add("way/written", b"x").add("up/written", b"x").add("way/.wh.auth.json")
    digest = push(site.plain, "host/links", [bad, more])
    made = run("image", "--from", f"http://{site.plain.host}/host/links@sha256:{digest}", "-o", "node.squashfs")
    assert made.returncode == 0, made.stderr
    assert list(outside.iterdir()) == [] and (tmp_path / "auth.json").exists()


def pushed(site: stage.Site, name: str, **changes: Any) -> str:
    """Push a small image with `changes` to its manifest; return what it is called."""
    layer = Layer().directory("./").add("x").tar
    config = {"mediaType": CONFIG, **site.plain.put_blob(name, json.dumps(config_of([layer], "s390x")).encode())}
    blob = {"mediaType": TAR, **site.plain.put_blob(name, layer)}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [blob], **changes}
    return f"http://{site.plain.host}/{name}@sha256:{site.plain.put_manifest(name, 'v1', document)}"


def test_images_that_cannot_be_unpacked_say_why(run: Run, site: stage.Site, tmp_path: Path) -> None:
    blob = site.plain.put_blob("host/bad", b"other")
    other = site.plain.put_blob("host/bad", json.dumps(config_of([b"other"])).encode())
    platform = pushed(site, "host/bad")
    type_ = pushed(site, "host/bad", layers=[{"mediaType": "application/x-unheard-of", **blob}])
    diff = pushed(site, "host/bad", config={"mediaType": CONFIG, **other})
    blobs = site.plain.storage / "docker/registry/v2/blobs/sha256"
    harmed = pushed(site, "host/harmed", layers=[{"mediaType": TAR, **site.plain.put_blob("host/harmed", b"harm me")}])
    digest = site.plain.put_blob("host/harmed", b"harm me")["digest"][7:]
    (blobs / digest[:2] / digest / "data").write_bytes(b"harmed!")
    cases = {
        platform: "is for linux/s390x, and",
        type_: "not an image of 1 to 128 tar layers",
        diff: "diffid mismatch",
        harmed: "sha256",
        f"http://{site.plain.host}/host/bad:v1": "nothing protects http://",
        f"{site.mutual.host}/host/bad:v1": "signed by unknown authority\nhint: name the registry's CA",
    }
    for reference, reason in cases.items():
        with pytest.raises(AnchorError) as caught, quiet_unpack(reference):
            pass
        assert reason in f"{caught.value.message}\nhint: {caught.value.hint}", reference
    ended = run("image", "--from", diff, "--platform", "linux/amd64", "-o", "node.squashfs")
    assert ended.returncode == 1 and f"error: --from {diff}: cannot be unpacked" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auth.json", "cache"]


# --- Publishing -------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a signed image; its key is site.pub beside it."""
    tree = tmp_path / "tree-of-node"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc/os-release").write_text("ID=demo\n")
    key, _ = make_key(tmp_path, "site")
    return made(tree, key)


def made(tree: Path, key: str) -> Path:
    """Make the image node.squashfs of a tree, beside it."""
    output = tree.with_name("node.squashfs")
    build_image(ImageBuild(output, tree, sign_key=key, valid_for=30 * DAY_S), quiet)
    return output


def uploads(server: Registry) -> int:
    """Return how many blobs were sent to a registry."""
    return server.log.read_text().count('"PATCH /v2/')


@pytest.mark.parametrize("how", ["mutual", "token"])
def test_a_published_image_is_what_the_node_mounts(
    run: Run, site: stage.Site, dash: stage.Node, image: Path, how: str
) -> None:
    server: Registry = getattr(site, how)
    words = (
        "publish",
        image,
        "--manifest-key",
        "site.pub",
        "--to",
        f"oci://{server.host}/nodes/{how}:v1",
        *trust(site),
    )
    epoch = {"SOURCE_DATE_EPOCH": "1790000000"}
    done = run(*words, "--annotation", "version=2026.11", "--json", **epoch)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["previous"], report["result"]) == (None, "published")
    parameter, _, reference = report["boot_parameter"].partition("=")
    assert (parameter, reference) == ("rd.anchor.oci.image", f"{server.host}/nodes/{how}:v1@{report['digest']}")
    facts = dash.facts(f"https://{reference}", user=USER, password=PASSWORD)
    assert "etc/os-release" in facts
    sent = uploads(server)
    again = run(*words, "--annotation", "version=2026.11", **epoch)
    assert again.returncode == 0 and f"{reference}: was there" in again.stdout, again.stderr
    assert uploads(server) == sent > 0
    blob = (
        site.plain.storage / "docker/registry/v2/blobs/sha256" / report["digest"][7:9] / report["digest"][7:] / "data"
    )
    document = json.loads(blob.read_bytes())
    assert document["artifactType"] == "application/vnd.anchor.image.v1"
    assert document["config"]["mediaType"] == "application/vnd.oci.empty.v1+json"
    assert [layer["mediaType"] for layer in document["layers"]] == ["application/vnd.anchor.image.layer.v1.squashfs"]
    prefix = "org.opencontainers.image."
    assert document["annotations"] == {
        f"{prefix}created": "2026-09-21T14:13:20Z",
        f"{prefix}title": "node.squashfs",
        f"{prefix}version": "2026.11",
    }


def test_a_set_has_one_tag_for_node_and_boot_server(
    run: Run, site: stage.Site, dash: stage.Node, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "vmlinuz-6.1").write_bytes(b"kernel")
    initramfs = tmp_path / "node.img"
    initramfs.write_bytes(b"initramfs")
    facts = {"sha256": file_digest(initramfs), "kernel": "6.1", "kernel_file": "vmlinuz-6.1"}
    (tmp_path / "node.img.json").write_text(json.dumps({**facts, "settings": {"rd.anchor.x": "(secret)"}}))
    to = f"oci+http://{site.plain.host}/nodes/set:v1"
    words = ("publish", image, "--manifest-key", "site.pub", "--initramfs", "node.img", "--to", to)
    done = run(*words, "--platform", "linux/arm64", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "holds secrets (rd.anchor.x)" in done.stderr
    names = [file["name"] for file in report["files"]]
    assert names[1:] == ["vmlinuz-6.1", "node.img", "node.squashfs.manifest"]
    reference = report["boot_parameter"].partition("=")[2]
    assert "etc/os-release" in dash.facts(reference, platform="linux/arm64")
    dash.refused(reference, "no manifest for linux/amd64", platform="linux/amd64")
    boot = report["files"][1]["manifest"]
    argv = [
        "skopeo",
        "copy",
        "--src-tls-verify=false",
        f"docker://{site.plain.host}/nodes/set@{boot}",
        f"dir:{tmp_path}/got",
    ]
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    assert (tmp_path / "got" / report["files"][2]["sha256"]).read_bytes() == b"initramfs"


JUDGE = """
for lib in report types params manifest; do . "$LIB/anchor-$lib.sh" || exit 9; done
anchor_step_dir=$ANCHOR_ROOT/run/anchor/steps/10
mkdir -p "$anchor_step_dir" && anchor_manifest_judge "$ANCHOR_ROOT/m/manifest" M || exit 7
anchor_stage_for_scheme() { return 1; }
"""


def test_a_signed_manifest_names_what_nodes_boot_from_a_registry(
    run: Run, site: stage.Site, dash: stage.Node, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "www").mkdir()
    (dash.shell.root / "m").mkdir()
    shutil.copy(tmp_path / "site.pub", dash.shell.root / "etc/anchor/manifest.pub")
    layer = Layer().directory("./").add("tar", b"1")
    digest = push(site.plain, "nodes/tar", [layer])
    name = f"{site.mutual.host}/nodes/named:v1"
    sign = ("--sign-key", "site.key", "--valid-for", "30d")
    pushed = run("publish", image, "--manifest-key", "site.pub", "--to", f"oci://{name}", *trust(site), *sign, "--json")
    assert pushed.returncode == 0, pushed.stderr
    at = run("image", "--at", f"{site.mutual.host}/nodes/tar:v1", *trust(site), *sign, "--json")
    assert at.returncode == 0, at.stderr
    reports = [json.loads(done.stdout) for done in (pushed, at)]
    assert reports[1]["digest"] == f"sha256:{digest}"
    for report, file in zip(reports, ("etc/os-release", "tar"), strict=True):
        manifest, text = read_manifest(tmp_path / report["manifest"])
        assert (manifest.image, f"sha256:{manifest.sha256}") == ("oci", report["digest"])
        assert run("publish", report["manifest"], "--to", "www", "--manifest-key", "site.pub").returncode == 0
        assert (tmp_path / "www" / report["manifest"]).read_bytes() == text
        (dash.shell.root / "m/manifest").write_bytes(text)
        done = dash.run("", setup=JUDGE)
        assert done.returncode == 0, done.stderr
        assert file in json.loads(done.stdout)
    # Nothing that the key did not sign is looked for.
    (dash.shell.root / "m/manifest").write_bytes(text.replace(digest.encode(), b"0" * 64))
    assert dash.run("", setup=JUDGE).returncode == 7
    newer = tmp_path / "www" / reports[1]["manifest"]
    late = replace(manifest, created=manifest.created + 60)
    newer.write_text(sign_text(manifest_text(late), open_key(str(tmp_path / "site.key"))))
    older = run("publish", reports[1]["manifest"], "--to", "www", "--manifest-key", "site.pub")
    assert older.returncode == 1 and f"make it the newest: anchor-build image --at {site.mutual.host}/" in older.stderr
    beside = run("publish", f"{image}.manifest", "--to", "www", "--manifest-key", "site.pub")
    assert beside.returncode == 1 and "is the manifest of a file" in beside.stderr
    gone = run("image", "--at", f"{site.mutual.host}/nodes/tar:never", *trust(site), "-o", "x.manifest")
    assert gone.returncode == 1 and "no such image or tag" in gone.stderr and not (tmp_path / "x.manifest").exists()


def test_what_is_newer_stays_and_the_way_back_is_told(
    site: stage.Site, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = parse_target(f"oci+http://{site.plain.host}/nodes/newer:v1")
    push_ = Push(image, target, read_public_keys([tmp_path / "site.pub"]))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    digest = publish_oci(push_, quiet)["digest"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1780000000")
    with pytest.raises(AnchorError, match="is there already, and newer: of 2026-09-21T14:13:20Z"):
        publish_oci(push_, quiet)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795000000")
    report = publish_oci(push_, quiet)
    assert report["previous"] == digest != report["digest"]


def test_a_registry_that_takes_nothing_says_why(run: Run, site: stage.Site, image: Path, tmp_path: Path) -> None:
    other = pki.make_authority(tmp_path / "other")
    (tmp_path / "nobody.json").write_text("{}")
    nobody = Access(site.authority.certificate, authfile=tmp_path / "nobody.json")
    key = read_public_keys([tmp_path / "site.pub"])
    with registry(tmp_path / "registry", storage=tmp_path / "storage", read_only=True) as server:
        cases = {
            f"oci+http://{server.host}/nodes/x:v1": (Access(), "is it read-only"),
            f"oci://{site.basic.host}/nodes/x:v1": (nobody, "log in with `skopeo login"),
            f"oci://{site.basic.host}/nodes/y:v1": (Access(other.certificate), "name the registry's CA"),
            f"oci://{site.mutual.host}/nodes/x:v1": (nobody, "--registry-cert and --registry-key"),
            f"oci://{site.plain.host}/nodes/x:v1": (Access(), "speaks plain http"),
        }
        for to, (access, reason) in cases.items():
            with pytest.raises(AnchorError) as caught:
                publish_oci(Push(image, parse_target(to), key, access=access), quiet)
            assert caught.value.message.startswith("--to ") and reason in caught.value.hint, caught.value
    image.write_bytes(image.read_bytes() + b"x")
    harmed = run("publish", image, "--manifest-key", "site.pub", "--to", f"oci://{site.basic.host}/nodes/x:v1")
    assert harmed.returncode == 1 and "is not the image of" in harmed.stderr


def test_a_registry_without_room_keeps_its_tag(image: Path, tmp_path: Path) -> None:
    key = read_public_keys([tmp_path / "site.pub"])
    with registry(tmp_path / "registry", storage=tmp_path / "storage", room=1_000_000) as server:
        target = parse_target(f"oci+http://{server.host}/nodes/x:v1")
        first = publish_oci(Push(image, target, key), quiet)
        (tmp_path / "tree-of-node/large").write_bytes(os.urandom(2_000_000))
        larger = Push(made(tmp_path / "tree-of-node", str(tmp_path / "site.key")), target, key)
        with pytest.raises(AnchorError, match=r"oci\+http://.*: writing blob") as caught:
            publish_oci(larger, quiet)
        assert "is there room in its storage?" in caught.value.hint
        there = Skopeo(tmp_path).document(target, "the tag")
        assert there is not None and f"sha256:{sha256(there)}" == first["digest"]


# --- Images in an initramfs -------------------------------------------------------------------------------


def test_images_to_embed_are_pinned_and_can_be_taken_out(site: stage.Site, tmp_path: Path) -> None:
    access = Access(site.authority.certificate, site.node.certificate, site.node.key)
    digest = push(site.plain, "tools/one", [Layer().directory("./").add("one", os.urandom(50_000))], ("zstd",))
    other = push(site.plain, "tools/two", [Layer().directory("./").add("two", b"2")], ("",))
    names = [f"{site.mutual.host}/tools/{name}:v1" for name in ("one", "two")]
    images = resolve(names, access, quiet)
    assert [(image.name, image.digest) for image in images] == list(
        zip(names, (f"sha256:{digest}", f"sha256:{other}"), strict=True)
    )
    # What the tag is later does not matter.
    push(site.plain, "tools/one", [Layer().add("moved")])
    packed = []
    for number in (1, 2):
        work = tmp_path / str(number)
        work.mkdir()
        content, rows = pack(images, access, work, quiet)
        packed.append(content)
        assert [row["manifest"] for row in rows] == [f"sha256:{digest}", f"sha256:{other}"]
    assert packed[0] == packed[1]
    (tmp_path / "images").write_bytes(packed[0])
    subprocess.run(["unsquashfs", "-q", "-n", "-d", tmp_path / "layout", tmp_path / "images"], check=True, timeout=60)
    storage = f"containers-storage:[vfs@{tmp_path}/storage+{tmp_path}/run]{names[0]}"
    for argv in (["copy", f"oci:{tmp_path}/layout:{names[0]}", storage], ["inspect", storage]):
        subprocess.run(["skopeo", *argv], check=True, capture_output=True, timeout=60)


def test_images_that_cannot_be_embedded_say_why(site: stage.Site, tmp_path: Path) -> None:
    access = Access(site.authority.certificate, site.node.certificate, site.node.key)
    push(site.plain, "tools/one", [Layer().directory("./").add("one", b"1")])
    name = f"{site.mutual.host}/tools/one:v1"
    cases = {
        f"{site.mutual.host}/tools/one:never": "has no such image or tag",
        f"{site.mutual.host}/tools/one@sha256:{'0' * 64}": "has no such image or tag",
        "tools/one:v1": "no registry in the name",
    }
    for reference, reason in cases.items():
        with pytest.raises(AnchorError, match=reason):
            resolve([reference], access, quiet)
    with pytest.raises(UsageError, match="is there twice"):
        resolve([name, name], access, quiet)
    gone = replace(resolve([name], access, quiet)[0], source=f"{name}@sha256:{'0' * 64}")
    with pytest.raises(AnchorError, match="manifest unknown"):
        pack([gone], access, tmp_path, quiet)
