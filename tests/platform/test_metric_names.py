"""The catalogue of names and the aliases."""

from __future__ import annotations

import pytest

from treadle.platform import metric_names as names
from treadle.platform.errors import ConfigError


def test_every_name_is_of_a_family_and_says_what_it_is() -> None:
    for name, metric in names.CATALOGUE.items():
        assert name == metric.name
        assert len(name.split("/")) == 2
        assert metric.meaning
        assert metric.unit


def test_no_constant_is_missing_from_the_catalogue() -> None:
    constants = {
        value
        for key, value in vars(names).items()
        if key.isupper() and isinstance(value, str) and not key.endswith("_PREFIX")
    }
    assert constants == set(names.CATALOGUE)


def test_aliases_stand_for_canonical_names_and_never_for_two() -> None:
    for table in names.ALIASES.values():
        assert set(table) <= set(names.CATALOGUE)
        aliases = [alias for group in table.values() for alias in group]
        assert len(aliases) == len(set(aliases))
        assert not set(aliases) & set(names.CATALOGUE)


def test_without_tables_nothing_is_added() -> None:
    assert names.with_aliases({"reward/mean": 1.0, "own": 2.0}, []) == {"reward/mean": 1.0, "own": 2.0}


def test_an_alias_never_overwrites_what_was_measured() -> None:
    assert names.with_aliases({"reward/mean": 1.0, "reward": 9.0}, ["trl"])["reward"] == 9.0


def test_units_of_open_families_are_known() -> None:
    assert names.unit_of("timing_s/reference") == "s"
    assert names.unit_of("reward/part/format") == "1"
    assert names.unit_of("response_length/mean") == "tokens"
    assert names.unit_of("somebody/else") == ""


def test_an_unknown_table_is_refused_naming_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.aliases.*wandb"):
        names.check_aliases(["wandb"], "tracking.aliases")
