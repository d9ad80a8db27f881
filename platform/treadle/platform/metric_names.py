"""The names of all figures, each once, with its meaning and unit.

Names are `family/figure`. Where the field agrees on a name it is used as it is; names that verl or TRL give
to the same quantity can be added with `with_aliases`, so that boards made for them go on working. An alias
exists only where the quantity is the same: verl's `perf/throughput`, say, is per GPU and therefore has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from treadle.platform.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure: `unit` is `1` for pure numbers, `fraction` for 0…1.

    Example: `Metric(name="response_length/mean", meaning="drawn tokens per sample", unit="tokens")`.
    """

    name: str
    meaning: str
    unit: str


CATALOGUE: dict[str, Metric] = {}
"""All fixed names. `reward/part/<name>`, `timing_s/<role>` and `weights_lag/<engine>` may have further members."""


def _metric(name: str, meaning: str, unit: str) -> str:
    CATALOGUE[name] = Metric(name=name, meaning=meaning, unit=unit)
    return name


REWARD_MEAN = _metric("reward/mean", "mean reward of the scored samples", "1")
REWARD_STD = _metric("reward/std", "standard deviation of the reward over the scored samples", "1")
REWARD_MIN = _metric("reward/min", "smallest reward of a scored sample", "1")
REWARD_MAX = _metric("reward/max", "largest reward of a scored sample", "1")
REWARD_PART_PREFIX = "reward/part/"

ACCURACY_SAMPLED = _metric(
    "accuracy/sampled", "correct share of the completions drawn at the training temperature", "fraction"
)
ACCURACY_GREEDY = _metric("accuracy/greedy", "correct share of the held-out prompts, greedy", "fraction")
ACCURACY_HELDOUT = _metric(
    "accuracy/heldout_sampled", "correct share of held-out prompts, sampled, between steps", "fraction"
)

RESPONSE_LENGTH_MEAN = _metric("response_length/mean", "drawn tokens per sample, mean", "tokens")
RESPONSE_LENGTH_MAX = _metric("response_length/max", "drawn tokens of the longest sample", "tokens")
RESPONSE_LENGTH_MIN = _metric("response_length/min", "drawn tokens of the shortest sample", "tokens")
RESPONSE_LENGTH_CLIP_RATIO = _metric(
    "response_length/clip_ratio", "share of samples that ended by length", "fraction"
)
PROMPT_LENGTH_MEAN = _metric("prompt_length/mean", "tokens per prompt, mean", "tokens")

POLICY_LOSS = _metric("policy/loss", "the step's loss with its one global denominator", "1")
POLICY_ENTROPY = _metric("policy/entropy", "entropy of the policy per drawn token", "nats")
POLICY_KL = _metric("policy/kl", "KL divergence from the reference policy per drawn token", "nats")
POLICY_CLIP_FRACTION = _metric(
    "policy/clip_fraction", "share of drawn tokens with a clipped ratio", "fraction"
)
POLICY_GRAD_NORM = _metric("policy/grad_norm", "global gradient norm before clipping", "1")
POLICY_LR = _metric("policy/lr", "learning rate of the step", "1")

MISMATCH_KL = _metric(
    "mismatch/kl", "KL divergence between engine and learner on the same tokens, mean per token", "nats"
)
MISMATCH_MAX = _metric(
    "mismatch/max", "largest difference of a token's log-probability, engine against learner", "nats"
)
STALENESS_MEAN = _metric("staleness/mean", "versions between drawing and training, mean", "steps")
STALENESS_MAX = _metric("staleness/max", "versions between drawing and training, largest", "steps")

GROUPS_ZERO_STD = _metric("groups/zero_std", "share of groups whose rewards are all equal", "fraction")
SAMPLES_FAILED = _metric("samples/failed", "samples whose verifier broke", "samples")
SAMPLES_TIMED_OUT = _metric("samples/timed_out", "samples whose verifier passed its deadline", "samples")
SAMPLES_DROPPED = _metric("samples/dropped", "samples dropped otherwise (stale, no signal)", "samples")
SAMPLES_TRAINED = _metric("samples/trained", "samples that entered the step", "samples")

