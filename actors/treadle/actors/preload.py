"""What role processes import before they do anything; names for `cluster.warm_start`. None of it imports ray."""

from __future__ import annotations

from treadle.actors.learner.config import GroupConfig
from treadle.actors.rollout.config import RolloutConfig

_ALWAYS = (
    "treadle.actors.verify.pool",
    "treadle.actors.broadcast.coordinator",
    "treadle.actors.broadcast.probe",
)
_LEARNER = (
    "treadle.actors.learner.imports:import_transformers",
    "treadle.actors.learner.rank",
    "treadle.actors.learner.fresh",
)
_BACKENDS = {
    "deepspeed": (
        "treadle.actors.learner.deepspeed_backend:import_deepspeed",
        "treadle.actors.learner.zero_state",
    ),
    "torch": ("treadle.actors.learner.torch_backend",),
}
_ENGINES = {"torch": ("treadle.actors.rollout.worker", "treadle.actors.rollout.torch_engine")}
"""vLLM is not here: it sets its process up (threads, allocator, platform) before it imports torch."""


def preload(rollout: RolloutConfig, learner: GroupConfig | None = None) -> tuple[str, ...]:
    """Modules, and functions as "module:function", that the roles' processes need. Nothing where an engine must
    import for itself."""
    if rollout.engine not in _ENGINES:
        return ()
    names = (*_ALWAYS, *_ENGINES[rollout.engine])
    return names if learner is None else (*_LEARNER, *_BACKENDS[learner.backend], *names)
