"""A container image as the system to build in: unpacked by buildah into a storage of its own, which goes away.

The storage driver is vfs: a container is then a plain directory, and nothing is mounted that could be left behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import disk_errors, disk_hint, work_directory
from anchor_build.root import Root, open_root
from anchor_build.run import run, which

PROGRAM = "buildah"
# containers-transports(5): what buildah takes as it is.
TRANSPORTS = ("docker:", "oci:", "oci-archive:", "docker-archive:", "dir:")
LOCAL = "containers-storage:"
LOGIN = "a registry that needs a login is logged in to with `buildah login`"
TAR_MAGIC = (257, b"ustar")
TIMEOUT = 3600.0


@contextmanager
def opened(reference: str) -> Iterator[Root]:
    """Yield the system in a container image; everything of it is gone afterwards.

    `reference` is an OCI directory, an archive as `buildah push` and `podman save` write them, the name of an image in
    a registry, a name with a transport, or containers-storage:NAME for an image of this host. Raises AnchorError.
    """
    if which(PROGRAM) is None:
        raise AnchorError(f"--container {reference}: {PROGRAM} is missing", "install buildah (deb and rpm)")
    with disk_errors(), work_directory() as work:
        source = _source(reference, work)
        own: list[str | Path] = [
            PROGRAM,
            "--root",
            work / "storage",
            "--runroot",
            work / "run",
            "--storage-driver",
            "vfs",
        ]
        # What buildah unpacks on the way would else be in /var/tmp, and its lock in XDG_RUNTIME_DIR.
        env = {"TMPDIR": str(work)}
        try:
            name = run([*own, "from", "--quiet", source], env=env, timeout=TIMEOUT).stdout.split()[-1]
            shown = run([*own, "inspect", "--type", "container", "--format", "{{.FromImageID}}", name], env=env)
            directory = run([*own, "mount", name], env=env).stdout.strip()
        except ProcessError as error:
            raise AnchorError(
                f"--container {reference}: buildah cannot unpack it\n{error.tail}",
                disk_hint(error.tail) or (LOGIN if source.startswith("docker://") else ""),
            ) from None
        identity = shown.stdout.strip()
        if not re.fullmatch(r"(sha256:)?[0-9a-f]{64}", identity):
            identity = ""
        yield open_root(Path(directory), f"--container {reference}", identity=identity or name)


def _source(reference: str, work: Path) -> str:
    """Return what buildah calls the image."""
    if reference.startswith(TRANSPORTS):
        return reference
    if reference.startswith(LOCAL):
        target = f"oci:{work}/image"
        try:
            run([PROGRAM, "push", "--quiet", reference.removeprefix(LOCAL), target], timeout=TIMEOUT)
        except ProcessError as error:
            raise AnchorError(
                f"--container {reference}: buildah has no such image here\n{error.tail}", "`buildah images` lists them"
            ) from None
        return target
    path = Path(reference)
    if path.is_dir():
        if not (path / "index.json").is_file():
            raise AnchorError(
                f"--container {reference}: is a directory, but not that of an OCI image: it has no index.json",
                "the directory of a system is named with --sysroot DIR",
            )
        return f"oci:{path.resolve()}"
    if path.is_file():
        return f"{_archive_kind(reference, path)}:{path.resolve()}"
    if reference.startswith(("/", ".")):
        raise AnchorError(f"--container {reference}: there is no such file or directory")
    registry, slash, _ = reference.partition("/")
    if not slash or not (re.search(r"[.:]", registry) or registry == "localhost"):
        # buildah would take it for the name of an image at a public registry that nobody named.
        raise AnchorError(
            f"--container {reference}: there is no such file or directory, and no registry in the name",
            "an image at a registry is REGISTRY/NAME:TAG, an image of this host is containers-storage:NAME",
        )
    return f"docker://{reference}"


def _archive_kind(reference: str, path: Path) -> str:
    """Return the transport for an archive: `podman save` and `docker save` write another kind than `buildah push`."""
    import tarfile

    try:
        with tarfile.open(path) as archive:
            names = {name.removeprefix("./") for name in archive.getnames()}
    except (OSError, EOFError, tarfile.TarError):
        names = set()
    # docker save writes both since version 25
    if "index.json" in names:
        return "oci-archive"
    if "manifest.json" in names:
        return "docker-archive"
    raise AnchorError(
        f"--container {reference}: is no archive of a container image: it has no index.json and no manifest.json",
        "a tar of a system is unpacked first, and then named with --sysroot DIR",
    )
