"""The way to an OCI registry: references, skopeo with the site's credentials, and why it was refused there.

skopeo knows what all tools of containers know: credential files and helpers, tokens, certs.d, proxies, the host's
signature policy. It runs with what a registry needs as files, never as arguments.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchor_build.console import printable
from anchor_build.errors import AnchorError, ProcessError, UsageError
from anchor_build.files import disk_hint, sha256
from anchor_build.run import run, which

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
NAME = "org.opencontainers.image.ref.name"
# A reference as dracut-modules/image-oci takes it (lib/anchor-oci.sh), and as the distribution specification has it.
REGISTRY = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9-]+)*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9]+)?")
FORM = "write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
# uname's words in those of OCI, which are Go's
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386"}
TIMEOUT = 4 * 3600.0
# Registries and lib/anchor-oci.sh have this limit, too.
DOCUMENT_MAX = 4 << 20
LOGIN = "log in with `skopeo login REGISTRY`, or name the file that has the login with --authfile"
# How registries say that there is no such image: Distribution, Harbor, and those that only have a status.
MISSING = r"manifest unknown|name unknown|(artifact|repository|manifest)\b.* not found|status code.* 404"
# What skopeo and registries say, and what helps there. The first that fits counts.
HINTS = (
    (r"no space left on device|disk quota exceeded", ""),
    (
        r"quota|exceed|413 |request entity too large|507 |insufficient storage",
        "the registry has no room for it: make some there",
    ),
    (r"unauthorized|authentication required|invalid username/password| 401", LOGIN),
    (
        r"certificate (is )?required|bad certificate|tls: handshake failure",
        "the registry wants to see a client certificate: --registry-cert and --registry-key",
    ),
    (r"signed by unknown authority|certificate is not trusted", "name the registry's CA: --registry-ca FILE"),
    (r"x509:", "does the certificate belong to this name, and is the clock of this host right?"),
    (r"server gave HTTP response", "the registry speaks plain http: see doc/oci.md"),
    (r"denied|forbidden|insufficient_scope| 403", "may this user do that there? " + LOGIN),
    (
        r"read.?only|operation is unsupported|method not allowed| 405",
        "the registry takes no images now: is it read-only, or a mirror?",
    ),
    (r"no image found in (image index|manifest list)", "name one that it has: --platform OS/ARCHITECTURE"),
    (r"manifest unknown|name unknown|not found| 404", "check name and tag: was it pushed to this registry?"),
    (
        r"unexpected HTTP status: 5|internal server error|unknown error|writing blob.*(broken pipe|reset|EOF|closed)",
        "the registry failed: is there room in its storage? Its own log says why",
    ),
    (
        r"no such host|connection refused|i/o timeout|no route to host|unreachable|connection reset",
        "is the name right, and the registry up?",
    ),
    (r"policy|signature", "the host's signature policy is in /etc/containers/policy.json: containers-policy.json(5)"),
)


@dataclass(frozen=True)
class Access:
    """What a registry wants beside the host's own settings: a further CA, a client certificate, a file of logins."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    authfile: Path | None = None


@dataclass(frozen=True)
class Reference:
    """An image at a registry; of `tag` and `digest` one may be empty. `plain` is for http instead of https."""

    registry: str
    name: str
    tag: str = ""
    digest: str = ""
    plain: bool = False

    def __str__(self) -> str:
        """Return it as a node and a user write it."""
        tag, digest = (f":{self.tag}" if self.tag else ""), (f"@{self.digest}" if self.digest else "")
        return f"{'http://' if self.plain else ''}{self.registry}/{self.name}{tag}{digest}"

    @property
    def source(self) -> str:
        """What skopeo calls it: it takes no tag beside a digest."""
        return f"docker://{self.registry}/{self.name}{f'@{self.digest}' if self.digest else f':{self.tag}'}"

    def at(self, digest: str) -> Reference:
        """Return the same with this digest."""
        return Reference(self.registry, self.name, self.tag, digest, self.plain)


