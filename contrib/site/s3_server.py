"""OpenStack Swift with its S3 interface in one process, for a site on one machine; `servers.swift_s3` starts it.

A program for the system's Python, which is where Debian's python3-swift is: proxy, account, container and object server
as Swift has them, with TLS in front of the proxy. Objects are kept in memory, because Swift on disk needs extended
attributes, which not every file system of a test machine has. The only argument is a file of settings (JSON).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import eventlet  # type: ignore[import-not-found] # of the system's Python, as Swift is
import eventlet.wsgi  # type: ignore[import-not-found] # the same
from eventlet.green import ssl  # type: ignore[import-not-found] # the same
from swift.common import utils, wsgi  # type: ignore[import-not-found] # the same
from swift.common.ring import RingBuilder  # type: ignore[import-not-found] # the same

SWIFT_CONF = """\
[swift-hash]
swift_hash_path_suffix = site
[storage-policy:0]
name = memory
default = yes
"""
BACKEND_CONF = """\
[DEFAULT]
swift_dir = {directory}
devices = {directory}/devices
mount_check = false
bind_ip = 127.0.0.1
bind_port = {port}
[app:main]
use = egg:swift#{app}
"""
PROXY_CONF = """\
[DEFAULT]
swift_dir = {directory}
bind_ip = 127.0.0.1
bind_port = {port}
[pipeline:main]
pipeline = catch_errors s3api tempauth bulk slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
location = {region}
storage_domain = {domain}
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
{users}
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""
PARTS = {"account": "account", "container": "container", "object": "mem_object"}


class Memory:
    """What Swift asks of memcached, within this process and without ever forgetting."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def get(self, key: str, *_words: Any, **_options: Any) -> Any:
        """Return what is kept, or None."""
        return self.values.get(key)

    def set(self, key: str, value: Any, *_words: Any, **_options: Any) -> None:
        """Keep a value."""
        self.values[key] = value

    def delete(self, key: str, *_words: Any, **_options: Any) -> None:
        """Keep it no longer."""
        self.values.pop(key, None)

    def before(self, app: Any) -> Any:
        """Return `app` with this memory in reach."""
        return lambda environ, start_response: app({**environ, "swift.cache": self}, start_response)


def serve(settings: dict[str, Any]) -> None:
    """Run all servers; standard output gets a line when they listen. Ports are chosen by the kernel where not given."""
    directory = Path(settings["directory"])
    (directory / "devices" / "memory").mkdir(parents=True)
    (directory / "swift.conf").write_text(SWIFT_CONF, encoding="utf-8")
    utils.set_swift_dir(str(directory))
    servers = []
    for part, app in PARTS.items():
        sock = eventlet.listen(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        _ring(port).save(str(directory / f"{part}.ring.gz"))
        servers.append((sock, _write(directory, part, BACKEND_CONF, app=app, port=port)))
    front = eventlet.listen(("127.0.0.1", settings["port"]))
    port = front.getsockname()[1]
    if settings["certificate"]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings["certificate"], settings["key"])
        front = context.wrap_socket(front, server_side=True)
    users = "\n".join(f"user_site_{name} = {secret} .admin" for name, secret in settings["users"].items())
    values = {"region": settings["region"], "domain": settings["domain"], "users": users, "port": port}
    servers.append((front, _write(directory, "proxy", PROXY_CONF, **values)))
    apps = [(sock, wsgi.loadapp(str(conf), global_conf={"log_name": conf.stem})) for sock, conf in servers]
    _shorten_names(apps[-1][1])
    apps[-1] = front, Memory().before(apps[-1][1])
    log = (directory / "requests.log").open("w", encoding="utf-8", buffering=1)
    for sock, app in apps:
        # An S3 client wants "ETag" as it is written.
        options = {"capitalize_response_headers": False, "protocol": wsgi.SwiftHttpProtocol}
        options["log"] = log if sock is front else wsgi.NullLogger()
        eventlet.spawn(eventlet.wsgi.server, sock, app, **options)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    while True:
        eventlet.sleep(3600)


def _shorten_names(app: Any) -> None:
    """Let "robot" be the access key of Swift's user "site:robot": not every client takes one with a colon."""
    while not hasattr(app, "users"):
        app = app.app
    app.users.update({name.partition(":")[2]: user for name, user in app.users.items()})


def _ring(port: int) -> Any:
    """Return a ring of one device, at a port of this machine."""
    builder = RingBuilder(part_power=1, replicas=1, min_part_hours=0)
    place = {"id": 0, "region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "memory", "weight": 1}
    builder.add_dev(place)
    builder.rebalance()
    return builder.get_ring()


def _write(directory: Path, name: str, template: str, **values: object) -> Path:
    path = directory / f"{name}-server.conf"
    path.write_text(template.format(directory=directory, **values), encoding="utf-8")
    return path


if __name__ == "__main__":
    serve(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
