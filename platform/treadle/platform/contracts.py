"""What the roles promise each other. One test suite per Protocol in `tests/contracts/`, run against every
implementation, the fakes included.

Calls that wait are `async` and have a deadline set when the implementation is built; a passed deadline raises
`DeadlineError` naming the role, the phase and the ids. Workflows know these Protocols and never import ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treadle.platform.records import (
    Drawn,
    Issue,
    Json,
    Prompt,
    PublishReport,
    Sample,
    StepBatch,
    StepReport,
    Verdict,
    WeightManifest,
    WeightVersion,
)

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Prompts(Protocol):
    """An endless, deterministic order of prompts. The cursor is the index: the same index gives the same
    prompt in every process and after every resume."""

    def at(self, index: int) -> Prompt: ...

    def __len__(self) -> int:
        """Distinct prompts in one epoch."""
        ...


@runtime_checkable
class Rollouts(Protocol):
    """Draws groups. The same issue gives the same samples whichever worker takes it and whatever else is
    being drawn, as long as the weights are the same."""

    async def draw(self, issue: Issue) -> Drawn: ...


@runtime_checkable
class Scorer(Protocol):
    """Anything that holds a policy and can be asked what it thinks: the rollout pool and the learner. The two
    answers on the same sequences are compared after a publication (the probe)."""

    async def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> Mapping[str, NDArray[np.float32]]:
        """`{holder's name: values}`: for every sequence of T tokens the T-1 log-probabilities of token t given
        those before it, at temperature 1, all sequences concatenated."""
        ...


@runtime_checkable
class Verifiers(Protocol):
    """Judges completions. A broken or slow verifier gives `failed` or `timed_out` verdicts, never a zero."""

    async def judge(self, drawn: Drawn) -> tuple[Verdict, ...]:
        """One verdict per sample, in sample order."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Owns the trained weights. A step either happens on all ranks or not at all."""

    async def step(self, batch: StepBatch) -> StepReport: ...

    async def save(self, folder: str, extra: Mapping[str, Json]) -> None:
        """Writes weights, optimizer and schedule under `folder` (fsspec URL) so that any backend, ZeRO stage
        or number of ranks can load them; commits nothing (the checkpoint's marker does)."""
        ...

    async def load(self, folder: str) -> None: ...


@runtime_checkable
class Broadcast(Protocol):
    """Carries the learner's weights to the engines, two-phase: every digest matches, then the flip."""

    async def publish(self, step: int) -> PublishReport: ...


@runtime_checkable
class Tracker(Protocol):
    """Where figures and traces go. Never blocks a step and never raises into one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, fields: Mapping[str, Json]) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class Engine(Protocol):
    """Inside a rollout worker: draws with one set of weights. Driven by one thread.

    consumes: admitted issues; waits for: nothing; unblocked by: `step` being called;
    produces: finished samples, in the order they finish.
    """

    def admit(self, issue: Issue) -> None:
        """Queues all samples of a group; raises `DataError` naming the prompt when it cannot fit."""
        ...

    def step(self) -> list[EngineSample]:
        """Draws one token for every active row; returns rows that finished. Empty and `idle` when no work."""
        ...

    @property
    def idle(self) -> bool: ...

    def adopt(self, version: WeightVersion, tensors: Iterator[tuple[str, torch.Tensor]]) -> str:
        """Replaces the weights between two steps and returns the digest recomputed from what the engine now
        holds. Unfinished rows go on by prefix: their KV cache is rebuilt with the new weights."""
        ...

    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]: ...


class EngineSample(Protocol):
    """A finished row: `Sample` plus the id of its issue and its decoded completion."""

    @property
    def issue_id(self) -> str: ...

    @property
    def sample(self) -> Sample: ...

    @property
    def text(self) -> str: ...


@runtime_checkable
class Verifier(Protocol):
    """Pure scoring of one completion, inside a killable process. May be slow, may crash; the pool copes.

    Optional attributes: `deterministic = True` lets equal completions share a verdict; `logged_parts` names parts
    that need no weight."""

    name: str
    version: str

    def score(self, completion: str, payload: Mapping[str, Json]) -> tuple[tuple[str, float], ...]:
        """Named reward parts, to be summed with the run's weights. Raises to say "failed" (not "wrong")."""
        ...


@runtime_checkable
class Transport(Protocol):
    """Moves a version's buckets from one learner process to many engines."""

    def send(self, manifest: WeightManifest, buckets: Sequence[NDArray[np.uint8]]) -> object:
        """Returns a small ticket that `receive` opens in another process."""
        ...

    def receive(self, ticket: object, deadline_s: float) -> list[NDArray[np.uint8]]: ...


@runtime_checkable
class LearnerBackend(Protocol):
    """One rank's model and optimizer. DeepSpeed is one, plain torch the other and the oracle.

    Calls happen in the same order on every rank; `backward` may be called a different number of times per
    step but equally often on all ranks.
    """

    model: torch.nn.Module  # called as model(PackedBatch) -> PolicyOutput

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates gradients of a *summed* loss (no averaging over ranks or micro-batches)."""
        ...

    def apply(self, step: int) -> float:
        """Reduces over ranks, clips, updates with the scheduled learning rate, zeroes the gradients.
        Returns the global gradient norm before clipping; a non-finite norm leaves the weights unchanged."""
        ...

    def full_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full fp32 (or model dtype) weights by Hugging Face name, on CPU, on every rank."""
        ...


__all__ = [
    "Broadcast",
    "Engine",
    "EngineSample",
    "Learner",
    "LearnerBackend",
    "Prompts",
    "Rollouts",
    "Scorer",
    "Tracker",
    "Transport",
    "Verifier",
    "Verifiers",
]
