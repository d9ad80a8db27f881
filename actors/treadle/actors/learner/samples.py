"""From a row's members to train samples: a share's credit is written onto its drawn samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from treadle.platform.errors import LearnerError
from treadle.platform.records import Credit, Group, Ref, Sample, Share, TrainSample

Resolver = Callable[[Sequence[Ref]], Sequence[Group]]
"""Opens the references of groups, in order."""


def train_samples(row: Sequence[Share | TrainSample], resolve: Resolver) -> list[TrainSample]:
    """The row's sequences in dealt order. Raises LearnerError for a reference to another group than named."""
    shares = [member for member in row if isinstance(member, Share)]
    groups = dict(zip((s.group_id for s in shares), resolve([s.group for s in shares]), strict=True))
    samples: list[TrainSample] = []
    for member in row:
        if isinstance(member, TrainSample):
            samples.append(member)
            continue
        group = groups[member.group_id]
        if group.id != member.group_id:
            raise LearnerError(f"learner: the reference of group {member.group_id} holds group {group.id}.")
        samples.extend(_credited(group.samples[credit.sample_index], credit) for credit in member.credits)
    return samples


def _credited(sample: Sample, credit: Credit) -> TrainSample:
    n = len(sample.token_ids)
    return TrainSample(
        token_ids=sample.token_ids,
        loss_mask=sample.loss_mask,
        advantages=np.full(n, credit.advantage, dtype=np.float32),
        weights=np.full(n, credit.weight, dtype=np.float32),
        behaviour_logprobs=sample.logprobs,
    )
