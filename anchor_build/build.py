"""Builds an initramfs: plan -> rendered modules -> dracut -> read back, trimmed -> compressed -> put in place.

A report goes beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from anchor_build import __version__, cache, dracut, embed, installer, readback
from anchor_build.compress import choose, compressed
from anchor_build.console import Step
from anchor_build.cpio import Initramfs, parse_initramfs, read_initramfs, rewrite_archives, write_archive
from anchor_build.drivers import DriverSet, Firmware, firmware, wanted_names
from anchor_build.elf import dynamic_linker
from anchor_build.errors import AnchorError, ProcessError
from anchor_build.files import PLAIN_PATH, beside, disk_errors, disk_hint, output_problems, sha256, work_directory
from anchor_build.inputs import Observation, facts_of
from anchor_build.kernel import Kernel, check_place
from anchor_build.network import expected_back_end
from anchor_build.oci import Access
from anchor_build.plan import Plan
from anchor_build.render import RenderedModule, module_digest, render_plan
from anchor_build.root import ENVIRONMENT, WORK, enter
from anchor_build.run import run
from anchor_build.settings import Setting
from anchor_build.signing import PublicKey
from anchor_build.stage import is_promised
from anchor_build.strip import strip
from anchor_build.trim import Trimmed, plan_trim
from anchor_build.version import source_date_epoch

# The name of what dracut writes in the work directory: an archive that is not compressed.
ARCHIVE = "initramfs.cpio"

# What a build has where nothing is said.
NETWORK_DRIVERS = DriverSet()
# How many drivers without their firmware a warning names.
SHOWN = 5
# What dracut says of a module that it leaves out.
LEFT_OUT = re.compile(
    r"[Mm]odule '([^'\n]+)' (?:will not be installed, because command '([^'\n]+)' could not be found"
    r"|depends on (?:module )?'([^'\n]+)', which can't be installed)"
)


@dataclass(frozen=True)
class InitramfsBuild:
    """Everything that decides the bytes of an initramfs, and where it goes."""

    plan: Plan
    kernel: Kernel
    output: Path
    ca: bytes
    settings: tuple[Setting, ...] = ()
    manifest_keys: tuple[PublicKey, ...] = ()
    # Seconds since the epoch: no older manifest is accepted.
    manifest_since: int | None = None
    # More drivers by name, and the set that they are added to.
    drivers: tuple[str, ...] = ()
    driver_set: DriverSet = NETWORK_DRIVERS
    # The dracut module that brings up the network, or "" for the core's choice; whether systemd runs in the initramfs.
    network: str = ""
    systemd: bool = True
    # Container images for use after the boot, and what their registries want to see.
    embedded: tuple[embed.Embedded, ...] = ()
    access: Access = field(default_factory=Access)
    copy_kernel: bool = True
    compress: str | None = None
    # Whether libraries that nothing uses are left out.
    trim: bool = True
    # The SHA-256 of more inputs by their role: the profile.
    inputs: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    # Called with each line of dracut's log when it matters (-v).
    tell: Callable[[str], None] = field(default=lambda line: None)

    @property
    def report_file(self) -> Path:
        """Where the JSON report goes."""
        return report_file(self.output)

    @property
    def kernel_file(self) -> Path | None:
        """Where the copy of the kernel goes: beside the output; None where there is no kernel to copy."""
        if not self.copy_kernel or self.kernel.image is None:
            return None
        return self.output.with_name(f"vmlinuz-{self.kernel.release}")


def report_file(output: Path) -> Path:
    """Return where the report of an initramfs goes: beside it."""
    return output.with_name(output.name + ".json")


def build_initramfs(build: InitramfsBuild, step: Step, *, use_cache: bool = True) -> dict[str, Any]:
    """Build, verify and put in place; return the report. With `use_cache`, what was built before is not built again.

    The output and its report appear whole or not at all. Raises AnchorError for everything that is missing,
    for a failed dracut, and when the finished file lacks something that a stage promises.
    """
    key = cache.key_of(facts_of(build)) if use_cache else ""
    check_output(build.output)
    if use_cache and (kept := cache.find(key)) is not None:
        with (
            step("nothing has changed: take the initramfs from the cache"),
            disk_errors(),
            beside(build.output) as file,
        ):
            file.write_bytes(kept.image)
            return _put_in_place(build, file, kept.report)
    installed = dracut.find_dracut(build.kernel.root)
    _check_host(build, installed)
    compression = choose(build.compress, build.kernel)
    seen = Observation(build) if use_cache else None
    modules = render_plan(build.plan)
    # Images would be there three times over.
    place = work_directory(in_memory=not build.embedded)
    with disk_errors(), place as work, beside(build.output) as partial:
        images, embedded = embed.pack(build.embedded, build.access, work, step) if build.embedded else (b"", [])
        with step("render the stages"):
            site = _site_files(build)
            site |= {embed.FILE: images} if build.embedded else {}
            request = _prepare(build, installed, modules, site, work)
        # The digests are taken aside: dracut keeps one core busy.
        with (
            step(f"run dracut {installed.version_text} for kernel {build.kernel.release}"),
            ThreadPoolExecutor(1) as aside,
        ):
            digests = aside.submit(_inputs, build, modules)
            tree = _run_dracut(build, installed, request, work)
        inputs = digests.result()
        with step("read it back"):
            made = tree or read_initramfs(work / ARCHIVE)
            stripped = strip(made, build.kernel.root, work)
            trimmed = _trim(build, made)
            initramfs = _rewrite(made, tree is not None, trimmed, stripped, work / ARCHIVE)
            left_out = sorted((*trimmed.left_out, *trimmed.placeholders))
        with (
            step("compress and verify it"),
            compressed(compression, work / ARCHIVE, partial, build.kernel, work),
        ):
            _verify(build, modules, site, initramfs)
            contents = _contents(build, installed, request, site, work, initramfs, inputs)
        data = partial.read_bytes()
        report = {"sha256": sha256(data), "bytes": len(data), "compression": compression.command, **contents}
        report |= {"left_out": left_out, "embedded": embedded}
        if warning := embed.size_warning(len(images)):
            report["warnings"].append(warning)
        if seen is not None and (found := seen.finish(made.members)) is not None:
            cache.keep(key, *found, report, data)
        return _put_in_place(build, partial, report)


def check_output(output: Path) -> None:
    """Raise AnchorError where an initramfs and its report could not be put in place."""
    problems = output_problems(output, report_file(output))
    if problems:
        raise AnchorError("\n".join(problems), "name another place with --output FILE")


def _check_host(build: InitramfsBuild, installed: dracut.Dracut) -> None:
    """Refuse, all at once, what would only fail in the middle of dracut's run."""
    check_place(build.kernel)
    problems: list[str] = []
    unknown: list[str] = []
    where = "" if build.kernel.root.is_host else f" in {build.kernel.root.name}"
    absent = () if build.systemd else ("systemd",)
    for stage in build.plan.all:
        for binary in stage.binaries:
            spare = binary.without and binary.without not in absent and installed.has_module(binary.without)
            if not spare and not binary.optional and build.kernel.root.find_program(binary.name) is None:
                reason = f", needed without {binary.without}," if binary.without else ""
                problems.append(
                    f"{stage.id}: {binary.name}{reason} is missing{where}: install {binary.where}"
                    + (dracut.misplaced_program(binary.name) if not where else "")
                )
        for module in stage.dracut:
            if not module.endswith("?") and not installed.has_module(module):
                deb, rpm = dracut.module_packages(module)
                which = f"dracut {installed.version_text}{where}" if where else "this dracut"
                problems.append(f"{stage.id}: {which} has no module {module}: install {deb} (deb) or {rpm} (rpm)")
    if problem := dracut.network_problem(installed, build.network, systemd=build.systemd):
        problems.append(problem)
    known = build.kernel.driver_names() | build.kernel.builtin_names()
    wanted = [(stage.id, driver) for stage in build.plan.all for driver in stage.drivers]
    wanted += [("--drivers", driver) for driver in build.driver_set.drivers]
    wanted += [("--add-drivers", driver) for driver in build.drivers]
    for owner, driver in wanted:
        if is_promised(driver) and driver.replace("-", "_") not in known:
            unknown.append(f"{owner}: kernel {build.kernel.release} has no driver {driver}")
    hint = "is the name right? With ? at its end, a driver is left out where a kernel has none" if unknown else ""
    if problems and not where:
        hint = "`anchor-build doctor` shows what this host lacks"
    if problems := [*problems, *unknown]:
        raise AnchorError("\n".join(problems), hint)


