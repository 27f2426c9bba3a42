"""The closed table of parameter types: what the value of a kernel command-line parameter may be.

Each type is one check here and one in lib/anchor-types.sh. The two accept the same values, normalise them to
the same text and refuse them for the same reason; tests/vectors/types.json holds both to that. A value is the
bytes of a command line: text that is not UTF-8 is carried as surrogates (PEP 383), and lengths count bytes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

Options = Mapping[str, object]

MAX_BYTES = 4096
MAX_DIGITS = 18
MAX_INTEGER = 10**MAX_DIGITS - 1  # what every shell computes with; the same limit for a product

SIZE_FACTORS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DURATION_FACTORS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
TRUE_WORDS = ("", "1", "yes", "true", "on")
FALSE_WORDS = ("0", "no", "false", "off")

CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGITS = re.compile(rf"[0-9]{{1,{MAX_DIGITS}}}")
SIZE = re.compile(r"([0-9]+)(?:([kmgt])i?)?b?", re.IGNORECASE | re.ASCII)
DURATION = re.compile(r"([0-9]+)([smhd]?)")
LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
MAILBOX = re.compile(r"(?![.-])(?!.*\.\.)[A-Za-z0-9._%+-]{1,64}(?<!\.)")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,15}")
LOWER_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,15}")
WORD = re.compile(r"[!-~]+")
# RFC 3986, without the single quote and without a fragment.
URL_USER = re.compile(r"[A-Za-z0-9._~:!$&()*+,;=%-]+")
URL_TAIL = re.compile(r"(?:[/?][A-Za-z0-9._~:/?@!$&()*+,;=%-]*)?")
URL_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(?::(.*))?")
# rsync(1): HOST::MODULE/PATH of a daemon, and USER@HOST:/PATH through a shell. Neither can be a host with a port.
RSYNC_SOURCE = re.compile(r"([^/\[:]+)(?:(::)|:/)(.*)")
NFS_EXPORT = re.compile(r"nfs4?:(\[[^\]]*\]|[^:]*):(/[^:]*)(?::[A-Za-z0-9._=,:/@+-]*(?<!:))?")
SHA256 = re.compile(r"(?:sha256:)?([0-9A-Fa-f]{64})")
MAC = re.compile(r"(?:01-)?(XX(?:-XX){5})|(XX(?::XX){5})".replace("X", "[0-9A-Fa-f]"))
DISK = re.compile(r"smallest|largest|only|(?:serial|wwn):[A-Za-z0-9._:+-]{1,64}")
DEVICE = re.compile(r"/[A-Za-z0-9._:+@=/-]*")
TTY = re.compile(r"(?:/dev/)?((?:tty|hvc)[A-Za-z]*[0-9]+)")


class InvalidValueError(ValueError):
    """A value that its type refuses; the text is a phrase that follows the parameter's name."""


@dataclass(frozen=True)
class ParamType:
    """One type: the keys of stage.toml that parametrise it, how documents show it, and its check.

    `check` takes a value that is free of control characters and not too long, and the options; it returns the
    normalised value or raises InvalidValueError.
    """

    name: str
    options: tuple[str, ...]
    summary: str
    metavar: str
    check: Callable[[str, Options], str]


