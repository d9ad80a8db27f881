"""Small line charts and bars as inline SVG: no scripts, no network; colours come from the page's CSS.

A chart is drawn in a fixed coordinate system and scaled by its viewBox, so it stays sharp and readable from a
phone to a wall. Every mark that carries a figure has a title, so that hovering, and screen readers, tell it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 360, 168
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 22
FEW = 4
"""Up to so many points are shown as dots and not smoothed."""
MAX_POINTS = 600
"""Longer series are reduced to the smallest and largest value of each bucket, so that no spike gets lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One curve: `values[i]` was measured at `steps[i]`; NaN leaves a gap. `smooth` curves are shown by their
    moving mean; schedules are not.

    Example: `Series(label="mean", steps=(0, 1, 2), values=(0.1, 0.2, nan))`.
    """

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    smooth: bool = True

    @property
    def means(self) -> list[float]:
        """The moving mean, or the values themselves where there are too few, or nothing to smooth."""
        if not self.smooth or len(self.values) <= FEW:
            return list(self.values)
        return moving_mean(self.values, window_of(len(self.values)))

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]

    @property
    def last(self) -> float:
        """Where the curve ends: its last finite mean; NaN without any."""
        return next((value for value in reversed(self.means) if math.isfinite(value)), math.nan)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to the plot's pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def figure(value: float | None) -> str:
    """A figure for reading, three significant digits or more: 0.98123 → `0.981`, 12345 → `12 345`."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    if 0 < size < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values within [low, high], about `count` of them. Steps are 1, 2 or 5 times a power of ten."""
    span = high - low
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, gaps left out; NaN where the window holds nothing. Linear in n."""
    half = window // 2
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index in range(len(values)):
        start, end = max(0, index - half), min(len(values), index + half + 1)
        seen = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / seen if seen else math.nan)
    return means


def window_of(length: int) -> int:
    """The moving mean's window: a twentieth of the curve, at least 3 and odd."""
    return max(3, length // 20 | 1)


def thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most about `MAX_POINTS` points that keep every bucket's extremes."""
    if len(steps) <= MAX_POINTS:
        return list(steps), list(values)
    size = math.ceil(len(steps) / (MAX_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(steps), size):
        bucket = range(start, min(start + size, len(steps)))
        finite = [i for i in bucket if math.isfinite(values[i])]
        if not finite:
            kept.append(start)
            continue
        kept += sorted({min(finite, key=lambda i: values[i]), max(finite, key=lambda i: values[i])})
    return [steps[i] for i in kept], [values[i] for i in kept]


def _path(steps: Sequence[int], values: Sequence[float], x: Scale, y: Scale) -> str:
    parts, pen_up = [], True
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value):
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{x(step):.1f} {y(value):.1f}")
        pen_up = False
    return "".join(parts)


def _range(series: Sequence[Series], *, from_zero: bool) -> tuple[float, float]:
    finite = [value for one in series for value in one.finite]
    low, high = min(finite), max(finite)
    if from_zero and low >= 0:
        low = 0.0
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.5 or 0.5
        return (low, high + pad) if from_zero and low >= 0 else (low - pad, high + pad)
    pad = (high - low) * 0.06
    return (low if from_zero and low == 0 else low - pad), high + pad


def _axes(x: Scale, y: Scale, steps: tuple[int, int]) -> Markup:
    lines = Markup("")
    for tick in ticks(y.low, y.high):
        at = y(tick)
        lines += Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, at, at
        )
        lines += Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
            LEFT - 6, at + 3.5, figure(0.0 if abs(tick) < 1e-12 else tick)
        )
    for step, anchor in ((steps[0], "start"), (steps[1], "end")):
        lines += Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            x(step), HEIGHT - 6, anchor, figure(float(step))
        )
    return lines + Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">step</text>').format(
        (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6
    )


def line_chart(ident: str, title: str, unit: str, series: Sequence[Series], *, from_zero: bool) -> Markup:
    """One panel. A single curve is drawn thin, its moving mean on top of it; several curves by their means.

    Every series must have a finite value. `ident` must be unique on the page.
    """
    all_steps = [step for one in series for step in one.steps]
    first, last = min(all_steps), max(all_steps)
    x = Scale(first, last if last > first else first + 1, LEFT, WIDTH - RIGHT)
    y = Scale(*_range(series, from_zero=from_zero), HEIGHT - BOTTOM, TOP)
    marks = Markup("")
    for index, one in enumerate(series):
        marks += _curve(one, index, x, y, alone=len(series) == 1)
    return Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{t}</title><desc id="{i}-d">{d}</desc>{axes}{marks}</svg>'
    ).format(
        w=WIDTH,
        h=HEIGHT,
        i=ident,
        t=title,
        d=_describe(unit, series),
        axes=_axes(x, y, (first, last)),
        marks=marks,
    )


