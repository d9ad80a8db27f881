"""The trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from treadle.platform.errors import DataError

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def export_folder(source: str, target: str, state: Iterable[tuple[str, Tensor]], *, writer: bool) -> None:
    """Copies config, tokenizer and the rest of `source` to the local folder `target` and writes the weights
    under it. All ranks walk `state` (gathering is collective); the `writer` writes. The weights come last,
    under their final name only when complete."""
    if not writer:
        for _ in state:
            pass
        return
    origin, folder = Path(source), Path(target)
    if origin.resolve() == folder.resolve():
        raise DataError(
            f"Export folder {target} is the model the learner started from.", "Choose another one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(origin.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    partial = folder / ".model.safetensors.partial"
    save_file({name: tensor.contiguous() for name, tensor in state}, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
