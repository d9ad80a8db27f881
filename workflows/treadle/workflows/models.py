"""Where a stage's model comes from: an earlier stage, a folder or URL, or random weights from a shape.

Everything below works on Hugging Face folders (config.json, model.safetensors, tokenizer files): learner and
engines load the same one, and what a stage leaves behind is another.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from treadle.platform.errors import ConfigError, DataError


@dataclass(frozen=True)
class ModelConfig:
    """Exactly one of `stage`, `path` and `architecture` is set."""

    stage: str = ""
    """Name of an earlier stage whose weights this one starts from."""
    path: str = ""
    """A Hugging Face folder or fsspec URL."""
    architecture: str = ""
    """A transformers model type, such as qwen2 or llama: random weights in the shape below."""
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 384
    context_tokens: int = 256
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; narrow models learn sooner with 0.05."""

    def check(self, where: str, earlier: Mapping[str, object]) -> None:
        """Raises `ConfigError` naming the setting. `earlier` holds the stages before this one."""
        given = [name for name in ("stage", "path", "architecture") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                f"{where}: exactly one of stage, path and architecture must be set, not {given or 'none'}.",
                f"Set {where}.stage to an earlier stage, {where}.path to a folder, or {where}.architecture=qwen2.",
            )
        if self.stage and self.stage not in earlier:
            raise ConfigError(
                f"{where}.stage={self.stage} is not an earlier stage (there are: {', '.join(earlier) or 'none'}).",
                "Name one that comes before this stage in the recipe.",
            )
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"{where}: hidden={self.hidden} must be a multiple of heads={self.heads}, and heads of "
                f"kv_heads={self.kv_heads}."
            )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies every file of a folder that is not a weight or a model configuration."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix != ".safetensors"
            and file.name not in ("config.json", "generation_config.json")
        ):
            shutil.copyfile(file, target / file.name)


def check_model_folder(folder: Path) -> None:
    """Raises `DataError` naming what is missing from a Hugging Face folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder.", "Point model.path at a Hugging Face model folder.")
    if not (folder / "config.json").exists():
        raise DataError(f"{folder} has no config.json.", "Point model.path at a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder} has no *.safetensors.", "Save the model with safe_serialization=True first."
        )
