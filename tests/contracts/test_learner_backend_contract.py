"""`contracts.LearnerBackend`, kept by every backend: sums, names, guards. Two ranks, real process groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.actors.learner.ranks import Ranks, drawn_samples, tiny_model

from treadle.actors.learner.config import LearnerConfig
from treadle.actors.learner.packing import pack
from treadle.actors.learner.rank import LearnerRank
from treadle.actors.learner.stepping import LearnerSpec
from treadle.platform.contracts import LearnerBackend
from treadle.platform.objectives.cross_entropy import CrossEntropy

pytestmark = pytest.mark.deepspeed

TORCH = LearnerConfig(backend="torch", zero=0, ranks=2, lr=0.1, grad_clip=0.0)
BACKENDS = {
    "torch": TORCH,
    "torch-bf16": replace(TORCH, dtype="bf16"),
    **{f"zero{stage}": replace(TORCH, backend="deepspeed", zero=stage) for stage in range(4)},
    **{
        f"zero{stage}-bf16": replace(TORCH, backend="deepspeed", zero=stage, dtype="bf16")
        for stage in (1, 2, 3)
    },
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("m") / "tiny")


def backend_of(learner: LearnerRank) -> LearnerBackend:
    return learner._stage.backend


def is_a_backend(learner: LearnerRank) -> bool:
    return isinstance(backend_of(learner), LearnerBackend)


def shapes(learner: LearnerRank) -> dict[str, tuple[int, ...]]:
    state = dict(backend_of(learner).full_state())
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def checksums(learner: LearnerRank) -> dict[str, float]:
    return {name: float(t.double().sum()) for name, t in backend_of(learner).full_state()}


def norm_after(learner: LearnerRank, passes: int, factor: float) -> float:
    """The global norm after `passes` backward passes of `factor` times the same loss on every rank."""
    backend = backend_of(learner)
    (batch,) = pack(drawn_samples(4), 1000)
    for _ in range(passes):
        output = backend.model(batch, 1.0)
        backend.backward(factor * (batch.weights * batch.advantages * output.logprobs).sum())
    return backend.apply(0)


@pytest.fixture(params=BACKENDS, scope="module")
def config(request: pytest.FixtureRequest) -> LearnerConfig:
    return BACKENDS[request.param]


@pytest.fixture
def ready(ranks: Ranks, folder: str, config: LearnerConfig) -> Ranks:
    spec = LearnerSpec(model_folder=folder, config=config, objective=CrossEntropy())
    ranks.call("setup", spec)
    return ranks


def test_it_is_a_backend_with_the_models_names_and_shapes(ready: Ranks, folder: str) -> None:
    from safetensors import safe_open

    assert all(ready.each("apply", is_a_backend))
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert ready.each("apply", shapes) == [expected, expected]


def test_losses_are_summed_over_passes_and_ranks_not_averaged(ready: Ranks, config: LearnerConfig) -> None:
    spec = LearnerSpec(model_folder=ready_folder(ready), config=config, objective=CrossEntropy())
    once = ready.each("apply", norm_after, 1, 1.0)
    assert once[0] == pytest.approx(once[1], rel=1e-6)
    ready.call("setup", spec)
    thrice = ready.each("apply", norm_after, 3, 1.0)
    tolerance = 2e-2 if config.dtype == "bf16" else 1e-5
    assert thrice[0] == pytest.approx(3 * once[0], rel=tolerance)
    ready.call("setup", spec)
    scaled = ready.each("apply", norm_after, 1, 3.0)
    assert scaled[0] == pytest.approx(3 * once[0], rel=tolerance)
    # and over ranks: two equal ranks have twice the gradient of one
    alone = gradient_norm_of_one(spec)
    assert once[0] == pytest.approx(2 * alone, rel=tolerance)


def ready_folder(ranks: Ranks) -> str:
    return str(ranks.each("apply", _folder)[0])


def _folder(learner: LearnerRank) -> str:
    return learner._stage.spec.model_folder


def gradient_norm_of_one(spec: LearnerSpec) -> float:
    learner = LearnerRank(0, list)
    learner.setup(replace(spec, config=replace(TORCH, ranks=1, dtype=spec.config.dtype)))
    return norm_after(learner, 1, 1.0)


def test_a_norm_that_is_not_finite_leaves_the_weights_and_the_next_update_works(ready: Ranks) -> None:
    before = ready.each("apply", checksums)
    norms = ready.each("apply", norm_after, 1, float("inf"))
    assert not any(np.isfinite(norms))
    assert ready.each("apply", checksums) == before
    assert all(np.isfinite(ready.each("apply", norm_after, 1, 1.0)))
    after = ready.each("apply", checksums)
    assert after != before
    assert after[0] == after[1]


def test_gradients_are_zero_after_an_update(ready: Ranks) -> None:
    first = ready.each("apply", norm_after, 2, 1.0)
    assert all(np.isfinite(first))
    assert ready.each("apply", norm_after, 1, 0.0) == [0.0, 0.0]


def test_probing_without_gradient_between_passes_changes_nothing(ready: Ranks) -> None:
    once = ready.each("apply", norm_after, 1, 1.0)
    spec = LearnerSpec(model_folder=ready_folder(ready), config=ready_config(ready), objective=CrossEntropy())
    ready.call("setup", spec)
    assert ready.each("apply", probed_norm) == once


def ready_config(ranks: Ranks) -> LearnerConfig:
    config = ranks.each("apply", _config)[0]
    assert isinstance(config, LearnerConfig)
    return config


def _config(learner: LearnerRank) -> LearnerConfig:
    return learner._stage.config


def probed_norm(learner: LearnerRank) -> float:
    backend = backend_of(learner)
    (batch,) = pack(drawn_samples(4), 1000)
    output = backend.model(batch, 1.0)
    with torch.no_grad():
        backend.model(batch, 1.0)
    backend.backward((batch.weights * batch.advantages * output.logprobs).sum())
    with torch.no_grad():
        backend.model(batch, 1.0)
    return backend.apply(0)
