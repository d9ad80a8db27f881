"""The vLLM engine on the CPU, against transformers. One engine serves most tests, in a thread of its own as in a
worker; each test leaves it idle and with the weights of `folder`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.actors.rollout.tiny_models import issue, symbol_tokenizer, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.engines import FinishedSample
from treadle.actors.rollout.vllm_engine import VllmEngine, build
from treadle.kernels.digest import state_digest
from treadle.platform.contracts import Engine
from treadle.platform.errors import ConfigError, DataError, MismatchError
from treadle.platform.records import Issue, StopReason, WeightVersion

pytestmark = pytest.mark.vllm

T = TypeVar("T")
CONFIG = RolloutConfig(engine="vllm", slots=16, row_block=16, max_context_tokens=96)
V0 = WeightVersion(step=0)
EOS = symbol_tokenizer().eos_token_id


class Engines:
    """Runs what it is given in one thread: vLLM keeps state per thread."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.engine: VllmEngine | None = None

    def build(self, folder: str, config: RolloutConfig = CONFIG) -> None:
        def act() -> None:
            self.engine = None
            engine = build(config, folder, V0)
            assert isinstance(engine, VllmEngine)
            self.engine = engine

        self.thread.submit(act).result()

    def do(self, question: Callable[[VllmEngine], T]) -> T:
        assert self.engine is not None
        return self.thread.submit(question, self.engine).result()

    def draw(self, *issues: Issue) -> dict[tuple[str, int], FinishedSample]:
        def act(engine: VllmEngine) -> dict[tuple[str, int], FinishedSample]:
            for one in issues:
                engine.admit(one)
            return drain(engine)

        return self.do(act)

    def adopt(self, folder: str, step: int) -> str:
        return self.do(lambda engine: engine.adopt(WeightVersion(step=step), iter(weights(folder))))


def drain(engine: VllmEngine) -> dict[tuple[str, int], FinishedSample]:
    found: dict[tuple[str, int], FinishedSample] = {}
    while not engine.idle:
        for finished in engine.step():
            assert isinstance(finished, FinishedSample)
            key = (finished.issue_id, finished.sample.index)
            assert key not in found, "a sample is delivered once"
            found[key] = finished
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("vllm"), tied=False, width=128, spread=0.1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("other"), tied=False, width=128, spread=0.1, seed=1)


@pytest.fixture(scope="module")
def engines(folder: str) -> Iterator[Engines]:
    made = Engines()
    made.build(folder)
    yield made
    made.engine = None
    made.thread.shutdown()


def weights(folder: str) -> list[tuple[str, torch.Tensor]]:
    return list(model(folder).state_dict().items())


@lru_cache
def model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def reference(folder: str, tokens: Sequence[int], temperature: float = 1.0) -> NDArray[np.float64]:
    """[T-1] log-probabilities by transformers."""
    with torch.no_grad():
        logits = model(folder)(torch.tensor([list(tokens)])).logits[0, :-1].double()
    scores = torch.log_softmax(logits / temperature, dim=-1)
    return scores.gather(1, torch.tensor(list(tokens))[1:, None])[:, 0].numpy()


