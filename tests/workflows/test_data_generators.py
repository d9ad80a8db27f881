"""Generators: every task's answer and chain recomputed independently, numbering, splits, order."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.platform.errors import ConfigError, DataError
from treadle.workflows.data.generators.addition import Addition
from treadle.workflows.data.generators.base import Generator, Task
from treadle.workflows.data.generators.chains import Chain
from treadle.workflows.data.generators.conversion import Conversion
from treadle.workflows.data.generators.countdown import Countdown
from treadle.workflows.data.generators.multiplication import Multiplication
from treadle.workflows.data.generators.registry import GENERATORS
from treadle.workflows.data.generators.sorting import Sorting
from treadle.workflows.data.permutation import Epochs, Permutation
from treadle.workflows.data.pool import TaskPool
from treadle.workflows.data.split import is_heldout

VARIED: list[Generator] = [
    *(kind() for kind in GENERATORS.values()),
    Addition(digits=4, chain="places"),
    Addition(digits=3, facts=0.1, worked=0.3),
    Chain(terms=3, digits=2),
    Multiplication(digits=4, other_digits=3),
    Countdown(numbers=4, max_number=13, space=5),
    Conversion(source_base=16, target_base=2, max_value=10**6),
    Conversion(source_base=10, target_base=16, max_value=70000),
    Sorting(length=7, max_number=9),
]
LEAVES = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a // b if a % b == 0 else None,
}


def value(expression: str) -> int:
    """Integer arithmetic by walking Python's syntax tree."""

    def walk(node: ast.expr) -> int:
        if isinstance(node, ast.Constant):
            return int(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            return -walk(node.operand)
        assert isinstance(node, ast.BinOp)
        return LEAVES[type(node.op)](walk(node.left), walk(node.right))  # type: ignore[index,no-any-return]

    return walk(ast.parse(expression, mode="eval").body)


def right_answer(generator: Generator, task: Task) -> bool:
    """Whether the answer solves what the prompt's text says, without the generator's help."""
    if isinstance(generator, Addition | Chain | Multiplication):
        return str(value(task.text.removesuffix("="))) == task.answer
    if isinstance(generator, Sorting):
        numbers = task.text.removeprefix("sort ").removesuffix(": ").split(" ")
        return sorted(map(int, numbers)) == [int(n) for n in task.answer.split(" ")]
    if isinstance(generator, Conversion):
        found = re.fullmatch(r"base (\d+) (\w+) to base (\d+): ", task.text)
        assert found
        return int(found[2], int(found[1])) == int(task.answer, int(found[3]))
    found = re.fullmatch(r"make (\d+) from ([\d ]+): ", task.text)
    assert found
    used = Counter(map(int, re.findall(r"\d+", task.answer)))
    return value(task.answer) == int(found[1]) and used == Counter(map(int, found[2].split(" ")))


def names(generator: Generator) -> str:
    return str(generator)


@pytest.mark.parametrize("generator", VARIED, ids=names)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_answers_are_right_and_every_equation_of_a_chain_holds(
    generator: Generator, data: st.DataObject
) -> None:
    task = generator.task(data.draw(st.integers(0, generator.size - 1)))
    assert right_answer(generator, task)
    for step in task.thinking.split(","):
        if "=" in step and not isinstance(generator, Conversion):
            left, right = step.split("=")
            assert value(left) == value(right), step


@pytest.mark.parametrize("generator", VARIED, ids=names)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_character_is_in_the_alphabet(generator: Generator, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, generator.size - 1))
    task = generator.task(number)
    line = generator.corpus_line(number, data.draw(st.integers(0, 2**63 - 1)))
    assert set(task.text + task.thinking + task.answer + line) <= set(generator.alphabet)
    assert len(set(generator.alphabet)) == len(generator.alphabet)


@pytest.mark.parametrize(
    "generator",
    [
        Addition(),
        Chain(terms=3),
        Multiplication(digits=2, other_digits=1),
        Countdown(),
        Conversion(),
        Sorting(length=3, max_number=9),
    ],
    ids=names,
)
def test_numbers_and_tasks_are_one_to_one(generator: Generator) -> None:
    tasks = [generator.task(n) for n in range(generator.size)]
    assert len({task.id for task in tasks}) == generator.size
    assert len({task.text for task in tasks}) == generator.size


@pytest.mark.parametrize("name", GENERATORS)
def test_no_corpus_line_poses_or_solves_a_heldout_task(name: str) -> None:
    generator = GENERATORS[name]()
    held = TaskPool(generator, "heldout", 0.2, seed=0, limit=3000)
    train = TaskPool(generator, "train", 0.2, seed=0, limit=3000)
    solved = {(t.text + t.answer) for t in (held.at(i) for i in range(len(held)))}
    lines = {generator.corpus_line(train.number_at(i), i * 0x9E3779B97F4A7C15 % 2**63) for i in range(2000)}
    assert not lines & solved


def test_two_digit_addition_is_worked_by_columns_in_the_demos_form() -> None:
    found = next(t for t in map(Addition().task, range(Addition().size)) if t.id == "addition-47+85")
    assert found.text == "47+85="
    assert found.completion == "<think>7+5=12,4+8+1=13</think><answer>132</answer>"


