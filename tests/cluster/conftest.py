"""One two-node cluster for all tests of this folder that attach or submit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.clusters import RunningCluster, two_node_cluster


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[RunningCluster]:
    with two_node_cluster() as cluster:
        yield cluster
