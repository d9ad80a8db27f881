"""Nodes that have been told to leave: a spot machine that is taken back, a node that is being replaced."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ray._private.state import state
from ray.exceptions import RayError

from treadle.platform.errors import ClusterError


def leaving() -> Mapping[str, float]:
    """The nodes being drained, by id, and in how many seconds each will be gone (infinite where nobody said).

    Asks Ray's head: not for an event loop. Ray has no public function for it; its own Serve and Train ask here.
    Raises `ClusterError` when the head does not answer.
    """
    now_ms = time.time() * 1000
    try:
        draining = state.get_draining_nodes()
    except (RayError, RuntimeError) as error:
        raise ClusterError(f"Ray's head does not say which nodes leave: {error}") from error
    return {
        node: max(0.0, (until_ms - now_ms) / 1000) if until_ms else math.inf
        for node, until_ms in draining.items()
    }