def build_time(build: InitramfsBuild) -> int:
    """Return the build's time in seconds since the epoch: SOURCE_DATE_EPOCH, else when its newest input was changed.

    A clock reading would make two builds of the same inputs differ. Raises AnchorError for a
    SOURCE_DATE_EPOCH that is no number.
    """
    given = source_date_epoch()
    if given is not None:
        return given
    root = build.kernel.root
    inputs = [build.kernel.modules_dep, root.at(dracut.BASE / "dracut-functions.sh")]
    inputs += [path for stage in build.plan.all for path in stage.directory.iterdir()]
    inputs += [path for stage in build.plan.all for b in stage.binaries if (path := root.find_program(b.name))]
    newest = max(int(path.stat().st_mtime) for path in inputs)
    return min(max(newest, _newest_certificate(build.ca)), int(time.time()))


def _newest_certificate(bundle: bytes) -> int:
    """Return the latest start of validity in a CA bundle: before it, a node could trust nobody."""
    import ssl

    newest = 0
    for block in re.findall(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", bundle, re.DOTALL):
        try:
            der = ssl.PEM_cert_to_DER_cert(block.decode("ascii"))
        except ValueError:
            continue
        times = re.findall(rb"\x17\x0d([0-9]{12}Z)", der[:1024])
        if times:
            newest = max(newest, int(ssl.cert_time_to_seconds(_utc_time(times[0].decode()))))
    return newest


def _utc_time(text: str) -> str:
    """Turn an ASN.1 UTCTime into the form that ssl.cert_time_to_seconds takes."""
    parsed = time.strptime(text, "%y%m%d%H%M%SZ")
    return time.strftime("%b %d %H:%M:%S %Y GMT", parsed)


def _site_files(build: InitramfsBuild) -> dict[str, bytes]:
    files = {"ca.pem": build.ca, "build-time": f"{build_time(build)}\n".encode()}
    if build.settings:
        files["params"] = "".join(f"{s.param.key}={s.value}\n" for s in build.settings).encode()
    if build.manifest_keys:
        files["manifest.pub"] = "".join(key.pem for key in build.manifest_keys).encode()
    if build.manifest_since is not None:
        files["manifest-since"] = f"{build.manifest_since}\n".encode()
    return files


def _prepare(
    build: InitramfsBuild,
    installed: dracut.Dracut,
    modules: tuple[RenderedModule, ...],
    site: Mapping[str, bytes],
    work: Path,
) -> dracut.Request:
    root = build.kernel.root
    # What lies in the work directory, as dracut sees it.
    seen = work if root.is_host else WORK
    unused = dracut.unused_modules(installed, build.network, systemd=build.systemd)
    without = (*build.driver_set.without, *unused)
    dracut.make_base(installed, modules, work / "dracut", without, systemd=build.systemd)
    etc, config = work / "etc", work / "dracut.conf"
    etc.mkdir()
    for name, content in site.items():
        (etc / name).write_bytes(content)
        (etc / name).chmod(readback.site_mode(name))
    config.write_text(dracut.configuration(root.inside(build.kernel.modules), seen / "tmp"), encoding="utf-8")
    (work / dracut.CONFIG_PARTS).mkdir()
    linker = dynamic_linker(root.at("/bin/sh"))
    if linker:
        (work / "ldd").write_text(dracut.ldd_script(linker), encoding="utf-8")
        (work / "ldd").chmod(0o755)
    (work / "tmp").mkdir()
    # dracut's own choice may be one that cannot be there without systemd.
    network = build.network or ("" if build.systemd else expected_back_end(installed, systemd=False))
    install = dracut.BASE / installer.INSTALL
    helped = root.at(install).is_file() and PLAIN_PATH.fullmatch(str(seen)) is not None
    if helped:
        with config.open("a", encoding="utf-8") as file:
            file.write(installer.prepare(work, seen))
    return dracut.Request(
        kernel=build.kernel,
        modules=dracut.choose_modules(
            installed, build.plan, build.driver_set.modules, network=network, systemd=build.systemd
        ),
        drivers=wanted_names((*build.driver_set.drivers, *build.drivers), build.kernel.driver_names()),
        base=seen / "dracut",
        config=seen / config.name,
        output=seen / ARCHIVE,
        ldd=seen / "ldd" if linker else None,
        install=seen / "dracut" / installer.INSTALL if helped else None,
        linker=linker,
    )


def _run_dracut(
    build: InitramfsBuild, installed: dracut.Dracut, request: dracut.Request, work: Path
) -> Initramfs | None:
    """Run dracut; return what it made, where that was read already."""
    root = build.kernel.root
    env = {"dracutbasedir": str(request.base), "ANCHOR_ETC": str(request.base.parent / "etc")}
    env |= ENVIRONMENT
    env |= {"DRACUT_LDD": str(request.ldd)} if request.ldd else {}
    env |= {"DRACUT_INSTALL": str(request.install)} if request.install else {}
    env |= {"SOURCE_DATE_EPOCH": os.environ["SOURCE_DATE_EPOCH"]} if "SOURCE_DATE_EPOCH" in os.environ else {}
    log, output = work / "dracut.log", work / ARCHIVE
    try:
        # What dracut makes itself goes into the initramfs: its modes must not depend on who builds.
        argv = enter(root, work, dracut.arguments(installed, request))
        helper = installer.installing(root, work, request.linker)
        with helper if request.install else nullcontext(installer.Made()) as made:
            run(argv, env=env, only_env=True, cwd=work, log=log, umask=0o022)
    except ProcessError as error:
        argv = dracut.arguments(installed, request)
        raise ProcessError(
            argv, error.status, error.tail, _dracut_hint(error.tail, request.base.parent, work)
        ) from None
    finally:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            build.tell(line)
    if made.tree is None and (not output.is_file() or output.stat().st_size == 0):
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise AnchorError(f"dracut ended without an error but wrote nothing\n{tail}")
    return made.tree


def _dracut_hint(output: str, seen: Path, work: Path) -> str:
    """Say what to do about what dracut wrote, to which `work` is at `seen`."""
    if "No space left on device" in output:
        return disk_hint(output.replace(f"{seen}/", f"{work}/"))
    if "Permission denied" in output:
        return "dracut reads files that only root may read here: run it as root"
    left_out = LEFT_OUT.search(output)
    if left_out:
        # Whatever needs this module is left out for this reason, too; dracut names the first one first.
        hint = f"dracut's module {left_out[1]} cannot be there: "
        if left_out[2]:
            return hint + f"{left_out[2]} is missing; install the package that has it"
        systemd = "; leave out --no-systemd, or choose another --network" if left_out[3] == "systemd" else ""
        return hint + f"it needs the module {left_out[3]}{systemd}"
    return "run again with -v to see all that dracut says"


def _trim(build: InitramfsBuild, made: Initramfs) -> Trimmed:
    """Say which libraries nothing uses."""
    rules = [rule for stage in build.plan.all for rule in stage.unused] if build.trim else []
    trimmed = plan_trim(made, rules, readback.included_modules(made))
    if trimmed.placeholders:
        build.tell(f"left out {trimmed.saved(made)} bytes of libraries that nothing uses")
    return trimmed


def _rewrite(
    made: Initramfs, from_tree: bool, trimmed: Trimmed, stripped: Mapping[str, bytes], archive: Path
) -> Initramfs:
    """Write the archive anew without what is left out, where it is not written yet or changes; return what is in it."""
    contents = {path: new for path, new in stripped.items() if path not in trimmed.left_out}
    contents.update(trimmed.placeholders)
    if not from_tree:
        if not contents and not trimmed.left_out:
            return made
        data = rewrite_archives(archive, archive.read_bytes(), trimmed.left_out, contents)
        archive.write_bytes(data)
        return parse_initramfs(archive, data)
    members = {path: member for path, member in made.members.items() if path not in trimmed.left_out}
    members |= {path: replace(members[path], size=len(new), content=new) for path, new in contents.items()}
    with archive.open("wb") as file:
        write_archive(file, members.values())
    return Initramfs(members, made.compression, (("none", len(members)),))


def _verify(
    build: InitramfsBuild, modules: tuple[RenderedModule, ...], site: Mapping[str, bytes], initramfs: Initramfs
) -> None:
    drivers = (*build.driver_set.drivers, *build.drivers)
    problems = readback.missing(initramfs, build.plan, modules, build.kernel, site, drivers)
    if problems:
        raise AnchorError(
            "the finished initramfs lacks what its stages promise:\n  " + "\n  ".join(problems),
            "run again with -v: dracut says why it left something out",
        )


def _contents(
    build: InitramfsBuild,
    installed: dracut.Dracut,
    request: dracut.Request,
    site: Mapping[str, bytes],
    work: Path,
    initramfs: Initramfs,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    contents = readback.measure(initramfs, build.plan, build.kernel)
    wanted = firmware(initramfs, work)
    return {
        "anchor_build": __version__,
        "dracut": installed.version_text,
        "dracut_modules": list(request.modules),
        "network": next((name for name in dracut.BACK_ENDS if name in readback.included_modules(initramfs)), ""),
        "kernel": build.kernel.release,
        "driver_set": build.driver_set.name,
        "build_time": int(site["build-time"]),
        "stages": [stage.id for stage in build.plan.all],
        "manifest_keys": [key.fingerprint for key in build.manifest_keys],
        "manifest_since": build.manifest_since,
        "settings": {setting.param.key: setting.shown for setting in build.settings},
        "inputs": dict(inputs),
        "uncompressed_bytes": contents.total,
        "files": contents.files,
        "bytes_by_stage": dict(contents.by_owner),
        "largest_files": [{"path": path, "bytes": size} for path, size in contents.largest],
        "drivers": list(contents.drivers),
        "firmware": list(wanted.included),
        "missing_firmware": {driver: list(files) for driver, files in wanted.missing.items()},
        "warnings": _warnings(build, wanted, initramfs),
    }


def _inputs(build: InitramfsBuild, modules: tuple[RenderedModule, ...]) -> dict[str, str]:
    """Return the SHA-256 of each input by its role; no path of this host."""
    inputs = {**build.inputs, "ca": sha256(build.ca)}
    inputs["modules.dep"] = sha256(build.kernel.modules_dep.read_bytes())
    if build.kernel.image is not None:
        inputs["kernel"] = sha256(build.kernel.image.read_bytes())
    for module in modules:
        inputs[module.name] = module_digest(module)
    for stage in build.plan.all:
        for binary in stage.binaries:
            path = build.kernel.root.find_program(binary.name)
            if path is not None:
                inputs[f"program {binary.name}"] = sha256(path.read_bytes())
    return inputs


def _warnings(build: InitramfsBuild, wanted: Firmware, initramfs: Initramfs) -> list[str]:
    secrets = [setting.param.key for setting in build.settings if setting.is_secret]
    found = list(build.warnings)
    if not build.kernel.drives_network(initramfs.members):
        found.append(
            f"no driver of a network card is inside, nor in kernel {build.kernel.release} itself: are all its modules"
            " installed (kernel-modules in Fedora), and is --drivers right?"
        )
    if secrets:
        found.append(
            f"holds secrets ({', '.join(secrets)}): whoever can fetch this initramfs can read them; its mode is 0600"
        )
    if build.manifest_keys and build.manifest_since is None:
        found.append("no --manifest-since: nodes accept every signed manifest until it expires, however old")
    if wanted.missing:
        names = sorted(wanted.missing)
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        where = "this host" if build.kernel.root.is_host else "the system there"
        found.append(
            f"firmware that drivers may ask for is not installed on {where}, and so not inside: {shown};"
            " the report names the files (missing_firmware)"
        )
    return found


def _put_in_place(build: InitramfsBuild, partial: Path, made: Mapping[str, Any]) -> dict[str, Any]:
    """Put the initramfs, the kernel and the report where they belong; return the report, which now names the files."""
    report = {
        "file": build.output.name,
        "kernel_file": build.kernel_file.name if build.kernel_file else None,
        **made,
    }
    secret = any(setting.is_secret for setting in build.settings)
    partial.chmod(0o600 if secret else 0o644)
    with beside(build.report_file) as report_partial:
        _copy_kernel(build)
        report_partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        report_partial.chmod(0o644)
        partial.replace(build.output)
        report_partial.replace(build.report_file)
    return report


def _copy_kernel(build: InitramfsBuild) -> None:
    """Put the kernel beside the initramfs, unless it is there."""
    source, target = build.kernel.image, build.kernel_file
    if source is None or target is None or (target.exists() and target.samefile(source)):
        return
    with beside(target) as partial:
        shutil.copyfile(source, partial)
        partial.chmod(0o644)
        partial.replace(target)
