"""What a build does for dracut itself: the same as dracut-install, cpio, mkdir, sed and grep, and nothing elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from anchor_build import installer
from anchor_build.elf import dynamic_linker
from anchor_build.installer import Made
from anchor_build.root import HOST, WORK, Root, mounts_of
from tests.conftest import TOP

pytestmark = pytest.mark.usefixtures("processes")
REAL = Path("/usr/lib/dracut/dracut-install")


class Build:
    """A work directory as dracut has it: the tree of an initramfs, and whoever does things for dracut or not."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.tree = work / "tmp/dracut.a1/initramfs"
        self.tree.mkdir(parents=True)
        (work / "dracut").mkdir()
        self.configuration = installer.prepare(work, work)
        self.made = Made()

    def run(self, script: str, *, asking: bool = True, patience: int = 60) -> subprocess.CompletedProcess[str]:
        """Run lines of bash as dracut would."""
        head = self.configuration if asking else f'{self.work}/dracut/dracut-install() {{ {REAL} "$@"; }}\n'
        head += f"umask 022; initdir={self.tree}; DRACUT_INSTALL={self.work}/dracut/dracut-install\n"
        head += f"ANCHOR_PATIENCE={patience}\n" + 'install() { $DRACUT_INSTALL -D "$initdir" "$@"; }\n'
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
        return subprocess.run(["bash", "-c", head + script], env=env, capture_output=True, text=True, check=False)

    def contents(self) -> dict[str, tuple[object, ...]]:
        """Return what is in the tree: type and mode, owner, time and content of each file."""
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted(self.tree.rglob("*")):
            facts = path.lstat()
            content: object = None
            if path.is_symlink():
                content = path.readlink()
            elif path.is_file():
                content = (path.read_bytes(), facts.st_mtime_ns)
            found[str(path.relative_to(self.tree))] = (oct(facts.st_mode), facts.st_uid, facts.st_gid, content)
        return found


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Return one that is helped."""
    made = Build(tmp_path / "helped")
    with installer.installing(HOST, made.work, dynamic_linker(Path("/bin/sh"))) as made.made:
        yield made


@pytest.fixture
def alone(tmp_path: Path) -> Build:
    """Return one where dracut-install does everything."""
    return Build(tmp_path / "alone")


CALLS = (
    "install /etc/passwd /etc/deep/er/users",
    "install -a cat ls no-such-program",
    "install -a -o cat no-such-program /no/such/file /etc/group",
    "install /usr/bin/cat",
    "install -d /usr/lib/udev/rules.d",
    "install -d /not/there",
    "install /bin/sh; install /etc/os-release",
    "install /no/such/file",
    "install -o /no/such/file /x",
    "install -a -o '/etc/host*' /etc/group",
    "install /etc/passwd /a/b; install /etc/group /a/b",
    "install /etc/passwd /../../out",
    "install -l /usr/bin/cat",
    "install /etc/passwd /lib/x /y",
    "install ''",
    'mkdir -m 0755 -p "$initdir/a/b" "$initdir/c"; mkdir -p "$initdir/d/e"; mkdir -m 0755 -p "$initdir/f"',
    'mkdir -p "$initdir/d/e"; ln -s d "$initdir/link"; mkdir -p "$initdir/link/more"; mkdir -p "$initdir/d/../z"',
    'mkdir -p "$initdir/file/x"; install /etc/passwd /plain; mkdir -p "$initdir/plain"',
    'umask 077; mkdir -p "$initdir/priv/a"; install /etc/passwd /kept/users; mkdir -m 0755 -p "$initdir/b/c"',
    "cd /etc; install -o default/useradd; install -a -o default/useradd default/no-such; install default/useradd /x",
    "cd /etc; install /etc/passwd rel/x; install -D",
    """mkdir -p "$initdir/two"$'\n'"lines" """,
)


@pytest.mark.parametrize("call", CALLS)
def test_it_does_what_the_programs_do(build: Build, alone: Build, call: str) -> None:
    said = [each.run(f"{call}", asking=each is build) for each in (build, alone)]
    assert build.contents() == alone.contents()
    assert said[0].returncode == said[1].returncode
    assert said[0].stderr.replace("helped", "alone") == said[1].stderr


def test_plain_copies_need_no_program(build: Build) -> None:
    script = 'anchor_real=/not/there; command() { echo "started $*"; }\n' + "\n".join(
        (
            "install /etc/passwd",
            "install -a -o /usr/bin/cat /etc/group /no/such",
            "install /etc/group /x/y",
            "mkdir -p $initdir/z",
        )
    )
    done = build.run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {"etc/passwd", "usr/bin/cat", "etc/group", "x/y", "z"} <= build.contents().keys()


def test_the_libraries_of_programs(build: Build, alone: Build) -> None:
    """As dracut has it at the end: through xargs, for programs and scripts."""
    resolve = 'find "$initdir" -type f -executable -print0 | xargs -r -0 $DRACUT_INSTALL -D "$initdir" -R --'
    shutil.copy(REAL, alone.work / "dracut/dracut-install")
    for each in (build, alone):
        done = each.run(f"install -a cat curl ldd openssl; {resolve}", asking=each is build)
        assert done.returncode == 0, done.stderr
    assert any("libssl" in path for path in build.contents())
    assert build.contents() == alone.contents()


RULE = 'A=="b", PROGRAM="one x", PROGRAM=="two"\n# RUN+="three a"\nIMPORT{program}="four %k", GROUP="audio"\nGROUP=="x'
SEARCHES = (
    *(rf"""sed -nr 's/.*{word}=?"([^ "]+).*/\1/p' rule""" for word in ("PROGRAM=", "OWNER", "GROUP", "RUN[+=]")),
    r"""sed -nr 's/.*IMPORT\{program\}==?"([^ "]+).*/\1/p' rule""",
    r"""sed -nr 's/.*PROGRAM==?"([^ "]+).*/\1/p' missing""",
    "sed -n 2p rule",
    *("grep -Eq ^root: users", "grep -Eq ^daemon: users", "grep -Eq ^oot: users", "grep -Eq ^x: missing"),
    *("grep -q -F initqueue rule", "grep -q -F initqueue users", "grep -c root users", "grep -q -F -- -x users"),
)


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_find_what_the_programs_find(build: Build, tmp_path: Path, search: str) -> None:
    (tmp_path / "rule").write_text(RULE, encoding="utf-8")
    (tmp_path / "users").write_text("root:x:0\n# initqueue\ndaemon:x:1", encoding="utf-8")
    said = [build.run(f"cd {tmp_path}; {search}", asking=asking) for asking in (True, False)]
    assert [(each.returncode, each.stdout) for each in said[:1]] == [(said[1].returncode, said[1].stdout)]


def test_the_tree_is_read_instead_of_packed(build: Build) -> None:
    pack = "find . -print0 | LC_ALL=C sort -z | cpio --reproducible --null -H newc -o --quiet"
    done = build.run(f"install /etc/passwd; ln -s passwd $initdir/etc/link; umask 077; cd $initdir && {pack}")
    assert (done.returncode, done.stdout) == (0, "")
    assert build.made.tree is not None
    assert list(build.made.tree.members) == [".", "etc", "etc/link", "etc/passwd"]
    assert build.made.tree.members["etc/passwd"].content == Path("/etc/passwd").read_bytes()


def test_another_archive_is_left_to_cpio(build: Build) -> None:
    done = build.run("cd $initdir; echo . | cpio -o -H newc --quiet; cpio --version")
    assert done.stdout.startswith("070701")
    assert "TRAILER!!!" in done.stdout
    assert "cpio (GNU cpio)" in done.stdout
    assert build.made.tree is None


def test_nobody_answers(tmp_path: Path) -> None:
    killed = Build(tmp_path / "killed")
    done = killed.run("install /etc/passwd; install /etc/group; mkdir -p $initdir/a", patience=1)
    assert done.returncode == 0, done.stderr
    assert {"etc/passwd", "etc/group", "a"} <= killed.contents().keys()


def test_a_question_that_no_pipe_takes_is_not_asked(build: Build, tmp_path: Path) -> None:
    """Where the build is killed meanwhile nobody reads it: here it has the byte for whoever may ask, and no reader."""
    many = "$(printf '/no/such/file-%05d ' {1..4000})"
    killed = Build(tmp_path / "killed")
    byte = f'exec 8<>"{killed.work}/turn" 9<>"{killed.work}/ask"; printf . >&8; '
    for each in (killed, build):
        done = each.run(f"{byte if each is killed else ''}install -a -o {many} /etc/passwd")
        assert done.returncode == 0, done.stderr
        assert "etc/passwd" in each.contents()


def test_a_question_that_cannot_be_read_ends_the_help_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda raised: print(raised.exc_type.__name__))  # noqa: T201
    one = Build(tmp_path / "one")
    with installer.installing(HOST, one.work, ""):
        with (one.work / installer.ASK).open("wb") as pipe:
            pipe.write(b"id\0path\0no number\0word\0")
        while (one.work / installer.TURN).exists():
            time.sleep(0.01)
        assert one.run("install /etc/passwd").returncode == 0
    assert "etc/passwd" in one.contents()
    assert "ValueError" in capsys.readouterr().out


def test_a_bug_is_answered_and_raised_when_dracut_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("a bug")

    monkeypatch.setattr(installer, "_copy", broken)
    one, done = Build(tmp_path / "one"), None
    with pytest.raises(IndexError, match="a bug"), installer.installing(HOST, one.work, ""):
        done = one.run("install /etc/passwd")
    assert done is not None and done.returncode == 0
    assert "etc/passwd" in one.contents()


def test_words_are_bytes_in_every_locale() -> None:
    script = r"""
