"""Learner settings: what cannot work is refused with the setting's name; the schedule is what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from treadle.actors.learner.config import LearnerConfig
from treadle.platform.errors import ConfigError

PLAIN = LearnerConfig()


def test_the_defaults_work() -> None:
    PLAIN.check()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backend": "jax"}, "learner.backend=jax"),
        ({"dtype": "fp16"}, "learner.dtype=fp16"),
        ({"schedule": "cos"}, "optim.schedule=cos"),
        ({"packing": "dense"}, "learner.packing=dense"),
        ({"ranks": 0}, "learner.ranks=0"),
        ({"zero": 4}, "learner.zero=4"),
        ({"zero": 0, "dtype": "bf16"}, "learner.zero=0 with learner.dtype=bf16"),
        ({"lr": 0.0}, "optim.lr=0.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"betas": (0.9, 1.0)}, "optim.betas"),
        ({"min_lr_ratio": 2.0}, "optim.min_lr_ratio"),
        ({"schedule": "linear", "total_steps": 5, "warmup_steps": 5}, "optim.warmup_steps=5"),
        ({"gpus": 0.5}, "learner.gpus=0.5"),
        ({"grad_clip": -1.0}, "optim.grad_clip"),
        ({"step_deadline_s": 0.0}, "learner.step_deadline_s"),
    ],
)
def test_a_setting_that_cannot_work_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        replace(PLAIN, **changes).check()
    assert named in str(error.value)


def test_plain_torch_trains_in_bf16_without_zero() -> None:
    replace(PLAIN, backend="torch", zero=0, dtype="bf16").check()


def test_warm_up_rises_to_the_peak_in_its_last_step() -> None:
    config = replace(PLAIN, lr=1.0, warmup_steps=4)
    assert [config.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_ends_at_the_floor() -> None:
    config = replace(PLAIN, lr=2.0, schedule="linear", total_steps=10, min_lr_ratio=0.1)
    assert config.lr_at(0) == 2.0
    assert config.lr_at(5) == pytest.approx(2.0 * 0.55)
    assert config.lr_at(10) == config.lr_at(99) == pytest.approx(0.2)


def test_cosine_decay_passes_the_middle_half_way() -> None:
    config = replace(PLAIN, lr=2.0, schedule="cosine", warmup_steps=2, total_steps=12)
    assert config.lr_at(2) == 2.0
    assert config.lr_at(7) == pytest.approx(1.0)
    assert config.lr_at(12) == pytest.approx(0.0, abs=1e-12)
