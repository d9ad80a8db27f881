"""The policy against Hugging Face's own forward pass: log-probabilities, entropies and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.actors.learner.ranks import drawn_samples, tiny_model
from transformers import AutoModelForCausalLM

from treadle.actors.learner.onednn import use_onednn
from treadle.actors.learner.packing import pack
from treadle.actors.learner.policy import load_policy
from treadle.platform.errors import ConfigError, DataError
from treadle.platform.records import TrainSample

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2-tied": {"kind": "qwen2", "tie_word_embeddings": True},
    "qwen3": {},
    "llama": {},
    "mistral-window": {"kind": "mistral", "sliding_window": 7},
    "gemma": {"head_dim": 8},
    "granite": {"logits_scaling": 3.0},
}


def hugging_face(
    folder: str, samples: list[TrainSample], temperature: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, entropies and the gradient of their weighted sum, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logprobs, entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        logp = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        mask = torch.from_numpy(sample.loss_mask[1:])
        logprobs.append(logp.gather(-1, ids[1:, None]).squeeze(-1)[mask])
        entropies.append(-(logp.exp() * logp).sum(-1)[mask])
    every = torch.cat(logprobs)
    (every * torch.linspace(-1, 1, len(every))).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return every.detach(), torch.cat(entropies).detach(), grads


@pytest.mark.parametrize(("packing", "onednn"), [("packed", True), ("packed", False), ("padded", True)])
@pytest.mark.parametrize("name", MODELS)
def test_the_policy_equals_the_model_it_wraps(name: str, packing: str, onednn: bool, tmp_path: Path) -> None:
    changes = dict(MODELS[name])
    folder = tiny_model(tmp_path, kind=changes.pop("kind", name), **changes)
    samples = drawn_samples(9, longest=40, seed=4)
    logprobs, entropies, gradients = hugging_face(folder, samples, 0.8)
    policy = load_policy(folder, dtype="fp32", packing=packing)
    assert policy.packed == (packing == "packed")
    if onednn:
        use_onednn(policy)
    (batch,) = pack(samples, 10_000)
    output = policy(batch, 0.8)
    order = _original_order(batch.samples, samples)
    torch.testing.assert_close(output.logprobs[order], logprobs, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(output.entropy[order], entropies, rtol=1e-5, atol=2e-6)
    (output.logprobs[order] * torch.linspace(-1, 1, len(order))).sum().backward()
    ours = {n: p.grad for n, p in policy.named_weights()}
    assert ours.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[parameter], gradient, rtol=0, atol=1e-5 * max(scale, 1.0))


def _original_order(members: tuple[int, ...], samples: list[TrainSample]) -> torch.Tensor:
    """Positions of a packed batch's targets, sorted back into the order of the samples."""
    counts = [int(samples[i].loss_mask.sum()) for i in members]
    starts = np.cumsum([0, *counts])
    return torch.cat(
        [
            torch.arange(starts[k], starts[k + 1])
            for k in sorted(range(len(members)), key=lambda k: members[k])
        ]
    )


def test_sequences_of_a_pack_do_not_see_each_other(model_folder: str) -> None:
    """Changing one sequence changes no bit of another sequence of the same length bucket."""
    policy = load_policy(model_folder, dtype="fp32", packing="packed")
    samples = drawn_samples(4, seed=6)
    (batch,) = pack(samples, 1000)
    before = policy(batch).logprobs
    other = samples[batch.samples[1]]
    other.token_ids[:] = (other.token_ids + 1) % 40
    (changed,) = pack(samples, 1000)
    after = policy(changed).logprobs
    same = batch.sequence != 1
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before[~same], after[~same])


def test_activation_checkpointing_leaves_the_gradient_unchanged(model_folder: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = load_policy(model_folder, dtype="fp32", packing="packed", checkpointing=checkpointing)
        (batch,) = pack(drawn_samples(5), 1000)
        policy(batch).logprobs.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_weights()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_dropout_is_off_so_that_a_step_is_a_function_of_its_batch(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, attention_dropout=0.5)
    policy = load_policy(folder, dtype="fp32", packing="packed")
    (batch,) = pack(drawn_samples(3), 1000)
    assert policy.training
    assert torch.equal(policy(batch).logprobs, policy(batch).logprobs)


def test_a_model_without_the_attention_interface_falls_back_to_padded_batches(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, kind="stablelm")
    policy = load_policy(folder, dtype="fp32", packing="packed")
    assert not policy.packed
    samples = drawn_samples(3)
    (batch,) = pack(samples, 1000)
    logprobs, _, _ = hugging_face(folder, samples, 1.0)
    order = _original_order(batch.samples, samples)
    torch.testing.assert_close(policy(batch).logprobs[order], logprobs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "g2", kind="gemma2", head_dim=8, final_logit_softcapping=30.0)
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        load_policy(folder, dtype="fp32", packing="packed")
    capped = tiny_model(
        tmp_path / "g3", kind="gemma2", head_dim=8, final_logit_softcapping=None, attn_logit_softcapping=9.0
    )
    policy = load_policy(capped, dtype="fp32", packing="packed")
    with pytest.raises(ConfigError, match=r"softcap.*learner\.packing=padded"):
        policy(pack(drawn_samples(2), 1000)[0])
    with pytest.raises(DataError, match=r"config\.json"):
        load_policy(str(tmp_path / "none"), dtype="fp32", packing="packed")
