"""The tokenizer of a run: characters for models trained from nothing, or a folder for those that exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treadle.platform.config import variants
from treadle.platform.errors import ConfigError
from treadle.platform.storage import local_path
from treadle.workflows.data.tokenization import character_tokenizer, load_tokenizer
from treadle.workflows.models import copy_tokenizer


@dataclass(frozen=True, kw_only=True)
class CharactersConfig:
    """One token per character, one per tag of the R1 template, padding and EOS."""

    kind: str = "characters"
    alphabet: str = "0123456789+-*/()=,;: abcdefghijklmnopqrstuvwxyz\n"
    """Every character that prompts, chains and corpus may hold."""

    def write(self, folder: Path) -> Path:
        """Makes the tokenizer and saves it as a Hugging Face folder."""
        folder.mkdir(parents=True, exist_ok=True)
        character_tokenizer(self.alphabet).save_pretrained(folder)
        return folder

    def check(self) -> None:
        if not self.alphabet:
            raise ConfigError("tokenizer.alphabet is empty.", "List the characters your data holds.")


@dataclass(frozen=True, kw_only=True)
class FolderTokenizerConfig:
    """The tokenizer of a Hugging Face folder or fsspec URL."""

    kind: str = "folder"
    path: str = ""

    def write(self, folder: Path) -> Path:
        """Copies the tokenizer's files. Raises `DataError` if it is unusable or has no EOS."""
        with local_path(self.path) as source:
            load_tokenizer(str(source))
            folder.mkdir(parents=True, exist_ok=True)
            copy_tokenizer(source, folder)
        return folder

    def check(self) -> None:
        if not self.path:
            raise ConfigError(
                "tokenizer.path is empty.", "Name a Hugging Face folder, or use tokenizer.kind=characters."
            )


TokenizerConfig = CharactersConfig | FolderTokenizerConfig

variants("tokenizer", {"characters": CharactersConfig, "folder": FolderTokenizerConfig})
