"""One process of TRL's side: its `GRPOTrainer`, with the model, prompts, rewards and settings of a recipe.

    python -m tests.benchmarks.step_trl --load demo --folder F --out FILE --warm 3 --steps 10 --setup threads

Under torchrun every rank writes FILE.<rank>. Evaluation, logging, saving, gradient checkpointing (TRL's default)
and bf16 (TRL's default, slow on CPUs) are off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tests.benchmarks.bench_rows import Stopwatch
from tests.benchmarks.step_loads import LOADS, Load, grpo_stage, ordered_prompts, step_recipe
from tests.benchmarks.step_ours import StepRun
from tests.benchmarks.trl_setups import SETUPS, TrlSetup
from transformers import AutoModelForCausalLM, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from treadle.actors.verify.composite import CompositeVerifier, ScoringSpec, make_composite
from treadle.platform.objectives.dapo import Dapo
from treadle.workflows.data.tokenization import load_tokenizer
from treadle.workflows.recipe import Recipe


@dataclass
class Rewards:
    """TRL's reward function: the verifiers of our pool, called in this process. Notes lengths and rewards."""

    spec: ScoringSpec
    eos_id: int
    group: int
    lengths: list[int] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    zero_spread: list[float] = field(default_factory=list)
    _verifiers: dict[str, CompositeVerifier] = field(default_factory=dict)
    __name__: str = "verified"

    def __call__(
        self,
        completions: list[str],
        completion_ids: list[list[int]],
        verifier: list[str],
        payload: list[str],
        **_: Any,
    ) -> list[float]:
        rewards = [
            self._score(name, text, json.loads(data), self.eos_id in ids)
            for name, text, data, ids in zip(verifier, completions, payload, completion_ids, strict=True)
        ]
        self.lengths += [len(ids) for ids in completion_ids]
        self.means.append(statistics.fmean(rewards))
        groups = [rewards[i : i + self.group] for i in range(0, len(rewards), self.group)]
        self.zero_spread.append(statistics.fmean(len(set(group)) == 1 for group in groups))
        return rewards

    def _score(self, name: str, text: str, payload: dict[str, Any], finished: bool) -> float:
        if name not in self._verifiers:
            self._verifiers[name] = make_composite(name, self.spec)
        parts = self._verifiers[name].score(text, payload, finished)
        return sum(self.spec.parts[part] * value for part, value in parts)


class StepTimes(TrainerCallback):  # type: ignore[misc]  # transformers is read as untyped
    """Seconds between the ends of two optimizer steps."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self._clock = Stopwatch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._clock.lap()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_s.append(self._clock.lap())


def trainer_config(recipe: Recipe, setup: TrlSetup, steps: int, output: Path) -> GRPOConfig:
    """The recipe's GRPO stage in TRL's terms."""
    stage = grpo_stage(recipe)
    optim, objective = stage.optim, stage.objective
    assert isinstance(objective, Dapo)
    samples = stage.prompts_per_step * stage.group_size
    return GRPOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=samples // setup.processes // setup.microbatches,
        gradient_accumulation_steps=setup.microbatches,
        steps_per_generation=setup.microbatches,
        num_generations=stage.group_size,
        max_completion_length=stage.max_new_tokens,
        temperature=stage.temperature,
        top_p=stage.top_p,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=objective.eps_low,
        epsilon_high=objective.eps_high,
        learning_rate=optim.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optim.warmup_steps,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.grad_clip,
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        ddp_backend="gloo" if setup.processes > 1 else None,
        use_transformers_continuous_batching=setup.continuous_batching,
        cache_implementation=setup.cache or None,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=recipe.seed,
    )


def measured(load: Load, folder: Path, setup: TrlSetup, warm_steps: int, steps: int, output: Path) -> StepRun:
    """Trains `warm_steps + steps` steps and times them."""
    torch.set_num_threads(setup.threads)
    total = warm_steps + steps
    recipe = step_recipe(load, folder, total)
    tokenizer = load_tokenizer(str(folder / "model"))
    prompts = ordered_prompts(recipe, folder, total)
    spec = ScoringSpec(
        parts=recipe.verify.parts, eos=tokenizer.eos_token, think_opened=False, custom=recipe.verify.custom
    )
    rewards = Rewards(spec, tokenizer.eos_token_id, load.group)
    times = StepTimes()
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation=setup.attention
        ),
        reward_funcs=rewards,
        args=trainer_config(recipe, setup, total, output),
        train_dataset=Dataset.from_list(
            [
                {"prompt": p.text, "verifier": p.verifier, "payload": json.dumps(dict(p.payload))}
                for p in prompts
            ]
        ),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    return StepRun(
        setup=setup.described(),
        step_s=times.step_s[warm_steps:],
        lengths=rewards.lengths,
        reward_mean=statistics.fmean(rewards.means[warm_steps:]),
        zero_spread=statistics.fmean(rewards.zero_spread[warm_steps:]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", choices=sorted(LOADS), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--setup", choices=sorted(SETUPS), required=True)
    given = parser.parse_args()
    setup = SETUPS[given.setup]
    run = measured(
        LOADS[given.load], given.folder, setup, given.warm, given.steps, given.out.with_suffix(".trl")
    )
    rank = os.environ.get("RANK", "0")
    run.write(given.out.with_name(f"{given.out.name}.{rank}"))


if __name__ == "__main__":
    main()
