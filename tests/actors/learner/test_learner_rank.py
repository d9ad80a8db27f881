"""One rank in this process, plain torch: what a step computes, and what a checkpoint refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tests.actors.learner.ranks import VOCAB, drawn_samples, tiny_model
from transformers import AutoModelForCausalLM

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.figures import merge
from treadle.actors.learner.rank import LearnerRank
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform import failpoints
from treadle.platform.errors import CheckpointError, FailpointError, LearnerError
from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs, TokenLosses
from treadle.platform.objectives.cross_entropy import CrossEntropy
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.records import (
    Credit,
    Group,
    Prompt,
    Sample,
    Share,
    StepReport,
    StopReason,
    TrainSample,
    WeightVersion,
)

CONFIG = LearnerConfig(backend="torch", zero=0, ranks=1, lr=1e-2, grad_clip=0.0)


def learner(folder: str, objective: object = None, **changes: object) -> LearnerRank:
    rank = LearnerRank(0, list)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    rank.setup(LearnerSpec(model_folder=folder, config=config, objective=objective or Grpo()))  # type: ignore[arg-type]
    return rank


def step(rank: LearnerRank, samples: list[TrainSample], number: int = 0) -> StepReport:
    return merge(number, [rank.step(samples, number, 1.0)], 1.0)


def weights(rank: LearnerRank) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in rank.full_state()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def supervised(seed: int = 0, count: int = 6) -> list[TrainSample]:
    """SFT: advantage 1 and one over all target tokens."""
    samples = drawn_samples(count, seed=seed, behaviour=False)
    return [replace(s, advantages=np.ones_like(s.advantages)) for s in samples]


def test_the_cross_entropy_step_is_torchs_own(model_folder: str) -> None:
    """Loss, norm and updated weights against a few lines of Hugging Face and torch."""
    samples = supervised()
    rank = learner(model_folder, CrossEntropy(), eps=1e-5, lr=1e-3)
    report = step(rank, samples)

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=CONFIG.betas, eps=1e-5, weight_decay=0.0)
    losses = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        each = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        losses.append(each[torch.from_numpy(sample.loss_mask[1:])])
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()

    assert report.metrics["policy/loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert report.metrics["policy/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    ours = weights(rank)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=1e-5)


def test_cross_entropy_falls_over_steps(model_folder: str) -> None:
    rank = learner(model_folder, CrossEntropy())
    losses = [step(rank, supervised(), n).metrics["policy/loss"] for n in range(8)]
    assert losses[-1] < 0.5 * losses[0]


def test_mini_batches_and_epochs_make_that_many_updates_with_the_ratio_to_the_first_policy(
    model_folder: str,
) -> None:
    rank = learner(model_folder, Grpo(tis_cap=0.0), minibatches=2, epochs=3)
    report = step(rank, drawn_samples(8))
    assert rank._stage.backend.updates == 6
    assert report.metrics["policy/clip_fraction"] > 0  # later updates have moved away from the old policy
    assert report.metrics["perf/microbatches"] == 6
    once = step(learner(model_folder, Grpo(tis_cap=0.0)), drawn_samples(8))
    assert once.metrics["policy/clip_fraction"] == 0
    assert report.tokens == 3 * once.tokens


def test_a_mini_batch_has_a_gradient_of_the_size_of_the_whole_batch(model_folder: str) -> None:
    """Two equal halves: each update of m=2 sees what the one update of m=1 sees."""
    half = drawn_samples(3)
    whole = step(learner(model_folder), [*half, *half])
    split = step(learner(model_folder, minibatches=2, lr=1e-12), [*half, *half])
    assert split.metrics["policy/grad_norm"] == pytest.approx(whole.metrics["policy/grad_norm"], rel=1e-5)
    assert split.metrics["policy/loss"] == pytest.approx(whole.metrics["policy/loss"], rel=1e-5, abs=1e-7)


def test_the_mismatch_is_between_engine_and_learner(model_folder: str) -> None:
    rank = learner(model_folder)
    samples = drawn_samples(4)
    exact = []
    for sample in samples:
        values = rank.logprobs([sample.token_ids])
        behaviour = np.concatenate([[0.0], values]).astype(np.float32)
        exact.append(replace(sample, behaviour_logprobs=behaviour))
    agreed = step(rank, exact)
    assert agreed.metrics["mismatch/max"] < 1e-5
    assert 0 <= agreed.metrics["mismatch/kl"] < 1e-9
    shifted = exact[0].behaviour_logprobs + np.float32(0.5)  # type: ignore[operator]
    off = step(learner(model_folder), [replace(exact[0], behaviour_logprobs=shifted), *exact[1:]])
    assert off.metrics["mismatch/max"] == pytest.approx(0.5, abs=1e-4)
    share = exact[0].loss_mask.sum() / off.tokens
    assert off.metrics["mismatch/kl"] == pytest.approx(share * (math.exp(-0.5) - 1 + 0.5), rel=1e-3)


def test_temperature_divides_the_logits(model_folder: str) -> None:
    """At a high temperature the policy is near uniform."""
    rank = learner(model_folder)
    report = merge(0, [rank.step(drawn_samples(4), 0, 1000.0)], 1.0)
    assert report.metrics["policy/entropy"] == pytest.approx(math.log(VOCAB), abs=1e-3)
    with pytest.raises(LearnerError, match="temperature=0"):
        rank.step(drawn_samples(4), 1, 0.0)


def test_the_schedule_is_that_of_the_steps_number(model_folder: str) -> None:
    rank = learner(model_folder, lr=1.0, warmup_steps=10)
    assert step(rank, drawn_samples(2), 3).metrics["policy/lr"] == pytest.approx(0.4)


@dataclass(frozen=True)
class Explodes:
    """An objective whose loss is finite and whose gradient is not: sqrt at zero."""

    needs_groups: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    dynamic_sampling: ClassVar[bool] = False

    def credit(self, groups: list[ScoredGroup]) -> list[GroupCredit]:
        return []

    def token_losses(self, inputs: TokenInputs) -> TokenLosses:
        return TokenLosses(losses=(inputs.logprobs - inputs.logprobs.detach()).abs().sqrt(), metrics={})


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(model_folder: str) -> None:
    rank = learner(model_folder, Explodes())
    before = weights(rank)
    report = step(rank, drawn_samples(3))
    assert report.skipped == "non-finite gradient norm"
    assert report.metrics["policy/loss"] == 0.0
    assert same(weights(rank), before)


def test_a_refused_update_ends_the_step(model_folder: str) -> None:
    rank = learner(model_folder, Explodes(), minibatches=2)
    step(rank, drawn_samples(4))
    assert rank._stage.backend.updates == 0


def test_tied_weights_are_trained_once_and_published_under_one_name(tmp_path: Path) -> None:
    rank = learner(tiny_model(tmp_path / "tied", tie_word_embeddings=True))
    step(rank, drawn_samples(3))
    state = weights(rank)
    assert "model.embed_tokens.weight" in state
    assert "lm_head.weight" not in state
    rank.export_hf(str(tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


def test_weight_decay_spares_biases_and_norms(model_folder: str) -> None:
    """With no gradient only decay moves anything."""
    rank = learner(model_folder, weight_decay=0.5, lr=0.1)
    before = weights(rank)
    step(rank, [replace(s, weights=np.zeros_like(s.weights)) for s in drawn_samples(2)])
    for name, tensor in weights(rank).items():
        factor = 0.95 if tensor.ndim > 1 else 1.0
        torch.testing.assert_close(tensor, before[name] * factor)


def test_an_export_has_everything_of_the_folder_but_the_old_weights(
    model_folder: str, tmp_path: Path
) -> None:
    source = Path(tiny_model(tmp_path / "source"))
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"old")
    rank = learner(str(source))
    step(rank, drawn_samples(3))
    rank.export_hf(str(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same({n: p.detach() for n, p in model.named_parameters()}, weights(rank))


def test_a_damaged_or_foreign_checkpoint_is_refused_with_its_name(model_folder: str, tmp_path: Path) -> None:
    rank = learner(model_folder)
    rank.save(str(tmp_path / "c"), {})
    with pytest.raises(CheckpointError, match="nowhere"):
        rank.load(str(tmp_path / "nowhere"))
    other = learner(tiny_model(tmp_path / "deep", num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="another model"):
        other.load(str(tmp_path / "c"))
    index = tmp_path / "c" / "learner.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        rank.load(str(tmp_path / "c"))
    index.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        rank.load(str(tmp_path / "c"))
    index.write_text(json.dumps(content))
    next((tmp_path / "c").glob("optimizer-*")).unlink()
    with pytest.raises(CheckpointError, match="optimizer-00000"):
        rank.load(str(tmp_path / "c"))


def test_a_checkpoint_in_many_shards_loads_exactly(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treadle.actors.learner.checkpoint.SHARD_BYTES", 20_000)
    rank = learner(model_folder, Grpo(kl_coefficient=0.1))
    step(rank, drawn_samples(3))
    rank.save(str(tmp_path), {"cursor": 7})
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) > 5
    assert len(list(tmp_path.glob("reference-*.safetensors"))) > 1
    fresh = learner(model_folder, Grpo(kl_coefficient=0.1))
    assert fresh.load(str(tmp_path)) == {"cursor": 7}
    assert same(weights(fresh), weights(rank))
    assert fresh.version == 1


def group_of(number: int) -> Group:
    tokens = np.array([1, 2, 3, 4], dtype=np.int32)
    version = WeightVersion(step=0)
    return Group(
        id=f"g{number}",
        prompt=Prompt(id="p", text="", token_ids=tokens[:2], verifier="exact", payload={}),
        samples=tuple(
            Sample(
                index=i,
                token_ids=tokens + i,
                loss_mask=np.array([False, False, True, True]),
                logprobs=np.full(4, -3.0, dtype=np.float32),
                oldest=version,
                newest=version,
                stop=StopReason.EOS,
            )
            for i in range(3)
        ),
    )


def share_of(number: int, members: dict[int, tuple[float, float]], group: Group | None = None) -> Share:
    return Share(
        group_id=f"g{number}",
        group=group or group_of(number),
        credits=tuple(Credit(sample_index=i, advantage=a, weight=w) for i, (a, w) in members.items()),
        tokens=4 * len(members),
    )


def test_credit_reaches_the_sample_it_is_for(model_folder: str) -> None:
    by_share = step(learner(model_folder), [share_of(1, {2: (1.5, 0.1), 0: (-0.5, 0.2)})])  # type: ignore[list-item]
    direct = [
        TrainSample(
            token_ids=np.array([1, 2, 3, 4], dtype=np.int32) + i,
            loss_mask=np.array([False, False, True, True]),
            advantages=np.full(4, a, dtype=np.float32),
            weights=np.full(4, w, dtype=np.float32),
            behaviour_logprobs=np.full(4, -3.0, dtype=np.float32),
        )
        for i, a, w in ((2, 1.5, 0.1), (0, -0.5, 0.2))
    ]
    expected = step(learner(model_folder), direct)
    assert by_share.metrics["policy/loss"] == expected.metrics["policy/loss"]
    assert by_share.metrics["policy/grad_norm"] == expected.metrics["policy/grad_norm"]


def test_a_reference_to_another_group_is_refused(model_folder: str) -> None:
    with pytest.raises(LearnerError, match="g1 holds group g2"):
        step(learner(model_folder), [share_of(1, {0: (1.0, 1.0)}, group_of(2))])  # type: ignore[list-item]


@pytest.fixture
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm()


@pytest.mark.usefixtures("disarmed")
def test_a_failure_after_the_backward_pass_leaves_the_weights(model_folder: str) -> None:
    rank = learner(model_folder)
    before = weights(rank)
    failpoints.arm({"TREADLE_FAILPOINTS": "learner.after_backward=raise"})
    with pytest.raises(FailpointError):
        step(rank, drawn_samples(3))
    assert same(weights(rank), before)


@pytest.mark.usefixtures("disarmed")
def test_a_save_that_fails_half_way_leaves_no_index(model_folder: str, tmp_path: Path) -> None:
    rank = learner(model_folder)
    failpoints.arm({"TREADLE_FAILPOINTS": "learner.mid_save=raise"})
    with pytest.raises(FailpointError):
        rank.save(str(tmp_path), {})
    assert not (tmp_path / "learner.json").exists()
    with pytest.raises(CheckpointError):
        rank.load(str(tmp_path))


def test_without_a_model_a_rank_says_so() -> None:
    with pytest.raises(LearnerError, match="has no model"):
        LearnerRank(3, list).save("nowhere", {})
