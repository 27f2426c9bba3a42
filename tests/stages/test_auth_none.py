"""auth none: nothing to do, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.shell.conftest import SHELLS, TOP, Shell

STAGE = TOP / "dracut-modules/auth-none/stage.sh"


@pytest.mark.parametrize("name", sorted(SHELLS))
def test_succeeds_and_leaves_no_credentials(name: str, tmp_path: Path) -> None:
    done = Shell(name, tmp_path).run('. "$1" && anchor_none_run', str(STAGE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
