"""The uninterrupted run that others are compared with; made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.programs import TINY, WITH_PROMPTS, patiently


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    program, ended = patiently("run", str(TINY), WITH_PROMPTS, "--dir", str(folder))
    assert ended.code == 0, ended
    assert program.all_gone(), program.survivors()
    return folder
