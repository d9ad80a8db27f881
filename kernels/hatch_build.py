"""Builds the kernel libraries whenever a wheel or an editable installation is made, and marks the wheel as one for
this kind of machine."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GLIBC = "2_34"  # the newest symbols the libraries use; a test looks


class KernelsBuildHook(BuildHookInterface[Any]):
    """Wheels hold what could be built: a machine without compilers makes a wheel that runs everywhere, slowly."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build = runpy.run_path(str(Path(self.root, "kernels", "build.py")))
        libraries: list[Path] = build["main"](log=self.app.display_info)
        if version == "editable" or not libraries:
            return
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in libraries]
        build_data["pure_python"] = False
        machine = sysconfig.get_platform().removeprefix("linux_").removeprefix("linux-").replace("-", "_")
        build_data["tag"] = f"py3-none-manylinux_{GLIBC}_{machine}"