import os
from anchor_build.installer import _Server
server = _Server(None, None, 0, 0, None, _rest=bytearray(b"id\0path\0" b"1\0/tmp/\xc3\xa4\0"))
assert os.fsencode(server._question()[2]) == b"/tmp/\xc3\xa4"
"""
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=TOP, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("keeps", [True, False])
def test_owners_are_those_of_cp(tmp_path: Path, keeps: bool) -> None:
    """Each as cp does it, as root and as another user, who must not make set-user-ID programs of others' files."""
    source = tmp_path / "source"
    shutil.copyfile("/usr/bin/true", source)
    if os.geteuid() == 0:
        os.chown(source, 65534, 65533)
    source.chmod(0o6755)
    wanted = "mode,timestamps" + (",ownership" if keeps else "")
    subprocess.run(["cp", f"--preserve={wanted}", "-fL", source, tmp_path / "theirs"], check=True)
    installer._copy(str(source), str(tmp_path / "ours"), keep_owner=keeps)
    found = [(tmp_path / name).stat() for name in ("ours", "theirs")]
    facts = [(each.st_mode, each.st_uid, each.st_gid, each.st_mtime_ns) for each in found]
    assert facts[0] == facts[1]


def test_another_user_gets_no_set_user_id_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copyfile("/usr/bin/true", source)
    source.chmod(0o6755)
    asked = []

    def refuse(_: int, uid: int, gid: int) -> None:
        asked.append((uid, gid))
        raise PermissionError

    facts = source.stat()
    monkeypatch.setattr(os, "fchown", refuse)
    with source.open("rb") as file:
        assert installer._give(file.fileno(), facts.st_uid, facts.st_gid)
        assert not installer._give(file.fileno(), facts.st_uid + 1, facts.st_gid)
    assert asked == [(facts.st_uid + 1, facts.st_gid), (-1, facts.st_gid)]
    monkeypatch.setattr(installer, "_give", lambda *_: False)
    installer._copy(str(source), str(tmp_path / "copy"), keep_owner=True)
    assert (tmp_path / "copy").stat().st_mode & 0o7777 == 0o755


