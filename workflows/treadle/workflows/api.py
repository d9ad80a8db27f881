"""What a program of your own needs: `from treadle.workflows.api import …`.

Example (the README's):

    async with open_run(load_recipe("grpo"), Path("runs/mine")) as run, run.begin("grpo") as journal:
        async for report in grpo(run.roles, recipe.stages["grpo"], run.inputs["grpo"].train, journal):
            print(report.step, report.metrics["reward/mean"])
"""

from treadle.workflows.evaluate import EvalReport, EvaluateConfig, evaluate
from treadle.workflows.fit import fit
from treadle.workflows.grpo import grpo
from treadle.workflows.launch import open_run, play
from treadle.workflows.recipe import Recipe, load_recipe
from treadle.workflows.roles import Roles
from treadle.workflows.stages import run_stage

__all__ = [
    "EvalReport",
    "EvaluateConfig",
    "Recipe",
    "Roles",
    "evaluate",
    "fit",
    "grpo",
    "load_recipe",
    "open_run",
    "play",
    "run_stage",
]
