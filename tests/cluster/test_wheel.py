"""The wheel that ships this Treadle to a cluster."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.clusters import clean_environment

from treadle.cluster.wheel import build_wheel

pytestmark = pytest.mark.processes


def test_the_wheel_holds_all_folders_and_no_requirements(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    assert wheel.name.startswith("treadle-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    for module in (
        "platform/records.py",
        "kernels/digest.py",
        "cluster/wheel.py",
        "actors/broadcast/actor.py",
    ):
        assert f"treadle/{module}" in names
    assert "treadle/__init__.py" not in names, "a regular package would hide the other folders' modules"
    assert not [name for name in names if "__pycache__" in name]
    assert "Requires-Dist" not in metadata
    assert "Name: treadle" in metadata


def test_equal_files_give_an_equal_wheel(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert build_wheel(tmp_path / "a").read_bytes() == build_wheel(tmp_path / "b").read_bytes()


def test_changed_code_gets_another_name(tmp_path: Path) -> None:
    """Ray keeps wheels by name."""
    first = build_wheel(tmp_path)
    extra = tmp_path / "portion" / "extra.py"
    extra.parent.mkdir()
    extra.write_text("x = 1\n")
    code = (
        f"import treadle, sys, pathlib; treadle.__path__ = [*treadle.__path__, {str(extra.parent)!r}]\n"
        "from treadle.cluster.wheel import build_wheel\n"
        "print(build_wheel(pathlib.Path(sys.argv[1])).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() != first.name


def test_pip_installs_the_wheel_and_it_is_what_is_imported(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        f"--target={target}",
        str(wheel),
    ]
    subprocess.run(command, check=True, env=clean_environment(tmp_path), timeout=240)
    code = "import treadle.cluster.wheel as w; print(w.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean_environment(tmp_path), "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(target / "treadle/cluster/wheel.py")
