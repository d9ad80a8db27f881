"""The uninterrupted run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.chaos.runs import chaotic


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run without faults."""
    return chaotic(tmp_path_factory.mktemp("undisturbed")).folder
