"""Plays a stage to its end, through failures of its roles."""

from __future__ import annotations

import time

from treadle.cluster.recovery import Action, Failure, RecoveryPolicy
from treadle.platform.errors import Interrupted, RefusedError, TreadleError
from treadle.workflows.configs import StageConfig
from treadle.workflows.outputs import StageOutput
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
            await _mend(run, name, error, policy)


async def _mend(run: Run, name: str, error: TreadleError, policy: RecoveryPolicy) -> None:
    """New roles for the broken ones, or the failure that stops the run. New ranks that do not come up are one more
    failure at the same step."""
    failed_s, refused = time.monotonic(), isinstance(error, RefusedError)
    while True:
        broken = await run.crew.broken()
        if refused:  # it may have lost its mind, or the machine has
            broken |= {"learner"}
        failure = Failure(stage=name, step=run.step_of(name), error=error, broken=broken)
        decision = policy.decide(failure)
        if decision.action is Action.STOP:
            if not decision.reason:
                raise error
            raise type(error)(f"{error.message} Not mended: {decision.reason}", error.remedy) from error
        cause = f"{type(error).__name__}: {error.message}"
        await record_failure(run, error)
        run.tracker.say(f"{name}: {cause} {decision.reason}; going back to the newest commit")
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