def _curve(one: Series, index: int, x: Scale, y: Scale, *, alone: bool) -> Markup:
    marks = Markup("")
    steps, values = thin(one.steps, one.values)
    if alone and one.smooth and len(values) > FEW:
        marks += Markup('<path class="raw" d="{}"/>').format(_path(steps, values, x, y))
    steps, values = thin(one.steps, one.means)
    kind = "curve" if alone else f"curve c{index % 6}"
    if len(one.finite) == 1 or len(one.values) <= FEW:
        for step, value in zip(one.steps, one.values, strict=True):
            if math.isfinite(value):
                marks += Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(
                    kind.replace("curve", "dot"), x(step), y(value)
                )
    return marks + Markup('<path class="{}" d="{}"><title>{}</title></path>').format(
        kind, _path(steps, values, x, y), f"{one.label}, last {figure(one.last)}"
    )


def _describe(unit: str, series: Sequence[Series]) -> str:
    texts = []
    for one in series:
        finite = one.finite
        texts.append(
            f"{one.label}: {len(finite)} values from {figure(finite[0])} to {figure(finite[-1])}, "
            f"smallest {figure(min(finite))}, largest {figure(max(finite))}"
        )
    return "; ".join(texts) + (f" ({unit})" if unit not in ("", "1") else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a bar; `kind` is the CSS class that colours it."""

    label: str
    value: float
    kind: str


def stacked_bar(ident: str, title: str, slices: Sequence[Slice], unit: str) -> Markup:
    """One horizontal bar divided by value. The smallest slices still show, as a hair line."""
    total = sum(piece.value for piece in slices)
    marks, at = Markup(""), 0.0
    for piece in slices:
        width = 1000 * piece.value / total if total else 0.0
        share = piece.value / total if total else 0.0
        marks += Markup(
            '<rect class="{}" x="{:.2f}" y="0" width="{:.2f}" height="20"><title>{}</title></rect>'
        ).format(
            piece.kind, at, max(width, 0.6), f"{piece.label}: {figure(piece.value)} {unit} ({share:.0%})"
        )
        at += width
    desc = ", ".join(f"{piece.label} {figure(piece.value)} {unit}" for piece in slices)
    return Markup(
        '<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" '
        'aria-labelledby="{i}-t {i}-d">'
        '<title id="{i}-t">{t}</title><desc id="{i}-d">{d}</desc>{m}</svg>'
    ).format(i=ident, t=title, d=desc, m=marks)


def interval_mark(ident: str, point: float, low: float, high: float, greedy: float | None) -> Markup:
    """A point with its confidence interval on the line from 0 to 1; a ring marks the greedy value."""
    described = f"sampled {figure(point)}, 95 % interval {figure(low)} to {figure(high)}"
    ring = Markup("")
    if greedy is not None and math.isfinite(greedy):
        described += f"; greedy {figure(greedy)}"
        ring = Markup(
            '<circle class="ring" cx="{:.1f}" cy="10" r="4"><title>greedy {}</title></circle>'
        ).format(200 * greedy, figure(greedy))
    return Markup(
        '<svg class="interval" viewBox="-6 0 212 20" preserveAspectRatio="xMinYMid" role="img" '
        'aria-labelledby="{i}-t">'
        '<title id="{i}-t">{t}</title>'
        '<line class="track" x1="0" x2="200" y1="10" y2="10"/>'
        '<line class="span" x1="{a:.1f}" x2="{b:.1f}" y1="10" y2="10"/>{ring}'
        '<circle class="dot" cx="{p:.1f}" cy="10" r="4.5"/></svg>'
    ).format(i=ident, t=described, a=200 * low, b=200 * high, p=200 * point, ring=ring)


__all__ = [
    "Series",
    "Slice",
    "figure",
    "interval_mark",
    "line_chart",
    "moving_mean",
    "stacked_bar",
    "thin",
    "ticks",
    "window_of",
]
