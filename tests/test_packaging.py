"""The layout: six source roots of one namespace package, beside a folder that is called like a standard
module."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "kernels", "cluster", "actors", "workflows", "dashboards")


def _run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_package_hides_the_standard_library(folder: str) -> None:
    """`platform/__init__.py` would shadow the module `platform` for everything started in the root."""
    assert not (ROOT / folder / "__init__.py").exists()
    assert not (ROOT / folder / "treadle" / "__init__.py").exists()
    assert (ROOT / folder / "treadle" / folder / "__init__.py").exists()


def test_the_standard_platform_module_works_from_the_root() -> None:
    code = "import platform; print(platform.node() == platform.uname().node, platform.__file__)"
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True")
    assert str(ROOT / "platform") not in done.stdout


def test_python_m_pytest_starts_from_the_root() -> None:
    done = _run(sys.executable, "-m", "pytest", "--version")
    assert done.returncode == 0, done.stderr


def test_no_module_is_named_after_the_standard_library() -> None:
    modules = [file for folder in FOLDERS for file in (ROOT / folder / "treadle").rglob("*.py")]
    taken = [file for file in modules if file.stem in sys.stdlib_module_names and file.stem != "__init__"]
    assert [str(file.relative_to(ROOT)) for file in taken] == []


def test_every_folder_with_modules_is_a_package() -> None:
    """A folder without `__init__.py` imports as a namespace here and may be missing elsewhere."""
    bare = {
        file.parent
        for folder in FOLDERS
        for file in (ROOT / folder / "treadle" / folder).rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    }
    assert sorted(str(path.relative_to(ROOT)) for path in bare) == []


def test_no_file_is_longer_than_400_lines() -> None:
    files = [file for folder in (*FOLDERS, "tests") for file in (ROOT / folder).rglob("*.py")]
    long = {str(f.relative_to(ROOT)): n for f in files if (n := len(f.read_text().splitlines())) > 400}
    assert long == {}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("treadle-*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        str(file.relative_to(ROOT / folder))
        for folder in FOLDERS
        for file in (ROOT / folder / "treadle").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert packed == sources
    assert {name.split("/")[1] for name in packed} == set(FOLDERS)


def test_the_wheel_imports_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    """Only the wheel's own files and the installed libraries are on the path, not the editable install."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; site, *sources = sys.argv[1:]\n"
        "sys.path[:] = [site, *(path for path in sys.path if path not in sources)]\n"
        "import platform; platform.node()\n"
        "import treadle.platform.ledger, treadle.platform.config, treadle.workflows, treadle.kernels\n"
        "assert treadle.platform.ledger.__file__.startswith(site), treadle.platform.ledger.__file__"
    )
    sources = [str(ROOT / folder) for folder in FOLDERS]
    done = _run(sys.executable, "-c", code, str(tmp_path / "site"), *sources, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_imports_only_point_down() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = _run(str(linter), "--no-cache")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_folders_agree_with_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    build = settings["tool"]["hatch"]["build"]
    assert tuple(build["dev-mode-dirs"]) == FOLDERS
    assert tuple(build["targets"]["wheel"]["sources"]) == FOLDERS
    assert build["targets"]["wheel"]["only-include"] == [f"{folder}/treadle" for folder in FOLDERS]
    assert settings["tool"]["importlinter"]["root_packages"] == [f"treadle.{folder}" for folder in FOLDERS]


def test_make_test_runs_every_test_file() -> None:
    """Its parts are lists: a file that none of them names would never run in CI. The oracle and the failure matrix have
    targets of their own."""
    done = _run("make", "--dry-run", "--no-print-directory", "test", "VENV=.venv")
    assert done.returncode == 0, done.stderr
    named = [ROOT / word for word in done.stdout.split() if word.startswith("tests/")]
    assert named
    apart = {ROOT / "tests/oracle", ROOT / "tests/chaos"}
    files = {path for path in ROOT.glob("tests/**/test_*.py") if not apart & set(path.parents)}
    left_out = [str(f) for f in sorted(files) if not any(f == n or n in f.parents for n in named)]
    assert left_out == []
