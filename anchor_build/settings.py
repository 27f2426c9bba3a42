"""The site's settings for a build: its CA, and parameter values that are baked in as defaults."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_build import paramtypes
from anchor_build.errors import AnchorError, UsageError
from anchor_build.files import read_bounded
from anchor_build.plan import Plan
from anchor_build.root import HOST, Root
from anchor_build.stage import PREFIX, Param

SYSTEM_BUNDLES = (Path("/etc/ssl/certs/ca-certificates.crt"), Path("/etc/pki/tls/certs/ca-bundle.crt"))
CERTIFICATE = re.compile(rb"-----BEGIN (?:TRUSTED )?CERTIFICATE-----([^-]*)")
# What stands for a secret in what people and reports are shown.
HIDDEN = "(secret)"


@dataclass(frozen=True)
class Setting:
    """A baked-in default: a parameter and its value as on a command line."""

    param: Param
    value: str

    @property
    def is_secret(self) -> bool:
        """Whether it must not be readable by everybody."""
        return holds_secret(self.param, self.value)

    @property
    def shown(self) -> str:
        """The value for people and reports."""
        return shown_value(self.param, self.value)


class FileSetting(str):
    """`KEY=VALUE` of a file; `origin` is what messages say before the KEY."""

    origin: str

    def __new__(cls, text: str, origin: str) -> FileSetting:
        """Make one; a text is made before __init__."""
        setting = super().__new__(cls, text)
        setting.origin = origin
        return setting


def holds_secret(param: Param, value: str) -> bool:
    """Whether a value is secret: the type says so, or it is a URL with a user, or with a query (presigned)."""
    return bool(value) and (param.type == "secret" or shown_value(param, value) != value)


def shown_value(param: Param, value: str) -> str:
    """Return a value for people and reports, with what is secret in it left out. A URL may lack its scheme."""
    if value and param.type == "secret":
        return HIDDEN
    if param.type == "list" and param.options["of"] == "url":
        return ",".join(map(_shown_url, value.split(",")))
    return _shown_url(value) if param.type == "url" else value


def _shown_url(value: str) -> str:
    base, question, _ = value.partition("?")
    scheme, separator, rest = base.rpartition("://")
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    shown = f"{scheme}{separator}{f'{HIDDEN}@' if at else ''}{host}{slash}{path}"
    return shown + (f"?{HIDDEN}" if question else "")


def named_files(settings: Iterable[str]) -> list[str]:
    """Return the FILE of each KEY=@FILE among settings."""
    values = (text.partition("=")[2] for text in settings)
    return [value[1:] for value in values if value.startswith("@")]


def read_settings(plan: Plan, texts: Sequence[str]) -> tuple[Setting, ...]:
    """Read `KEY=VALUE` and `KEY=@FILE` (the file's text, final newline removed); the last of a key counts.

    Raises UsageError with every problem at once.
    """
    params = {name: param for _, param in plan.params for name in param.names}
    found: dict[str, Setting] = {}
    problems = []
    for text in texts:
        name, equals, value = text.partition("=")
        where = (text.origin if isinstance(text, FileSetting) else "--set ") + name
        param = params.get(name)
        if not equals:
            problems.append(f"{where}: has no value: --set KEY=VALUE or KEY=@FILE")
        elif param is None:
            problems.append(f"{where}: {unknown_parameter(name, plan)}")
        else:
            try:
                if param.type == "secret" and not value.startswith("@"):
                    who = (
                        "all who build read this"
                        if isinstance(text, FileSetting)
                        else "every process can read arguments"
                    )
                    raise paramtypes.InvalidValueError(f"is a secret, and {who}: give it as {param.key}=@FILE")
                raw = _read_value(value)
                paramtypes.check_value(param.type, raw, param.options)
                found[param.key] = Setting(param, raw)
            except paramtypes.InvalidValueError as error:
                problems.append(f"{where}: {error}")
            except OSError as error:
                problems.append(f"{where}: {error.filename}: {error.strerror}")
    if problems:
        raise UsageError("\n".join(problems))
    return tuple(found[key] for key in sorted(found))


def _read_value(text: str) -> str:
    if not text.startswith("@"):
        return text
    file = Path(text[1:])
    try:
        return read_bounded(file).decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise paramtypes.InvalidValueError(f"{file}: is not UTF-8 text") from None


def unknown_parameter(name: str, plan: Plan) -> str:
    """Say that a plan has no such parameter, and which one is meant: the nearest of its own, else of all stages."""
    import difflib

    owners = {known: stage for stage in (*plan.known, *plan.all) for param in stage.params for known in param.names}
    text = "is not a parameter of these stages"

    def nearest(names: Iterable[str], cutoff: float) -> list[str]:
        # What all begin with makes none of them nearer.
        ends = {known.removeprefix(PREFIX): known for known in names}
        return [ends[end] for end in difflib.get_close_matches(name.removeprefix(PREFIX), ends, n=1, cutoff=cutoff)]

    own = [known for known, stage in owners.items() if stage in plan.all]
    # One of a stage that nobody asked for has to look the same but for a slip.
    near = [name] if name in owners else nearest(own, 0.7) or nearest(owners, 0.85)
    if not near:
        return text
    owner = owners[near[0]]
    if near[0] != name:
        text += f"; did you mean {near[0]}?"
    if owner in plan.all:
        return text
    return f"{text}{' It is one' if near[0] != name else ', but'} of {owner.id}, which --{owner.kind} {owner.name} adds"


def read_ca(path: Path | None, root: Root = HOST) -> tuple[bytes, str]:
    """Return the CA bundle to bake in and a warning, empty when the site named its own and that is of use.

    Raises AnchorError when the file is unreadable, holds no or a broken certificate, or holds a private key.
    """
    if path is None:
        for bundle in map(root.at, SYSTEM_BUNDLES):
            if bundle.is_file():
                whom = "this host" if root.is_host else "the system there"
                return bundle.read_bytes(), f"no --ca: nodes trust every public CA that {whom} trusts"
        raise AnchorError(f"no --ca, and {root.name} has no CA bundle of its own", "name the site's CA with --ca FILE")
    try:
        data = read_bounded(path)
    except OSError as error:
        raise AnchorError(f"--ca {path}: cannot be read: {error.strerror}") from None
    if re.search(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----", data):
        raise AnchorError(f"--ca {path}: holds a private key", "a CA bundle holds certificates only")
    certificates = {b"".join(text.split()) for text in CERTIFICATE.findall(data)}
    if not certificates:
        raise AnchorError(f"--ca {path}: holds no certificate in PEM form")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise AnchorError(f"--ca {path}: holds a certificate that cannot be read", "is it whole?") from None
    # One that is pinned is no CA, and not among these: whether its time is over is not known.
    ends = [ssl.cert_time_to_seconds(str(found["notAfter"])) for found in context.get_ca_certs()]
    if len(ends) >= len(certificates) and max(ends) < time.time():
        day = time.strftime("%Y-%m-%d", time.gmtime(max(ends)))
        return data, f"--ca {path}: expired on {day}: nodes will trust no server"
    return data, ""
