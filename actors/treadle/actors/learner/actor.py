"""The Ray shell of a learner rank, and the opening of references."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from treadle.actors.calls import once
from treadle.actors.learner import process_group
from treadle.actors.learner.figures import RankReport
from treadle.actors.learner.fresh import ModelShape, random_model
from treadle.actors.learner.heartbeat import IDLE
from treadle.actors.learner.rank import LearnerRank
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.errors import BroadcastError, DeadlineError
from treadle.platform.failpoints import failpoint
from treadle.platform.memory import kernel_kills
from treadle.platform.packed import unpacked
from treadle.platform.processes import keep_freed_memory
from treadle.platform.records import Group, Json, Offered, Ref, Share, TrainSample, WeightManifest
from treadle.platform.rollcall import enlist
from treadle.platform.stacks import places, stacks


class Offering(Protocol):
    """Packs the full weights and makes them fetchable (the broadcast's `Outgoing`). Equal ones do the same; the one
    that is held on to remembers what it offered."""

    def offer(self, state: Iterable[tuple[str, Tensor]], step: int, bases: Collection[str]) -> Offered: ...

    def dense(self, step: int) -> tuple[WeightManifest, Ref]: ...


class RefResolver:
    """Opens references through the object store within a deadline; other groups came with the call."""

    def __init__(self, rank: int, deadline_s: float) -> None:
        self._rank = rank
        self._deadline_s = deadline_s

    def __call__(self, refs: Sequence[Ref]) -> list[Group]:
        remote = [ref for ref in refs if isinstance(ref, ray.ObjectRef)]
        try:
            opened = iter(ray.get(remote, timeout=self._deadline_s))
        except GetTimeoutError as error:
            raise DeadlineError(
                f"learner rank {self._rank}: {len(remote)} groups did not arrive in {self._deadline_s:g} s.",
                "Look for a rollout worker that died while its groups were in use.",
            ) from error
        return [next(opened) if isinstance(ref, ray.ObjectRef) else unpacked(ref) for ref in refs]


@ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1, "weights": 1})
class LearnerRankActor:
    """See `LearnerRank`. Never restarted or retried by Ray: a half-made step must not be made again (`once`).

    Work runs on one thread; `phase` answers on another while work hangs, and published weights are handed out on a
    third while the next step is being made.
    """

    def __init__(self, rank: int, ranks: int, step_deadline_s: float) -> None:
        enlist(f"learner-{rank}")
        keep_freed_memory()
        self._rank = rank
        self._ranks = ranks
        self._deadline_s = step_deadline_s
        self._learner = LearnerRank(rank, RefResolver(rank, step_deadline_s))
        self._store: TCPStore | None = None
        self._outgoing: Offering | None = None

    @once
    def open(self, deadline_s: float) -> tuple[str, int]:
        """Rank 0 only: opens the rendezvous; returns its host and port."""
        host = ray.util.get_node_ip_address()
        self._store = process_group.open_store(host, self._ranks, deadline_s)
        return host, self._store.port

    @once
    def join(self, host: str, port: int) -> None:
        self._learner.phase = "joining the process group"
        process_group.join(self._rank, self._ranks, host, port, self._deadline_s, self._store)
        self._learner.phase = "idle"

    @once
    def make_model(self, shape: ModelShape, target: str, seed: int) -> None:
        random_model(shape, target, seed)

    @once
    def setup(self, spec: LearnerSpec) -> int:
        return self._learner.setup(spec)

    @once
    def step(self, row: Sequence[Share | TrainSample], step: int, temperature: float) -> RankReport:
        return self._learner.step(row, step, temperature)

    @once
    def logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        return self._learner.logprobs(sequences)

    @once
    def publish(self, step: int, outgoing: Offering, bases: Collection[str]) -> Offered | None:
        """Gathers the full weights with the other ranks; rank 0 offers them. `bases` are the digests that engines
        hold, "" for none."""
        self._learner.phase = f"publishing version {step}"
        failpoint("learner.before_publish", str(self._rank))
        state = self._learner.full_state()
        offered = None
        if self._rank == 0:
            if self._outgoing != outgoing:
                self._outgoing = outgoing
            offered = self._outgoing.offer(state, step, bases)
        else:
            for _ in state:
                pass
        self._learner.phase = "idle"
        return offered

    @ray.method(concurrency_group="weights")
    def dense(self, step: int) -> tuple[WeightManifest, Ref]:
        """Offers all of version `step`, which this rank published last as deltas. Raises `BroadcastError`."""
        if self._outgoing is None:
            raise BroadcastError(
                f"learner rank {self._rank} has published nothing, version {step} is asked for.",
                "Publish again from the living learner.",
            )
        return self._outgoing.dense(step)

    @once
    def save(self, folder: str, extra: Mapping[str, Json]) -> None:
        self._learner.save(folder, extra)

    @once
    def load(self, folder: str) -> Mapping[str, Json]:
        return self._learner.load(folder)

    @once
    def export_hf(self, folder: str) -> None:
        self._learner.export_hf(folder)

    @ray.method(concurrency_group="health")
    def phase(self) -> str:
        """What the rank is doing right now, in which function, and on which machine."""
        place = "" if self._learner.phase == IDLE else f" {places()}"
        return f"{self._learner.phase}{place} ({socket.gethostname()}, process {os.getpid()})"

    @ray.method(concurrency_group="health")
    def kernel_kills(self) -> tuple[str, int]:
        """The rank's node, and what the kernel has ended there for want of memory."""
        return ray.get_runtime_context().get_node_id(), kernel_kills()

    @ray.method(concurrency_group="health")
    def stacks(self) -> str:
        return stacks()

    @ray.method(concurrency_group="health")
    def memory_bytes(self) -> int:
        """Peak device memory, 0 on a CPU."""
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else 0
