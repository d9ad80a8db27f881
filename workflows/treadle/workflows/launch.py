"""From a recipe and a folder to a finished run: opens everything, plays the stages, closes everything."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from treadle.actors.preload import preload
from treadle.actors.verify.config import VerifyConfig
from treadle.cluster.ray_metrics import RayMetrics
from treadle.cluster.recovery import RecoveryPolicy
from treadle.cluster.session import open_session
from treadle.platform.config import flatten
from treadle.platform.errors import ConfigError, FencedError, Interrupted, TreadleError
from treadle.platform.ledger import Ledger
from treadle.platform.records import Outcome, WeightVersion
from treadle.platform.tracking import RunTracker
from treadle.workflows.configs import DistillConfig, GrpoConfig, SftConfig
from treadle.workflows.crew import engine_specs, open_crew, open_engines, preloads, role_specs
from treadle.workflows.data.tokenization import load_tokenizer
from treadle.workflows.evaluate import EvalReport, evaluate
from treadle.workflows.folder import RunFolder, write_json
from treadle.workflows.inputs import StageInputs, build_inputs, stage_inputs
from treadle.workflows.mirroring import check_new_mirror, mirrored
from treadle.workflows.models import check_model_folder
from treadle.workflows.outcomes import as_json, interrupted, outcome_of
from treadle.workflows.outputs import finished, record
from treadle.workflows.recipe import Recipe
from treadle.workflows.recovering import play_stage
from treadle.workflows.run import Run
from treadle.workflows.stopping import stoppable
from treadle.workflows.summary import summarise
from treadle.workflows.watch import record_failure, watched
from treadle.workflows.weights_url import check_weights_url, weights_url

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FENCED = "fenced"
"""How a run ends for a process that another one has replaced."""


@asynccontextmanager
async def open_run(
    recipe: Recipe, path: Path, *, quiet: bool = False, controller: Mapping[str, Any] | None = None
) -> AsyncIterator[Run]:
    """A run with its roles, in a new folder or in one that holds a run of the same recipe. `controller` is what
    `run.json` says of the detached controller whose process this is.

    Raises what the checks, the cluster and the roles raise; whatever ends the block, all processes are ended and
    the folder says how the run ended. Example: `async with open_run(recipe, Path("runs/mine")) as run: …`
    """
    started = time.monotonic() - (time.time() - psutil.Process().create_time())
    with tempfile.TemporaryDirectory(prefix="treadle-") as scratch:
        drafted = recipe.tokenizer.write(Path(scratch) / "tokenizer")
        tokenizer = load_tokenizer(str(drafted))
        inputs = build_inputs(
            recipe, tokenizer
        )  # whatever is wrong with the data is said before a folder exists
        if not RunFolder(path).config.exists():
            check_new_mirror(recipe.checkpoint)
        check_weights_url(recipe.broadcast)
        folder = RunFolder.of(path, recipe)
        shutil.copytree(drafted, folder.tokenizer, dirs_exist_ok=True)
    recipe = replace(recipe, verify=_readied(recipe.verify, tokenizer, inputs.values()))
    tracker = RunTracker(
        folder.path, recipe.tracking, name=recipe.name, settings=flatten(recipe), json_mode=quiet
    )
    _tell_skipped(tracker, inputs)
    attempts = int(folder.state().get("attempts", 0)) + 1
    folder.set_state(
        state="running",
        pid=os.getpid(),
        host=socket.gethostname(),
        attempts=attempts,
        started_unix_s=time.time(),
        controller=dict(controller) if controller else None,
        error=None,
    )
    async with (
        _concluded(folder, tracker),
        stoppable(folder, attempts, tracker.say) as stop,
        _running(recipe, folder, tracker, tokenizer, inputs, started) as run,
    ):
        stop.run = run
        yield run


@asynccontextmanager
async def _running(
    recipe: Recipe,
    folder: RunFolder,
    tracker: RunTracker,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, StageInputs],
    started: float,
) -> AsyncIterator[Run]:
    """The run, while its ledger, its mirror, its Ray and its roles are open."""
    staleness = max((s.staleness for s in recipe.stages.values() if isinstance(s, GrpoConfig)), default=0)
    with (
        Ledger.open(folder.ledger) as ledger,
        mirrored(recipe.checkpoint, folder, ledger, tracker) as mirror,
        weights_url(recipe.broadcast, folder, tracker.say) as broadcast,
        open_session(recipe.cluster, role_specs(recipe), folder.path / "logs", preloads(recipe)),
        RayMetrics(recipe.name) as metrics,
    ):
        tracker.mirror_to(metrics)
        crew = await open_crew(replace(recipe, broadcast=broadcast), staleness)
        run = Run(recipe, folder, crew, ledger, tracker, tokenizer, inputs, started, mirror)
        crew.tell(run.replaced, run.missing, run.lowered)
        try:
            async with watched(run):
                yield run
            await run.settle_mirror()
        except FencedError:
            raise
        except TreadleError as error:
            if not isinstance(error, Interrupted):
                with suppress(OSError):  # the failure itself must be told
                    await record_failure(run, error)
            if mirror:
                await mirror.settle(patient=False)
            raise
        finally:
            await crew.close()


@asynccontextmanager
async def _concluded(folder: RunFolder, tracker: RunTracker) -> AsyncIterator[None]:
    """Whatever ends the block, the folder says how, unless it belongs to another process by then."""
    state: str = "failed"
    outcome: Outcome | None = None
    try:
        yield
        state = "finished"
    except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
        state, outcome = "interrupted", outcome_of(interrupted(folder.path))
        raise
    except Interrupted as error:
        told = Interrupted(error.message, interrupted(folder.path).remedy)
        state, outcome = "interrupted", outcome_of(told)
        raise told from None
    except FencedError:
        state = FENCED
        raise
    except TreadleError as error:
        outcome = outcome_of(error)
        tracker.event(
            "failure", {"error": type(error).__name__, "message": error.message, "remedy": error.remedy}
        )
        raise
    except Exception as error:
        outcome = outcome_of(error)
        raise
    finally:
        if state == FENCED:
            tracker.abandon()
        else:
            with suppress(OSError):  # on a full disk the reason for the end is what must be said
                said = as_json(outcome, tracker.redactor) if outcome else None
                folder.set_state(state=state, ended_unix_s=time.time(), error=said)
            tracker.close(state)


async def play(
    recipe: Recipe, path: Path, *, quiet: bool, controller: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Runs all stages and returns the summary, which is also written to `summary.json`, with `report.html`
    beside it. `controller` as in `open_run`."""
    folder = RunFolder(path)
    async with open_run(recipe, path, quiet=quiet, controller=controller) as run:
        policy = RecoveryPolicy(recipe.recovery)
        for name, config in recipe.stages.items():
            output = finished(folder, name, run.key(name))
            if output is None:
                run.entered()
                output = await play_stage(run, name, config, policy)
                record(folder, output)
                if run.mirror:
                    await run.mirror.offer(name, output.steps)
            run.outputs[name] = output
        await run.settle_mirror()
        summary = summarise(run)
        write_json(folder.summary, summary)
    _draw_report(folder)
    return summary