PERF_TOKENS_PER_S = _metric("perf/tokens_per_s", "trained tokens over the wall time of the step", "tokens/s")
PERF_DRAWN_TOKENS_PER_S = _metric(
    "perf/drawn_tokens_per_s", "drawn tokens over the time of generation", "tokens/s"
)
PERF_TOKENS = _metric("perf/tokens", "tokens in the step's sequences", "tokens")

TIMING_PREFIX = "timing_s/"
TIMING_GENERATE = _metric("timing_s/generate", "drawing the step's groups", "s")
TIMING_VERIFY = _metric("timing_s/verify", "judging the step's samples", "s")
VERIFY_P50 = _metric("verify/p50_s", "judging a sample of the step, median", "s")
VERIFY_P95 = _metric("verify/p95_s", "judging a sample of the step, 95th percentile", "s")
VERIFY_P99 = _metric("verify/p99_s", "judging a sample of the step, 99th percentile", "s")
VERIFY_CACHED = _metric("verify/cached", "samples whose verdict was known from an equal one", "fraction")
TIMING_WAIT = _metric("timing_s/wait", "learner idle until a batch was ready", "s")
TIMING_LEARN = _metric("timing_s/learn", "the learner's step", "s")
TIMING_PUBLISH = _metric("timing_s/publish", "publishing the new version to the engines", "s")
TIMING_CHECKPOINT = _metric("timing_s/checkpoint", "writing a checkpoint", "s")
TIMING_EVALUATE = _metric("timing_s/evaluate", "evaluating on held-out prompts", "s")
TIMING_STEP = _metric("timing_s/step", "the whole step", "s")

MIRROR_NEWEST_STEP = _metric("mirror/newest_step", "the stage's step of the newest mirrored commit", "steps")
MIRROR_LAG_STEPS = _metric(
    "mirror/lag_steps", "steps between the newest commit and the newest mirrored one", "steps"
)
MIRROR_LAG_S = _metric("mirror/lag_s", "waiting time of the oldest commit that is newer than the mirror", "s")
MIRROR_SKIPPED = _metric("mirror/skipped", "commits that were never copied, since newer ones came", "commits")

WEIGHTS_SENT_BYTES = _metric("weights/sent_bytes", "bytes sent to the engines by the publication", "bytes")
WEIGHTS_BEHIND = _metric("weights/behind", "engines left at an older version", "engines")
WEIGHTS_DENSE_BYTES = _metric(
    "weights/dense_bytes", "bytes that the same engines would have fetched without deltas", "bytes"
)
WEIGHTS_BY_DELTA = _metric("weights/by_delta", "engines that took the version as a delta", "engines")
WEIGHTS_REFUSED = _metric(
    "weights/refused", "fetches refused: damaged, cut short, from other weights, not written", "fetches"
)
WEIGHTS_GATHER_S = _metric("weights/gather_s", "collecting the weights from the learner's ranks", "s")
WEIGHTS_ENCODE_S = _metric("weights/encode_s", "comparing with the version before, and encoding", "s")
WEIGHTS_STAGE_S = _metric("weights/stage_s", "until the last engine staged the version or was given up", "s")
WEIGHTS_WIRE_S = _metric("weights/wire_s", "fetching and checking, slowest engine", "s")
WEIGHTS_APPLY_S = _metric("weights/apply_s", "building the version and its digest, slowest engine", "s")
WEIGHTS_FLIP_S = _metric("weights/flip_s", "until the last engine adopted the version", "s")
WEIGHTS_DENSITY = _metric(
    "weights/density", "share of the elements that changed since the version before", "fraction"
)
WEIGHTS_DENSITY_EMBEDDING = _metric("weights/density_embedding", "the same of the embeddings", "fraction")
WEIGHTS_DENSITY_ATTENTION = _metric("weights/density_attention", "the same of the attention", "fraction")
WEIGHTS_DENSITY_MLP = _metric("weights/density_mlp", "the same of the feed-forward layers", "fraction")
WEIGHTS_DENSITY_NORM = _metric("weights/density_norm", "the same of the norms", "fraction")
WEIGHTS_DENSITY_HEAD = _metric("weights/density_head", "the same of the output layer", "fraction")
WEIGHTS_DENSITY_OTHER = _metric("weights/density_other", "the same of all other tensors", "fraction")
WEIGHTS_LAG_PREFIX = "weights_lag/"


