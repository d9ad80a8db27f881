"""Tracking: a durable spool in the run folder, the console's progress line, MLflow fed from the spool."""

from treadle.platform.tracking.config import TrackingConfig, tracking_uri
from treadle.platform.tracking.feed import Unsent, sync, unsent
from treadle.platform.tracking.redact import Redactor, flatten
from treadle.platform.tracking.rollouts import (
    RolloutRow,
    read_rollouts,
    rollout_rows,
    split_completion,
)
from treadle.platform.tracking.spool import EventRow, MetricRow, read_events, read_metrics
from treadle.platform.tracking.tracker import RunTracker, StageTracker

__all__ = [
    "EventRow",
    "MetricRow",
    "Redactor",
    "RolloutRow",
    "RunTracker",
    "StageTracker",
    "TrackingConfig",
    "Unsent",
    "flatten",
    "read_events",
    "read_metrics",
    "read_rollouts",
    "rollout_rows",
    "split_completion",
    "sync",
    "tracking_uri",
    "unsent",
]
