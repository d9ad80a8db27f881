"""Do this machine's matrix kernels give a row the same bits wherever it stands and however many rows there
are?

Matrix libraries choose tiles by shape; the order in which a row's products are summed can then change. The
torch engine asks once per model instead of assuming.
"""

from __future__ import annotations

import numpy as np
import torch

from treadle.actors.rollout.config import RolloutConfig
from treadle.actors.rollout.hf_model import HfModel
from treadle.actors.rollout.kv_cache import SlotCache

_PREFIX_TOKENS = 7


def rows_are_independent(model: HfModel, config: RolloutConfig) -> bool:
    """Computes one row's logits with every number of blocks, at several places, with a short and a longer
    neighbour's look-back, and prefills it alone and in company."""
    random = np.random.default_rng(0)
    prompts = random.integers(0, model.vocabulary, (3, _PREFIX_TOKENS + 1)).astype(np.int32)
    alone = model.prefill([prompts[0, :-1]])[0]
    company = model.prefill(list(prompts[:, :-1]))
    same_prefill = all(
        torch.equal(a, b)
        for one, other in zip(alone, company[0], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    if not same_prefill:
        return False
    cache = SlotCache(config.slots, config.kv_step_tokens)
    reference: torch.Tensor | None = None
    spans = (_PREFIX_TOKENS + 1, config.kv_step_tokens + 1)  # one step and two
    for n in range(config.row_block, config.slots + 1, config.row_block):
        for place, longest in zip((0, min(n // 2 + 1, n - 1), n - 1), (*spans, spans[0]), strict=True):
            others = [slot for slot in range(n) if slot != place]
            cache.put([place], alone)
            cache.put(others, company[1])
            tokens = torch.full((n,), int(prompts[1, -1]), device=config.device)
            tokens[place] = int(prompts[0, -1])
            positions = torch.full((n,), _PREFIX_TOKENS, device=config.device)
            logits = model.decode(tokens, positions, longest, cache)[place]
            if reference is not None and not torch.equal(logits, reference):
                return False
            reference = logits
    return True
