"""Group-relative policy optimisation (DeepSeekMath, 2402.03300, section 4.1) and its relatives.

Which relative is the objective's business; how asynchronous, the staleness bound's. Departures from the paper:
a sample whose verifier failed is masked out of its group's baseline instead of counting as zero, and the ratio
clips against the policy at the start of the step, corrected for the engine's by truncated importance sampling.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from treadle.platform.contracts import Prompts
from treadle.platform.records import StepReport
from treadle.workflows.configs import GrpoConfig
from treadle.workflows.dealing import deal_groups, outcomes
from treadle.workflows.journal import Journal
from treadle.workflows.roles import Roles


async def grpo(
    roles: Roles, config: GrpoConfig, prompts: Prompts, journal: Journal
) -> AsyncIterator[StepReport]:
    """Yields a report per optimizer step, from the journal's position to `config.steps`.

    consumes: prompts in order; waits for: groups drawn at most `config.staleness` versions ago;
    unblocked by: draws, verdicts, the published version; produces: trained groups, new weights, reports.
    """
    stream = journal.stream(roles, prompts, config)
    try:
        for step in range(journal.start, config.steps):
            with journal.clock("wait"):
                groups = await stream.take(step)
            seen = outcomes(groups, step=step, shuffled=config.shuffle_rewards)
            credits = config.objective.credit(seen)
            batch = deal_groups(
                step,
                groups,
                credits,
                ranks=roles.ranks,
                temperature=config.temperature,
                keep_zero_advantage=config.objective.needs_reference,
            )
            journal.leased(step, groups)
            with journal.clock("learn"):
                report = await roles.learner.step(batch)
            with journal.clock("publish"):
                published = await roles.broadcast.publish(step + 1)
            stream.advance(published.version)
            yield await journal.trained(groups, report, published)
    finally:
        await stream.close()
