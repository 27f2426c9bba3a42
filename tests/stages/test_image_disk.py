"""image disk: real block devices (loop), nginx with mutual TLS and files as sources, and what goes wrong with each."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from contrib.site import pki, servers
from contrib.site.registry import MANIFEST, Registry, registry
from tests.shell.conftest import LIB, SHELLS
from tests.stages.disk_images import MIB, RECORD_AT, disk_image, gpt, noise
from tests.stages.disk_node import DEFAULTS, IMAGE, LOAD, OTHER, SIZE, STAGES, Node, prepared, sha256

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for loop devices")

# A registry over TLS, one over the same storage to push by, and the CA of the first.
Store = tuple[Registry, Registry, pki.Authority]


@pytest.fixture(params=sorted(SHELLS))
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    yield from prepared(request.param, tmp_path)


@pytest.fixture
def dash(tmp_path: Path) -> Iterator[Node]:
    """One shell only, for what is the same in all."""
    yield from prepared("dash", tmp_path)


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-cq"], input=data, stdout=subprocess.PIPE, check=True).stdout


def xz(data: bytes) -> bytes:
    return subprocess.run(["xz", "-0c"], input=data, stdout=subprocess.PIPE, check=True).stdout


# --- The image arrives ------------------------------------------------------------------------------------


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "gzip": lambda data: gzip.compress(data, 1),
    "zstd": zstd,
    "xz": xz,
}


@pytest.mark.parametrize(
    ("node", "name"),
    [*((shell, "zstd") for shell in sorted(SHELLS)), *(("dash", name) for name in PACKED if name != "zstd")],
    indirect=["node"],
)
def test_an_image_is_written_and_read_back(node: Node, name: str) -> None:
    pack = PACKED[name]
    packed = pack(IMAGE)
    done = node.run(disk_url=node.put("image", packed), disk_sha256=sha256(packed), disk_raw_sha256=sha256(IMAGE))
    assert node.installed(done)
    assert node.note("note-raw_sha256") == sha256(IMAGE)
    assert node.note("number-raw_bytes") == str(SIZE)
    assert node.note("note-sha256") == sha256(packed)
    assert "written and read back" in done.stderr
    record = node.file.read_bytes()[RECORD_AT : RECORD_AT + 512].decode()
    assert f"sha256 {sha256(packed)}\nraw_sha256 {sha256(IMAGE)}\nsize {SIZE}\nkind gpt\n" in record


def test_an_image_that_ends_within_a_sector_is_written_whole(dash: Node) -> None:
    image = noise("odd", 3 * MIB + 700)
    done = dash.run(disk_url=dash.put("image", gzip.compress(image)), disk_raw_sha256=sha256(image))
    assert done.returncode == 0, done.stderr
    data = dash.file.read_bytes()
    assert data[: len(image)] == image
    # No partition table, so the record lies behind the image.
    assert data[SIZE - 4096 :].startswith(b"anchor-disk 1\n")


def test_a_disk_without_room_for_the_record_is_not_rebooted_into(dash: Node) -> None:
    image = disk_image(SIZE, start=1024)
    done = dash.run(disk_url=dash.put("image", image), disk_sha256=sha256(image))
    assert done.returncode == 0, done.stderr
    assert dash.file.read_bytes() == image
    assert "the next boot will not know it" in done.stderr
    assert (dash.shell.root / "run/anchor/steps/finish").read_text() == "poweroff\n"


def test_an_installed_image_is_known_and_not_fetched_again(node: Node) -> None:
    url, digest = node.put("image", IMAGE), sha256(IMAGE)
    assert node.installed(node.run(disk_url=url, disk_sha256=digest))
    node.put("image", b"no longer there")
    # Whatever the system has written since.
    with node.file.open("r+b") as disk:
        disk.seek(5 * MIB)
        disk.write(b"a file of the system")
    before = node.file.read_bytes()
    for parameters in ({"disk_sha256": digest}, {"disk_raw_sha256": digest}, {}, {"disk_overwrite": "always"}):
        done = node.run(disk_url=url, disk_installed="poweroff", **parameters)
        assert done.returncode == 0, done.stderr
        assert "has the image already" in done.stderr
        assert (node.shell.root / "run/anchor/steps/finish").read_text() == "poweroff\n"
    assert node.file.read_bytes() == before


def test_another_image_takes_the_place_of_an_installed_one_only_where_that_is_said(dash: Node) -> None:
    assert dash.installed(dash.run(disk_url=dash.put("image", IMAGE), disk_sha256=sha256(IMAGE)))
    other = {"disk_url": dash.put("other", OTHER), "disk_sha256": sha256(OTHER)}
    before = dash.file.read_bytes()
    assert dash.refused(dash.run(**other), "holds another image", sha256(IMAGE), "overwrite=installed")
    assert dash.file.read_bytes() == before
    assert dash.installed(dash.run(**other, disk_overwrite="installed"), OTHER)


def test_a_disk_that_somebody_emptied_is_installed_again(dash: Node) -> None:
    parameters = {"disk_url": dash.put("image", IMAGE), "disk_sha256": sha256(IMAGE)}
    assert dash.installed(dash.run(**parameters))
    subprocess.run(["partx", "--delete", str(dash.device)], check=True)
    subprocess.run(["wipefs", "-qa", str(dash.device)], check=True)
    done = dash.run(**parameters)
    assert "already" not in done.stderr
    assert dash.installed(done)


# --- What may not be written to ---------------------------------------------------------------------------


def test_a_disk_with_data_is_left_alone_unless_told(node: Node) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(node.device)], check=True)
    before = node.file.read_bytes()
    parameters = {"disk_url": node.put("image", IMAGE), "disk_sha256": sha256(IMAGE)}
    for overwrite in ("never", "installed"):
        done = node.run(**parameters, disk_overwrite=overwrite)
        assert node.refused(done, f"{node.device.name} holds data: ext4", "overwrite=always")
    assert node.file.read_bytes() == before
    assert node.installed(node.run(**parameters, disk_overwrite="always"))


def test_a_partition_table_is_data(dash: Node) -> None:
    first, last = gpt(SIZE)
    dash.file.write_bytes(first.ljust(SIZE - len(last), b"\0") + last)
    assert dash.refused(dash.run(disk_url="file:///none"), "holds data: gpt PMBR")


def test_a_mounted_disk_is_refused(dash: Node, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(dash.device)], check=True)
    (tmp_path / "mnt").mkdir()
    script = f"mount {dash.device} {tmp_path}/mnt && anchor_disk_run; s=$?; umount {tmp_path}/mnt; exit $s"
    done = dash.run(script, disk_url="file:///none", disk_overwrite="always")
    assert dash.refused(done, "is in use: it is mounted on", "nothing may use the disk")


def test_a_regular_file_is_refused(dash: Node, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    (dash.shell.root / "dev").unlink()
    (dash.shell.root / "dev").mkdir()
    (dash.shell.root / "dev/sdz").write_bytes(bytes(MIB))
    done = dash.run(disk_url="file:///none", disk_target="/dev/sdz")
    assert dash.refused(done, "/dev/sdz is not a disk but a regular file")
    assert (dash.shell.root / "dev/sdz").read_bytes() == bytes(MIB)


def test_a_disk_that_does_not_come_is_waited_for_and_named(dash: Node) -> None:
    done = dash.run(disk_url="file:///none", disk_target="serial:NONE", disk_timeout="1")
    assert dash.refused(done, "no disk is serial:NONE after 1 s; there are:")


def test_a_read_only_disk_is_refused(dash: Node) -> None:
    subprocess.run(["blockdev", "--setro", str(dash.device)], check=True)
    assert dash.refused(dash.run(disk_url=dash.put("image", IMAGE)), "is read-only")


def test_an_image_for_a_larger_disk_is_refused_before_anything_is_written(dash: Node) -> None:
    image = disk_image(SIZE + MIB)
    done = dash.run(disk_url=dash.put("image", gzip.compress(image, 1)), disk_sha256="0" * 64)
    assert dash.refused(done, "is too small: the image needs 13.0 MiB, and it has 12.0 MiB")
    assert not any(dash.file.read_bytes())


def test_an_image_that_does_not_say_its_size_may_turn_out_too_large(dash: Node) -> None:
    image = gzip.compress(noise("large", SIZE + MIB), 1)
    done = dash.run(disk_url=dash.put("image", image), disk_sha256=sha256(image))
    assert dash.refused(done, f"the image is larger than {dash.device.name}, which has 12.0 MiB")
    assert dash.file.read_bytes().startswith(b"anchor-disk-unfinished 1\n")


# --- What must not become bootable ------------------------------------------------------------------------


def unbootable(node: Node) -> bool:
    """Whether nothing would boot from the disk, or find a partition on it, and the next boot knows it for its own."""
    data = node.file.read_bytes()
    argv = ["blkid", "-p", "-o", "value", "-s", "PTTYPE", "-s", "TYPE", str(node.device)]
    assert subprocess.run(argv, capture_output=True, text=True, check=False).stdout == ""
    return data.startswith(b"anchor-disk-unfinished 1\n") and data[510:MIB] == b"  " + bytes(MIB - 512)


def test_a_wrong_digest_leaves_nothing_that_boots(node: Node) -> None:
    subprocess.run(["mkfs.ext4", "-q", str(node.device)], check=True)
    image = node.put("image", IMAGE)
    done = node.run(disk_url=image, disk_sha256=sha256(OTHER), disk_overwrite="always")
    assert node.refused(done, f"is {sha256(IMAGE)}, expected {sha256(OTHER)}")
    assert unbootable(node)
    # The next boot has the right digest, and begins again without being told that it may.
    done = node.run(disk_url=image, disk_sha256=sha256(IMAGE))
    assert "was cut off: it begins again" in done.stderr
    assert node.installed(done)


def test_a_wrong_raw_digest_leaves_nothing_that_boots(dash: Node) -> None:
    packed = gzip.compress(IMAGE, 1)
    done = dash.run(disk_url=dash.put("image", packed), disk_sha256=sha256(packed), disk_raw_sha256=sha256(OTHER))
    assert dash.refused(done, f"is {sha256(IMAGE)}, expected {sha256(OTHER)}", "rd.anchor.disk.raw_sha256")
    assert unbootable(dash)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(IMAGE, 1)[:-4000], "gzip cannot unpack it: gzip: stdin: unexpected end of file"),
        (b"\x28\xb5\x2f\xfd" + IMAGE, "zstd cannot unpack it"),
        (b"<html>" + b"An error, with status 200. " * 300, "but HTML or JSON"),
        (b"short", "it has 5 bytes unpacked"),
        (gzip.compress(b""), "it has 0 bytes unpacked"),
    ],
    ids=["cut", "damaged", "html", "short", "empty"],
)
def test_what_is_no_image_is_refused(dash: Node, data: bytes, message: str) -> None:
    # Without a digest: then the data itself has to be judged.
    assert dash.refused(dash.run(disk_url=dash.put("image", data)), "is not what it should be", message)
    assert not dash.file.read_bytes()[512:600].strip(b"\0 ")


def test_another_mirror_brings_what_the_first_had_wrong(dash: Node) -> None:
    wrong = dash.put("wrong", gzip.compress(IMAGE, 1)[:-100] + bytes(100))
    right = gzip.compress(IMAGE, 1)
    done = dash.run(disk_url=wrong, disk_mirrors=dash.put("right", right), disk_sha256=sha256(right))
    assert dash.installed(done)


def test_a_device_that_gives_back_something_else_is_found_out(dash: Node) -> None:
    # The device itself cannot be made to lie, so its reader is.
    script = """
    anchor_disk__read() { dd if=/dev/zero bs=1M count=1 2>/dev/null; }
    anchor_disk_run
    """
    done = dash.run(script, disk_url=dash.put("image", IMAGE), disk_sha256=sha256(IMAGE))
    assert dash.refused(done, "does not hold what was written to it", sha256(IMAGE))
    assert unbootable(dash)


def test_an_install_that_was_killed_begins_again(dash: Node) -> None:
    url, digest = dash.put("image", IMAGE), sha256(IMAGE)
    # Like a power cut: in the middle, without a chance to do anything.
    script = """
    dd() {
        case $* in *seek=6291456*) kill -KILL 0 ;; esac
        command dd "$@"
    }
    anchor_disk_run
    """
    values = {**DEFAULTS, "disk_target": str(dash.device), "disk_url": url, "disk_sha256": digest}
    env = {f"anchor_{name}": value for name, value in values.items()} | {"STAGES": str(STAGES), "LIB": str(LIB)}
    env |= {"ANCHOR_ROOT": str(dash.shell.root), "PATH": os.environ["PATH"]}
    argv = [*SHELLS["dash"], "-c", LOAD + script]
    child = subprocess.Popen(argv, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert child.wait(60) == -9
    assert unbootable(dash)
    assert dash.file.read_bytes()[2 * MIB : 5 * MIB] == IMAGE[2 * MIB : 5 * MIB]
    done = dash.run(disk_url=url, disk_sha256=digest)
    assert "was cut off: it begins again" in done.stderr
    assert dash.installed(done)


# --- From servers -----------------------------------------------------------------------------------------


def test_a_server_that_goes_away_half_way_is_waited_for(dash: Node, tmp_path: Path) -> None:
    www = tmp_path / "www"
    www.mkdir()
    (www / "disk.img").write_bytes(IMAGE)
    authority = pki.make_authority(tmp_path / "ca")
    shutil.copy(authority.certificate, dash.shell.root / "etc/anchor/ca.pem")
    leaf, directory = pki.issue(authority, tmp_path, "store"), tmp_path / "nginx"
    again: list[subprocess.Popen[bytes]] = []
    with servers.nginx(directory, root=www, leaf=leaf, rate=6 * MIB) as store:

        def away_and_back() -> None:
            while dash.file.read_bytes()[3 * MIB : 3 * MIB + 512] == bytes(512):
                time.sleep(0.05)
            os.kill(store.pids[0], 15)
            argv = ["nginx", "-e", "stderr", "-p", str(directory), "-c", str(directory / "nginx.conf")]
            time.sleep(1)
            again.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL))

        thread = threading.Thread(target=away_and_back)
        thread.start()
        url = f"https://127.0.0.1:{store.https_port}/disk.img"
        done = dash.run(disk_url=url, disk_sha256=sha256(IMAGE), fetch_attempts="20")
        thread.join()
        log = store.access_log.read_text().splitlines()
    for child in again:
        child.terminate()
        child.wait()
    assert dash.installed(done)
    assert int(dash.note("number-attempts")) > 1
    # It went on where it stopped: the last request is for a part.
    assert log[-1].startswith("206 ")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Run a registry over TLS, and one over the same storage to push by."""
    top = tmp_path_factory.mktemp("registry")
    authority = pki.make_authority(top / "ca")
    leaf = pki.issue(authority, top, "registry")
    with (
        registry(top / "push", storage=top / "storage") as push,
        registry(top / "registry", storage=top / "storage", leaf=leaf) as running,
    ):
        yield running, push, authority


