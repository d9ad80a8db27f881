"""Evaluation: accuracy on held-out prompts, greedy and sampled, with pass@k and a confidence interval."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from treadle.platform.contracts import Prompts, Rollouts, Verifiers
from treadle.platform.errors import ConfigError, VerifierError
from treadle.platform.records import Issue, Sampling, Verdict, VerdictStatus, WeightVersion

ACCURACY_PART = "accuracy"


@dataclass(frozen=True)
class EvaluateConfig:
    """How a model is evaluated. Accuracy is the verifier's accuracy part, without format or length terms."""

    prompts: int = 256
    """Held-out prompts, the first of the split in its fixed order."""
    samples: int = 1
    """Sampled completions per prompt; pass@k is reported for every power of two up to it."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    greedy: bool = True
    """Also one greedy completion per prompt."""

    def check(self, where: str) -> None:
        if self.prompts < 1 or self.samples < 1:
            raise ConfigError(
                f"{where}: prompts={self.prompts} and samples={self.samples} must be at least 1."
            )
        if self.temperature <= 0:
            raise ConfigError(
                f"{where}.temperature={self.temperature} cannot sample.",
                "Use a value above 0; greedy is a switch of its own.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """`sampled` is pass@1: the mean over prompts of the share of correct samples; `ci95` its 95 % half-width
    (normal approximation over prompts, which are the independent units); `pass_at_k` the unbiased estimator of
    Chen et al. 2021 (2107.03374, eq. 1). `unscored` samples (failed, timed out) are left out of every mean."""

    sampled: float
    greedy: float | None
    n: int
    samples: int
    ci95: float
    pass_at_k: tuple[tuple[int, float], ...]
    unscored: int
    mean_length: float

    def line(self) -> str:
        """The figures in one line for people."""
        greedy = "" if self.greedy is None else f"  greedy {self.greedy:.3f}"
        powers = "".join(f"  pass@{k} {value:.3f}" for k, value in self.pass_at_k if k > 1)
        unscored = f"  unscored {self.unscored}" if self.unscored else ""
        return f"sampled {self.sampled:.3f} ± {self.ci95:.3f}{greedy}{powers}  n {self.n}{unscored}"

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"pass_at_k": {str(k): value for k, value in self.pass_at_k}}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples drawn without replacement from n is correct:
    1 - C(n-c, k)/C(n, k) (2107.03374, eq. 1)."""
    if n - correct < k:
        return 1.0
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


async def evaluate(
    rollouts: Rollouts,
    verifiers: Verifiers,
    prompts: Prompts,
    config: EvaluateConfig,
    *,
    label: str,
    seed: int,
    version: WeightVersion,
) -> EvalReport:
    """Draws and judges. Raises `VerifierError` if not a single sample could be judged."""
    count = min(config.prompts, len(prompts))

    async def judged(mode: str, sampling: Sampling) -> list[tuple[tuple[Verdict, ...], tuple[int, ...]]]:
        async def one(index: int) -> tuple[tuple[Verdict, ...], tuple[int, ...]]:
            issue = Issue(
                id=f"{label}/{mode}/{index:08d}", prompt=prompts.at(index), sampling=sampling, version=version
            )
            drawn = await rollouts.draw(issue)
            return tuple(await verifiers.judge(drawn)), drawn.lengths

        return list(await asyncio.gather(*(one(i) for i in range(count))))

    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        group_size=config.samples,
        seed=seed,
    )
    sampled = await judged("sampled", sampling)
    greedy = None
    if config.greedy:
        once = Sampling(
            temperature=0.0, top_p=1.0, max_new_tokens=config.max_new_tokens, group_size=1, seed=seed
        )
        marks = [mark for verdicts, _ in await judged("greedy", once) for mark in correctness(verdicts)]
        greedy = sum(marks) / len(marks) if marks else None
    return _report([correctness(v) for v, _ in sampled], greedy, config, [n for _, ls in sampled for n in ls])


def correctness(verdicts: Sequence[Verdict]) -> list[bool]:
    """Whether each scored sample is right, by its accuracy part (by its reward where it has no parts)."""
    marks = []
    for verdict in verdicts:
        if verdict.status is VerdictStatus.SCORED:
            marks.append(dict(verdict.parts).get(ACCURACY_PART, verdict.reward) >= 1.0)
    return marks


def _report(
    marks: Sequence[Sequence[bool]], greedy: float | None, config: EvaluateConfig, lengths: Sequence[int]
) -> EvalReport:
    judged = [row for row in marks if row]
    if not judged:
        raise VerifierError(
            f"verify/evaluate: none of {len(marks)} prompts got a verdict.",
            "Look at the verifier's log in the run folder.",
        )
    means = [sum(row) / len(row) for row in judged]
    mean = sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / max(1, len(means) - 1)
    powers = [2**i for i in range(config.samples.bit_length()) if 2**i <= config.samples]
    return EvalReport(
        sampled=mean,
        greedy=greedy,
        n=len(judged),
        samples=config.samples,
        ci95=1.96 * math.sqrt(variance / len(means)),
        pass_at_k=tuple(
            (k, sum(pass_at_k(len(r), sum(r), min(k, len(r))) for r in judged) / len(judged)) for k in powers
        ),
        unscored=sum(config.samples - len(row) for row in marks),
        mean_length=sum(lengths) / max(1, len(lengths)),
    )
