"""What tests of several directories share: stages written on the spot, a site's own stages, and a node's files."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from anchor_build.plan import Plan
from anchor_build.render import installed_files, render_plan
from contrib.site.pki import Authority, Leaf, issue, make_authority

TOP = Path(__file__).resolve().parents[1]
SITE_PACKAGE = TOP / "tests" / "fixtures" / "site_package"
SITE_STAGES = SITE_PACKAGE / "site_stages"

# Parameters of Anchor 0.1.5 that chose a way to authenticate or fetch.
OLDER_CHOICES = ("dropbear_auth_key", "nfs_mount", "buildah_registry", "squashfs_rsync")

WriteStage = Callable[..., Path]
LayOut = Callable[[Plan, Path], None]


@pytest.fixture(scope="session", autouse=True)
def _no_profiles() -> Iterator[None]:
    """Keep the profiles of this host and of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ANCHOR_BUILD_PROFILE", raising=False)
        patch.setenv("ANCHOR_BUILD_CONFIG", os.devnull)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let tests send SIGINT: what a shell or a build daemon starts in the background ignores it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def write_stage(tmp_path: Path) -> WriteStage:
    """Write a stage's directory: `header` goes into [stage], `body` below it."""

    def write(
        name: str = "demo", *, kind: str = "auth", header: str = "", body: str = "", script: str | None = None
    ) -> Path:
        directory = tmp_path / "stages" / f"{kind}-{name}"
        directory.mkdir(parents=True)
        if kind == "transport" and "schemes" not in header:
            header += f'\nschemes = ["{name}"]'
        facts = f'kind = "{kind}"\nname = "{name}"\napi = 1\nsummary = "A stage."\n'
        (directory / "stage.toml").write_text(f"[stage]\n{facts}{header}\n{body}", encoding="utf-8")
        if script is None:
            word = name.replace("-", "_")
            script = f"anchor_{word}_run() {{\n    :\n}}\nanchor_{word}_mount() {{\n    :\n}}\n"
        (directory / "stage.sh").write_text(script, encoding="utf-8")
        return directory

    return write


@pytest.fixture
def installed_package(tmp_path: Path) -> Path:
    """Return a directory for sys.path into which the site's package is installed, as pip would leave it."""
    target = tmp_path / "site-packages"
    shutil.copytree(SITE_STAGES, target / "site_stages", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = target / "site_stages-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: site-stages\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[anchor_build.stages]\nsite = site_stages\n", encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def lay_out() -> LayOut:
    """Lay the files of a plan out below a node's root, as the rendered dracut modules would."""

    def install(plan: Plan, root: Path) -> None:
        for stage, module in zip(plan.all, render_plan(plan), strict=True):
            for source, target, mode in installed_files(stage):
                path = root / target.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(module.files[source].content)
                path.chmod(mode)

    return install


@pytest.fixture(scope="session")
def site_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the CA of a site: its certificate; the key is beside it as ca.key."""
    return make_authority(tmp_path_factory.mktemp("pki")).certificate


@pytest.fixture(scope="session")
def leaf(site_ca: Path, tmp_path_factory: pytest.TempPathFactory) -> Leaf:
    """Issue the certificate of a node of that site."""
    authority = Authority(site_ca, site_ca.with_suffix(".key"))
    return issue(authority, tmp_path_factory.mktemp("leaf"), "node1", client=True)


@pytest.fixture(scope="session")
def other(site_ca: Path, tmp_path_factory: pytest.TempPathFactory) -> Leaf:
    """Issue that of another node."""
    return issue(
        Authority(site_ca, site_ca.with_suffix(".key")), tmp_path_factory.mktemp("other"), "node2", client=True
    )


@pytest.fixture
def authority(site_ca: Path, tmp_path: Path) -> Path:
    """Return a copy of that CA that a test may change."""
    shutil.copytree(site_ca.parent, tmp_path / "pki")
    return tmp_path / "pki" / site_ca.name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Under build.sh, which installs everything, a test that was skipped because a program is missing has failed."""
    report = yield
    if report.skipped and os.environ.get("ANCHOR_BUILD_SH") and "is missing" in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `./build.sh test --fast` leaves out as a whole: servers, builds, all shells but dash."""
    for item in items:
        part = item.path.relative_to(TOP / "tests").parts[0]
        shells = {"bash", "busybox"}.intersection(item.name.partition("[")[2].rstrip("]").split("-"))
        if part in ("stages", "integration") or (part == "shell" and shells):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("boot"):
            # One in some hundred nodes meets a fault of QEMU 7.2's own, without KVM and with two processors.
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=["QEMU crashed"]))
