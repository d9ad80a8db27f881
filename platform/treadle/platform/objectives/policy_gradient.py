"""What all policy-gradient objectives share: truncated importance weights and a KL term in the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from treadle.platform.errors import ConfigError
from treadle.platform.objectives.base import GroupCredit, ScoredGroup, TokenInputs, TokenLosses
from treadle.platform.objectives.kl import KL_ESTIMATORS
from treadle.platform.objectives.ratios import Surrogate, truncated_weight

Weights = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(ABC):
    """loss_t = w_t · surrogate_t + β · KL_t, with w_t the truncated importance weight (1 without one).

    A subclass gives `credit` (who gets which advantage, and the denominator) and `surrogate` (the policy
    term); its fields are its configuration.
    """

    kind: str

    kl_coefficient: float = 0.0
    """β; 0 needs no reference policy."""
    kl_estimator: str = "k3"
    """k1, k2 or k3; see `kl.py` for what their gradients do."""
    kl_unbiased: bool = False
    """Multiply the estimator with the importance ratio (DeepSeek-V3.2)."""
    tis_cap: float = 2.0
    """C of the truncated importance weight against the engine's log-probabilities; 0 switches it off."""

    needs_groups: ClassVar[bool] = True
    takes_parts: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0

    @property
    def dynamic_sampling(self) -> bool:
        return False

    @abstractmethod
    def credit(self, groups: Sequence[ScoredGroup]) -> list[GroupCredit]: ...

    @abstractmethod
    def surrogate(self, inputs: TokenInputs) -> Surrogate: ...

    def token_losses(self, inputs: TokenInputs) -> TokenLosses:
        """Raises ConfigError when a KL term is asked for without reference log-probabilities."""
        policy = self.surrogate(inputs)
        metrics = {"ratio": policy.ratio, "clip_fraction": policy.clipped}
        losses = policy.losses
        weight = truncated_weight(inputs, self.tis_cap)
        if weight is not None:
            losses = losses * weight
            metrics["is_weight"] = weight
        if inputs.ref_logprobs is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](inputs.logprobs, inputs.ref_logprobs)
            metrics["kl"] = kl
            if self.needs_reference:
                losses = losses + self.kl_coefficient * (kl * policy.ratio if self.kl_unbiased else kl)
        elif self.needs_reference:
            raise ConfigError(
                f"objective.kl_coefficient={self.kl_coefficient} but there are no reference logprobs.",
                "Give the learner a reference policy, or set objective.kl_coefficient=0.",
            )
        return TokenLosses(losses=losses, metrics={name: value.detach() for name, value in metrics.items()})

    def check(self) -> None:
        """Raises ConfigError for a setting that cannot work."""
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ConfigError(
                f"objective.kl_estimator={self.kl_estimator!r} is not one of {', '.join(KL_ESTIMATORS)}.",
                "Set it to one of these.",
            )
        refuse_negative(kl_coefficient=self.kl_coefficient, tis_cap=self.tis_cap)


def refuse_negative(**settings: float) -> None:
    """Raises ConfigError naming the first of these objective settings that is below 0 or not a number."""
    for name, value in settings.items():
        if not value >= 0:
            raise ConfigError(
                f"objective.{name}={value} must not be negative.", f"Set objective.{name} to 0 or more."
            )


def paired(advantages: Sequence[Weights], weights: Sequence[Weights]) -> list[GroupCredit]:
    """Pairs advantages and weights; a sample that does not count gets advantage 0 as well."""
    return [GroupCredit(advantages=a * (w > 0), weights=w) for a, w in zip(advantages, weights, strict=True)]
