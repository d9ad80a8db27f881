"""Everything that crosses a process, as frozen records.

Letters used in shapes: P prompt tokens, T tokens of a whole sequence (prompt and completion), G samples in a
group, R data-parallel ranks. Arrays are numpy, contiguous and treated as read-only.
A record is complete when made; a later stage makes a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Ref: TypeAlias = Any
"""An opaque handle: a reference into the object store, or a small record itself, `packed.Packed` where it has
parts. Workflows pass it on and never open it."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class WeightVersion:
    """Which weights: the number of optimizer steps behind them, and their digest.

    Example: `WeightVersion(step=12, digest="9f…")` are the weights after twelve steps of this stage.
    The digest is empty only where weights have not been published yet.
    """

    step: int
    digest: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task for the policy.

    Example: `Prompt(id="addition-47+85", text="47+85=", token_ids=[P] int32, verifier="exact",
    payload={"answer": "132"})`. The policy sees `token_ids`, never `payload`.
    """

    id: str
    text: str
    token_ids: NDArray[np.int32]  # [P]
    verifier: str
    payload: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How samples are drawn. `seed` is the run's; each sample derives its own from
    (seed, prompt id, sample index, version). `temperature=0` is greedy. `stop` are strings after which a
    row ends, besides EOS."""

    temperature: float
    top_p: float
    max_new_tokens: int
    group_size: int
    seed: int
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"Sampling: temperature={self.temperature} must be >= 0, top_p={self.top_p} in (0, 1]"
            )
        if self.group_size < 1 or self.max_new_tokens < 1:
            raise ValueError("Sampling: group_size and max_new_tokens must be at least 1")


