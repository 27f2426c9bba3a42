"""A real NFS server, 3 and 4, in user space: nfs-ganesha and rpcbind in a network namespace of their own.

rpcbind's port cannot be chosen, and ganesha does not serve NFS 3 without it. So both live where no port is taken. QEMU
is started in there, too: then a node's 10.0.2.2 is that namespace's loopback.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anchor_build.run import start, stop

START_TIMEOUT_S = 60
NFS_PORT, MOUNT_PORT = 2049, 20048

CONFIG = """\
NFS_CORE_PARAM {{
    Protocols = 3, 4;
    NFS_Port = {nfs}; MNT_Port = {mount}; Bind_addr = 127.0.0.1;
    Mount_Path_Pseudo = true; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
}}
NFSV4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = {directory}/state; Only_Numeric_Owners = true; }}
LOG {{ Default_Log_Level = EVENT; }}
{exports}
"""
EXPORT = """\
EXPORT {{
    Export_Id = {number}; Path = {path}; Pseudo = {pseudo}; Protocols = {protocols};
    Access_Type = {access}; Squash = No_Root_Squash; SecType = sys; Transports = TCP; PrivilegedPort = false;
    FSAL {{ Name = VFS; }}
}}
"""
# glibc resolves 127.0.0.1 only where an address beyond the loopback's exists (AI_ADDRCONFIG).
SERVER = """
ip link set lo up && ip address add 10.255.255.1/32 dev lo && mount -t tmpfs none /run || exit 9
rpcbind -w -f &
sleep 0.3
"$@" &
wait "$!"
"""


@dataclass(frozen=True)
class NfsServer:
    """A running server: its ports, its log, and the process whose network namespace it is in."""

    log: Path
    pid: int
    port: int = NFS_PORT
    mount_port: int = MOUNT_PORT

    @property
    def inside(self) -> str:
        """The command that runs another in the server's network."""
        return f"nsenter --net=/proc/{self.pid}/ns/net --"

    def wrapped(self, program: Path, directory: Path) -> Path:
        """Make a program in `directory` that is `program`, run in the server's network."""
        directory.mkdir()
        wrapper = directory / program.name
        wrapper.write_text(f'#!/bin/sh\nexec {self.inside} {program} "$@"\n')
        wrapper.chmod(0o755)
        return wrapper


@dataclass(frozen=True)
class Export:
    """A directory that is exported: `protocols` as ganesha writes them, `access` RO or None (nobody may mount it)."""

    path: Path
    protocols: str = "3, 4"
    access: str = "RO"


def in_namespace(script: str, *arguments: str | Path) -> list[str]:
    """Return the command that runs a shell script where every port is free; its processes end with it."""
    spaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*spaces, "--", "sh", "-c", script, "sh", *map(str, arguments)]


def write_config(directory: Path, exports: Mapping[str, Export]) -> Path:
    """Write ganesha's configuration; `exports` are by the path that clients see."""
    (directory / "state").mkdir(parents=True, exist_ok=True)
    blocks = [
        EXPORT.format(
            number=number,
            path=export.path,
            pseudo=pseudo,
            protocols=export.protocols,
            access=export.access,
        )
        for number, (pseudo, export) in enumerate(exports.items(), 1)
    ]
    config = directory / "ganesha.conf"
    config.write_text(
        CONFIG.format(nfs=NFS_PORT, mount=MOUNT_PORT, directory=directory, exports="".join(blocks)),
        encoding="utf-8",
    )
    return config


def ganesha(directory: Path, config: Path) -> list[str]:
    """Return the command that runs the server in the foreground."""
    words = ["-F", "-L", str(directory / "log"), "-p", str(directory / "pid"), "-f", str(config)]
    return ["ganesha.nfsd", *words]


@contextmanager
def nfs_server(directory: Path, exports: Mapping[str, Export]) -> Iterator[NfsServer]:
    """Serve directories over NFS 3 and 4."""
    config = write_config(directory, exports)
    command = in_namespace(SERVER, *ganesha(directory, config))
    child = start(["setpriv", "--pdeathsig", "TERM", "--", *command], log=directory / "process.log")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        log = directory / "log"
        while not (log.exists() and "NFS SERVER INITIALIZED" in log.read_text(encoding="utf-8", errors="replace")):
            said = log.read_text(encoding="utf-8", errors="replace")[-3000:] if log.exists() else "no log"
            assert child.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        yield NfsServer(log, child.pid)
    finally:
        stop(child)
