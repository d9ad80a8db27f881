"""A stage's reward: weights that change over steps, and parts that are standardised one by one."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from tests.workflows.test_dealing import ready

from treadle.platform.errors import ConfigError
from treadle.platform.objectives.dapo import Dapo
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.records import Drawn, Verdict, VerdictStatus, WeightVersion
from treadle.workflows.dealing import outcomes
from treadle.workflows.recipe import load_recipe
from treadle.workflows.rewards import RewardConfig, RewardPhase, RewardRule
from treadle.workflows.stream import Ready

WEIGHTS = {"accuracy": 1.0, "format": 0.1, "language": 0.0}
LATE = RewardConfig(
    phases=(
        RewardPhase(from_step=4, parts={"language": 0.2}),
        RewardPhase(from_step=9, parts={"format": 0.0}),
    )
)
PER_PART = RewardRule(RewardConfig(per_part=True), {"accuracy": 1.0, "format": 0.5, "language": 0.0})


def verdict(accuracy: float, form: float, language: float = 1.0) -> Verdict:
    parts = (("accuracy", accuracy), ("format", form), ("language", language))
    status = VerdictStatus.FAILED if math.isnan(accuracy) else VerdictStatus.SCORED
    if status is VerdictStatus.FAILED:
        parts = ()
    reward = math.nan if status is VerdictStatus.FAILED else accuracy + 0.1 * form
    return Verdict(status=status, reward=reward, parts=parts, wall_s=0.0, detail="", verifier="t/1")


def group(rule: RewardRule, *verdicts: Verdict, step: int = 4) -> Ready:
    """A judged group of four-token samples, issued at `step`."""
    base = ready(0, [0.0] * len(verdicts), [4] * len(verdicts))
    version = WeightVersion(step=step)
    fields = {name: getattr(base.drawn, name) for name in Drawn.__dataclass_fields__}
    drawn = Drawn(**{**fields, "oldest": version, "newest": version})
    weighed = rule.weighed(drawn, verdicts)
    return Ready(index=0, drawn=drawn, verdicts=weighed, outcome=rule.outcome(drawn, weighed, 64))


@pytest.mark.parametrize(("step", "reward"), [(0, 1.1), (3, 1.1), (4, 1.2), (8, 1.2), (9, 1.1)])
def test_a_group_gets_the_weights_of_the_step_it_was_issued_in(step: int, reward: float) -> None:
    found = group(RewardRule(LATE, WEIGHTS), verdict(1.0, 1.0, 0.5), verdict(math.nan, 0.0), step=step)
    assert found.verdicts[0].reward == pytest.approx(reward)
    assert found.outcome.rewards[0] == found.verdicts[0].reward
    assert math.isnan(found.verdicts[1].reward), "a failed sample never gets a reward"


def test_without_phases_the_pools_rewards_stay_as_they_are() -> None:
    given = (verdict(1.0, 1.0), verdict(0.0, 1.0))
    assert group(RewardRule(RewardConfig(), WEIGHTS), *given).verdicts == given


def test_one_standard_deviation_confuses_mixtures_that_single_parts_tell_apart() -> None:
    """GDPO's own example: of two parts, right in one (sums 0 and 1) and right in both (sums 0 and 2) look the same."""
    weights = {"accuracy": 1.0, "format": 1.0, "language": 0.0}
    one_of_two, both = (verdict(0.0, 0.0), verdict(1.0, 0.0)), (verdict(0.0, 0.0), verdict(1.0, 1.0))

    def gaps(per_part: bool) -> list[float]:
        rule = RewardRule(RewardConfig(per_part=per_part, phases=(RewardPhase(),)), weights)
        seen = [group(rule, *given).outcome for given in (one_of_two, both)]
        return [float(credit.advantages[1] - credit.advantages[0]) for credit in Grpo().credit(seen)]

    summed, apart = gaps(per_part=False), gaps(per_part=True)
    assert summed[1] == pytest.approx(summed[0], rel=1e-3)
    assert apart[1] == pytest.approx(2 * apart[0], rel=1e-3)


def vars_of(outcome: object) -> dict[str, object]:
    return {name: getattr(outcome, name) for name in type(outcome).__dataclass_fields__}  # type: ignore[attr-defined]


