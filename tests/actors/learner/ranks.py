"""Real learner ranks in processes of their own, without Ray, shared by a test session: spawning is what costs."""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treadle.platform.records import StepBatch, StepReport, TrainSample

VOCAB = 40
ANSWER_S = 280


def tiny_model(folder: Path, *, kind: str = "qwen2", seed: int = 0, **changes: Any) -> str:
    """A random Hugging Face model of about 60k parameters on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | changes))
    with torch.no_grad():  # biases start at zero, where a missing one would go unnoticed
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def drawn_samples(
    count: int, *, seed: int = 0, longest: int = 24, behaviour: bool = True
) -> list[TrainSample]:
    """Samples of varied length, three to a prompt of 2 to 4 tokens; the weights are 1 over all drawn tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, longest + 1, count)
    prompts = [rng.integers(0, VOCAB, size).astype(np.int32) for size in rng.integers(2, 5, -(-count // 3))]
    drawn = int(lengths.sum()) - sum(len(prompts[i // 3]) for i in range(count))
    return [
        _drawn_sample(rng, int(n), prompts[i // 3], 1.0 / drawn, behaviour) for i, n in enumerate(lengths)
    ]


def _drawn_sample(
    rng: np.random.Generator, length: int, prompt: NDArray[np.int32], weight: float, behaviour: bool
) -> TrainSample:
    mask = np.arange(length) >= len(prompt)
    completion = rng.integers(0, VOCAB, length - len(prompt)).astype(np.int32)
    return TrainSample(
        token_ids=np.concatenate([prompt, completion]),
        loss_mask=mask,
        advantages=np.full(length, rng.normal(), dtype=np.float32),
        weights=np.full(length, weight, dtype=np.float32),
        behaviour_logprobs=(rng.normal(-3.0, 0.3, length) * mask).astype(np.float32) if behaviour else None,
    )


def deal(samples: Sequence[TrainSample], ranks: int, step: int = 0) -> StepBatch:
    return StepBatch(step=step, rows=tuple(tuple(samples[r::ranks]) for r in range(ranks)))


@dataclass(frozen=True)
class Full:
    """Whole state of a trainer, by parameter name."""

    weights: Mapping[str, NDArray[np.float32]]
    masters: Mapping[str, NDArray[np.float32]]
    exp_avg: Mapping[str, NDArray[np.float32]]
    exp_avg_sq: Mapping[str, NDArray[np.float32]]
    updates: int

    def equals(self, other: Full) -> bool:
        """Bit for bit."""
        return self.updates == other.updates and all(
            np.array_equal(ours[name].view(np.int32), theirs[name].view(np.int32))
            for ours, theirs in (
                (self.weights, other.weights),
                (self.masters, other.masters),
                (self.exp_avg, other.exp_avg),
                (self.exp_avg_sq, other.exp_avg_sq),
            )
            for name in ours
        )


def largest_difference(
    ours: Mapping[str, NDArray[np.float32]], theirs: Mapping[str, NDArray[np.float32]]
) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


class Host:
    """What runs in a rank's process: a `LearnerRank` and a look into its state."""

    def __init__(self, rank: int) -> None:
        from treadle.actors.learner.rank import LearnerRank

        self.learner = LearnerRank(rank, list)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.learner, method)(*args)

    def full(self) -> Full:
        backend = self.learner._stage.backend
        states = dict(backend.master_state())
        return Full(
            weights={name: tensor.float().numpy().copy() for name, tensor in backend.full_state()},
            masters={name: s.weight.numpy().copy() for name, s in states.items()},
            exp_avg={name: s.exp_avg.numpy().copy() for name, s in states.items()},
            exp_avg_sq={name: s.exp_avg_sq.numpy().copy() for name, s in states.items()},
            updates=backend.updates,
        )

    def apply(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.learner, *args)


def _serve(rank: int, ranks: int, store: str, pipe: Connection) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = "1"  # unused: the group is up before DeepSpeed looks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    host = Host(rank)
    while (order := pipe.recv()) is not None:
        method, args = order
        try:
            pipe.send((True, getattr(host, method)(*args)))
        except Exception as error:  # noqa: BLE001  carried to the test
            pipe.send((False, (error, traceback.format_exc())))


class Ranks:
    """A process group of `n` ranks that tests drive like a `LearnerGroup`, but synchronously."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._folder = tempfile.mkdtemp(prefix="treadle-store-")
        store = f"{self._folder}/store"
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        self._late = ""
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, n, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def each(self, method: str, *args: Any, rows: Sequence[Any] | None = None) -> list[Any]:
        """Runs a `Host` method on all ranks; `rows` gives each its own first argument after `args[0]`."""
        for rank, pipe in enumerate(self._pipes):
            own = args if rows is None else (args[0], rows[rank], *args[1:])
            pipe.send((method, own))
        answers = []
        assert not self._late, self._late  # answers of an earlier order would be taken for this one's
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(ANSWER_S):
                self._late = f"rank {rank} did not answer {method} {args[:1]} in {ANSWER_S} s"
                raise TimeoutError(self._late)
            answers.append(pipe.recv())
        for good, value in answers:
            if not good:
                raise value[0] from RuntimeError(value[1])
        return [value for _, value in answers]

    def call(self, method: str, *args: Any) -> list[Any]:
        return self.each("call", method, *args)

    def step(self, batch: StepBatch) -> StepReport:
        from treadle.actors.learner.figures import merge

        reports = self.each("call", "step", batch.step, batch.temperature, rows=batch.rows)
        return merge(batch.step, reports, 1.0)

    def full(self) -> Full:
        """Rank 0's view, after checking that all ranks agree on the weights."""
        views: list[Full] = self.each("full")
        assert all(views[0].equals(view) for view in views[1:])
        return views[0]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
