"""The run's figures on Ray's metrics port, for Prometheus and Grafana.

The same scalars as in the spool, as gauges named `ray_treadle_<family>_<figure>` (Ray adds `ray_`). Tags are
the stage and the run and nothing else: every further tag, and above all prompt ids or versions, would make a
new time series per value.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from treadle.platform import metric_names as names

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

PREFIX = "treadle_"
TAGS = ("stage", "run")
REFRESH_S = 5.0
MAX_GAUGES = 300
"""More names than a run can mean to have; beyond it new ones are left out, so that a bug in a name (one that
holds an id) cannot drown Prometheus."""


def gauge_name(name: str) -> str:
    """The Prometheus name of a metric, without Ray's prefix.

    Example: `reward/part/format` gives `treadle_reward_part_format`.
    """
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class RayMetrics:
    """Publishes figures from this process, the driver's or an actor's, which must be connected to Ray.

    Ray takes a gauge off the port about 20 s after it was last set, while a step may take minutes: a thread
    sets the current values again until the stage is over. Names that differ only in characters Prometheus
    refuses share a gauge.

    consumes: nothing; waits for: `REFRESH_S`; unblocked by: `close`; produces: the last values, once more.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}
        self._current: dict[str, dict[str, float]] = {}  # stage -> gauge name -> value
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="ray-metrics", daemon=True)
        self._thread.start()
        self.left_out = 0

    def publish(self, stage: str, metrics: Mapping[str, float]) -> None:
        """Sets the gauges of the stage. A figure that is not finite takes its gauge off the port."""
        with self._lock:
            current = self._current.setdefault(stage, {})
            for name, value in metrics.items():
                key = gauge_name(name)
                current.pop(key, None)
                if math.isfinite(value) and self._knows(key, name):
                    current[key] = float(value)
            self._set(stage)

    def end_stage(self, stage: str) -> None:
        """The stage is over: within half a minute its figures leave the port."""
        with self._lock:
            self._current.pop(stage, None)

    def __enter__(self) -> RayMetrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the refreshing thread; a second call does nothing."""
        self._closed.set()
        self._thread.join(REFRESH_S)

    def _refresh(self) -> None:
        while not self._closed.wait(REFRESH_S):
            with self._lock:
                for stage in self._current:
                    self._set(stage)

    def _set(self, stage: str) -> None:
        tags = {"stage": stage, "run": self._run}
        for key, value in self._current[stage].items():
            self._gauges[key].set(value, tags=tags)

    def _knows(self, key: str, name: str) -> bool:
        """Makes the gauge if there is none yet; False beyond `MAX_GAUGES`."""
        if key in self._gauges:
            return True
        if len(self._gauges) >= MAX_GAUGES:
            self.left_out += 1
            return False
        from ray.util.metrics import Gauge  # on use: settings are checked before ray is imported

        known = names.CATALOGUE.get(name)
        unit = names.unit_of(name)
        meaning = known.meaning if known else name
        text = f"{meaning} ({unit})" if unit not in ("", "1") else meaning
        self._gauges[key] = Gauge(key, description=text, tag_keys=TAGS)
        return True
