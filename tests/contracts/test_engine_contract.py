"""What every engine promises. A new engine joins by one entry in `SUBJECTS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.actors.rollout.tiny_models import issue, write_model
from tests.fakes import FakeEngine, weights_of
from transformers import AutoModelForCausalLM

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import build_engine
from treadle.kernels.digest import state_digest
from treadle.platform.contracts import Engine, EngineSample
from treadle.platform.errors import DataError, TreadleError
from treadle.platform.records import Issue, StopReason, WeightVersion

CONFIG = RolloutConfig(slots=16, max_context_tokens=96)
V0 = WeightVersion(step=0)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """How to make a fresh engine, and other weights that fit it."""

    make: Callable[[], Engine]
    other: Callable[[], Mapping[str, torch.Tensor]]


def torch_subject(base: pytest.TempPathFactory) -> Subject:
    folder = write_model(base.mktemp("model"))
    other = write_model(base.mktemp("other"), seed=1)
    return Subject(
        make=lambda: build_engine(CONFIG, folder, V0),
        other=lambda: AutoModelForCausalLM.from_pretrained(other).state_dict(),
    )


def fake_subject(_: pytest.TempPathFactory) -> Subject:
    return Subject(make=lambda: FakeEngine(CONFIG, V0), other=lambda: weights_of(2.0))


SUBJECTS = {"torch": torch_subject, "fake": fake_subject}


@pytest.fixture(scope="module", params=list(SUBJECTS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return SUBJECTS[request.param](tmp_path_factory)


def issues() -> list[Issue]:
    return [
        issue(f"p{n}", prompt=f"{n}+{n}=", group_size=3 + n % 3, max_new_tokens=12 + 4 * (n % 4))
        for n in range(6)
    ]


def drain(engine: Engine) -> dict[tuple[str, int], EngineSample]:
    found: dict[tuple[str, int], EngineSample] = {}
    while not engine.idle:
        for finished in engine.step():
            assert (finished.issue_id, finished.sample.index) not in found
            found[finished.issue_id, finished.sample.index] = finished
    return found


def drawn_by(engine: Engine, wanted: list[Issue]) -> dict[tuple[str, int], EngineSample]:
    for one in wanted:
        engine.admit(one)
    return drain(engine)


def test_it_keeps_the_protocol(subject: Subject) -> None:
    assert isinstance(subject.make(), Engine)


def test_a_new_engine_is_idle_and_draws_nothing(subject: Subject) -> None:
    engine = subject.make()
    assert engine.idle
    assert engine.step() == []


def test_every_sample_is_delivered_once_and_then_the_engine_is_idle(subject: Subject) -> None:
    engine = subject.make()
    found = drawn_by(engine, issues())
    assert set(found) == {(i.id, n) for i in issues() for n in range(i.sampling.group_size)}
    assert engine.idle


def test_samples_are_well_formed(subject: Subject) -> None:
    by_id = {i.id: i for i in issues()}
    for finished in drawn_by(subject.make(), issues()).values():
        one, sample = by_id[finished.issue_id], finished.sample
        prompt = one.prompt.token_ids
        np.testing.assert_array_equal(sample.token_ids[: len(prompt)], prompt)
        assert not sample.loss_mask[: len(prompt)].any()
        assert sample.loss_mask[len(prompt) :].all()
        assert 1 <= sample.drawn_tokens <= one.sampling.max_new_tokens
        assert (sample.stop is StopReason.LENGTH) <= (sample.drawn_tokens == one.sampling.max_new_tokens)
        assert (sample.logprobs[len(prompt) :] <= 0).all()
        assert (sample.logprobs[: len(prompt)] == 0).all()
        assert len(finished.text) > 0


def test_the_same_issue_gives_the_same_samples_in_any_company(subject: Subject) -> None:
    together = drawn_by(subject.make(), issues()[::-1])
    for one in issues():
        for key, finished in drawn_by(subject.make(), [one]).items():
            np.testing.assert_array_equal(finished.sample.token_ids, together[key].sample.token_ids)
            np.testing.assert_array_equal(finished.sample.logprobs, together[key].sample.logprobs)


def test_samples_depend_on_seed_index_and_version(subject: Subject) -> None:
    def tokens(**changes: int) -> list[list[int]]:
        found = drawn_by(subject.make(), [issue("a", group_size=6, **changes)])  # type: ignore[arg-type]
        return [found["test/a", n].sample.token_ids.tolist() for n in range(6)]

    plain = tokens()
    assert len({tuple(t) for t in plain}) > 1
    assert tokens(seed=8) != plain
    assert tokens(step=1) != plain


def test_drawn_logprobs_are_those_the_probe_reports(subject: Subject) -> None:
    engine = subject.make()
    found = [f.sample for f in drawn_by(engine, issues()).values()]
    probe = engine.logprobs([s.token_ids for s in found])
    assert probe.shape == (sum(len(s.token_ids) - 1 for s in found),)
    start = 0
    for sample in found:
        values = probe[start : start + len(sample.token_ids) - 1]
        start += len(values)
        mask = sample.loss_mask[1:]
        np.testing.assert_allclose(values[mask], sample.logprobs[1:][mask], atol=2e-5)


def test_adoption_returns_the_digest_and_changes_what_is_drawn(subject: Subject) -> None:
    engine, state = subject.make(), subject.other()
    before = {k: f.sample.token_ids.tolist() for k, f in drawn_by(engine, issues()).items()}
    version = WeightVersion(step=1)
    assert engine.adopt(version, iter(state.items())) == state_digest(state.items())
    after = drawn_by(engine, issues())
    assert {k: f.sample.token_ids.tolist() for k, f in after.items()} != before
    assert {(f.sample.oldest.step, f.sample.newest.step) for f in after.values()} == {(1, 1)}


def test_unfinished_rows_go_on_after_an_adoption(subject: Subject) -> None:
    engine = subject.make()
    one = issue("a", group_size=8, max_new_tokens=40, temperature=1.2)
    engine.admit(one)
    early = [f for _ in range(3) for f in engine.step()]
    engine.adopt(WeightVersion(step=1), iter(subject.other().items()))
    late = drain(engine)
    assert len(early) + len(late) == 8
    assert {(f.sample.oldest.step, f.sample.newest.step) for f in late.values()} == {(0, 1)}


def test_weights_of_another_model_are_refused(subject: Subject) -> None:
    engine = subject.make()
    before = drawn_by(engine, issues())
    with pytest.raises(TreadleError):
        engine.adopt(WeightVersion(step=1), iter([("nobody.knows.me", torch.ones(2))]))
    for key, finished in drawn_by(engine, issues()).items():
        np.testing.assert_array_equal(finished.sample.token_ids, before[key].sample.token_ids)
        assert finished.sample.newest == V0


def test_a_prompt_that_cannot_fit_is_refused_by_name(subject: Subject) -> None:
    engine = subject.make()
    with pytest.raises(DataError, match="prompt long"):
        engine.admit(issue("long", prompt="1" * 90))
    assert engine.idle
