"""The charts' arithmetic and their marks."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.dashboards.charts import (
    MAX_POINTS,
    Series,
    Slice,
    figure,
    interval_mark,
    line_chart,
    moving_mean,
    stacked_bar,
    thin,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def _series(*values: float, label: str = "mean", smooth: bool = True) -> Series:
    return Series(label=label, steps=tuple(range(len(values))), values=values, smooth=smooth)


def _parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=60), st.integers(1, 21)
)
def test_the_moving_mean_equals_the_plain_definition(values: list[float], window: int) -> None:
    half = window // 2
    for index, mean in enumerate(moving_mean(values, window)):
        near = np.array(values[max(0, index - half) : index + half + 1])
        near = near[np.isfinite(near)]
        expected = near.mean() if len(near) else math.nan
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-3, nan_ok=True)


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_few_ascending_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    found = ticks(low, high)
    assert 1 <= len(found) <= 8
    assert found == sorted(found)
    slack = (high - low) * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert ticks(0, 37, count=4) == pytest.approx([0, 10, 20, 30])


def test_thinning_keeps_the_spike() -> None:
    values = [0.0] * 5000
    values[3210] = 99.0
    values[4000] = -5.0
    steps, kept = thin(range(5000), values)
    assert len(kept) <= MAX_POINTS + 2
    assert (max(kept), steps[kept.index(99.0)]) == (99.0, 3210)
    assert min(kept) == -5.0
    assert steps == sorted(steps)


def test_figures_are_short_and_say_what_they_are() -> None:
    assert [figure(v) for v in (0.98123, 12345.0, -0.5, 0.00002, math.nan, math.inf, None, 0.0)] == [
        "0.981",
        "12\u202f345",
        "−0.5",
        "2.0e−5",
        "–",
        "∞",
        "–",
        "0",
    ]


def test_a_curve_lies_where_its_values_are() -> None:
    chart = _parsed(line_chart("c", "Loss", "1", [_series(0, 1, 2, 3, 4, 5, smooth=False)], from_zero=True))
    (curve,) = [path for path in chart.iter(f"{SVG}path") if path.get("class") == "curve"]
    points = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", curve.get("d", ""))]
    assert len(points) == 6
    x, y = np.array(points).T
    assert np.allclose(np.diff(x), np.diff(x)[0], atol=0.11)
    assert np.all(np.diff(y) < 0)  # larger values stand higher


def test_a_gap_lifts_the_pen() -> None:
    chart = line_chart("c", "t", "", [_series(1, 2, math.nan, 3, 4, 5, smooth=False)], from_zero=False)
    assert re.search(r'class="curve" d="M[^"]*M[^"]*"', chart)


def test_a_single_curve_shows_every_step_and_its_mean() -> None:
    chart = _parsed(line_chart("c", "t", "", [_series(*range(50))], from_zero=True))
    assert [path.get("class") for path in chart.iter(f"{SVG}path")] == ["raw", "curve"]


def test_a_single_point_is_a_dot() -> None:
    chart = _parsed(line_chart("c", "t", "", [_series(0.5)], from_zero=True))
    assert [mark.get("class") for mark in chart.iter(f"{SVG}circle")] == ["dot"]


def test_a_constant_curve_has_an_axis() -> None:
    for value in (0.0, 5.0, -5.0, 1e-30, 1e30):
        assert "<text" in line_chart("c", "t", "", [_series(value, value, value)], from_zero=True)


def test_a_chart_names_and_describes_itself() -> None:
    chart = _parsed(line_chart("c", "Reward <b>", "1", [_series(1, 2, 3, label="<i>x</i>")], from_zero=True))
    assert chart.get("role") == "img"
    title, desc = chart.find(f"{SVG}title"), chart.find(f"{SVG}desc")
    assert title is not None
    assert desc is not None
    assert chart.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
    assert title.text == "Reward <b>"
    assert desc.text == "<i>x</i>: 3 values from 1 to 3, smallest 1, largest 3"


def test_a_bar_divides_by_value() -> None:
    bar = _parsed(
        stacked_bar(
            "b", "time", [Slice(label="a", value=3, kind="p0"), Slice(label="b", value=1, kind="p1")], "s"
        )
    )
    widths = [float(rect.get("width", "0")) for rect in bar.iter(f"{SVG}rect")]
    assert widths == [750.0, 250.0]


def test_a_bar_of_nothing_is_empty_not_an_error() -> None:
    assert "<rect" in stacked_bar("b", "time", [Slice(label="a", value=0, kind="p0")], "s")


def test_an_interval_shows_point_span_and_ring() -> None:
    mark = _parsed(interval_mark("i", 0.5, 0.4, 0.6, 0.9))
    dots = {circle.get("class"): float(circle.get("cx", "0")) for circle in mark.iter(f"{SVG}circle")}
    assert dots == {"ring": 180.0, "dot": 100.0}
    assert "greedy" not in interval_mark("i", 0.5, 0.4, 0.6, math.nan)
