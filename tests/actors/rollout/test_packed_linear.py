"""The torch engine's packed linear layers: the same numbers as the plain ones, before and after new weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.actors.rollout.test_torch_engine import assert_same_bits, draw_all, engine_of
from tests.actors.rollout.tiny_models import issue, write_model
from torch import nn
from transformers import AutoModelForCausalLM

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.hf_model import HfModel
from treadle.actors.rollout.packed_linear import CACHED_ELEMENTS, pack_linears
from treadle.kernels.digest import state_digest
from treadle.platform.records import WeightVersion

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
SEQUENCES = [np.arange(5, 25, dtype=np.int32), np.arange(30, 7, -1, dtype=np.int32)]


def large_layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1024, 1056), nn.SiLU(), nn.Linear(1056, 1000, bias=False)).to(dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models of 2.8M weights in linear layers, with heads too small for a decode step of their own."""
    return [
        write_model(tmp_path_factory.mktemp("large"), width=256, layers=4, heads=16, seed=seed, spread=0.08)
        for seed in (0, 1)
    ]


def hf_logprobs(folder: str) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found = []
    for sequence in SEQUENCES:
        ids = torch.from_numpy(sequence.astype(np.int64))[None]
        with torch.no_grad():
            scores = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        found.append(scores.gather(1, ids[0, 1:, None])[:, 0].numpy())
    return np.concatenate(found)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [1, 4, 20, 64])
@torch.inference_mode()
def test_packed_layers_compute_what_plain_ones_do(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    plain, packed = large_layers(dtype), large_layers(dtype)
    assert len(pack_linears(packed, 32)) == 2
    x = torch.randn(rows, 1, 1024, dtype=dtype)
    torch.testing.assert_close(packed(x), plain(x), atol=tolerance, rtol=tolerance)


@torch.inference_mode()
def test_new_weights_count_from_the_next_renewal_on() -> None:
    model = large_layers()
    packed = pack_linears(model, 32)
    x = torch.randn(4, 1024)
    old = model(x)
    for layer in (model[0], model[2]):
        layer.weight.mul_(2.0)
    torch.testing.assert_close(model(x), old, atol=0, rtol=0)
    for layer in packed:
        layer.renew()
    assert not torch.allclose(model(x), old)


def test_a_model_that_stays_in_the_caches_keeps_its_plain_layers() -> None:
    side = int(CACHED_ELEMENTS**0.5) - 1
    layer = nn.Linear(side, side)
    assert pack_linears(layer, 32) == []
    assert "forward" not in vars(layer)


def test_layers_of_another_dtype_stay_plain() -> None:
    assert pack_linears(large_layers(torch.float64), 32) == []


def test_an_engine_with_packed_layers_scores_like_transformers_and_so_after_adoption(
    folders: list[str],
) -> None:
    model = HfModel(RolloutConfig(max_context_tokens=96), folders[0])
    assert model.packed_layers == 4 * 7 + 1
    assert not model.decode_is_written_out
    np.testing.assert_allclose(model.logprobs(SEQUENCES), hf_logprobs(folders[0]), atol=1e-4)
    state = AutoModelForCausalLM.from_pretrained(folders[1]).state_dict()
    del state["lm_head.weight"]  # tied
    assert model.replace_weights(state.items()) == state_digest(state.items())
    np.testing.assert_allclose(model.logprobs(SEQUENCES), hf_logprobs(folders[1]), atol=1e-4)
    assert np.abs(hf_logprobs(folders[0]) - hf_logprobs(folders[1])).max() > 0.1


def test_samples_of_packed_layers_do_not_depend_on_neighbours_or_slots(folders: list[str]) -> None:
    asked = [
        issue(f"p{i}", prompt=prompt, max_new_tokens=24) for i, prompt in enumerate(("1+1=", "12+34=", "9"))
    ]
    together = engine_of(folders[0], slots=16, row_block=4)
    assert together.row_block == 4, "rows of these kernels are independent of how many there are"
    found = draw_all(together, asked)
    for one in asked:
        for key, alone in draw_all(engine_of(folders[0], slots=4, row_block=4), [one]).items():
            assert_same_bits(found[key].sample, alone.sample)


def test_samples_after_adoption_are_those_of_a_fresh_engine(folders: list[str]) -> None:
    engine = engine_of(folders[0], slots=16, row_block=4)
    state = AutoModelForCausalLM.from_pretrained(folders[1]).state_dict()
    engine.adopt(WeightVersion(step=1), iter(state.items()))
    asked = [issue("p", prompt="7*8=")]
    fresh = draw_all(engine_of(folders[1], slots=16, row_block=4), asked)
    found = draw_all(engine, asked)
    assert found.keys() == fresh.keys()
    for key, finished in fresh.items():
        np.testing.assert_array_equal(found[key].sample.logprobs, finished.sample.logprobs)