def check_value(type_name: str, value: str, options: Options) -> str:
    """Return `value` in its type's normal form; raise InvalidValueError with the reason why it has none."""
    try:
        size = len(value.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        raise InvalidValueError("contains a character that has no UTF-8 form") from None
    if size > MAX_BYTES:
        raise InvalidValueError(f"is longer than {MAX_BYTES} bytes")
    if CONTROL.search(value):
        raise InvalidValueError("contains a control character")
    return TYPES[type_name].check(value, options)


def shell_arguments(type_name: str, options: Options) -> list[str]:
    """Return the words that follow VALUE in a call of the type's shell function, not quoted."""
    if type_name == "list":
        element = str(options["of"])
        return [element, *shell_arguments(element, options)]
    words: list[str] = []
    for key in TYPES[type_name].options:
        option = options.get(key, "")
        words.append(" ".join(option) if isinstance(option, (list, tuple)) else str(option))
    while words and not words[-1]:
        words.pop()
    return words


def check_options(type_name: str, options: Options) -> list[str]:
    """Return what is wrong with a parameter's type and its options in stage.toml, each naming its key."""
    if type_name not in TYPES:
        return [f"type is not one of: {' '.join(TYPES)}"]
    if type_name == "list":
        element = options.get("of")
        if not isinstance(element, str) or element not in TYPES or element == "list":
            return ["of does not name the type of the elements, which is any type but list"]
        return check_options(element, {key: options[key] for key in options if key != "of"})
    known = TYPES[type_name].options
    problems = [f"{key} is not an option of type {type_name}" for key in options if key not in known]
    if "min" in known:
        problems += _check_bounds(type_name, options)
    if "choices" in known:
        problems += _check_words("choices", options.get("choices"), WORD, "word of printable ASCII")
    if "schemes" in known and "schemes" in options:
        problems += _check_words("schemes", options["schemes"], LOWER_SCHEME, "scheme in lower case")
    if "bare" in known and "bare" in options:
        problems += _check_bare(options["bare"], options.get("schemes"))
    return problems


def _check_bare(bare: object, schemes: object) -> list[str]:
    if not isinstance(bare, str) or not LOWER_SCHEME.fullmatch(bare):
        return ["bare is not a scheme in lower case"]
    if isinstance(schemes, (list, tuple)) and bare not in schemes:
        return ["bare is not one of schemes"]
    return []


def _check_bounds(type_name: str, options: Options) -> list[str]:
    lowest = -MAX_INTEGER if type_name == "int" else 0
    bounds = {key: options[key] for key in ("min", "max") if key in options}
    numbers = {key: bound for key, bound in bounds.items() if type(bound) is int and lowest <= bound <= MAX_INTEGER}
    if numbers.keys() == bounds.keys():
        return ["min is greater than max"] if list(numbers.values()) != sorted(numbers.values()) else []
    return [f"{key} must be a whole number from {lowest} to {MAX_INTEGER}" for key in bounds if key not in numbers]


def _check_words(key: str, words: object, word: re.Pattern[str], meaning: str) -> list[str]:
    if not isinstance(words, (list, tuple)) or not words:
        return [f"{key} is not a list of at least one {meaning}"]
    if not all(isinstance(item, str) and word.fullmatch(item) for item in words):
        return [f"{key} has an element that is not a {meaning}"]
    if len(set(words)) < len(words):
        return [f"{key} names something twice"]
    return []


def _string(value: str, options: Options) -> str:
    return value


def _secret(value: str, options: Options) -> str:
    if not value:
        raise InvalidValueError("is empty")
    return value


def _name(value: str, options: Options) -> str:
    if not NAME.fullmatch(value):
        raise InvalidValueError("is not a name of up to 64 letters, digits, dots, dashes and underscores")
    return value


def _bool(value: str, options: Options) -> str:
    if value.lower() in TRUE_WORDS:
        return "1"
    if value.lower() in FALSE_WORDS:
        return "0"
    raise InvalidValueError("is not yes or no (1, 0, true, false, on, off)")


def _digits(text: str) -> int | None:
    return int(text) if DIGITS.fullmatch(text) else None


def _bounded(number: int | None, options: Options, noun: str, unit: str, unbounded: str) -> str:
    """Return `number` as text if it is one, is not too large for a shell and lies between min and max."""
    low, high = (None if options.get(key) is None else int(str(options[key])) for key in ("min", "max"))
    lowest, highest = (-MAX_INTEGER if low is None else low), (MAX_INTEGER if high is None else high)
    if number is not None and lowest <= number <= highest:
        return str(number)
    wanted = unbounded
    if low is not None and high is not None:
        wanted = f"from {low} to {high}{unit}"
    elif low is not None:
        wanted = f"of at least {low}{unit}"
    elif high is not None:
        wanted = f"of at most {high}{unit}"
    raise InvalidValueError(f"is not a {noun} {wanted}")


def _int(value: str, options: Options) -> str:
    number = _digits(value.removeprefix("-"))
    if number is not None and value.startswith("-"):
        number = -number
    return _bounded(number, options, "whole number", "", f"of at most {MAX_DIGITS} digits")


def _port(value: str, options: Options) -> str:
    return _bounded(_digits(value), {"min": 1, "max": 65535}, "port number", "", "")


def _scaled(match: re.Match[str] | None, factors: Mapping[str, int]) -> int | None:
    number = _digits(match[1]) if match else None
    return number * factors[(match[2] or "").lower()] if match and number is not None else None


def _size(value: str, options: Options) -> str:
    number = _scaled(SIZE.fullmatch(value), SIZE_FACTORS)
    return _bounded(number, options, "size", " bytes", "such as 512M or 2G")


def _size_or_percent(value: str, options: Options) -> str:
    try:
        if value.endswith("%"):
            return _bounded(_digits(value[:-1]), {"min": 1, "max": 100}, "", "", "") + "%"
        return _size(value, {})
    except InvalidValueError:
        raise InvalidValueError("is not a size or a percentage, such as 2G or 50%") from None


def _duration(value: str, options: Options) -> str:
    number = _scaled(DURATION.fullmatch(value), DURATION_FACTORS)
    return _bounded(number, options, "duration", " seconds", "such as 90, 30s or 5m")


def _choice(value: str, options: Options) -> str:
    choices = shell_arguments("choice", options)[0]
    if value not in choices.split(" "):
        raise InvalidValueError(f"is not one of: {choices}")
    return value


def _is_dns_name(text: str) -> bool:
    labels = text.split(".")
    # A last label of digits alone would be half an IPv4 address.
    return len(text) <= 253 and all(map(LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def _host_or_none(text: str) -> str | None:
    """Return the host in lower case without brackets, or None if `text` is not one."""
    bracketed = text.startswith("[") and text.endswith("]")
    address = text[1:-1] if bracketed else text
    try:
        if not bracketed and ":" not in text:
            if not _is_dns_name(text):
                ipaddress.IPv4Address(text)
        elif ipaddress.IPv6Address(address).scope_id is not None:
            return None
    except ValueError:
        return None
    return address.lower()


def _host(value: str, options: Options) -> str:
    host = _host_or_none(value)
    if host is None:
        raise InvalidValueError("is not a host name or an IP address")
    return host


def _email(value: str, options: Options) -> str:
    mailbox, _, domain = value.partition("@")
    if not MAILBOX.fullmatch(mailbox) or not _is_dns_name(domain):
        raise InvalidValueError("is not an email address such as ops@example.org")
    return value


def _authority_or_none(text: str) -> str | None:
    """Return [user[:password]@]host[:port] with the host in lower case, or None if `text` is not one."""
    user, at, place = text.rpartition("@")
    match = URL_HOST.fullmatch(place)
    host = _host_or_none(match[1]) if match else None
    if match is None or host is None or (at and not URL_USER.fullmatch(user)):
        return None
    port = _digits(match[2]) if match[2] is not None else 80
    if port is None or not 1 <= port <= 65535:
        return None
    host = f"[{host}]" if ":" in host else host
    return user + at + host + (f":{port}" if match[2] is not None else "")


def _url(value: str, options: Options) -> str:
    schemes, bare = ([*shell_arguments("url", options), "", ""])[:2]
    example = f"is not a URL such as {(schemes or 'https').split()[0]}://host/path"
    if "://" not in value and bare:
        source = None if schemes else RSYNC_SOURCE.fullmatch(value)
        if source:
            value = f"{'rsync' if source[2] == '::' else 'rsync+ssh'}://{source[1]}/{source[3]}"
        else:
            value = f"{'file' if value.startswith('/') and not schemes else bare}://{value}"
    scheme, _, rest = value.partition("://")
    if "://" not in value or not SCHEME.fullmatch(scheme):
        raise InvalidValueError(example)
    if schemes and scheme.lower() not in schemes.split():
        raise InvalidValueError(f"is not a URL with one of the schemes: {schemes}")
    place = re.split("[/?]", rest, maxsplit=1)[0]
    authority = _authority_or_none(place)
    tail = rest.removeprefix(place)
    if scheme.lower() == "file" and re.match("/.", rest) and URL_TAIL.fullmatch(tail):
        return f"file://{tail}"
    if authority is None or scheme.lower() == "file" or not URL_TAIL.fullmatch(tail):
        raise InvalidValueError(example)
    return f"{scheme.lower()}://{authority}{tail}"


def _path(value: str, options: Options) -> str:
    parts = [part for part in value.split("/") if part]
    if not value.startswith("/") or "." in parts or ".." in parts:
        raise InvalidValueError("is not an absolute path without . and .. in it")
    return "/" + "/".join(parts)


def _nfs_export(value: str, options: Options) -> str:
    match = NFS_EXPORT.fullmatch(value)
    try:
        if match and _host_or_none(match[1]) and _path(match[2], {}):
            return value
    except InvalidValueError:
        pass
    raise InvalidValueError("is not an NFS export such as nfs4:server:/path or nfs:server:/path:options")


def _sha256(value: str, options: Options) -> str:
    match = SHA256.fullmatch(value)
    if not match:
        raise InvalidValueError("is not a SHA-256 digest of 64 hexadecimal digits")
    return match[1].lower()


def _mac(value: str, options: Options) -> str:
    match = MAC.fullmatch(value)
    if not match:
        raise InvalidValueError("is not a MAC address such as 52:54:00:12:34:56")
    return (match[1] or match[2]).replace("-", ":").lower()


def _disk(value: str, options: Options) -> str:
    if DISK.fullmatch(value):
        return value
    parts = [part for part in value.split("/") if part]
    if DEVICE.fullmatch(value) and parts[:1] == ["dev"] and parts[1:] and not {".", ".."} & set(parts):
        return "/" + "/".join(parts)
    raise InvalidValueError(
        "is not a disk such as /dev/sda, serial:S1A2B3, wwn:0x5000c500a1b2c3d4, smallest, largest or only"
    )


def _tty(value: str, options: Options) -> str:
    match = TTY.fullmatch(value)
    if not match:
        raise InvalidValueError("is not a terminal device such as ttyS0 or hvc0")
    return match[1]


def _list(value: str, options: Options) -> str:
    elements = []
    for element in value.split(","):
        if not element:
            raise InvalidValueError("has an empty element")
        try:
            elements.append(check_value(str(options["of"]), element, options))
        except InvalidValueError as error:
            raise InvalidValueError(f"has an element that {error}") from None
    return ",".join(elements)


_ALL = (
    ParamType("string", (), "any text without control characters", "TEXT", _string),
    ParamType("name", (), "up to 64 letters, digits, `.`, `-`, `_`; no sign first", "NAME", _name),
    ParamType("bool", (), "`1 yes true on` or the bare name; `0 no false off`", "0|1", _bool),
    ParamType("int", ("min", "max"), "a whole number in decimal digits", "N", _int),
    ParamType("size", ("min", "max"), "bytes, or a number with `K M G T` (powers of 1024)", "SIZE", _size),
    ParamType("size-or-percent", (), "a size, or a share from `1%` to `100%`", "SIZE|N%", _size_or_percent),
    ParamType("duration", ("min", "max"), "seconds, or a number with `s m h d`", "TIME", _duration),
    ParamType("choice", ("choices",), "one of the words listed", "WORD", _choice),
    ParamType("host", (), "a DNS name, an IPv4 address or an IPv6 address", "HOST", _host),
    ParamType("port", (), "a port number from 1 to 65535", "PORT", _port),
    ParamType("email", (), "an email address", "ADDRESS", _email),
    ParamType("url", ("schemes", "bare"), "`scheme://[user[:pw]@]host[:port][/path][?query]`", "URL", _url),
    ParamType("path", (), "an absolute path without `.` and `..` in it", "PATH", _path),
    ParamType("sha256", (), "64 hexadecimal digits, also after `sha256:`", "DIGEST", _sha256),
    ParamType("mac", (), "a MAC address with colons or dashes, or in the form of `BOOTIF`", "MAC", _mac),
    ParamType("disk", (), "`/dev/...`, `serial:NUMBER`, `wwn:NUMBER`, `smallest`, `largest` or `only`", "DISK", _disk),
    ParamType("tty", (), "a terminal device such as `ttyS0` or `hvc0`, also after `/dev/`", "TTY", _tty),
    ParamType("nfs-export", (), "`nfs[4]:server:/path[:options]`", "EXPORT", _nfs_export),
    ParamType("secret", (), "text that is baked in and never shown", "SECRET", _secret),
    ParamType("list", ("of",), "elements of one type, with commas between them", "A,B,...", _list),
)

TYPES: Mapping[str, ParamType] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every type by its name, in the order of the reference documentation."""
