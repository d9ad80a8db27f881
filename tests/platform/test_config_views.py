"""Ways to look at a configuration, and that nothing is lost on the way back to YAML."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.platform.tiny_recipe import TEXT, Draw, Fancy, Fit, Mode, Optim, Part, Plain, Recipe

from treadle.platform.config import diff_from_defaults, fingerprint, flatten, load, to_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_flatten_gives_every_leaf_under_its_dotted_key(recipe: Path) -> None:
    flat = flatten(load(Recipe, recipe))
    assert flat["stages.rl.objective.kl"] == 1e-3
    assert flat["stages.sft.optim.betas"] == "[0.9, 0.95]"
    assert flat["mode"] == "fast"
    assert flat["stages.rl.warmup"] is None
    assert all(isinstance(value, str | int | float | None) for value in flat.values())


def test_the_difference_lists_what_was_chosen_and_nothing_else(recipe: Path) -> None:
    assert diff_from_defaults(load(Recipe, recipe, ["stages.rl.objective.kind=fancy"])) == [
        ("name", "???", "tiny"),
        ("seed", 0, 3),
        ("out", "runs/${name}", "runs/tiny"),
        ("stages.sft.kind", None, "fit"),
        ("stages.sft.steps", 10, 3),
        ("stages.sft.optim.lr", 2e-3, 1e-4),
        ("stages.rl.kind", None, "draw"),
        ("stages.rl.objective.kind", "plain", "fancy"),
        ("weights.a", None, 1e-4),
        ("weights.b", None, 2.0),
    ]


def test_the_fingerprint_follows_the_settings(recipe: Path) -> None:
    config = load(Recipe, recipe)
    assert fingerprint(config) == fingerprint(load(Recipe, recipe, ["seed=3"]))
    changed = ["seed=4", "stages.rl.objective.kl=0.002", "stages.rl.objective.kind=fancy", "~stages.sft"]
    prints = {fingerprint(load(Recipe, recipe, [override])) for override in changed}
    assert len(prints | {fingerprint(config)}) == len(changed) + 1
    assert fingerprint(Optim(lr=1)) == fingerprint(Optim(lr=1.0))


_TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "1e-4",
        "true",
        "null",
        "~",
        "",
        "${name}",
        r"\${x}",
        "a: b",
        "- x",
        "#",
        "010",
        "1:30",
        "'",
        '"',
        "yes",
        "<<",
        "=",
    ]
)
_FLOATS = st.floats(allow_nan=False)
_STAGES = st.one_of(
    st.builds(
        Fit, steps=st.integers(), optim=st.builds(Optim, lr=st.floats(min_value=1e-12, exclude_min=True))
    ),
    st.builds(
        Draw,
        objective=st.builds(Plain, clip=_FLOATS) | st.builds(Fancy, dynamic=st.booleans()),
        files=st.lists(_TEXTS, max_size=2),
        warmup=st.none() | st.builds(Optim),
    ),
)
_RECIPES = st.builds(
    Recipe,
    name=_TEXTS,
    out=_TEXTS,
    seed=st.integers(),
    note=st.none() | _TEXTS,
    mode=st.sampled_from(Mode),
    stages=st.dictionaries(st.text("abc.1", min_size=1, max_size=4), _STAGES, max_size=2),
    weights=st.dictionaries(st.text("abc.:1", min_size=1, max_size=4), _FLOATS, max_size=2),
    parts=st.lists(st.builds(Part, name=_TEXTS), max_size=2).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(config=_RECIPES)
def test_what_to_yaml_writes_loads_to_an_equal_object(
    config: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_text(to_yaml(config))
    again = load(Recipe, path)
    assert again == config
    assert fingerprint(again) == fingerprint(config)


def test_infinity_survives_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(to_yaml(Optim(lr=math.inf)))
    assert load(Optim, tmp_path / "x.yaml").lr == math.inf