def greedy(folders: Sequence[str], prompt: Sequence[int]) -> list[int]:
    """Token t by the model of `folders[t]`, over the whole prefix."""
    tokens = list(prompt)
    models = {folder: model(folder) for folder in folders}
    for folder in folders:
        with torch.no_grad():
            tokens.append(int(models[folder](torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


def test_it_is_an_engine_and_idle_at_first(engines: Engines) -> None:
    assert engines.do(lambda engine: isinstance(engine, Engine) and engine.idle and engine.step() == [])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_drawn_logprobs_are_those_of_transformers_at_the_temperature(
    engines: Engines, folder: str, temperature: float
) -> None:
    drawn = engines.draw(*(issue(name, temperature=temperature, max_new_tokens=30) for name in "ab"))
    assert len(drawn) == 8
    for finished in drawn.values():
        sample = finished.sample
        expected = reference(folder, sample.token_ids.tolist(), temperature)[sample.loss_mask[1:]]
        np.testing.assert_allclose(sample.logprobs[sample.loss_mask], expected, atol=1e-4)
        assert (sample.logprobs[~sample.loss_mask] == 0).all()
        assert sample.oldest.step == sample.newest.step == 0


def test_scores_are_those_of_transformers_up_to_the_full_context(engines: Engines, folder: str) -> None:
    random = np.random.default_rng(0)
    sequences = [random.integers(2, 40, n).astype(np.int32) for n in (96, 2, 1, 17)]
    found = engines.do(lambda engine: engine.logprobs(sequences))
    expected = np.concatenate([reference(folder, s.tolist()) for s in sequences if len(s) > 1])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert engines.do(lambda engine: engine.logprobs([])).shape == (0,)


def test_adopted_weights_are_the_ones_it_draws_and_scores_with(
    engines: Engines, folder: str, other: str
) -> None:
    probe = [np.arange(2, 40, dtype=np.int32)]
    one = issue("adopt", temperature=0.0, max_new_tokens=24, group_size=2)
    prompt = one.prompt.token_ids.tolist()
    for source, step in ((other, 1), (folder, 2)):
        assert engines.adopt(source, step) == state_digest(weights(source))
        found = engines.do(lambda engine: engine.logprobs(probe))
        np.testing.assert_allclose(found, reference(source, probe[0].tolist()), atol=1e-4)
        for finished in engines.draw(one).values():
            assert finished.sample.token_ids.tolist() == greedy([source] * 24, prompt)
            assert finished.sample.newest.step == step
    assert greedy([folder] * 24, prompt) != greedy([other] * 24, prompt)
    difference = reference(folder, probe[0].tolist()) - reference(other, probe[0].tolist())
    assert np.abs(difference).max() > 0.1, "the two models must differ for this test to mean anything"


def test_unfinished_rows_go_on_from_their_prefix_with_the_new_weights(
    engines: Engines, folder: str, other: str
) -> None:
    one = issue("prefix", temperature=0.0, max_new_tokens=24, group_size=3)

    def act(engine: VllmEngine) -> dict[tuple[str, int], FinishedSample]:
        engine.admit(one)
        for _ in range(9):
            assert engine.step() == []
        engine.adopt(WeightVersion(step=5), iter(weights(other)))
        return drain(engine)

    drawn = engines.do(act)
    expected = greedy([folder] * 9 + [other] * 15, one.prompt.token_ids.tolist())
    assert expected != greedy([folder] * 24, one.prompt.token_ids.tolist())
    assert len(drawn) == 3
    for finished in drawn.values():
        sample = finished.sample
        assert sample.token_ids.tolist() == expected
        prefix = len(one.prompt.token_ids) + 9
        parts = [reference(folder, expected)[: prefix - 1], reference(other, expected)[prefix - 1 :]]
        scores = np.concatenate(parts)[len(one.prompt.token_ids) - 1 :]
        np.testing.assert_allclose(sample.logprobs[sample.loss_mask], scores, atol=1e-4)
        assert sample.newest.step == 5
        assert sample.oldest.step != 5
    engines.adopt(folder, 0)


def test_rows_end_at_eos_at_a_stop_string_or_at_the_length(engines: Engines) -> None:
    drawn = engines.draw(
        issue("plain", max_new_tokens=40, group_size=12),
        issue("tags", max_new_tokens=40, group_size=12, stop=("3", "<answer>")),
    )
    assert {finished.sample.stop for finished in drawn.values()} == set(StopReason)
    tokenizer = symbol_tokenizer()
    for (name, _), finished in drawn.items():
        tokens = finished.sample.token_ids[finished.sample.loss_mask].tolist()
        assert finished.text == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert EOS not in tokens[:-1]
        stopped = name == "test/tags" and finished.text.endswith(("3", "<answer>"))
        expected = StopReason.EOS if tokens[-1] == EOS else StopReason.TAG if stopped else StopReason.LENGTH
        assert finished.sample.stop == expected
        if name == "test/tags":
            assert not any(stop in finished.text[:-8] for stop in ("3", "<answer>"))
        if finished.sample.stop is StopReason.LENGTH:
            assert len(tokens) == 40


def test_the_same_seed_draws_the_same_and_another_does_not(engines: Engines) -> None:
    first = engines.draw(issue("seeded", group_size=8))
    again = engines.draw(issue("seeded", group_size=8))
    texts = [finished.text for finished in first.values()]
    assert {key: finished.text for key, finished in again.items()} == {
        key: finished.text for key, finished in first.items()
    }
    assert len(set(texts)) == 8
    for change in ({"seed": 8}, {"step": 1}):
        changed = engines.draw(issue("seeded", group_size=8, **change))  # type: ignore[arg-type]
        assert not {finished.text for finished in changed.values()} & set(texts)


def test_scoring_while_rows_are_drawn_loses_none(engines: Engines, folder: str) -> None:
    probe = [np.arange(2, 40, dtype=np.int32)]

    def act(engine: VllmEngine) -> tuple[NDArray[np.float32], dict[tuple[str, int], FinishedSample]]:
        engine.admit(issue("busy", group_size=8, max_new_tokens=6))
        for _ in range(4):
            found = engine.logprobs(probe)
        return found, drain(engine)

    found, drawn = engines.do(act)
    np.testing.assert_allclose(found, reference(folder, probe[0].tolist()), atol=1e-4)
    assert len(drawn) == 8


def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    engines: Engines, folder: str, other: str
) -> None:
    given = weights(other)
    name, tensor = given[3]
    bad = {
        "not published": given[1:],
        "has no tensor": [*given, ("model.extra.weight", tensor)],
        "bfloat16": [(n, t.bfloat16()) for n, t in given],
        name: [*given[:3], (name, tensor[:1]), *given[4:]],
    }
    for says, tensors in bad.items():
        with pytest.raises(MismatchError, match=says):
            engines.do(lambda engine, tensors=tensors: engine.adopt(V0, iter(tensors)))  # type: ignore[misc]
    probe = [np.arange(2, 40, dtype=np.int32)]
    found = engines.do(lambda engine: engine.logprobs(probe))
    np.testing.assert_allclose(found, reference(folder, probe[0].tolist()), atol=1e-4)


def test_prompts_that_cannot_be_drawn_are_named(engines: Engines) -> None:
    for one, says in (
        (issue("long", max_new_tokens=95), r"prompt long of 6 tokens plus max_new_tokens=95"),
        (issue("empty", prompt=""), "prompt empty is empty"),
    ):
        with pytest.raises(DataError, match=says):
            engines.do(lambda engine, one=one: engine.admit(one))  # type: ignore[misc]
    with pytest.raises(DataError, match="97 tokens"):
        engines.do(lambda engine: engine.logprobs([np.full(97, 5, np.int32)]))
    assert engines.do(lambda engine: engine.idle)


def test_models_that_it_would_compute_wrongly_are_refused(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", tied=True, width=128)
    with pytest.raises(ConfigError, match=r"tie_word_embeddings.*model.tie_embeddings=false"):
        build(CONFIG, tied, V0)
    narrow = write_model(tmp_path / "narrow", tied=False, width=32)
    with pytest.raises(ConfigError, match="heads of 8 features"):
        build(CONFIG, narrow, V0)
    short = write_model(tmp_path / "short", tied=False, width=128, positions=64)
    with pytest.raises(ConfigError, match="64 positions"):
        build(CONFIG, short, V0)
    with pytest.raises(DataError, match=r"config.json"):
        build(CONFIG, str(tmp_path), V0)


def test_another_model_can_be_loaded_in_the_same_process(engines: Engines, tmp_path: Path) -> None:
    deeper = write_model(tmp_path / "deeper", tied=False, width=64, heads=2, kv_heads=1, layers=3, spread=0.1)
    assert AutoConfig.from_pretrained(deeper).num_hidden_layers == 3
    engines.build(deeper)
    probe = [np.arange(2, 40, dtype=np.int32)]
    found = engines.do(lambda engine: engine.logprobs(probe))
    np.testing.assert_allclose(found, reference(deeper, probe[0].tolist()), atol=1e-4)
