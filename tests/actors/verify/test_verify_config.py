"""Settings that cannot work are refused before anything starts."""

import pytest
from omegaconf import OmegaConf

from treadle.actors.verify.config import VerifyConfig
from treadle.platform.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"processes": 0}, "verify.processes=0"),
        ({"actors": 0}, "verify.actors=0"),
        ({"deadline_s": 0.0}, "verify.deadline_s"),
        ({"deadline_s": float("inf")}, "verify.deadline_s"),
        ({"judge_deadline_s": 2.0}, "must exceed"),
        ({"memory_bytes": 1000}, "verify.memory_bytes"),
        ({"cpus": -1.0}, "verify.cpus"),
        ({"parts": {}}, "verify.parts"),
        ({"parts": {"accuracy": 0.0}}, "verify.parts"),
        ({"parts": {"accuracy": float("nan")}}, "verify.parts.accuracy"),
        ({"custom": {"exact": "a:b"}}, "verify.custom.exact"),
        ({"custom": {"mine": "a.b"}}, "verify.custom.mine"),
        ({"custom": {"mine": "a:b c"}}, "verify.custom.mine"),
        ({"warm": ["maths"]}, "maths"),
    ],
)
def test_a_setting_that_cannot_work_is_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        VerifyConfig(**change).check()  # type: ignore[arg-type]


def test_the_defaults_work_and_can_be_overridden_from_the_command_line() -> None:
    VerifyConfig().check()
    merged = OmegaConf.merge(
        OmegaConf.structured(VerifyConfig),
        OmegaConf.from_dotlist(
            ["parts.format=0.5", "custom.mine=pkg.mod:Mine", "warm=[math]", "deadline_s=3"]
        ),
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, VerifyConfig)
    config.check()
    assert dict(config.parts) == {"accuracy": 1.0, "format": 0.5}
    assert config.warm == ["math"]