class StopReason(StrEnum):
    EOS = "eos"
    TAG = "tag"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One drawn sequence. There is no prompt/completion split: `loss_mask` marks the tokens that the policy
    drew, so that several turns are the same record.

    Example: prompt of 6 tokens, 20 drawn: T=26, loss_mask = 6 × False, 20 × True. `logprobs[t]` is the
    engine's log-probability of `token_ids[t]` given all before it, at the sampling temperature; 0 where the
    mask is False. `oldest`/`newest` are the versions the first and the last token were drawn with.
    """

    index: int
    token_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T]
    logprobs: NDArray[np.float32]  # [T]
    oldest: WeightVersion
    newest: WeightVersion
    stop: StopReason

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if len(self.loss_mask) != n or len(self.logprobs) != n:
            raise ValueError(
                f"Sample {self.index}: token_ids has {n} tokens, loss_mask {len(self.loss_mask)}, "
                f"logprobs {len(self.logprobs)}; all three must be [T]"
            )

    @property
    def drawn_tokens(self) -> int:
        """Tokens the policy drew."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G samples of one prompt. `id` is the ledger's key."""

    id: str
    prompt: Prompt
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """An order to draw one group. `id` (stage and running number) is unique within a run and is the ledger's
    key; `version` is the newest published version at issue time and enters the seeds."""

    id: str
    prompt: Prompt
    sampling: Sampling
    version: WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What the driver learns of a drawn group: sizes and references, no token arrays.

    `group` refers to the `Group`, `texts` to `tuple[str, ...]` (completions decoded with special tokens
    kept, in sample order). Field lengths are G.
    """

    id: str
    prompt: Prompt
    group: Ref
    texts: Ref
    lengths: tuple[int, ...]  # drawn tokens per sample
    stops: tuple[StopReason, ...]
    oldest: WeightVersion  # the oldest over all samples
    newest: WeightVersion
    worker: str
    wall_s: float


class VerdictStatus(StrEnum):
    SCORED = "scored"
    FAILED = "failed"  # the verifier broke; says nothing about the sample
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement of one sample. `reward` counts only when `status` is scored; otherwise it is NaN so that
    no arithmetic can mistake it for a zero. `parts` are as the verifiers gave them; the reward is their weighted sum.

    Example: `Verdict(status=SCORED, reward=1.1, parts=(("accuracy", 1.0), ("format", 1.0)), wall_s=0.002,
    detail="", verifier="exact/1")`.
    """

    status: VerdictStatus
    reward: float
    parts: tuple[tuple[str, float], ...]
    wall_s: float
    detail: str
    verifier: str

    def __post_init__(self) -> None:
        if (self.status is VerdictStatus.SCORED) == bool(np.isnan(self.reward)):
            raise ValueError(f"Verdict {self.verifier}: status {self.status} with reward {self.reward}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What one sample contributes: every drawn token gets `advantage`, and its loss counts `weight` times in
    the step's sum. Weights already hold the step's one global denominator, so the learner only adds up."""

    sample_index: int
    advantage: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A rank's part of one group: the reference and which of its samples, with their credit."""

    group_id: str
    group: Ref
    credits: tuple[Credit, ...]
    tokens: int  # whole sequences, for balancing


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSample:
    """One sequence as the learner sees it: masks, advantages, weights; no algorithm's name.

    Example (SFT): advantages all 1, weights 1/(target tokens of the step): the summed loss is the mean
    cross-entropy. `behaviour_logprobs` are the engine's, or None where nothing was drawn.
    """

    token_ids: NDArray[np.int32]  # [T]
    loss_mask: NDArray[np.bool_]  # [T], True where token t is a target (never t=0)
    advantages: NDArray[np.float32]  # [T]
    weights: NDArray[np.float32]  # [T]
    behaviour_logprobs: NDArray[np.float32] | None  # [T]

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        sizes = {len(self.loss_mask), len(self.advantages), len(self.weights)}
        if self.behaviour_logprobs is not None:
            sizes.add(len(self.behaviour_logprobs))
        if sizes != {n}:
            raise ValueError(f"TrainSample: token_ids has {n} tokens but another field has {sizes - {n}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One optimizer step's work, dealt to R ranks. A row's members are `Share`s (drawn groups) or
    `TrainSample`s (supervised data). `temperature` is the one the samples were drawn with (1 for SFT)."""

    step: int  # makes version step+1
    rows: tuple[tuple[Share | TrainSample, ...], ...]  # [R][members]
    temperature: float = 1.0

    @property
    def group_ids(self) -> tuple[str, ...]:
        """Ids of the drawn groups, each once, in dealt order."""
        return tuple(dict.fromkeys(m.group_id for row in self.rows for m in row if isinstance(m, Share)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What a step did. `skipped` names the guard that refused the update (weights unchanged), or is empty.
    `metrics` are plain floats under the names of `metric_names`."""

    step: int
    version: WeightVersion  # digest is filled when the version is published
    metrics: Mapping[str, float]
    tokens: int
    wall_s: float
    skipped: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where a tensor lies in the published buckets."""

    name: str
    dtype: str  # torch's name without the prefix, e.g. "bfloat16"
    shape: tuple[int, ...]
    bucket: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """A published version: its digest, its tensors, and the size and CRC-32 of each bucket.

    With a `base` the buckets hold, end to end, what leads from those weights to this version; `tensors` is then
    empty, since they are the base's. `as_base` tells an engine to keep this version's bytes beside the weights in
    use, because such a delta may follow.
    """

    version: WeightVersion
    tensors: tuple[TensorEntry, ...]
    bucket_bytes: tuple[int, ...]
    bucket_crc32: tuple[int, ...]
    base: WeightVersion | None = None
    as_base: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(self.bucket_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """What the rank that packed a version offers. `dense` describes the whole version, `ways` lead to it: pairs of
    manifest and ticket, at most one of them dense and at most one per base. `metrics` are plain floats under the
    names of `metric_names`.

    Example: engines hold versions 6 and 7 when version 8 is published; `ways` are a delta from each.
    """

    dense: WeightManifest
    ways: tuple[tuple[WeightManifest, Ref], ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """An engine's answer to a version that it staged: the digest of what lies beside the weights in use, recomputed;
    seconds until the bytes were there and checked; seconds until the version was built from them and digested."""

    digest: str
    wire_s: float
    apply_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """Outcome of a publication. `behind` names engines left at an older version; they catch up later."""

    version: WeightVersion
    adopted: tuple[str, ...]
    behind: tuple[str, ...]
    sent_bytes: int
    wall_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRef:
    """A committed checkpoint: where, after which step of which stage."""

    url: str
    stage: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the work of a process has ended. `kind` is the name of the error that ended it, empty for a good end.

    Example: `Outcome(kind="LearnerError", message="rank 1 died.", remedy="Resume the run.", exit_code=1)`.
    """

    kind: str = ""
    message: str = ""
    remedy: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """What a role needs from the cluster: `count` actors, each with these resources. `labels` are Ray label
    selectors (`{"ray.io/node-group": "rollout"}`), `accelerator` a Ray accelerator type or empty."""

    role: str
    count: int
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    accelerator: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