def parse_reference(text: str, what: str) -> Reference:
    """Read REGISTRY/NAME[:TAG][@sha256:DIGEST], after `http://` or `docker://` where that stands before it.

    `what` names the option in messages. A name without a registry is refused, since tools take it for one of a public
    registry that nobody named. Raises UsageError.
    """
    plain = text.startswith("http://")
    rest = text.removeprefix("http://").removeprefix("https://").removeprefix("docker://")
    registry, slash, path = rest.partition("/")
    if not slash or not (re.search(r"[.:]", registry) or registry == "localhost"):
        raise UsageError(f"{what}: has no registry in its name", FORM)
    if "@" in registry:
        raise UsageError(f"{what}: has a user in it", LOGIN)
    path, at, digest = path.partition("@")
    name, colon, tag = path.partition(":")
    if not REGISTRY.fullmatch(registry):
        raise UsageError(f"{what}: {registry} is not HOST or HOST:PORT", FORM)
    if not PATH.fullmatch(name):
        raise UsageError(f"{what}: its name is none: lower-case letters, digits and single separators", FORM)
    if colon and not TAG.fullmatch(tag):
        raise UsageError(f"{what}: its tag is none", FORM)
    if at and not DIGEST.fullmatch(digest):
        raise UsageError(f"{what}: its digest is not sha256: and 64 digits in lower case", FORM)
    return Reference(registry, name, tag or ("" if at else "latest"), digest, plain)


def host_platform() -> str:
    """Return OS/ARCHITECTURE[/VARIANT] of this host in OCI's words."""
    machine = platform.machine()
    return f"linux/{ARCHITECTURES.get(machine, machine)}"


def check_platform(text: str) -> str:
    """Return a platform as it was given, or this host's where nothing was; raises UsageError for what is none."""
    if text and not PLATFORM.fullmatch(text):
        raise UsageError(f"--platform {text}: is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT", "such as linux/arm64")
    return text or host_platform()


def missing_programs(*programs: str) -> list[str]:
    """Return a line for each of these programs that is not installed; each has the name of its package."""
    return [f"{name} is missing: install {name} (deb and rpm)" for name in programs if which(name) is None]


@dataclass(frozen=True)
class Skopeo:
    """skopeo, working in `work`, a private directory that goes away: paths in it need no name of their own."""

    work: Path
    access: Access = Access()
    platform: str = ""

    def copy(
        self,
        source: str,
        target: str,
        what: str,
        *options: str,
        plain: bool = False,
        watch: Callable[[int], None] | None = None,
    ) -> None:
        """Copy an image between what skopeo calls transports; `plain` is for http, `watch` as in run.

        Raises AnchorError.
        """
        side = "dest-" if target.startswith("docker://") else "src-"
        at_registry = "docker://" in source + target
        words = self._registry(side, plain=plain) if at_registry else []
        self._run("copy", [*options, "--retry-times", "2", *words, source, target], what, watch=watch)

    def document(self, reference: Reference, what: str) -> bytes | None:
        """Return the manifest or index at a reference, None where there is none. Raises AnchorError."""
        words = ["--raw", "--retry-times", "2", *self._registry("", plain=reference.plain), reference.source]
        try:
            # Its bytes count, so they come by way of a file.
            with (self.work / "document").open("wb") as file:
                self._run("inspect", words, what, stdout=file)
        except MissingError:
            return None
        data = (self.work / "document").read_bytes()
        if len(data) > DOCUMENT_MAX:
            raise AnchorError(f"{what}: its manifest has {len(data)} bytes, and {DOCUMENT_MAX} are allowed")
        if reference.digest and f"sha256:{sha256(data)}" != reference.digest:
            raise AnchorError(f"{what}: the registry gave something else for {reference.digest}")
        return data

    def _registry(self, side: str, *, plain: bool) -> list[str]:
        if plain:
            # Nothing secret goes over http; what comes has a digest.
            (self.work / "nobody.json").write_text("{}", encoding="ascii")
            return [f"--{side}tls-verify=false", f"--{side or ''}authfile", "nobody.json"]
        words = [f"--{side}authfile", str(self.access.authfile.absolute())] if self.access.authfile else []
        directory = self.work / "certs"
        directory.mkdir(mode=0o700, exist_ok=True)
        # The names are those of containers-certs.d(5).
        for name, file in (
            ("ca.crt", self.access.ca),
            ("client.cert", self.access.certificate),
            ("client.key", self.access.key),
        ):
            if file is not None:
                shutil.copyfile(file, directory / name)
                (directory / name).chmod(0o600)
        return [*words, f"--{side}cert-dir", "certs"] if any(directory.iterdir()) else words

    def _run(self, command: str, words: Sequence[str], what: str, **more: Any) -> None:
        system, _, rest = self.platform.partition("/")
        architecture, _, variant = rest.partition("/")
        wanted = [f"--override-os={system}", f"--override-arch={architecture}"] if self.platform else []
        wanted += [f"--override-variant={variant}"] if variant else []
        try:
            run(
                ["skopeo", *wanted, command, *words],
                cwd=self.work,
                env={"TMPDIR": str(self.work)},
                timeout=TIMEOUT,
                **more,
            )
        except ProcessError as error:
            raise explained(what, error.tail) from None