def test_whether_dracut_install_keeps_owners() -> None:
    assert installer.KEEPS_OWNERS.search(b"\0--preserve=mode,xattr,timestamps,ownership\0")
    assert installer.KEEPS_OWNERS.search(b"\0--preserve=xattr\0-fLp\0")  # 110
    assert not installer.KEEPS_OWNERS.search(b"\0--preserve=mode,xattr,timestamps\0-fL\0")  # 056


def test_what_the_linker_says_that_is_no_text_is_unknown(tmp_path: Path) -> None:
    linker, program = tmp_path / "linker", tmp_path / "program"
    linker.write_bytes(b'#!/bin/sh\n[ "$1" = --list ] && printf "\\tliba.so => /x\\377/liba.so (0x1)\\n"\n')
    linker.chmod(0o755)
    shutil.copyfile("/usr/bin/true", program)
    lister = installer._Lister(str(linker))
    lister.look_at(str(program))
    assert lister.libraries([str(program)]) == (set(), [str(program)])
    lister.stop()


def test_the_linker_is_not_waited_for_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "LIST_S", 0.1)
    linker, program, log = tmp_path / "linker", tmp_path / "program", tmp_path / "log"
    linker.write_text(f"#!/bin/sh\necho x >>{log}\nexec sleep 60\n", encoding="utf-8")
    linker.chmod(0o755)
    shutil.copyfile("/usr/bin/true", program)
    lister = installer._Lister(str(linker))
    for _ in range(100):
        lister.look_at(str(program))
    while not log.exists():
        time.sleep(0.01)
    lister.stop()
    assert len(log.read_text(encoding="utf-8").split()) < 100


