from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.actors.learner.ranks import Ranks, tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def two_ranks(one_rank: Ranks) -> Iterator[Ranks]:
    """Depends on `one_rank` so that all processes import their libraries at the same time."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()