def sizes_of(skopeo: Skopeo, reference: Reference, what: str) -> list[int]:
    """Return the bytes of the layers of an image at a registry, for skopeo's platform where there are several.

    Empty where the registry's answer is none that could be copied. Raises AnchorError.
    """
    for _ in range(2):
        try:
            document = json.loads(skopeo.document(reference, what) or b"{}")
            if "layers" in document:
                return [int(layer["size"]) for layer in document["layers"]]
            reference = reference.at(next(_entries_for(document, skopeo.platform or host_platform())))
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
            break
    return []


def _entries_for(index: Mapping[str, Any], wanted: str) -> Iterator[str]:
    for entry in index["manifests"]:
        has = entry.get("platform", {})
        if f"{wanted}/".startswith(f"{has.get('os')}/{has.get('architecture')}/") and DIGEST.fullmatch(entry["digest"]):
            yield str(entry["digest"])


class MissingError(AnchorError):
    """The registry has no such image."""


def explained(what: str, said: str) -> AnchorError:
    """Return the failure that a tool of containers wrote down, with what helps."""
    found = re.findall(r'level=fatal msg="((?:[^"\\]|\\.)*)"', said)
    reason = printable(found[-1].replace('\\"', '"').replace("\\n", " ") if found else said.strip()[-600:])
    # A query says nothing to people, and may be what opens somebody's store.
    reason = re.sub(r"(https?://[^\s\"?]+)\?[^\s\"]*", r"\1", reason)
    hint = next((text for pattern, text in HINTS if re.search(pattern, reason, re.IGNORECASE)), "")
    kind = MissingError if re.search(MISSING, reason) else AnchorError
    return kind(f"{what}: {reason}", hint or disk_hint(reason))


# --- Layouts ----------------------------------------------------------------------------------------------


def read_blob(layout: Path, digest: str, what: str) -> dict[str, Any]:
    """Return a JSON document of an OCI layout, whose digest is compared. Raises AnchorError."""
    if not DIGEST.fullmatch(digest):
        raise AnchorError(f"{what}: names a blob by something else than a SHA-256 digest")
    file = layout / "blobs/sha256" / digest.removeprefix("sha256:")
    data = file.read_bytes() if file.stat().st_size <= DOCUMENT_MAX else b""
    document = json.loads(data) if f"sha256:{sha256(data)}" == digest else None
    if not isinstance(document, dict):
        raise AnchorError(f"{what}: {digest} is not what it should be")
    return document


def add_blob(layout: Path, content: bytes | Path, digest: str = "") -> dict[str, Any]:
    """Put bytes into an OCI layout, or a file of this digest by way of a link; return a descriptor without a type."""
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        target = blobs / digest
        if not target.is_symlink():
            target.symlink_to(content.resolve())
        return {"digest": f"sha256:{digest}", "size": content.stat().st_size}
    digest = sha256(content)
    (blobs / digest).write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a document as it is stored: the same for the same content."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True).encode()


def write_layout(layout: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Finish an OCI layout: `entries` are descriptors by the name that they get."""
    manifests = [{**entry, "annotations": {NAME: name}} for name, entry in entries.items()]
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}', encoding="ascii")
    (layout / "index.json").write_bytes(json_bytes({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))


def entry_named(layout: Path, name: str, what: str) -> dict[str, Any]:
    """Return the descriptor that a layout has under a name. Raises AnchorError."""
    index = json.loads((layout / "index.json").read_bytes())
    for entry in index["manifests"]:
        if entry.get("annotations", {}).get(NAME) == name:
            return dict(entry)
    raise AnchorError(f"{what}: was not fetched")
