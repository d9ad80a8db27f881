"""The kinds of data a recipe can name. Importing this module declares their unions to the configuration."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.platform.config import variants
from treadle.workflows.data.corpus import FileCorpusConfig, GeneratedCorpusConfig
from treadle.workflows.data.pairs import FilePairsConfig, GeneratedPairsConfig
from treadle.workflows.data.prompts import FilePromptsConfig, GeneratedPromptsConfig

PromptsConfig = GeneratedPromptsConfig | FilePromptsConfig
CorpusConfig = GeneratedCorpusConfig | FileCorpusConfig
PairsConfig = GeneratedPairsConfig | FilePairsConfig

PROMPTS: Mapping[str, type[PromptsConfig]] = {
    "generator": GeneratedPromptsConfig,
    "file": FilePromptsConfig,
}
CORPORA: Mapping[str, type[CorpusConfig]] = {
    "generator": GeneratedCorpusConfig,
    "file": FileCorpusConfig,
}
PAIRS: Mapping[str, type[PairsConfig]] = {
    "generator": GeneratedPairsConfig,
    "file": FilePairsConfig,
}

variants("prompts", PROMPTS)
variants("corpus", CORPORA)
variants("pairs", PAIRS)