def plain_gdpo(groups: list[list[tuple[float, ...]]], weights: list[float]) -> list[float]:
    """The paper's two equations as loops; a sample of NaNs was not scored and gets 0."""
    sums: list[float] = []
    for samples in groups:
        scored = [parts for parts in samples if not math.isnan(parts[0])]
        for parts in samples:
            total = 0.0
            for k, weight in enumerate(weights):
                column = [other[k] for other in scored]
                if len(set(column)) > 1 and not math.isnan(parts[k]):
                    total += (
                        weight * (parts[k] - statistics.fmean(column)) / (statistics.stdev(column) + 1e-4)
                    )
            sums.append(math.nan if math.isnan(parts[0]) else total)
    every = [value for value in sums if not math.isnan(value)]
    mean, spread = statistics.fmean(every), statistics.stdev(every) + 1e-4
    return [0.0 if math.isnan(value) else (value - mean) / spread for value in sums]


@pytest.mark.parametrize("objective", [Grpo(), Dapo(overlong_factor=0.0)])
def test_per_part_advantages_equal_the_plain_formula(objective: Grpo | Dapo) -> None:
    random = np.random.default_rng(0)
    groups = [[(float(random.integers(0, 2)), float(random.random())) for _ in range(6)] for _ in range(4)]
    groups[1][2] = (math.nan, math.nan)
    seen = [group(PER_PART, *(verdict(a, f) for a, f in samples)).outcome for samples in groups]
    found = np.concatenate([credit.advantages for credit in objective.credit(seen)])
    np.testing.assert_allclose(found, plain_gdpo(groups, [1.0, 0.5]), rtol=1e-9, atol=1e-12)
    assert np.abs(found).max() > 0.5


def test_a_part_of_weight_zero_has_no_say() -> None:
    seen = group(PER_PART, verdict(1.0, 1.0, 0.1), verdict(1.0, 1.0, 0.9)).outcome
    assert not seen.informative
    assert not Grpo().credit([seen, seen])[0].advantages.any()


def test_parts_that_cancel_in_the_sum_still_make_a_group_informative() -> None:
    weights = {"accuracy": 1.0, "format": 1.0, "language": 0.0}
    given = (verdict(1.0, 0.0), verdict(0.0, 1.0))
    assert group(RewardRule(RewardConfig(per_part=True), weights), *given).outcome.informative


def test_a_length_punishment_is_a_part_of_its_own() -> None:
    seen = group(PER_PART, verdict(1.0, 1.0), verdict(1.0, 1.0), verdict(0.0, 1.0)).outcome
    lengths = np.array([10, 64, 10])
    longer = type(seen)(**{**vars_of(seen), "lengths": lengths})
    short, long, _ = Dapo().credit([longer, longer])[0].advantages
    assert short > long + 0.5


def test_shuffled_parts_move_together_with_their_rewards() -> None:
    seen = [group(PER_PART, *(verdict(float(i % 2), i / 10) for i in range(8))) for _ in range(2)]
    for shuffled in outcomes(seen, step=3, shuffled=True):
        assert shuffled.parts is not None
        np.testing.assert_allclose(shuffled.rewards, shuffled.parts @ [1.0, 0.1])
    assert any(
        (o.rewards != g.outcome.rewards).any()
        for o, g in zip(outcomes(seen, step=3, shuffled=True), seen, strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["stages.grpo.reward.phases=[{from_step: 5, parts: {languag: 1.0}}]"],
            "phases[0].parts.languag: no verdict",
        ),
        (["stages.grpo.reward.phases=[{from_step: 5}, {from_step: 5}]"], "begin at the steps 5, 5"),
        (["stages.grpo.reward.phases=[{from_step: -1}]"], "begin at the steps -1"),
        (
            ["stages.grpo.reward.per_part=true", "stages.grpo.objective={kind: rloo}"],
            "does not standardise rewards",
        ),
    ],
)
def test_a_reward_that_cannot_work_is_refused_before_anything_starts(settings: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_recipe("demo", settings)
    assert says in str(raised.value)
    assert "stages.grpo.reward" in str(raised.value)
