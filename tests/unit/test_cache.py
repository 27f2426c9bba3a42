"""The cache of builds: what counts as changed, and what is done with entries."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from anchor_build import cache, inputs
from anchor_build.build import InitramfsBuild
from anchor_build.cache import Inputs, digests, find, is_settled, keep, key_of, prune, size_limit, snapshot, unchanged
from anchor_build.drivers import driver_set
from anchor_build.embed import Embedded
from anchor_build.errors import UsageError
from anchor_build.kernel import Kernel
from anchor_build.plan import make_plan
from anchor_build.registry import load_registry
from anchor_build.root import Root
from anchor_build.settings import read_settings
from anchor_build.signing import PublicKey

KEY = "0" * 64
REPORT = {"kernel": "6.1.0"}
IMAGE = b"an initramfs\nwith lines\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.SIZE_VARIABLE, raising=False)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Lay out a tree and a list, both with files and a link."""
    for name in ("tree/below", "list/below"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tree/file", "tree/below/file", "list/file", "list/below/file", "single"):
        (tmp_path / name).write_text("content", encoding="utf-8")
    (tmp_path / "tree/large").write_bytes(bytes(cache.SMALL + 1))
    (tmp_path / "list/link").symlink_to("file")
    return tmp_path


@pytest.fixture
def watched(top: Path) -> Inputs:
    files = {str(top / "single"), str(top / "gone")}
    return Inputs(frozenset({str(top / "tree")}), frozenset({str(top / "list")}), frozenset(files))


def preserve(path: Path, content: bytes) -> None:
    """Change a file's content but not its size and not the time that programs look at."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_link(path: Path, target: str | None) -> None:
    path.unlink()
    if target is None:
        path.write_text("content", encoding="utf-8")
    else:
        path.symlink_to(target)


def put_in_place(path: Path, content: str) -> None:
    other = path.with_name("other")
    other.write_text(content, encoding="utf-8")
    other.replace(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda top: (top / "tree/below/file").write_text("another"),
    "content of the same size and time": lambda top: preserve(top / "tree/file", b"CONTENT"),
    "a file in a list": lambda top: preserve(top / "list/file", b"CONTENT"),
    "a single file": lambda top: (top / "single").write_text("another"),
    "a large file": lambda top: preserve(top / "tree/large", b"x" * (cache.SMALL + 1)),
    "a new file in a tree": lambda top: (top / "tree/below/new").touch(),
    "a new directory in a tree": lambda top: (top / "tree/new").mkdir(),
    "a new file in a list": lambda top: (top / "list/new").touch(),
    "what was missing": lambda top: (top / "gone").touch(),
    "a file that went away": lambda top: (top / "list/file").unlink(),
    "a mode": lambda top: (top / "tree/file").chmod(0o600),
    "an owner": lambda top: os.chown(top / "tree/file", 1, 1),
    "where a link leads": lambda top: replace_link(top / "list/link", "single"),
    "a file in place of a link": lambda top: replace_link(top / "list/link", None),
    "another file in its place": lambda top: put_in_place(top / "tree/file", "CONTENT"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_seen(what: str, top: Path, watched: Inputs) -> None:
    if what == "an owner" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    before = snapshot(watched)
    known = digests(before, ())
    assert unchanged(watched, before, known)
    CHANGES[what](top)
    assert not unchanged(watched, before, known)


def test_what_does_not_matter_is_no_change(top: Path, watched: Inputs) -> None:
    before = snapshot(watched)
    known = digests(before, ())
    (top / "list/below/new").touch()  # a list is what is directly in it
    (top / "tree/__pycache__").mkdir()
    (top / "tree/file").touch()  # another time, the same content
    content = (top / "single").read_bytes()
    (top / "single").unlink()
    (top / "single").write_bytes(content)
    now = snapshot(watched)
    assert now[str(top / "single")] != before[str(top / "single")]
    assert unchanged(watched, before, known)
    (top / "tree/large").touch()  # has no digest: it may be another one
    assert not unchanged(watched, before, known)
    assert unchanged(watched, before, digests(before, [str(top / "tree/large")]))


def test_what_was_changed_just_now_may_change_again_at_the_same_time(top: Path, watched: Inputs) -> None:
    found = snapshot(watched)
    newest = max(int(text.rpartition(" ")[2]) for text in found.values() if text.count(" ") == 6)
    assert not is_settled(found, newest)
    assert not is_settled(found, newest + cache.RACY_NS)
    assert is_settled(found, newest + cache.RACY_NS + 1)
    later = time.time_ns() + 2 * cache.RACY_NS
    assert is_settled(found, later, [str(top / "list")])
    assert not is_settled(found, time.time_ns(), [str(top / "list")])


def test_coverage(top: Path, watched: Inputs) -> None:
    for name in ("tree", "tree/a/b/c", "list", "list/new", "single", "gone"):
        assert watched.covers(str(top / name)), name
    for name in ("list/below/x", "treetop", "other", "gone/x"):
        assert not watched.covers(str(top / name)), name


def kept(top: Path, watched: Inputs, key: str = KEY, image: bytes = IMAGE) -> Path:
    found = snapshot(watched)
    keep(key, watched, found, digests(found, ()), REPORT, image)
    return cache.directory() / key


def test_a_build_is_found_again_and_only_by_its_owner(top: Path, watched: Inputs) -> None:
    assert find(KEY) is None
    path = kept(top, watched)
    found = find(KEY)
    assert found is not None
    assert (found.report, found.image) == (REPORT, IMAGE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert find("1" * 64) is None
    assert kept(top, watched, image=b"another") == path
    again = find(KEY)
    assert again is not None
    assert again.image == b"another"
    assert [entry.name for entry in path.parent.iterdir()] == [KEY]


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "digest"])
def test_a_damaged_entry_is_removed(top: Path, watched: Inputs, damage: str) -> None:
    path = kept(top, watched)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    elif damage == "digest":
        data[3] ^= 1
    else:
        data = {"cut": data[:-1], "longer": data + b"x", "empty": bytearray()}[damage]
    path.write_bytes(data)
    assert find(KEY) is None
    assert not path.exists()


def test_what_was_not_used_for_longest_goes_first(top: Path, watched: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    size = kept(top, watched, image=bytes(100_000)).stat().st_size
    for number in (1, 2):
        kept(top, watched, f"{number}" * 64, bytes(100_000))
    for age, number in ((30, 0), (20, 1), (10, 2)):
        os.utime(cache.directory() / (f"{number}" * 64), (time.time() - age,) * 2)
    assert find(KEY) is not None  # used now
    left = cache.directory() / f"{cache.UNFINISHED}x"
    left.touch()
    os.utime(left, (0, 0))
    prune(cache.directory(), 2 * size)
    assert sorted(path.name[0] for path in cache.directory().iterdir()) == ["0", "2"]
    monkeypatch.setenv(cache.SIZE_VARIABLE, "1")
    kept(top, watched, "3" * 64)
    assert find("3" * 64) is None


def test_the_size_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert size_limit() == cache.DEFAULT_SIZE
    monkeypatch.setenv(cache.SIZE_VARIABLE, "500M")
    assert size_limit() == 500 << 20
    monkeypatch.setenv(cache.SIZE_VARIABLE, "much")
    with pytest.raises(UsageError, match=f"{cache.SIZE_VARIABLE}=much"):
        cache.find("key")
    with pytest.raises(UsageError, match=f"{cache.SIZE_VARIABLE}=much"):
        size_limit()


def test_a_full_disk_keeps_nothing_and_fails_nothing(top: Path, watched: Inputs) -> None:
    cache.directory().parent.mkdir(parents=True)
    cache.directory().touch()  # no directory can be made there
    kept(top, watched)
    assert find(KEY) is None


# --- What is said to a build ------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Path) -> InitramfsBuild:
    plan = make_plan(load_registry(), image=["squashfs"])
    settings = read_settings(plan, ["rd.anchor.fetch.attempts=3"])
    kernel = Kernel("6.1.0", tmp_path / "modules", tmp_path / "vmlinuz")
    return InitramfsBuild(plan, kernel, tmp_path / "out.img", b"a CA", settings)


SAID: dict[str, Callable[[InitramfsBuild], InitramfsBuild]] = {
    "stages": lambda b: replace(b, plan=make_plan(load_registry(), auth=["acme"], image=["squashfs"])),
    "settings": lambda b: replace(b, settings=read_settings(b.plan, ["rd.anchor.fetch.attempts=4"])),
    "no settings": lambda b: replace(b, settings=()),
    "CA": lambda b: replace(b, ca=b"another CA"),
    "manifest keys": lambda b: replace(b, manifest_keys=(PublicKey("pem", "fingerprint"),)),
    "manifest-since": lambda b: replace(b, manifest_since=1),
    "embedded images": lambda b: replace(b, embedded=(Embedded("x.example/x:1", "sha256:" + "0" * 64, "x.oci"),)),
    "kernel": lambda b: replace(b, kernel=replace(b.kernel, release="6.1.1")),
    "modules": lambda b: replace(b, kernel=replace(b.kernel, modules=Path("/elsewhere"))),
    "kernel image": lambda b: replace(b, kernel=replace(b.kernel, image=None)),
    "root": lambda b: replace(b, kernel=Kernel("6.1.0", Path("/r/modules"), None, Root(Path("/r")))),
    "add-drivers": lambda b: replace(b, drivers=("ice",)),
    "drivers": lambda b: replace(b, driver_set=driver_set("minimal")),
    "compress": lambda b: replace(b, compress="gzip"),
    "no trim": lambda b: replace(b, trim=False),
    "profile": lambda b: replace(b, inputs={"profile default": "0" * 64}),
    "warnings": lambda b: replace(b, warnings=("something",)),
}


@pytest.mark.parametrize("what", SAID)
def test_everything_that_is_said_has_its_own_entry(what: str, build: InitramfsBuild) -> None:
    assert key_of(inputs.facts_of(SAID[what](build))) != key_of(inputs.facts_of(build))


def test_so_has_the_version_and_the_date(build: InitramfsBuild, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key_of(inputs.facts_of(build))}
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    keys.add(key_of(inputs.facts_of(build)))
    monkeypatch.setattr(inputs, "__version__", "9.9")
    keys.add(key_of(inputs.facts_of(build)))
    monkeypatch.setattr(cache, "FORMAT", 0)
    keys.add(key_of(inputs.facts_of(build)))
    assert len(keys) == 4


def test_where_the_output_goes_does_not_matter(build: InitramfsBuild) -> None:
    elsewhere = replace(build, output=Path("/elsewhere"), copy_kernel=False)
    assert key_of(inputs.facts_of(elsewhere)) == key_of(inputs.facts_of(build))


def test_a_container_is_its_identity(build: InitramfsBuild) -> None:
    """Two times it is unpacked to different places."""
    found = []
    for place in ("/a", "/b"):
        root = Root(Path(place), "--container x", "sha256:1")
        kernel = Kernel("6.1.0", Path(place, "lib/modules/6.1.0"), Path(place, "boot/vmlinuz"), root)
        found.append(replace(build, kernel=kernel))
    assert key_of(inputs.facts_of(found[0])) == key_of(inputs.facts_of(found[1]))
    assert inputs.before_build(found[0]) == inputs.before_build(found[1])
    assert inputs.went_in(found[0].kernel.root, ["usr/bin/sh"]).files == frozenset()
