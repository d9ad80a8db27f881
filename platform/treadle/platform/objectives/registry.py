"""The algorithms by name: `objective.kind` in a recipe. Adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from treadle.platform.objectives.base import Objective
from treadle.platform.objectives.cispo import Cispo
from treadle.platform.objectives.cross_entropy import CrossEntropy
from treadle.platform.objectives.dapo import Dapo
from treadle.platform.objectives.dr_grpo import DrGrpo
from treadle.platform.objectives.grpo import Grpo
from treadle.platform.objectives.gspo import Gspo
from treadle.platform.objectives.reinforce_pp import ReinforcePlusPlus
from treadle.platform.objectives.rloo import Rloo

OBJECTIVES: Mapping[str, type[Objective]] = {
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "dapo": Dapo,
    "gspo": Gspo,
    "cispo": Cispo,
    "rloo": Rloo,
    "reinforce_pp": ReinforcePlusPlus,
    "cross_entropy": CrossEntropy,
}
