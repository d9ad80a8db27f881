"""Settings of tracking."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from treadle.platform.errors import ConfigError
from treadle.platform.metric_names import check_aliases


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where figures, events and sampled rollouts go, besides the run folder, which always has all of them."""

    mlflow: str = "auto"
    """`off`; a tracking URI; or `auto`: `MLFLOW_TRACKING_URI` if set, else SQLite in the run folder."""
    experiment: str = "treadle"
    """MLflow experiment of the run."""
    rollouts_every: int = 10
    """Every how many steps sampled rollouts are kept; 0 keeps none."""
    rollouts_per_step: int = 8
    """How many samples of such a step are kept."""
    aliases: list[str] = field(default_factory=list)
    """Libraries whose metric names are logged as well: `verl`, `trl`."""
    console_every: int = 0
    """Without a terminal: also print every step that is a multiple of this; 0 prints at most every 2 s."""
    drain_s: float = 60.0
    """How long the end of a run waits for MLflow to take the rest of the spool, in seconds."""

    def check(self) -> None:
        """Raises `ConfigError` for settings that cannot work."""
        check_aliases(self.aliases, "tracking.aliases")
        if self.mlflow not in ("off", "auto") and ":" not in self.mlflow:
            raise ConfigError(
                f"tracking.mlflow={self.mlflow!r} is not a tracking URI.",
                "Set off, auto, or a URI such as http://host:5000 or sqlite:////path/mlflow.db.",
            )
        if not self.experiment:
            raise ConfigError("tracking.experiment is empty.", "Name the MLflow experiment.")
        for name in ("rollouts_every", "rollouts_per_step", "console_every", "drain_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"tracking.{name}={getattr(self, name)} is negative.", "Set 0 or more.")


def tracking_uri(config: TrackingConfig, run_dir: Path) -> str:
    """The MLflow tracking URI of a run, or an empty string when MLflow is off. `file:` folders are refused by
    MLflow itself; the default is a SQLite file in the run folder."""
    if config.mlflow == "off":
        return ""
    if config.mlflow != "auto":
        return config.mlflow
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve() / 'mlflow.db'}"
