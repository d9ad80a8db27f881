"""Export: a stage's model as a Hugging Face folder that loads anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from treadle.kernels.digest import state_digest
from treadle.platform.errors import DataError
from treadle.workflows.models import check_model_folder


def export_model(source: Path, target: Path, digest: str) -> None:
    """Copies a model folder and reads the copy back. Raises `DataError` if its weights are not those of
    `digest`; the target then does not exist."""
    check_model_folder(source)
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copyfile(file, draft / file.name)
    found = folder_digest(draft)
    if digest and found != digest:
        shutil.rmtree(draft)
        raise DataError(
            f"{source}: its weights have the digest {found}, the stage recorded {digest}.",
            "The artefact was changed or damaged after the run; run the stage again.",
        )
    shutil.rmtree(target, ignore_errors=True)
    draft.replace(target)


def folder_digest(folder: Path) -> str:
    """The state digest of a model folder's weights, in the dtype they are stored in."""
    from safetensors import safe_open

    def tensors() -> object:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  safe_open is no mapping
                    yield name, stored.get_tensor(name)

    return state_digest(tensors())  # type: ignore[arg-type]
