"""The running Treadle as a wheel, to ship to a cluster.

It is written from the files this process imports, so that source trees and installations are shipped alike,
and without requirements: a cluster's nodes have Treadle's dependencies, and installing them per job would
replace half of the environment.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import treadle.platform
from treadle.cluster.environment import passed_on
from treadle.platform.errors import ClusterError

_WHEEL = "Wheel-Version: 1.0\nGenerator: treadle\nRoot-Is-Purelib: true\nTag: py3-none-any\nBuild: {build}\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal files give an equal wheel


def build_wheel(folder: Path) -> Path:
    """Writes `treadle-<version>-<build>-py3-none-any.whl` into `folder` and returns its path.

    The build tag is a hash of the content: a cluster keeps wheels by name, and would otherwise run the code
    of the first one of a version for ever. Raises `ClusterError` when Treadle is not installed, not even as
    an editable source tree.
    """
    try:
        installed = distribution("treadle")
    except PackageNotFoundError as error:
        raise ClusterError(
            "Treadle is not installed here.", "Run `pip install -e .` in its source tree."
        ) from error
    info = f"treadle-{installed.version}.dist-info"
    files = dict(_modules())
    files[f"{info}/METADATA"] = _metadata(installed).encode()
    if entry_points := installed.read_text("entry_points.txt"):
        files[f"{info}/entry_points.txt"] = entry_points.encode()
    build = f"0{_digest(files)}"
    files[f"{info}/WHEEL"] = _WHEEL.format(build=build).encode()
    path = folder / f"treadle-{installed.version}-{build}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
        archive.writestr(
            zipfile.ZipInfo(f"{info}/RECORD", _EPOCH), _record(files, info), zipfile.ZIP_DEFLATED
        )
    return path


def shipped(folder: Path) -> dict[str, object]:
    """The runtime environment of processes that run this Treadle on a cluster, whichever one its nodes have. The wheel
    is written into `folder`, which may go once Ray has been initialised with it."""
    return {"py_modules": [str(build_wheel(folder))], "env_vars": passed_on()}


def _modules() -> Iterator[tuple[str, bytes]]:
    """Every file of the namespace package `treadle`, wherever its portions lie, in a fixed order."""
    portions = sorted(Path(portion) for portion in treadle.__path__)
    for portion in portions:
        for path in sorted(portion.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"treadle/{path.relative_to(portion).as_posix()}", path.read_bytes()


def _digest(files: dict[str, bytes]) -> str:
    """16 hexadecimal digits of names and contents."""
    total = hashlib.sha256()
    for name, content in files.items():
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()[:16]


def _metadata(installed: Distribution) -> str:
    """Name, version and summary of the installed distribution, no requirements."""
    headers = HeaderParser().parsestr(installed.read_text("METADATA") or "")
    kept = ("Metadata-Version", "Name", "Version", "Summary", "License-Expression", "Requires-Python")
    return "".join(f"{name}: {headers[name]}\n" for name in kept if headers[name])


def _record(files: dict[str, bytes], info: str) -> str:
    lines = io.StringIO()
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.write(f"{name},sha256={digest},{len(content)}\n")
    lines.write(f"{info}/RECORD,,\n")
    return lines.getvalue()
