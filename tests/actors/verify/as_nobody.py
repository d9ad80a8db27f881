"""Tests run once more by the user `nobody`, under the system's interpreter: nobody may not read a root's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MARKERS = "slow: takes more than 30 s\nhostile: the long part"
USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def passes_as_nobody(folder: str, files: str, chosen: str, within_s: float) -> None:
    """Runs `chosen` (as in `pytest -k`) of the test files that the pattern `files` finds in `folder`, from a copy."""
    python = shutil.which("python3", path="/usr/bin")
    if python is None or f"python{sys.version_info[0]}.{sys.version_info[1]}" not in os.path.realpath(python):
        pytest.skip("the system has no interpreter of our version")
    with tempfile.TemporaryDirectory(prefix="treadle-nobody-") as place:
        os.chmod(place, 0o777)
        home = Path(shutil.copytree(ROOT, f"{place}/tree", ignore=_only_what_it_takes))
        packages = [path for path in sys.path if path.endswith("site-packages")]
        found = sorted(map(str, home.glob(f"{folder}/{files}")))
        assert found
        ended = subprocess.run(
            [
                *(*USER, python, "-m", "pytest", "-q"),
                *("-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={home}", "-c", os.devnull),
                *(f"--basetemp={place}/pytest", "-o", "timeout=300", "-o", f"markers={MARKERS}"),
                *("-k", chosen, *found),
            ],
            cwd=home,
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": place,
                "PYTHONPATH": os.pathsep.join([f"{home}/platform", f"{home}/actors", str(home), *packages]),
            },
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout


def _only_what_it_takes(folder: str, names: list[str]) -> set[str]:
    """What the copy leaves out: it takes our own sources of two floors, and tests."""
    if Path(folder) == ROOT:
        return set(names) - {"platform", "actors", "tests"}
    return {"__pycache__"}
