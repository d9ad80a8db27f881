"""Configuration: what loads, and what is refused and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import fsspec
import pytest
from tests.platform.tiny_recipe import TEXT, Draw, Fancy, Fit, Mode, Optim, Part, Plain, Recipe

from treadle.platform.config import load, variants
from treadle.platform.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def _drawn(config: Recipe) -> Draw:
    stage = config.stages["rl"]
    assert isinstance(stage, Draw)
    return stage


def test_a_file_becomes_plain_frozen_dataclasses(recipe: Path) -> None:
    config = load(Recipe, recipe)
    assert config == Recipe(
        name="tiny",
        seed=3,
        out="runs/tiny",
        weights={"a": 1e-4, "b": 2.0},
        stages={
            "sft": Fit(steps=3, optim=Optim(lr=1e-4)),
            "rl": Draw(objective=Plain(clip=0.1, kl=1e-3)),
        },
    )
    assert list(config.stages) == ["sft", "rl"]
    assert type(config.stages) is dict
    assert type(_drawn(config).files) is list
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 4  # type: ignore[misc]


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", ".0001", "0.0001"])
def test_numbers_without_a_dot_are_floats(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"lr: {text}\n")
    assert load(Optim, tmp_path / "x.yaml").lr == 1e-4
    assert load(Optim, {}, [f"lr={text}"]).lr == 1e-4


@pytest.mark.parametrize("text", ["12:30", "yes", "on", "2026-01-01", "010", "1e5", "true", "1_000"])
def test_text_fields_keep_what_looks_like_another_type(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"name: {text}\n")
    assert load(Recipe, tmp_path / "x.yaml").name == text
    assert load(Recipe, {}, [f"name={text}"]).name == text


def test_an_override_replaces_a_value_and_the_last_one_wins(recipe: Path) -> None:
    config = load(Recipe, recipe, ["stages.sft.optim.lr=5e-5", "seed=7", "seed=8"])
    assert config.stages["sft"].optim.lr == 5e-5  # type: ignore[union-attr]
    assert config.seed == 8


def test_an_override_may_be_a_list_a_mapping_null_or_empty(recipe: Path) -> None:
    config = load(
        Recipe,
        recipe,
        ["stages.rl.files=[a, 1e5]", "weights={c: 3}", "note=null", "name=", "where=there", "mode=slow"],
    )
    assert _drawn(config).files == ["a", "1e5"]
    assert config.weights == {"a": 1e-4, "b": 2.0, "c": 3.0}
    assert (config.note, config.name, config.where, config.mode) == (None, "", "there", Mode.SLOW)


def test_a_kind_can_be_switched_and_starts_from_its_own_defaults(recipe: Path) -> None:
    assert _drawn(load(Recipe, recipe, ["stages.rl.objective.kind=fancy"])).objective == Fancy()


def test_a_kind_and_its_keys_may_come_in_any_order(recipe: Path) -> None:
    overrides = ["stages.rl.objective.dynamic=false", "stages.rl.objective.kind=fancy"]
    for order in (overrides, overrides[::-1]):
        assert _drawn(load(Recipe, recipe, order)).objective == Fancy(dynamic=False)


def test_naming_the_kind_that_is_already_chosen_keeps_its_settings(recipe: Path) -> None:
    assert _drawn(load(Recipe, recipe, ["stages.rl.objective.kind=plain"])).objective == Plain(
        clip=0.1, kl=1e-3
    )


def test_a_stage_can_be_added_switched_and_removed_from_the_command_line(recipe: Path) -> None:
    config = load(Recipe, recipe, ["stages.more.kind=fit", "stages.sft=null", "stages.rl.kind=fit"])
    assert config.stages == {"rl": Fit(), "more": Fit()}


def test_a_tilde_takes_a_key_back_to_its_default(recipe: Path) -> None:
    config = load(Recipe, recipe, ["~seed", "~stages.rl.objective", "~stages.sft"])
    assert config.seed == 0
    assert config.stages == {"rl": Draw()}


def test_an_optional_dataclass_is_made_when_one_of_its_keys_is_set(recipe: Path) -> None:
    assert _drawn(load(Recipe, recipe, ["stages.rl.warmup.lr=1"])).warmup == Optim(lr=1.0)
    assert _drawn(load(Recipe, recipe)).warmup is None


def test_a_list_of_dataclasses_is_replaced_as_a_whole() -> None:
    config = load(Recipe, {"name": "x", "parts": [{"name": "a"}, {"name": "b", "weight": 2}]})
    assert config.parts == (Part(name="a"), Part(name="b", weight=2.0))


def test_a_recipe_extends_its_base(recipe: Path) -> None:
    child = recipe.with_name("child.yaml")
    child.write_text(
        "base: recipe.yaml\nname: child\nstages: {rl: {objective: {kind: fancy}}, last: {kind: fit}}\n"
    )
    grandchild = recipe.with_name("grandchild.yaml")
    grandchild.write_text("base: child.yaml\nstages: {sft: {steps: 1}}\n")
    config = load(Recipe, grandchild)
    assert (config.name, config.seed, list(config.stages)) == ("child", 3, ["sft", "rl", "last"])
    assert config.stages["sft"] == Fit(steps=1, optim=Optim(lr=1e-4))
    assert _drawn(config).objective == Fancy()


def test_an_upper_mapping_that_names_every_entry_sets_the_order(recipe: Path) -> None:
    child = recipe.with_name("child.yaml")
    child.write_text("base: recipe.yaml\nstages: {rl: {steps: 1}, mid: {kind: fit}, sft: {steps: 2}}\n")
    assert list(load(Recipe, child).stages) == ["rl", "mid", "sft"]


def test_recipes_are_found_by_name_in_the_library(recipe: Path, tmp_path: Path) -> None:
    assert load(Recipe, "recipe", library=tmp_path) == load(Recipe, recipe)
    own = tmp_path / "elsewhere"
    own.mkdir()
    (own / "mine.yaml").write_text("base: recipe\nseed: 9\n")
    assert load(Recipe, own / "mine.yaml", library=tmp_path).seed == 9
    with pytest.raises(ConfigError, match=r"recipee does not exist.*Did you mean 'recipe'"):
        load(Recipe, "recipee", library=tmp_path)


def test_a_recipe_and_its_base_can_lie_behind_a_url() -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/recipes/base.yaml", TEXT.encode())
    files.pipe_file("/recipes/child.yaml", b"base: base.yaml\nseed: 11\n")
    assert load(Recipe, "memory://recipes/child.yaml").seed == 11
    with pytest.raises(ConfigError, match=r"memory://recipes/none.yaml does not exist"):
        load(Recipe, "memory://recipes/none.yaml")


def test_interpolation_reaches_environment_and_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_TEST_NOTE", "hello")
    config = load(Recipe, {"name": "x", "note": "${oc.env:TREADLE_TEST_NOTE}", "out": "${name}/${seed}"})
    assert (config.note, config.out) == ("hello", "x/0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"r.yaml is empty"),
        ("# nothing\n", r"r.yaml is empty"),
        ("name: [1\nseed: 2\n", r"r.yaml:2: not valid YAML"),
        ("name: x\n\tseed: 3\n", r"r.yaml:2: not valid YAML"),
        ("\0", r"r.yaml: not valid YAML"),
        ("- 1\n", r"expected `key: value` lines, got list"),
        ("name: x\nname: y\n", r"r.yaml:2: the key 'name' was already given on line 1"),
        ("a: &a [*a]\n", r"nested deeper than"),
        ("name: x\nseeds: 3\n", r"r.yaml:2: unknown key 'seeds'. Did you mean 'seed'\? Valid: name, seed"),
        (
            "name: x\nstages:\n  s:\n    kind: fit\n    optim: {rl: 1}\n",
            r"r.yaml:5: unknown key 'stages.s.optim.rl'",
        ),
        (
            "name: x\nstages:\n  s:\n    kind: fti\n",
            r"r.yaml:4: stages.s.kind: 'fti' is no .* Did you mean 'fit'",
        ),
        (
            "name: x\nstages: {s: {steps: 1}}\n",
            r"stages.s has no `kind`. Set stages.s.kind to one of: fit, draw",
        ),
        ("name: x\nseed: abc\n", r"r.yaml:2: seed: expected int, got 'abc' \(str\)"),
        ("name: x\nseed: 1.5\n", r"seed: expected int, got 1.5 \(float\)"),
        ("name: x\nseed: true\n", r"seed: expected int, got True"),
        ("name: x\nseed:\n", r"seed: expected int, got None"),
        ("name: x\nmode: quick\n", r"mode: expected one of fast, slow, got 'quick'"),
        ("name: x\nwhere: nowhere\n", r"where: expected Literal\['here', 'there'\], got 'nowhere'"),
        ("name: x\nweights: {a: b}\n", r"weights: expected dict\[str, float\]"),
        ("name: x\nparts: {a: 1}\n", r"parts: expected a list"),
        ("name: x\nparts: [{weight: 1}]\n", r"parts.0.name: no value"),
        ("name: x\nstages: [1]\n", r"stages: expected a mapping of names"),
        ("name: x\nstages: {s: fit}\n", r"stages.s: expected a mapping with `kind:`, got 'fit'"),
        (
            "name: x\nstages: {s: {kind: fit, optim: {betas: [1]}}}\n",
            r"optim.betas: expected tuple\[float, float\]",
        ),
        ("name: x\nout: ${nme}\n", r"r.yaml:2: out: Interpolation key 'nme' not found"),
        ("name: x\nseed: ${out}\n", r"r.yaml:2: seed: While dereferencing"),
        ("seed: 1\n", r"name: no value"),
        ("name: x\nbase: none.yaml\n", r"r.yaml:2: base: .*none.yaml does not exist"),
        ("name: x\nbase: 3\n", r"r.yaml:2: base: expected the name of a file, got 3"),
        ("name: x\nbase: r.yaml\n", r"`base:` leads back to its own file"),
        (
            "name: x\nstages: {s: {kind: fit, optim: {lr: 0}}}\n",
            r"stages.s.optim: lr=0.0 must be above 0. Set lr.",
        ),
    ],
)
def test_a_bad_file_gets_one_message_that_says_where_and_what(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load(Recipe, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "override 'seed' is malformed"),
        ("=3", "is malformed"),
        ("a..b=3", "is malformed"),
        ("seed=[1", r"the value '\[1' cannot be read"),
        ("sed=1", "override 'sed=1': unknown key 'sed'. Did you mean 'seed'"),
        ("stages.rll.steps=1", r"stages.rll has no `kind`.*Entries so far: sft, rl"),
        ("stages.rl.objective.kind=plane", "'plane' is no test-objective. Did you mean 'plain'"),
        ("stages.rl.objective.dynamic=true", "unknown key 'stages.rl.objective.dynamic'"),
        ("seed=x", "override 'seed=x': seed: expected int, got 'x'"),
        ("stages.rl.files.0=x", "stages.rl.files: expected list"),
        ("~sed", "no file sets this key, so there is nothing to take back. Did you mean 'seed'"),
        ("~name", "name: no value"),
    ],
)
def test_a_bad_override_is_named(override: str, said: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(Recipe, recipe, [override])


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"name: \xff\xfe")
    for name, said in [
        ("none.yaml", "does not exist"),
        (".", "is a folder"),
        ("binary.yaml", "not a text file"),
    ]:
        with pytest.raises(ConfigError, match=said):
            load(Recipe, tmp_path / name)


def test_all_missing_values_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"name, parts.0.name: no value"):
        load(Recipe, {"parts": [{}]})


def test_a_member_must_be_frozen_and_carry_its_kind() -> None:
    with pytest.raises(ConfigError, match="must be a frozen dataclass with the field"):
        variants("test-objective", {"other": Plain})
    with pytest.raises(ConfigError, match="is already"):
        variants(
            "test-objective",
            {"plain": dataclasses.make_dataclass("Else", [("kind", str, "plain")], frozen=True)},
        )


@dataclasses.dataclass(frozen=True)
class Weighted:
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: {"right": 1.0, "form": 0.1})
    options: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)


def test_a_mapping_that_is_written_down_replaces_the_default_one(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("parts: {right: 2.0}\n")
    assert load(Weighted, tmp_path / "x.yaml").parts == {"right": 2.0}
    assert load(Weighted, {}, ["parts={own: 3}"]).parts == {"own": 3.0}


def test_an_override_of_one_entry_leaves_the_others(tmp_path: Path) -> None:
    assert load(Weighted, {}, ["parts.own=3"]).parts == {"right": 1.0, "form": 0.1, "own": 3.0}
    (tmp_path / "x.yaml").write_text("parts: {right: 2.0}\noptions: {math: {a: 1}}\n")
    changed = load(Weighted, tmp_path / "x.yaml", ["parts.own=3", "options.math.b=2", "options.words.c=3"])
    assert changed.parts == {"right": 2.0, "own": 3.0}
    assert changed.options == {"math": {"a": 1, "b": 2}, "words": {"c": 3}}


def test_a_file_changes_entries_of_the_file_it_is_based_on(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("parts: {right: 2.0}\n")
    (tmp_path / "above.yaml").write_text("base: below.yaml\nparts: {own: 3}\n")
    assert load(Weighted, tmp_path / "above.yaml").parts == {"right": 2.0, "own": 3.0}