def _readied(
    verify: VerifyConfig, tokenizer: PreTrainedTokenizerBase, inputs: Iterable[StageInputs]
) -> VerifyConfig:
    """With the tokenizer's EOS, and warm for every verifier that the prompts name: its imports are on nobody's clock,
    and one that cannot be built is said at the start."""
    named = {
        name
        for stage in inputs
        for p in (stage.train, stage.heldout)
        if p is not None
        for name in p.verifiers
    }
    return replace(verify, eos=verify.eos or str(tokenizer.eos_token), warm=sorted({*verify.warm, *named}))


def _tell_skipped(tracker: RunTracker, inputs: Mapping[str, StageInputs]) -> None:
    for name, stage in inputs.items():
        if stage.skipped:
            tracker.event("rows_skipped", {"rows": stage.skipped}, stage=name)
            tracker.say(f"warning: stages.{name}: {stage.skipped} broken rows are left out (skip_bad)")


def _draw_report(folder: RunFolder) -> None:
    from treadle.dashboards.report import write_report

    write_report(folder.path)


async def evaluate_folder(recipe: Recipe, model: Path) -> EvalReport:
    """Evaluates a model folder as the last stage of the recipe that has an evaluation was: same prompts, same
    sampling, same seeds, and so the same figures for the same weights. Starts engines and verifiers only."""
    check_model_folder(model)
    tokenizer = load_tokenizer(str(model))
    name, stage = _evaluated_stage(recipe)
    inputs = stage_inputs(recipe, tokenizer, name, stage)
    heldout = inputs.heldout
    assert heldout is not None
    recipe = replace(recipe, verify=_readied(recipe.verify, tokenizer, [inputs]))
    with open_session(recipe.cluster, engine_specs(recipe), preload=preload(recipe.rollout)):
        async with open_engines(recipe, str(model)) as (rollouts, verifiers):
            return await evaluate(
                rollouts,
                verifiers,
                heldout,
                stage.evaluate,
                label="eval",
                seed=recipe.seed,
                version=WeightVersion(step=0),
            )


def _evaluated_stage(recipe: Recipe) -> tuple[str, SftConfig | GrpoConfig | DistillConfig]:
    for name, stage in reversed(recipe.stages.items()):
        if isinstance(stage, SftConfig | GrpoConfig | DistillConfig):
            return name, stage
    raise ConfigError(
        "The recipe has no stage with an evaluation.", "Use one with an sft, grpo or distill stage."
    )