def reward_part(part: str) -> str:
    """The name of one reward part's mean, e.g. `reward/part/format`."""
    return REWARD_PART_PREFIX + part


def weights_lag(engine: str) -> str:
    """The name of the steps by which one engine's weights are behind the published ones."""
    return WEIGHTS_LAG_PREFIX + engine


def unit_of(name: str) -> str:
    """The unit of a canonical name, also of members of open families; empty if unknown."""
    if name in CATALOGUE:
        return CATALOGUE[name].unit
    if name.startswith(TIMING_PREFIX):
        return "s"
    if name.startswith(WEIGHTS_LAG_PREFIX):
        return "steps"
    return "1" if name.startswith(REWARD_PART_PREFIX) else ""


_VERL = {
    REWARD_MEAN: ("critic/score/mean", "critic/rewards/mean"),
    REWARD_MIN: ("critic/score/min", "critic/rewards/min"),
    REWARD_MAX: ("critic/score/max", "critic/rewards/max"),
    POLICY_LOSS: ("actor/pg_loss",),
    POLICY_ENTROPY: ("actor/entropy",),
    POLICY_KL: ("actor/kl_loss",),
    POLICY_CLIP_FRACTION: ("actor/pg_clipfrac",),
    POLICY_GRAD_NORM: ("actor/grad_norm",),
    POLICY_LR: ("actor/lr",),
    STALENESS_MEAN: ("training/off_policy/trajectory_staleness/mean",),
    STALENESS_MAX: ("training/off_policy/trajectory_staleness/max",),
    TIMING_GENERATE: ("timing_s/gen",),
    TIMING_VERIFY: ("timing_s/reward",),
    TIMING_LEARN: ("timing_s/update_actor",),
    TIMING_PUBLISH: ("timing_s/update_weights",),
}

_TRL = {
    REWARD_MEAN: ("reward",),
    REWARD_STD: ("reward_std",),
    GROUPS_ZERO_STD: ("frac_reward_zero_std",),
    RESPONSE_LENGTH_MEAN: ("completions/mean_length",),
    RESPONSE_LENGTH_MAX: ("completions/max_length",),
    RESPONSE_LENGTH_MIN: ("completions/min_length",),
    RESPONSE_LENGTH_CLIP_RATIO: ("completions/clipped_ratio",),
    POLICY_LOSS: ("loss",),
    POLICY_ENTROPY: ("entropy",),
    POLICY_KL: ("kl",),
    POLICY_CLIP_FRACTION: ("clip_ratio/region_mean",),
    POLICY_GRAD_NORM: ("grad_norm",),
    POLICY_LR: ("learning_rate",),
    MISMATCH_MAX: ("sampling/sampling_logp_difference/max",),
    TIMING_STEP: ("step_time",),
}

ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {"verl": _VERL, "trl": _TRL}


def check_aliases(tables: Sequence[str], setting: str) -> None:
    """Raises `ConfigError` naming `setting` if a table does not exist."""
    for table in tables:
        if table not in ALIASES:
            raise ConfigError(
                f"{setting}: there are no aliases named {table!r}.",
                f"Choose from {', '.join(sorted(ALIASES))}.",
            )


def with_aliases(metrics: Mapping[str, float], tables: Sequence[str]) -> dict[str, float]:
    """The metrics and, for every table of `ALIASES` named, the same values under that library's names.

    A canonical name is never overwritten. Example: `with_aliases({"reward/mean": 0.5}, ["trl"])` is
    `{"reward/mean": 0.5, "reward": 0.5}`.
    """
    added: dict[str, float] = {}
    for table in tables:
        for name, value in metrics.items():
            for alias in ALIASES[table].get(name, ()):
                added[alias] = value
            if table == "trl" and name.startswith(REWARD_PART_PREFIX):
                added[f"rewards/{name.removeprefix(REWARD_PART_PREFIX)}/mean"] = value
    return {**added, **metrics}