def test_it_writes_nothing_outside_the_tree(build: Build, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (build.tree / "out").symlink_to(tmp_path / "outside")
    build.run("anchor_real=false; install /etc/passwd /out/here; command() { :; }; mkdir -p $initdir/out/there")
    build.run(
        "anchor_real=false; initdir="
        + f"{tmp_path}/outside; install /etc/passwd; command() {{ :; }}; mkdir -p $initdir/x"
    )
    assert list((tmp_path / "outside").iterdir()) == []


def test_paths_of_another_system(tmp_path: Path) -> None:
    top, work, seen = tmp_path / "root", tmp_path / "work", WORK
    for name in ("usr/lib", "tmp", "run"):
        (top / name).mkdir(parents=True)
    (top / "lib").symlink_to("/usr/lib")
    (work / "dracut").mkdir(parents=True)
    (work / "dracut/mod").symlink_to("/lib/module")
    (top / "etc").mkdir()
    for link, target in (("link", "/etc"), ("ring", "ring/x"), ("var-run", "/run")):
        (top / link).symlink_to(target)
    files = installer._Files(Root(top), work, mounts_of(Root(top), work))
    assert files.at("/lib/x") == f"{top}/usr/lib/x"
    assert files.at("/../../lib/../etc/x") == f"{top}/usr/etc/x"
    assert files.at(f"{seen}/dracut/mod/x") == f"{top}/usr/lib/module/x"
    assert files.at(f"{seen}/etc/x") == f"{work}/etc/x"
    assert files.at("/link") == f"{top}/link"
    assert files.at("/link/x") == f"{top}/etc/x"
    assert files.at("/run/../etc/x") == f"{top}/etc/x"
    hidden_ones = ("/tmp/x", "/proc/1/environ", "/run/x", "/var-run/x", "/dev/null", "/run", f"{seen}/../x", "etc/x")  # noqa: S108
    for hidden in (*hidden_ones, "/ring/x"):
        with pytest.raises(installer._NotHere):
            files.at(hidden)


def test_a_process_that_ends_leaves_no_thread(tmp_path: Path) -> None:
    one = Build(tmp_path / "one")
    before = threading.enumerate()
    with installer.installing(HOST, one.work, ""):
        assert len(threading.enumerate()) > len(before)
    assert threading.enumerate() == before
