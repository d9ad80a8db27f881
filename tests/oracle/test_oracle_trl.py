"""Objectives against TRL's real trainers: its generation, its rewards and advantages, its loss and backward.

A tiny Qwen2 (fp64, CPU) draws completions through TRL. The policy is moved before drawing (so that it differs
from the reference) and again before the loss (so that ratios differ from 1 and some are clipped). Then TRL's
`_compute_loss` and ours run on the same model; loss and every parameter's gradient must agree.

Where TRL's definitions differ from the papers and ours, the difference has a test of its own below.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from treadle.platform.objectives.base import GroupCredit, Objective, ScoredGroup, TokenInputs
from treadle.platform.objectives.cispo import Cispo
from treadle.platform.objectives.dapo import Dapo
from treadle.platform.objectives.dr_grpo import DrGrpo
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.objectives.gspo import Gspo
from treadle.platform.objectives.rloo import Rloo
from treadle.workflows.data.tokenization import character_tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.timeout(900)]

GROUP, PROMPTS, LIMIT = 4, 3, 12
SCORES = [1.0, 0.0, 0.25, 1.0, 0.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0]  # the last group is all equal
TOLERANCE = 1e-6
EOS = 1


def tiny_model(vocabulary: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).double()


def shake(model: torch.nn.Module, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * noise)


def reward_of(values: list[float]) -> Callable[..., list[float | None]]:
    """A reward function that knows its values beforehand."""

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]

    return reward


@dataclass
class Oracle:
    """A TRL trainer after drawing: what it drew, and what it made of the rewards."""

    trainer: Any
    inputs: dict[str, torch.Tensor]
    scores: list[float]

    def logprobs(self, model: torch.nn.Module) -> torch.Tensor:
        """[B, T] log-probabilities of the completions, from plain logits."""
        ids = torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], dim=1)
        attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], dim=1)
        logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
        chosen = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        return chosen[:, self.inputs["prompt_ids"].shape[1] - 1 :]

    def in_double_precision(self) -> None:
        """Gives TRL's loss the same log-probabilities as ours, instead of its own in float32."""

        def forward(model: torch.nn.Module, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
            logprobs = self.logprobs(model)
            return logprobs, torch.zeros_like(logprobs), None

        self.trainer._get_per_token_logps_and_entropies = forward

    def loss_and_gradients(self) -> tuple[float, list[torch.Tensor]]:
        self.trainer.current_gradient_accumulation_steps = 1
        return backward(self.trainer.model, self.trainer._compute_loss(self.trainer.model, self.inputs))


def backward(model: torch.nn.Module, loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.item(), [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
    ]


def drawn(
    trainer_class: Any,
    config_class: Any,
    scores: list[float],
    more: list[list[float]] | None = None,
    **settings: Any,
) -> Oracle:
    """Draws and scores; `more` are the values of further reward functions."""
    tokenizer = character_tokenizer("0123456789+=", tags=())
    prompts = [{"prompt": p} for p in ("1+2=", "30+4=", "5+67=") for _ in range(GROUP)]
    with tempfile.TemporaryDirectory() as folder:
        tiny_model(len(tokenizer)).save_pretrained(folder)  # TRL reads its reference policy from there
        args = config_class(
            output_dir=folder,
            per_device_train_batch_size=len(prompts),
            num_generations=GROUP,
            max_completion_length=LIMIT,
            temperature=1.0,
            use_cpu=True,
            bf16=False,
            report_to=[],
            seed=3,
            **settings,
        )
        trainer = trainer_class(
            model=Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float64),
            reward_funcs=[reward_of(values) for values in (scores, *(more or []))],
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        trainer.model.train()
        if getattr(trainer, "ref_model", None) is not None:
            trainer.ref_model.double()
        shake(trainer.model, 0.02, seed=1)
        torch.manual_seed(7)
        inputs = trainer._generate_and_score_completions(prompts)
    return Oracle(trainer, inputs, scores)


def moved(oracle: Oracle) -> Oracle:
    """Keeps the log-probabilities of the policy that drew, then moves the policy."""
    with torch.no_grad():
        old = oracle.logprobs(oracle.trainer.model)
    oracle.inputs["old_per_token_logps"] = old
    oracle.inputs["old_logps"] = (old * oracle.inputs["completion_mask"]).sum(1)
    shake(oracle.trainer.model, 0.02, seed=2)
    return oracle


def drawn_mask(oracle: Oracle) -> torch.Tensor:
    """[B, T] True up to and including the first EOS. TRL's own mask is empty for samples it filters."""
    ids = oracle.inputs["completion_ids"]
    return ((ids == EOS).cumsum(1) - (ids == EOS).int()) == 0


def groups_of(oracle: Oracle) -> list[ScoredGroup]:
    mask = drawn_mask(oracle)
    lengths = mask.sum(1).numpy().reshape(PROMPTS, GROUP)
    ended = (oracle.inputs["completion_ids"] == EOS).any(1).numpy().reshape(PROMPTS, GROUP)
    rewards = np.array(oracle.scores).reshape(PROMPTS, GROUP)
    return [
        ScoredGroup(rewards=r, lengths=n, truncated=~e, max_new_tokens=LIMIT)
        for r, n, e in zip(rewards, lengths, ended, strict=True)
    ]


def flat(credits: list[GroupCredit], name: str) -> torch.Tensor:
    return torch.tensor(np.concatenate([getattr(credit, name) for credit in credits]), dtype=torch.float64)


def our_loss(objective: Objective, oracle: Oracle, behaviour: torch.Tensor | None = None) -> torch.Tensor:
    credits = objective.credit(groups_of(oracle))
    mask = drawn_mask(oracle)
    sequence = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
    ref = oracle.inputs.get("ref_per_token_logps")
    result = objective.token_losses(
        TokenInputs(
            logprobs=oracle.logprobs(oracle.trainer.model)[mask],
            old_logprobs=oracle.inputs["old_per_token_logps"][mask],
            behaviour_logprobs=None if behaviour is None else behaviour[mask],
            ref_logprobs=None if ref is None else ref[mask],
            advantages=flat(credits, "advantages")[sequence],
            sequence=sequence,
            n_sequences=len(mask),
        )
    )
    return (flat(credits, "weights")[sequence] * result.losses).sum()


def assert_same(ours: tuple[float, list[torch.Tensor]], theirs: tuple[float, list[torch.Tensor]]) -> None:
    assert theirs[0] != 0
    assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE, rel=TOLERANCE)
    assert max(gradient.abs().max() for gradient in theirs[1]) > 1e-4
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@dataclass
class Pairing:
    """One of our objectives and the settings under which TRL has the same loss."""

    ours: Objective
    settings: dict[str, Any]


PAIRINGS = {
    "grpo with k3 against the reference": Pairing(
        Grpo(), {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
    ),
    "grpo with V3.2's unbiased KL": Pairing(
        Grpo(kl_unbiased=True), {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True}
    ),
    "dr_grpo": Pairing(DrGrpo(), {"loss_type": "dr_grpo", "beta": 0.0, "scale_rewards": "none"}),
    "dapo": Pairing(
        Dapo(overlong_factor=0), {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}
    ),
    # TRL's bnpo divides by the tokens of its micro-batch; with the step in one micro-batch that is DAPO.
    "dapo as bnpo in one micro-batch": Pairing(
        Dapo(overlong_factor=0), {"loss_type": "bnpo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28}
    ),
    "dapo with overlong filter": Pairing(
        Dapo(overlong_factor=0, overlong_filter=True),
        {"loss_type": "dapo", "beta": 0.0, "epsilon_high": 0.28, "mask_truncated_completions": True},
    ),
    "gspo": Pairing(
        Gspo(),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "beta": 0.0,
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "gspo where little is clipped": Pairing(
        Gspo(eps_low=0.3, eps_high=0.4),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "beta": 0.0,
            "epsilon": 0.3,
            "epsilon_high": 0.4,
        },
    ),
    # TRL's epsilon_high is the cap itself for cispo, as `weight_cap` is.
    "cispo": Pairing(Cispo(weight_cap=1.05), {"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.05}),
}


@pytest.fixture(params=PAIRINGS, scope="module")
def pairing(request: pytest.FixtureRequest) -> tuple[Pairing, Oracle]:
    chosen = PAIRINGS[request.param]
    return chosen, moved(drawn(GRPOTrainer, GRPOConfig, SCORES, **chosen.settings))


def test_advantages_are_trls(pairing: tuple[Pairing, Oracle]) -> None:
    chosen, oracle = pairing
    credits = chosen.ours.credit(groups_of(oracle))
    counted = flat(credits, "weights") > 0
    theirs = oracle.inputs["advantages"].double()
    # TRL holds rewards in float32.
    torch.testing.assert_close(flat(credits, "advantages")[counted], theirs[counted], rtol=0, atol=TOLERANCE)


def test_loss_and_gradient_are_trls(pairing: tuple[Pairing, Oracle]) -> None:
    chosen, oracle = pairing
    oracle.inputs["advantages"] = oracle.inputs["advantages"].double()
    theirs = oracle.loss_and_gradients()
    ours = backward(oracle.trainer.model, our_loss(chosen.ours, oracle))
    assert_same(ours, theirs)


def test_the_ratio_has_moved_far_enough_to_be_clipped(pairing: tuple[Pairing, Oracle]) -> None:
    _, oracle = pairing
    mask = oracle.inputs["completion_mask"].bool()
    with torch.no_grad():
        ratio = (oracle.logprobs(oracle.trainer.model) - oracle.inputs["old_per_token_logps"])[mask].exp()
    assert ratio.max() > 1.28
    assert ratio.min() < 0.8


def test_rloo_is_trls() -> None:
    """TRL clips the whole answer's ratio as we do. Its KL is taken off the reward, so it is compared at 0.
    Its sum over an answer in float32 rounds at 4e-6, which the exponential multiplies: this loss runs in
    double."""
    oracle = moved(drawn(RLOOTrainer, RLOOConfig, SCORES, beta=0.0, epsilon=0.2))
    oracle.inputs["advantages"] = oracle.inputs["advantages"].double()
    oracle.in_double_precision()
    theirs = oracle.loss_and_gradients()
    credits = Rloo().credit(groups_of(oracle))
    torch.testing.assert_close(
        flat(credits, "advantages"), oracle.inputs["advantages"], rtol=0, atol=TOLERANCE
    )
    assert_same(backward(oracle.trainer.model, our_loss(Rloo(), oracle)), theirs)


def test_truncated_importance_weights_are_trls() -> None:
    """TRL computes these weights only beside a vLLM server; its loss takes them as an input, given here. They
    multiply the policy term and not the KL, in both."""
    settings = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False}
    oracle = moved(drawn(GRPOTrainer, GRPOConfig, SCORES, **settings))
    old = oracle.inputs["old_per_token_logps"]
    generator = torch.Generator().manual_seed(5)
    behaviour = old + 0.6 * torch.randn(old.shape, generator=generator, dtype=old.dtype)
    oracle.trainer.use_vllm = True
    oracle.trainer.vllm_importance_sampling_correction = True
    oracle.inputs["importance_sampling_ratio"] = torch.exp(old - behaviour).clamp(max=2.0)
    oracle.inputs["advantages"] = oracle.inputs["advantages"].double()
    theirs = oracle.loss_and_gradients()
    assert_same(backward(oracle.trainer.model, our_loss(Grpo(), oracle, behaviour)), theirs)


def test_an_unscored_sample_has_the_same_baseline_but_leaves_our_denominator() -> None:
    """TRL gives it advantage 0 and still divides by it; here it does not count. The losses therefore differ
    by the share of scored samples, and by nothing else."""
    scores = copy.copy(SCORES)
    scores[1] = scores[6] = math.nan
    settings = {"loss_type": "grpo", "beta": 0.0}
    oracle = moved(drawn(GRPOTrainer, GRPOConfig, scores, **settings))
    oracle.inputs["advantages"] = oracle.inputs["advantages"].double()
    credits = Grpo(kl_coefficient=0).credit(groups_of(oracle))
    torch.testing.assert_close(
        flat(credits, "advantages"), oracle.inputs["advantages"], rtol=0, atol=TOLERANCE
    )
    theirs = oracle.loss_and_gradients()
    ours = backward(oracle.trainer.model, our_loss(Grpo(kl_coefficient=0), oracle))
    share = (len(scores) - 2) / len(scores)
    assert_same((ours[0] * share, [g * share for g in ours[1]]), theirs)


def test_parts_standardised_one_by_one_give_trls_advantages() -> None:
    """GDPO: our `reward.per_part` against TRL's `multi_objective_aggregation="normalize_then_sum"`."""
    accuracy = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    form = [1.0, 0.0, 0.5, 1.0, 0.25, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0, 0.75]
    weights = [1.0, 0.4]
    settings = {
        "reward_weights": weights,
        "multi_objective_aggregation": "normalize_then_sum",
        "loss_type": "grpo",
        "beta": 0.0,
    }
    oracle = drawn(GRPOTrainer, GRPOConfig, accuracy, more=[form], **settings)
    parts = np.stack([accuracy, form], axis=1).reshape(PROMPTS, GROUP, 2)
    groups = [
        replace(group, parts=matrix, part_weights=np.array(weights))
        for group, matrix in zip(groups_of(oracle), parts, strict=True)
    ]
    ours = flat(Grpo().credit(groups), "advantages")
    theirs = oracle.inputs["advantages"].double().flatten()
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=TOLERANCE)  # TRL sums rewards in float32
