"""Plays a stage to its end, through failures of its roles."""

from __future__ import annotations

import time

from treadle.cluster.recovery import Action, Failure, RecoveryPolicy
from treadle.platform.errors import Interrupted, RefusedError, TreadleError
from treadle.platform.memory import AT_THE_FLOOR, PHRASE, REMEDIES
from treadle.workflows.configs import PretrainConfig, StageConfig
from treadle.workflows.outputs import StageOutput
from treadle.workflows.recipe import Recipe
from treadle.workflows.run import Run
from treadle.workflows.stages import run_stage
from treadle.workflows.watch import record_failure

RECOVERY = "recovery"


async def play_stage(run: Run, name: str, config: StageConfig, policy: RecoveryPolicy) -> StageOutput:
    """`run_stage`, and again from the newest commit where `policy` says so.

    consumes: failures; waits for: the stage, or new roles; unblocked by: their deadlines; produces: the stage's
    output, and an event per recovery. Raises the failure that stops the run.
    """
    while True:
        try:
            return await run_stage(run, name, config)
        except Interrupted:
            raise
        except TreadleError as error:
            await _mend(run, name, config, error, policy)


async def _mend(
    run: Run, name: str, config: StageConfig, error: TreadleError, policy: RecoveryPolicy
) -> None:
    """New roles for the broken ones, or the failure that stops the run. New ranks that do not come up are one more
    failure at the same step."""
    failed_s, refused = time.monotonic(), isinstance(error, RefusedError)
    while True:
        broken = await run.crew.broken()
        if refused:  # it may have lost its mind, or the machine has
            broken |= {"learner"}
        lever = run.crew.lever(longest_tokens(run.recipe, config)) if _out_of_memory(error, broken) else None
        failure = Failure(stage=name, step=run.step_of(name), error=error, broken=broken, lever=lever)
        decision = policy.decide(failure)
        if decision.action is Action.STOP:
            if not decision.reason:
                raise error
            least = lever is not None and lever.now <= lever.least
            remedy = AT_THE_FLOOR if least else error.remedy
            raise type(error)(f"{error.message} Not mended: {decision.reason}", remedy) from error
        cause = f"{type(error).__name__}: {error.message}"
        await record_failure(run, error)
        run.tracker.say(f"{name}: {cause} {decision.reason}; going back to the newest commit")
        if decision.back_off is not None:
            run.crew.lower(decision.back_off)
            run.lowered(decision.back_off)
        try:
            await run.crew.replace_broken()
        except TreadleError as again:
            error = again
            continue
        run.recoveries += 1
        told = {
            "message": cause,
            "action": decision.action.value,
            "replaced": ", ".join(sorted(failure.broken)),
            "step": failure.step,
            "seconds": round(time.monotonic() - failed_s, 3),
        }
        run.tracker.event(RECOVERY, told, stage=name)
        return


def _out_of_memory(error: TreadleError, broken: frozenset[str]) -> bool:
    """Whether ranks are broken because they ran out of memory: in a call, or while they published. What the engines or
    the coordinator say of theirs comes with another remedy."""
    return "learner" in broken and PHRASE in error.message and error.remedy == REMEDIES["learner"]


def longest_tokens(recipe: Recipe, config: StageConfig) -> int:
    """What one sequence of the stage may come to. A longer one, of supervised rows, has a forward pass of its own
    whatever the setting."""
    if isinstance(config, PretrainConfig):
        return config.block_tokens
    return recipe.rollout.max_context_tokens
