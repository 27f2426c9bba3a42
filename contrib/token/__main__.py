"""Make join tokens, and run the server that exchanges them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from contrib.site import pki
from contrib.token import store
from contrib.token.server import Server, Settings


def main(argv: list[str]) -> int:
    """Run one of the two commands; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m contrib.token", description=__doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="the directory of tokens")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a token for a node's name and print it")
    add.add_argument("name", help="the name in the node's certificate")
    add.add_argument("--hours", type=float, default=24, help="how long it may be used (%(default)s)")
    add.add_argument(
        "--s3", type=Path, help="a file with access_key=, secret_key= and session_token= lines to give with it"
    )
    serve = commands.add_parser("serve", help="exchange tokens for certificates, over HTTPS")
    serve.add_argument("--ca-cert", type=Path, required=True, help="the CA that signs the nodes' certificates")
    serve.add_argument("--ca-key", type=Path, required=True, help="its key")
    serve.add_argument("--cert", type=Path, required=True, help="the server's own certificate, with its chain")
    serve.add_argument("--key", type=Path, required=True, help="its key")
    serve.add_argument(
        "--chain", type=Path, help="certificates that follow the node's own, where the CA is not the root"
    )
    serve.add_argument("--address", default="0.0.0.0", help="where to listen (%(default)s)")  # noqa: S104 - nodes come from outside
    serve.add_argument("--port", type=int, default=8443, help="where to listen (%(default)s)")
    serve.add_argument("--window", type=float, default=600, help="seconds in which the same key is answered again")
    serve.add_argument("--days", type=int, default=30, help="how long certificates are good (%(default)s)")
    words = parser.parse_args(argv)
    if words.command == "add":
        if not re.fullmatch(store.NAME, words.name):
            parser.error(f"{words.name!r} is not a host name of up to 64 letters, digits, dots and dashes")
        s3 = str(words.s3.resolve(strict=True)) if words.s3 else ""
        sys.stdout.write(store.issue(words.tokens, words.name, words.hours * 3600, s3) + "\n")
        return 0
    authority, leaf = pki.Authority(words.ca_cert, words.ca_key), pki.Leaf(words.cert, words.key)
    listen = (words.address, words.port)
    settings = Settings(words.tokens, authority, leaf, *listen, words.window, words.days, words.chain)
    with Server(settings) as server:
        sys.stderr.write(f"token server: https://{words.address}:{server.server_port}/\n")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
