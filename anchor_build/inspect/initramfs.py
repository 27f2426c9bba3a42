"""What an initramfs says about itself: which stages, drivers and settings it holds, and who made it."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from anchor_build.cpio import Initramfs, read_initramfs
from anchor_build.embed import FILE as IMAGES
from anchor_build.files import sha256
from anchor_build.inspect.artifact import Artifact, Entry, file_facts, utc
from anchor_build.inspect.embedded import embedded_images
from anchor_build.readback import driver_dependencies, included_modules, measure_stages
from anchor_build.registry import Registry, load_registry
from anchor_build.settings import HIDDEN, holds_secret, shown_value
from anchor_build.stage import Stage

# Where render.py puts them.
STAGE_SCRIPT = re.compile(r"usr/lib/anchor/stages/([a-z]+)/[0-9]+-([^/]+)/params\.sh")
SETTINGS = "etc/anchor/params"
KEY_MAX = 64 << 10  # bytes; no private key is larger, and programs hold the words as well
PRIVATE_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
PUBLIC_KEY = re.compile(rb"-----BEGIN PUBLIC KEY-----(.*?)-----END PUBLIC KEY-----", re.DOTALL)
NOT_SHOWN = "(not shown: no stage that is known here declares it)"


def inspect_initramfs(file: Path, stage_dirs: tuple[Path, ...] = ()) -> Artifact:
    """Read an initramfs; `stage_dirs` holds stages of one's own, by which their sizes and settings are told.

    Raises as read_initramfs and load_registry do.
    """
    initramfs = read_initramfs(file)
    registry = load_registry(stage_dirs)
    stages, unknown = _stages(initramfs, registry)
    settings, has_secrets = _settings(initramfs, registry)
    contents = measure_stages(initramfs, stages, driver_dependencies(_text(initramfs, _modules_dep(initramfs))), _none)
    held = initramfs.resolve(f"etc/anchor/{IMAGES}")
    embedded, unread = embedded_images(held.content) if held is not None and held.is_file else ({}, "")
    facts: dict[str, Any] = {
        **file_facts(file),
        "archives": [f"{compression}, {count} entries" for compression, count in initramfs.archives],
        "anchor_build": _text(initramfs, "etc/anchor/version").strip(),
        "build_time": _time(initramfs, "etc/anchor/build-time"),
        "kernel": sorted(
            {path.split("/")[3] for path in initramfs.members if re.match("usr/lib/modules/[^/]+/", path)}
        ),
        "dracut": _release(initramfs, "DRACUT_VERSION"),
        "system": _release(initramfs, "PRETTY_NAME"),
        "dracut_modules": included_modules(initramfs),
        "drivers": list(contents.drivers),
        "settings": settings,
        "ca_certificates": _fingerprints(initramfs, "etc/anchor/ca.pem", CERTIFICATE),
        "manifest_keys": _fingerprints(initramfs, "etc/anchor/manifest.pub", PUBLIC_KEY),
        "manifest_since": _time(initramfs, "etc/anchor/manifest-since"),
        "private_keys": [
            member.path
            for member in initramfs.members.values()
            if member.is_file and member.size <= KEY_MAX and PRIVATE_KEY.search(member.content)
        ],
        "uncompressed_bytes": contents.total,
        "bytes_by_stage": dict(contents.by_owner),
        "embedded": embedded,
    }
    entries = {
        path: Entry(
            path=path,
            mode=member.mode,
            size=len(member.content) if member.is_file else member.size,
            owner=f"{member.uid}:{member.gid}",
            time=member.mtime,
            digest=sha256(member.content) if member.is_file else "",
            target=member.content.decode("utf-8", "surrogateescape") if member.is_link else "",
        )
        for path, member in sorted(initramfs.members.items())
        if path
    }
    notes = ["shared libraries count as the base system's, whichever stage needs them"] if stages else []
    notes += [f"{name}: is not known here; --stage-dir DIR names its directory" for name in unknown]
    notes += [unread] if unread else []
    if not stages and not unknown:
        notes.append("holds no stage of anchor-build: it is another initramfs")
    if has_secrets and SETTINGS in entries:
        # A digest of a short secret can be tried out by whoever sees it.
        entries[SETTINGS] = Entry(**{**vars(entries[SETTINGS]), "digest": HIDDEN})
        notes.append(f"/{SETTINGS} holds secrets: neither they nor the file's digest are shown")
    return Artifact("initramfs", {name: fact for name, fact in facts.items() if fact}, entries, tuple(notes))


def _none(stage: Stage) -> tuple[str, ...]:
    """Name no libraries: which ones a program needs, only the host that built it could say."""
    return ()


def _stages(initramfs: Initramfs, registry: Registry) -> tuple[list[Stage], list[str]]:
    """Return the stages that are inside, and the names of those that nothing is known of."""
    found, unknown = [], []
    known = {(stage.kind, stage.name): stage for stage in registry.stages}
    for path in initramfs.members:
        match = STAGE_SCRIPT.fullmatch(path)
        if match and match[1] == "core":
            found.append(registry.core)
        elif match and match.groups() in known:
            found.append(known[match[1], match[2]])
        elif match:
            unknown.append(f"{match[1]}-{match[2]}")
    order = [registry.core, *registry.stages]
    return sorted(found, key=order.index), unknown


def _text(initramfs: Initramfs, path: str) -> str:
    member = initramfs.resolve(path)
    return "" if member is None or not member.is_file else member.content.decode("utf-8", "surrogateescape")


def _modules_dep(initramfs: Initramfs) -> str:
    return next((path for path in initramfs.members if re.fullmatch("(usr/)?lib/modules/[^/]+/modules.dep", path)), "")


def _release(initramfs: Initramfs, key: str) -> str:
    """Return a value of the os-release file of the initramfs (dracut writes initrd-release)."""
    for name in ("usr/lib/initrd-release", "etc/initrd-release", "etc/os-release"):
        found = re.search(rf'^{key}="?([^"\n]*)"?$', _text(initramfs, name), re.MULTILINE)
        if found:
            return found[1]
    return ""


def _time(initramfs: Initramfs, path: str) -> str:
    text = _text(initramfs, path).strip()
    return utc(int(text)) if re.fullmatch("[0-9]{1,11}", text) else text


def _settings(initramfs: Initramfs, registry: Registry) -> tuple[dict[str, str], bool]:
    """Return the baked-in parameters without what is secret, and whether something was left out."""
    params = {
        name: param for stage in (registry.core, *registry.stages) for param in stage.params for name in param.names
    }
    shown: dict[str, str] = {}
    hidden = False
    for line in _text(initramfs, SETTINGS).splitlines():
        key, _, value = line.partition("=")
        param = params.get(key)
        shown[key] = NOT_SHOWN if param is None else shown_value(param, value)
        hidden = hidden or param is None or holds_secret(param, value)
    return shown, hidden


def _fingerprints(initramfs: Initramfs, path: str, kind: re.Pattern[bytes]) -> list[str]:
    """Return the SHA-256 of each certificate or public key (in DER) that a file of PEM blocks has, in its order."""
    digests = []
    for body in kind.findall(_text(initramfs, path).encode("utf-8", "surrogateescape")):
        try:
            digests.append(sha256(base64.b64decode(b"".join(body.split()), validate=True)))
        except ValueError:
            digests.append("(not readable)")
    return digests