def publish(running: Registry, tag: str, *layers: bytes, media_type: str = "application/octet-stream+gzip") -> None:
    config = {**running.put_blob("nodes/disk", b"{}"), "mediaType": "application/vnd.oci.empty.v1+json"}
    described = [{**running.put_blob("nodes/disk", layer), "mediaType": media_type} for layer in layers]
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described}
    running.put_manifest("nodes/disk", tag, document)


def test_an_image_comes_from_a_registry_by_tag_or_by_blob(dash: Node, store: Store) -> None:
    running, push, authority = store
    shutil.copy(authority.certificate, dash.shell.root / "etc/anchor/ca.pem")
    packed = gzip.compress(IMAGE, 1)
    publish(push, "v1", packed)
    name = f"{running.host}/nodes/disk"
    assert dash.installed(dash.run(disk_tag=f"{name}:v1"))
    assert dash.note("note-sha256") == sha256(packed)
    # The tag is asked for again, and leads to what is there.
    assert "has the image already" in dash.run(disk_tag=f"{name}:v1").stderr
    other = gzip.compress(OTHER, 1)
    publish(push, "v2", other)
    blob = f"{name}@sha256:{sha256(other)}"
    assert dash.installed(dash.run(disk_blob=blob, disk_overwrite="installed"), OTHER)


def test_what_is_no_disk_in_a_registry_is_refused(dash: Node, store: Store) -> None:
    running, push, authority = store
    shutil.copy(authority.certificate, dash.shell.root / "etc/anchor/ca.pem")
    publish(push, "two", gzip.compress(IMAGE, 1), b"another layer")
    publish(push, "container", b"x", media_type="application/vnd.oci.image.layer.v1.tar+gzip")
    name = f"{running.host}/nodes/disk"
    assert dash.refused(dash.run(disk_tag=f"{name}:two"), "has 2 layers: which one is the image?")
    assert dash.refused(dash.run(disk_tag=f"{name}:container"), "is a container image")
    assert dash.refused(dash.run(disk_tag=f"{name}:none"), "status 404")
    assert dash.refused(dash.run(disk_blob=f"{name}:v1"), "names no blob")
    assert dash.refused(dash.run(disk_tag=f"{name}:v1", disk_allow_no_tls="1"), "nothing protects http://")
    assert not any(dash.file.read_bytes())
