"""The figures on a real Ray node's metrics port."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest

from treadle.cluster.ray_metrics import MAX_GAUGES, RayMetrics, gauge_name

FIGURES = {
    "reward/mean": 0.625,
    "reward/part/format": 0.1,
    "perf/tokens_per_s": 8600.0,
    "policy/kl": float("nan"),
}


def test_names_are_what_prometheus_takes() -> None:
    assert gauge_name("reward/part/format") == "treadle_reward_part_format"
    for name in (*FIGURES, "odd name@%", "rewards/<fn>/mean"):
        assert re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", gauge_name(name))


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def _await_metric(port: int, wanted: list[str], deadline_s: float = 90) -> str:
    deadline = time.monotonic() + deadline_s
    text = ""
    while time.monotonic() < deadline:
        text = _scrape(port)
        if all(re.search(f"^{pattern}$", text, re.MULTILINE) for pattern in wanted):
            return text
        time.sleep(1)
    raise AssertionError([line for line in text.splitlines() if "treadle" in line] or "no line of ours")


def _line(name: str, stage: str, value: str) -> str:
    return rf"ray_{name}\{{(?=[^}}]*stage=\"{stage}\")(?=[^}}]*run=\"demo\")[^}}]*\}} {value}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_driver_and_actor_figures_appear_on_the_metrics_port() -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Role:
        def publish(self) -> None:
            self.metrics = RayMetrics("demo")
            self.metrics.publish("sft", {"policy/loss": 1.5})

    driver = RayMetrics("demo")
    driver.publish("grpo", FIGURES)
    role = Role.remote()
    ray.get(role.publish.remote(), timeout=60)
    port = ray.nodes()[0]["MetricsExportPort"]
    text = _await_metric(
        port,
        [
            _line("treadle_reward_mean", "grpo", r"0\.625"),
            _line("treadle_reward_part_format", "grpo", r"0\.1"),
            _line("treadle_perf_tokens_per_s", "grpo", r"8600\.0"),
            _line("treadle_policy_loss", "sft", r"1\.5"),
        ],
    )
    assert "treadle_policy_kl" not in text
    assert "mean reward of the scored samples" in text

    time.sleep(35)  # Ray alone would have taken them off by now
    assert re.search(f"^{_line('treadle_reward_mean', 'grpo', '0.625')}$", _scrape(port), re.MULTILINE)
    driver.end_stage("grpo")
    deadline = time.monotonic() + 90
    while "treadle_reward_mean" in _scrape(port):
        assert time.monotonic() < deadline, "a finished stage stays on the port"
        time.sleep(1)
    driver.close()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_flood_of_names_is_cut_off_and_counted() -> None:
    metrics = RayMetrics("demo")
    metrics.publish("grpo", {f"prompt/{index}": 1.0 for index in range(MAX_GAUGES + 7)})
    assert metrics.left_out == 7
    metrics.close()