def test_corpora_of_addition_are_a_tenth_facts_and_the_rest_worked_sums() -> None:
    generator, pool = Addition(), TaskPool(Addition(), "train", 0.1, seed=1)
    lines = [generator.corpus_line(pool.number_at(i), hash_like(i)) for i in range(20000)]
    facts = [line for line in lines if "," not in line]
    assert 0.08 < len(facts) / len(lines) < 0.12
    assert all(re.fullmatch(r"\d\+\d(\+1)?=\d+", line) for line in facts)
    assert len(set(facts)) == 200


def hash_like(i: int) -> int:
    return (i * 0x9E3779B97F4A7C15 + 0x1234567) % 2**63


@pytest.mark.parametrize(
    "broken",
    [
        Addition(digits=1),
        Addition(chain="abacus"),
        Addition(facts=0.7, worked=0.7),
        Chain(terms=1),
        Multiplication(digits=0),
        Countdown(max_number=50),
        Conversion(source_base=2, target_base=2),
        Conversion(target_base=17),
        Sorting(length=1),
    ],
    ids=names,
)
def test_spaces_that_cannot_work_are_refused(broken: Addition) -> None:
    with pytest.raises(ConfigError, match=broken.kind):
        broken.check()


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), key=st.integers())
def test_a_permutation_visits_everything_once(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation.at(i) for i in range(size)) == list(range(size))


def test_permutations_shuffle_and_differ_by_key_and_reach_huge_spaces() -> None:
    orders = {tuple(Permutation(50, key).at(i) for i in range(50)) for key in range(20)}
    assert len(orders) == 20
    assert tuple(range(50)) not in orders
    huge = Permutation(10**30, "huge")
    found = [huge.at(i) for i in range(1000)]
    assert len(set(found)) == 1000
    assert max(found) > 10**29
    with pytest.raises(IndexError):
        huge.at(10**30)


def test_early_positions_of_a_permutation_are_spread_evenly() -> None:
    halves = [sum(Permutation(1000, key).at(i) < 500 for i in range(100)) for key in range(50)]
    assert 45 < sum(halves) / len(halves) < 55


def test_epochs_repeat_nothing_within_and_change_order_between() -> None:
    epochs = Epochs(30, "x")
    first, second = [epochs.at(i) for i in range(30)], [epochs.at(i) for i in range(30, 60)]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert [epochs.at(i) for i in range(30)] == first
    with pytest.raises(IndexError):
        epochs.at(-1)


@pytest.mark.parametrize("name", GENERATORS)
def test_train_and_heldout_are_disjoint_and_together_everything(name: str) -> None:
    generator = GENERATORS[name]()
    parts = {
        split: TaskPool(generator, split, 0.2, seed=seed, limit=2000)
        for seed, split in enumerate(("train", "heldout", "all"))
    }
    ids = {split: {pool.at(i).id for i in range(len(pool))} for split, pool in parts.items()}
    assert not ids["train"] & ids["heldout"]
    assert ids["train"] | ids["heldout"] == ids["all"]
    assert len(ids["all"]) == min(generator.size, 2000)
    assert 0.15 < len(ids["heldout"]) / len(ids["all"]) < 0.25


def test_a_sum_and_its_mirror_fall_into_the_same_split() -> None:
    held = TaskPool(Addition(), "heldout", 0.1, seed=0)
    pairs = {tuple(held.at(i).text[:-1].split("+")) for i in range(len(held))}
    assert all((b, a) in pairs for a, b in pairs)


def test_a_larger_share_holds_out_a_superset() -> None:
    contents = [f"{i}" for i in range(2000)]
    small = {c for c in contents if is_heldout(c, 0.1)}
    large = {c for c in contents if is_heldout(c, 0.3)}
    assert small < large
    assert not any(is_heldout(c, 0.0) for c in contents)


def test_the_split_never_changes_between_releases() -> None:
    """Trained models depend on it: these are facts about the hash, not about this code."""
    assert [c for c in map(str, range(60)) if is_heldout(c, 0.1)] == [
        "21",
        "26",
        "30",
        "36",
        "37",
        "47",
        "54",
    ]


def test_the_order_depends_on_the_seed_and_on_nothing_else() -> None:
    a, b, c = (TaskPool(Sorting(), "train", 0.1, seed=s, limit=500) for s in (1, 1, 2))
    b.at(1234)
    assert [a.at(i).id for i in range(50)] == [b.at(i).id for i in range(50)]
    assert [a.at(i).id for i in range(50)] != [c.at(i).id for i in range(50)]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="heldout"):
        TaskPool(Addition(), "heldout", 0.0, seed=0)
    with pytest.raises(ConfigError, match="split"):
        TaskPool(Addition(), "test", 0.1, seed=0)
    with pytest.raises(ConfigError, match="heldout_fraction"):
        TaskPool(Addition(), "train", 1.0, seed=0)


def test_a_smallest_operand_bounds_both_operands_and_loses_no_pair() -> None:
    for smallest in (3, 10):
        generator = Addition(smallest=smallest)
        pairs = {generator.task(number).id for number in range(generator.size)}
        wanted = {(a, b) for a in range(smallest, 100) for b in range(smallest, 100) if a > 9 or b > 9}
        assert pairs == {f"addition-{a}+{b}" for a, b in wanted}
