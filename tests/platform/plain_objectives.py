"""The papers' formulas as loops over prompts, samples and tokens, written without looking at the packed code:
no masks, no weights, no denominators shared between functions. Scalars are 0-d tensors, so that autograd
gives the gradient. A `Case` holds a whole step."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch


@dataclass
class PlainSample:
    reward: float  # NaN: not scored
    truncated: bool
    new: list[torch.Tensor]  # log-probabilities, one 0-d tensor per token
    old: list[float]
    behaviour: list[float]
    ref: list[float]


Case = list[list[PlainSample]]  # [prompt][sample]


def usable(group: list[PlainSample]) -> list[PlainSample]:
    good = [s for s in group if not math.isnan(s.reward)]
    return good if len(good) >= 2 else []


def zscores(values: list[float]) -> list[float]:
    if max(values) == min(values):
        return [0.0 for _ in values]
    return [(v - statistics.fmean(values)) / (statistics.stdev(values) + 1e-4) for v in values]


def centred(values: list[float]) -> list[float]:
    if max(values) == min(values):
        return [0.0 for _ in values]
    return [v - statistics.fmean(values) for v in values]


def ppo_term(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    bounded = min(max(ratio.item(), 1 - low), 1 + high)
    if ratio.item() * advantage <= bounded * advantage:
        return -(ratio * advantage)
    return torch.tensor(-bounded * advantage, dtype=ratio.dtype)


def tis(sample: PlainSample, t: int, cap: float) -> float:
    return min(math.exp(sample.old[t] - sample.behaviour[t]), cap) if cap else 1.0


def schulman(kind: str, new: torch.Tensor, ref: float) -> torch.Tensor:
    ratio = torch.exp(ref - new)
    if kind == "k1":
        return -torch.log(ratio)
    if kind == "k2":
        return torch.log(ratio) ** 2 / 2
    return ratio - torch.log(ratio) - 1


def grpo(case: Case, low: float, high: float, cap: float, beta: float, kl: str) -> torch.Tensor:
    terms = []
    for group in map(usable, case):
        if not group:
            continue
        for sample, advantage in zip(group, zscores([s.reward for s in group]), strict=True):
            inner = []
            for t, new in enumerate(sample.new):
                policy = ppo_term(torch.exp(new - sample.old[t]), advantage, low, high)
                inner.append(tis(sample, t, cap) * policy + beta * schulman(kl, new, sample.ref[t]))
            terms.append(sum(inner) / len(inner))
    return sum(terms) / len(terms) if terms else torch.tensor(0.0)


def dr_grpo(case: Case, low: float, high: float, cap: float, limit: int) -> torch.Tensor:
    total, count = torch.tensor(0.0, dtype=torch.float64), 0
    for group in map(usable, case):
        if not group:
            continue
        for sample, advantage in zip(group, centred([s.reward for s in group]), strict=True):
            count += 1
            for t, new in enumerate(sample.new):
                ratio = torch.exp(new - sample.old[t])
                total = total + tis(sample, t, cap) * ppo_term(ratio, advantage, low, high)
    return total / (count * limit) if count else total


def overlong(length: int, limit: int, buffer: float, factor: float) -> float:
    cache = buffer * limit
    if length <= limit - cache:
        return 0.0
    if length <= limit:
        return factor * ((limit - cache) - length) / cache
    return -factor


def dapo(
    case: Case,
    low: float,
    high: float,
    cap: float,
    limit: int,
    buffer: float,
    factor: float,
    drop_truncated: bool,
) -> torch.Tensor:
    total, tokens = torch.tensor(0.0, dtype=torch.float64), 0
    for group in map(usable, case):
        if not group:
            continue
        rewards = [s.reward + overlong(len(s.new), limit, buffer, factor) for s in group]
        for sample, advantage in zip(group, zscores(rewards), strict=True):
            if drop_truncated and sample.truncated:
                continue
            for t, new in enumerate(sample.new):
                tokens += 1
                ratio = torch.exp(new - sample.old[t])
                total = total + tis(sample, t, cap) * ppo_term(ratio, advantage, low, high)
    return total / tokens if tokens else total


def gspo(case: Case, low: float, high: float, cap: float) -> torch.Tensor:
    terms = []
    for group in map(usable, case):
        if not group:
            continue
        for sample, advantage in zip(group, zscores([s.reward for s in group]), strict=True):
            n = len(sample.new)
            log_ratio = sum(new - old for new, old in zip(sample.new, sample.old, strict=True))
            weight = sum(tis(sample, t, cap) for t in range(n)) / n
            terms.append(weight * ppo_term(torch.exp(log_ratio) ** (1 / n), advantage, low, high))
    return sum(terms) / len(terms) if terms else torch.tensor(0.0)


def cispo(case: Case, weight_cap: float, cap: float) -> torch.Tensor:
    total, tokens = torch.tensor(0.0, dtype=torch.float64), 0
    for group in map(usable, case):
        if not group:
            continue
        for sample, advantage in zip(group, zscores([s.reward for s in group]), strict=True):
            for t, new in enumerate(sample.new):
                tokens += 1
                weight = min(math.exp(new.item() - sample.old[t]), weight_cap)
                total = total - tis(sample, t, cap) * weight * advantage * new
    return total / tokens if tokens else total


def rloo(case: Case, low: float, high: float, cap: float) -> torch.Tensor:
    terms = []
    for group in map(usable, case):
        for i, sample in enumerate(group):
            others = [s.reward for j, s in enumerate(group) if j != i]
            advantage = sample.reward - statistics.fmean(others)
            if max(s.reward for s in group) == min(s.reward for s in group):
                advantage = 0.0
            n = len(sample.new)
            log_ratio = sum(new - old for new, old in zip(sample.new, sample.old, strict=True))
            weight = sum(tis(sample, t, cap) for t in range(n)) / n
            terms.append(weight * ppo_term(torch.exp(log_ratio), advantage, low, high))
    return sum(terms) / len(terms) if terms else torch.tensor(0.0)


def reinforce_pp(case: Case, low: float, high: float, cap: float, beta: float, kl: str) -> torch.Tensor:
    pairs = []
    for group in map(usable, case):
        if group:
            pairs += list(zip(group, centred([s.reward for s in group]), strict=True))
    if not pairs:
        return torch.tensor(0.0)
    scale = statistics.stdev([a for _, a in pairs]) + 1e-4
    terms = []
    for sample, raw in pairs:
        inner = []
        for t, new in enumerate(sample.new):
            policy = ppo_term(torch.exp(new - sample.old[t]), raw / scale, low, high)
            inner.append(tis(sample, t, cap) * policy + beta * schulman(kl, new, sample.ref[t]))
        terms.append(sum(inner) / len(inner))
    return sum(terms) / len(terms)


def cross_entropy(case: Case) -> torch.Tensor:
    picked = [new for group in case for s in group if not math.isnan(s.reward) for new in s.new]
    return -sum(picked) / len(picked) if picked else torch.tensor(0.0)
