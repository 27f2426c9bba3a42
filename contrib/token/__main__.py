"""Make join tokens, and run the server that exchanges them."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from pathlib import Path

from anchor_build.errors import AnchorError
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
    serve.add_argument("--address", default="0.0.0.0", help="where to listen (%(default)s); :: for IPv6")  # noqa: S104 - nodes come from outside
    serve.add_argument("--port", type=int, default=8443, help="where to listen (%(default)s)")
    serve.add_argument("--window", type=float, default=600, help="seconds in which the same key is answered again")
    serve.add_argument("--days", type=int, default=30, help="how long certificates are good (%(default)s)")
    words = parser.parse_args(argv)
    if words.command == "add" and not re.fullmatch(store.NAME, words.name):
        parser.error(f"{words.name!r} is not a host name of up to 64 letters, digits, dots and dashes")
    if words.command == "add" and not 0 < words.hours < math.inf:
        parser.error("--hours is more than 0")
    if words.command == "serve" and (words.days < 1 or words.window < 0):
        parser.error("--days is at least 1, and --window not below 0")
    try:
        return add_token(words) if words.command == "add" else serve_tokens(words)
    except (AnchorError, OSError, OverflowError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def add_token(words: argparse.Namespace) -> int:
    """Make a token, and print it."""
    s3 = ""
    if words.s3:
        words.s3.read_bytes()
        s3 = str(words.s3.resolve())
    sys.stdout.write(store.issue(words.tokens, words.name, words.hours * 3600, s3) + "\n")
    return 0


def serve_tokens(words: argparse.Namespace) -> int:
    """Serve until interrupted. What would make the server fail at its first node fails at the start."""
    authority, leaf = pki.Authority(words.ca_cert, words.ca_key), pki.Leaf(words.cert, words.key)
    for path in (*(authority.certificate, authority.key, leaf.certificate, leaf.key), words.chain):
        if path is not None:
            path.read_bytes()
    words.tokens.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as trial:
        pki.issue(authority, Path(trial), "trial", client=True)
    address = words.address.strip("[]")
    settings = Settings(words.tokens, authority, leaf, address, words.port, words.window, words.days, words.chain)
    with Server(settings) as server:
        sys.stderr.write(f"token server: {server.url}\n")
        sys.stderr.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
