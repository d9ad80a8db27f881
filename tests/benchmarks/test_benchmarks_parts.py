"""The parts of the benchmarks that measure nothing: statistics, tables, bounds, and the model of known lengths."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.benchmarks import step_loads
from tests.benchmarks.bench_overlap import overlap_rows
from tests.benchmarks.bench_rows import (
    against_neighbours,
    append_rows,
    compared,
    lengths_line,
    mean_and_sd,
    read_rows,
    run_command,
    spread,
    table,
)
from tests.benchmarks.bench_step import of_ranks, quick, step_row
from tests.benchmarks.bench_supervision import OFTENER, Stretch, rows_of
from tests.benchmarks.markov_model import Shape, log_transitions, transitions, write_markov_model
from tests.benchmarks.reproduce_demo import Accuracy, DemoRun, broken_bounds, broken_control, lines_of
from tests.benchmarks.step_loads import DEMO, LOADS, grpo_stage, step_recipe
from tests.benchmarks.step_ours import StepRun, WatchedRollouts
from tests.benchmarks.trl_setups import SETUPS, SHORTLIST

from treadle.workflows.data.tokenization import character_tokenizer

RUN = StepRun(setup="a side", step_s=[1.0, 3.0], lengths=[4, 5], reward_mean=0.5, zero_spread=0.0)


def demo_run(sft: float, grpo: float, student: float, name: str = "seed-1") -> DemoRun:
    values = {"sft": sft, "grpo": grpo, "student": student}
    stages = {k: Accuracy(sampled=v, greedy=v, ci95=0.01) for k, v in values.items()}
    return DemoRun(name=name, seed=1, wall_s=200.0, stages=stages)


def test_a_row_carries_ours_over_theirs() -> None:
    row = compared("step", 1.0, 4.0, "s", command="make bench")
    assert (row.ratio, row.command) == (0.25, "make bench")
    assert "load" in row.hardware


@pytest.mark.parametrize("theirs", [0.0, math.nan])
def test_nothing_measured_is_no_row(theirs: float) -> None:
    with pytest.raises(ValueError, match="no comparison"):
        compared("step", 1.0, theirs, "s", command="make bench")


def test_rows_of_the_same_name_are_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    append_rows(path, [compared("a", 1, 2, "s", command="x"), compared("b", 1, 2, "s", command="x")])
    append_rows(path, [compared("a", 2, 2, "s", command="x")])
    assert {row["name"]: row["ratio"] for row in read_rows(path)} == {"a": 1.0, "b": 0.5}
    fields = {"name", "ours", "theirs", "ratio", "unit", "hardware", "command"}
    assert all(fields <= row.keys() for row in json.loads(path.read_text()))


def test_a_table_aligns_numbers_to_the_right() -> None:
    lines = table(
        [{"name": "a", "ours": 1.5}, {"name": "longer", "ours": 12.25}], ["name", "ours"]
    ).splitlines()
    assert lines == ["name     ours", "------  -----", "a         1.5", "longer  12.25"]


def test_spread_and_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.000 [1.500, 2.500] of 3"
    assert spread([]) == "none"
    assert mean_and_sd([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))
    assert math.isnan(mean_and_sd([1.0])[1])


def test_lengths_at_the_limit_are_counted() -> None:
    assert "max 28, at the limit 25.0% (n 4)" in lengths_line([3, 28, 10, 4], 28)


def test_a_failing_child_shows_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match=r"ended with 3(?s:.*)why"):
        run_command(command, log=tmp_path / "log", deadline_s=60)


def test_a_late_child_is_ended(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="took over"):
        run_command(
            [sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "log", deadline_s=0.2
        )


def test_ranks_of_one_run_count_each_step_once_at_the_slowest() -> None:
    both = of_ranks([RUN, replace(RUN, step_s=[2.0, 2.0], lengths=[6])])
    assert both.step_s == [2.0, 3.0]
    assert both.lengths == [4, 5, 6]


def test_the_step_row_compares_medians() -> None:
    row = step_row(DEMO, RUN, replace(RUN, step_s=[4.0, 4.0, 100.0]))
    assert (row.ours, row.theirs, row.ratio) == (2.0, 4.0, 0.5)


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    RUN.write(tmp_path / "run.json")
    assert StepRun.read(tmp_path / "run.json") == RUN


def test_staleness_beyond_the_bound_makes_no_overlap_row() -> None:
    free = replace(RUN, generating_s=[1.0, 1.0], learning_s=[2.0, 2.0], staleness_max=2.0)
    bound = replace(free, staleness_max=0.0)
    ratio, wall = overlap_rows(free, bound)
    assert (ratio.ours, wall.ratio) == (1.0, 1.0)
    with pytest.raises(ValueError, match="exceeds the bound"):
        overlap_rows(replace(free, staleness_max=3.0), bound)


def test_the_demo_is_held_to_its_bounds() -> None:
    assert broken_bounds(demo_run(0.45, 0.9, 0.96)) == []
    assert len(broken_bounds(demo_run(0.7, 0.8, 0.7))) == 3
    assert broken_control(demo_run(0.45, 0.2, 0.0)) == []
    assert broken_control(demo_run(0.45, 0.45, 0.0))


def test_runs_are_listed_with_mean_and_spread() -> None:
    lines = lines_of([demo_run(0.4, 0.9, 0.9), demo_run(0.6, 0.9, 0.9, "seed-2")])
    assert [line["run"] for line in lines] == ["seed-1", "seed-2", "mean", "sd"]
    assert (lines[2]["sft sampled"], lines[3]["sft sampled"]) == ("0.500", "0.141")


@pytest.mark.parametrize("name", sorted(LOADS))
def test_a_load_resolves_to_one_grpo_stage_of_its_size(name: str, tmp_path: Path) -> None:
    load = LOADS[name]
    if name == "tail":
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1=", "answer": "0"}\n')
    recipe = step_recipe(load, tmp_path, 7)
    stage = grpo_stage(recipe)
    assert list(recipe.stages) == ["grpo"]
    assert (stage.steps, stage.prompts_per_step, stage.max_new_tokens) == (
        7,
        load.prompts,
        load.max_new_tokens,
    )
    assert (recipe.checkpoint.every_steps, recipe.tracking.mlflow) == (0, "off")
    assert set(SHORTLIST) <= set(SETUPS)
    assert quick(load).steps <= load.steps


def test_a_model_made_from_another_recipe_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        step_loads, "TAIL_SHAPE", replace(step_loads.TAIL_SHAPE, layers=1, hidden=48, intermediate=16)
    )
    folder = tmp_path / "tail"
    (folder / "model").mkdir(parents=True)
    (folder / "made_from.yaml").write_text("an older recipe")
    step_loads.prepare(step_loads.TAIL, folder)
    weights = folder / "model" / "model.safetensors"
    made = weights.stat().st_mtime_ns
    step_loads.prepare(step_loads.TAIL, folder)
    assert weights.stat().st_mtime_ns == made
    recipe = step_recipe(step_loads.TAIL, folder, 2)
    assert (
        len({prompt.id for prompt in step_loads.ordered_prompts(recipe, folder, 2)})
        == 2 * step_loads.TAIL.prompts
    )


def test_every_row_of_the_chain_is_a_distribution() -> None:
    chain = transitions(64.0)
    assert all(sum(row.values()) == pytest.approx(1.0) for row in chain.values())
    assert chain["5"]["</think>"] == pytest.approx(1 / 64)


def test_the_model_draws_from_its_chain(tmp_path: Path) -> None:
    """After the final norm the logits are the chain's log-probabilities, up to what the layers add."""
    from transformers import AutoModelForCausalLM

    tokenizer = character_tokenizer("0123456789+=")
    shape = Shape(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, context_tokens=64)
    write_markov_model(tmp_path, tokenizer, shape, 10.0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = "4+4=<think>2345</think><answer>1</answer>"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        drawn = torch.log_softmax(model(ids).logits[0], -1).exp()
    wanted = log_transitions(transitions(10.0), tokenizer.get_vocab()).exp()[ids[0]]
    torch.testing.assert_close(drawn, wanted, atol=0.02, rtol=0.0)


class _Slow:
    """Rollouts that hand out one group when told to."""

    async def draw(self, issue: object) -> object:
        import asyncio

        await asyncio.sleep(0.05)
        return type("Drawn", (), {"lengths": (3, 4)})()


def test_watched_rollouts_count_seconds_of_drawing_once() -> None:
    import asyncio

    async def scenario() -> tuple[float, float, list[int]]:
        watched = WatchedRollouts(_Slow())  # type: ignore[arg-type]
        await asyncio.gather(watched.draw(None), watched.draw(None))  # type: ignore[arg-type]
        busy_s = watched.take_busy_s()
        await asyncio.sleep(0.05)
        return busy_s, watched.take_busy_s(), watched.lengths

    busy_s, idle_s, lengths = asyncio.run(scenario())
    assert busy_s > 0.04
    assert idle_s == 0.0
    assert lengths == [3, 4, 3, 4]


def test_a_machine_that_slows_down_does_not_change_a_ratio_to_neighbours() -> None:
    ratio, error = against_neighbours([1.0, 1.2, 1.4, 1.6, 1.8], [False, True, False, True, False])
    assert ratio == pytest.approx(1.0)
    assert error == pytest.approx(0.0, abs=1e-12)
    ratio, error = against_neighbours([1.0, 1.1, 1.0, 1.21, 1.0], [False, True, False, True, False])
    assert ratio == pytest.approx(math.sqrt(1.1 * 1.21))
    assert error > 0


@pytest.mark.parametrize("treated", [[True, False, True], [False, True, True, False], [False, True, False]])
def test_stretches_without_untreated_neighbours_are_no_comparison(treated: list[bool]) -> None:
    with pytest.raises(ValueError, match="do not alternate"):
        against_neighbours([1.0] * len(treated), treated)


def test_the_price_of_supervision_is_what_its_multiple_adds() -> None:
    """A step of 1 s, 1 % of it supervision: at OFTENER times the rate it takes 0.99 + OFTENER * 0.01 s."""
    dense = 0.99 + OFTENER * 0.01
    seconds = (1.0, dense, 1.0, dense, 1.0)
    stretches = [Stretch(oftener=s != 1.0, step_s=[s, s], cpu_s=2 * s) for s in seconds]
    step, cpu = rows_of(stretches)
    assert step.ratio == pytest.approx(1 / 0.99, rel=1e-3)
    assert (cpu.ours, cpu.theirs) == (pytest.approx(2.0), pytest.approx(1.98))
