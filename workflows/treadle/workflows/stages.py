"""What each kind of stage does, from its starting weights to its artefact."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from treadle.platform import metric_names as names
from treadle.platform.objectives.cross_entropy import CrossEntropy
from treadle.platform.records import Sampling, WeightVersion
from treadle.workflows.chains import record_chains
from treadle.workflows.configs import (
    DistillConfig,
    ExportConfig,
    GrpoConfig,
    PretrainConfig,
    SftConfig,
    StageConfig,
)
from treadle.workflows.data.batches import RowList, RowSource, batches
from treadle.workflows.distill import VerifiedSet, verified_answers
from treadle.workflows.evaluate import EvalReport, EvaluateConfig, evaluate
from treadle.workflows.export import export_model
from treadle.workflows.fit import fit
from treadle.workflows.grpo import grpo
from treadle.workflows.inputs import stage_seed
from treadle.workflows.journal import Journal
from treadle.workflows.outputs import StageOutput
from treadle.workflows.run import Run


async def pretrain(run: Run, name: str, config: PretrainConfig) -> StageOutput:
    """Next-token prediction on a packed token stream. The engines are not needed and may still be starting."""
    async with run.stage(name, config, CrossEntropy(), steps=config.steps, engines=False) as journal:
        await _fit(run, name, config, journal)
        return await run.finish(name, config, journal, evaluation=None)


async def sft(run: Run, name: str, config: SftConfig) -> StageOutput:
    """Supervised fine-tuning up to `target_accuracy` on held-out prompts."""
    async with run.stage(name, config, CrossEntropy(), steps=config.steps, engines=True) as journal:

        async def good_enough(step: int) -> bool:
            if not config.target_accuracy or step == 0 or step % config.check_every:
                return False
            with journal.clock("evaluate"):
                await run.roles.broadcast.publish(step)
                report = await _evaluate(run, name, config.check_with, f"check-{step}")
            journal.note({names.ACCURACY_HELDOUT: report.sampled})
            return report.sampled >= config.target_accuracy

        await _fit(run, name, config, journal, good_enough)
        await run.roles.broadcast.publish(journal.step)
        return await _evaluated(run, name, config, journal)


async def reinforce(run: Run, name: str, config: GrpoConfig) -> StageOutput:
    """Reinforcement learning with verifiable rewards: `grpo` with its objective and staleness bound."""
    prompts = run.inputs[name].train
    assert prompts is not None
    async with run.stage(name, config, config.objective, steps=config.steps, engines=True) as journal:
        async for _ in grpo(run.roles, config, prompts, journal):
            run.stepped()
        return await _evaluated(run, name, config, journal)


async def distill(run: Run, name: str, config: DistillConfig) -> StageOutput:
    """The teacher's verified answers, then supervised fine-tuning of the student on them."""
    answers = await _teacher_answers(run, name, config)
    rows = RowList(answers.rows(), seed=stage_seed(run.recipe, name))
    async with run.stage(name, config, CrossEntropy(), steps=config.steps, engines=True) as journal:
        await _fit(run, name, config, journal, rows=rows)
        await run.roles.broadcast.publish(journal.step)
        notes = {"asked": float(answers.asked), "kept": float(len(answers))}
        return await _evaluated(run, name, config, journal, notes)


async def _fit(
    run: Run,
    name: str,
    config: PretrainConfig | SftConfig | DistillConfig,
    journal: Journal,
    stop: Callable[[int], Awaitable[bool]] | None = None,
    rows: RowSource | None = None,
) -> None:
    source = rows or run.inputs[name].rows
    assert source is not None
    work = batches(source, rows_per_step=config.batch_sequences, ranks=run.roles.ranks)
    async for _ in fit(run.roles, work, config.steps, journal, stop=stop):
        run.stepped()


async def _evaluate(run: Run, name: str, config: EvaluateConfig, label: str) -> EvalReport:
    heldout = run.inputs[name].heldout
    assert heldout is not None
    return await evaluate(
        run.roles.rollouts,
        run.roles.verifiers,
        heldout,
        config,
        label=f"{name}/{label}",
        seed=run.recipe.seed,
        version=run.roles.broadcast.version,
    )


async def _evaluated(
    run: Run,
    name: str,
    config: SftConfig | GrpoConfig | DistillConfig,
    journal: Journal,
    notes: Mapping[str, float] | None = None,
) -> StageOutput:
    """The stage's final accuracy and its ten chains for the report, then its artefact."""
    report = await _evaluate(run, name, config.evaluate, "final")
    heldout = run.inputs[name].heldout
    assert heldout is not None
    await record_chains(
        run.roles,
        heldout,
        stage=name,
        path=run.folder.path / "chains.json",
        sampling=Sampling(
            temperature=config.evaluate.temperature,
            top_p=config.evaluate.top_p,
            max_new_tokens=config.evaluate.max_new_tokens,
            group_size=1,
            seed=run.recipe.seed,
        ),
        version=run.roles.broadcast.version,
    )
    return await run.finish(name, config, journal, evaluation=report, notes=notes)


async def _teacher_answers(run: Run, name: str, config: DistillConfig) -> VerifiedSet:
    """Drawn once and kept beside the stage, so that a resumed run trains on the same set."""
    kept = run.folder.path / "work" / name / "answers.npz"
    if kept.exists():
        return VerifiedSet.load(kept)
    prompts = run.inputs[name].train
    assert prompts is not None
    teacher = run.outputs[config.teacher]
    await run.crew.set_engines(teacher.model)
    answers = await verified_answers(
        run.roles,
        prompts,
        count=config.asked_prompts,
        sampling=Sampling(
            temperature=config.temperature,
            top_p=1.0,
            max_new_tokens=config.max_new_tokens,
            group_size=config.samples_per_prompt,
            seed=run.recipe.seed,
        ),
        label=f"{name}/teacher",
        version=WeightVersion(step=0, digest=teacher.digest),
        keep_per_prompt=config.keep_per_prompt,
    )
    kept.parent.mkdir(parents=True, exist_ok=True)
    answers.save(kept)
    return answers


async def export(run: Run, name: str, config: ExportConfig) -> StageOutput:
    """Hugging Face safetensors of an earlier stage, read back and compared with its digest."""
    source = run.outputs[config.model.stage]
    target = run.folder.path / "export" / config.model.stage
    export_model(Path(source.model), target, source.digest)
    return run.output(name, config, model=str(target), digest=source.digest, steps=0, evaluation=None)


STAGES: Mapping[type[Any], Callable[[Run, str, Any], Awaitable[StageOutput]]] = {
    PretrainConfig: pretrain,
    SftConfig: sft,
    GrpoConfig: reinforce,
    DistillConfig: distill,
    ExportConfig: export,
}


async def run_stage(run: Run, name: str, config: StageConfig) -> StageOutput:
    """Runs one stage of the recipe, whatever its kind."""
    return await STAGES[type(config)](run, name, config)
