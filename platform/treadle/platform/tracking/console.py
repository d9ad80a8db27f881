"""One progress line per step: rewritten in place on a terminal, elsewhere plain lines, sparsely."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from treadle.platform import metric_names as names

ETA_WINDOW = 25
"""Steps whose median duration the estimate rests on: one slow step (a checkpoint) does not move it."""
TTY_INTERVAL_S = 0.1
PLAIN_INTERVAL_S = 2.0


class Eta:
    """Time left, from the moving median of the time between steps."""

    def __init__(self, total: int, window: int = ETA_WINDOW) -> None:
        self._total = total
        self._gaps: deque[float] = deque(maxlen=window)
        self._last: tuple[int, float] | None = None

    def tick(self, step: int, now_s: float) -> None:
        """A step ended. Steps that were skipped share the time since the last one; going back starts anew."""
        if self._last is not None and step > self._last[0]:
            self._gaps.append((now_s - self._last[1]) / (step - self._last[0]))
        if self._last is None or step != self._last[0]:
            self._last = (step, now_s)

    @property
    def step_s(self) -> float:
        """Median seconds per step; NaN before the second step."""
        return statistics.median(self._gaps) if self._gaps else math.nan

    def left_s(self, step: int) -> float:
        """Seconds until the last step; NaN while nothing is known."""
        return max(0, self._total - step) * self.step_s


def duration(seconds: float) -> str:
    """Example: 5.31 → `5.3s`, 65 → `1:05`, 3725 → `1:02:05`; not known → `–`."""
    if math.isnan(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{rest:02d}"
    return f"{minutes}:{rest:02d}" if minutes else f"{rest}s"


def short(value: float) -> str:
    """Three significant figures, thousands as k and M. Example: 12345 → `12.3k`, 0.01234 → `0.0123`."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[unit]:.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


_COLUMNS: tuple[tuple[str, str], ...] = (
    (names.REWARD_MEAN, "reward {}"),
    (names.ACCURACY_SAMPLED, "acc {}"),
    (names.ACCURACY_GREEDY, "greedy {}"),
    (names.RESPONSE_LENGTH_MEAN, "len {}"),
    (names.POLICY_ENTROPY, "H {}"),
    (names.POLICY_LOSS, "loss {}"),
    (names.STALENESS_MAX, "stale {}"),
    (names.PERF_TOKENS_PER_S, "{} tok/s"),
)


def progress_line(
    stage: str, step: int, total: int, metrics: Mapping[str, float], *, eta: Eta, elapsed_s: float
) -> str:
    """Example: `grpo 12/300  reward 0.51  acc 0.48  len 20.1  …  0.48s/step  ETA 2:18  elapsed 5.9s`."""
    parts = [f"{stage} {step:>{len(str(total))}}/{total}"]
    parts += [text.format(short(metrics[name])) for name, text in _COLUMNS if name in metrics]
    step_s = metrics.get(names.TIMING_STEP, eta.step_s)
    if not math.isnan(step_s):
        parts.append(f"{short(step_s)}s/step")
    parts.append(f"ETA {duration(eta.left_s(step))}")
    parts.append(f"elapsed {duration(elapsed_s)}")
    return "  ".join(parts)


def opening_line(name: str, attempt: int, folder: Path) -> str:
    """What a run says first."""
    again = f" (attempt {attempt})" if attempt > 1 else ""
    return f"run {name}{again}  folder {folder}  report {folder / 'report.html'}"


def closing_line(status: str, elapsed_s: float, folder: Path) -> str:
    """What a run says last."""
    return f"run {status} after {duration(elapsed_s)}  folder {folder}"


class Console:
    """Writes to one stream: standard output, or standard error under `--json` so that standard output stays
    empty for the result. A stream that breaks (closed pipe) is given up silently: the spool has everything.
    """

    def __init__(
        self, stream: TextIO, *, every: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream: TextIO | None = stream
        self._tty = stream.isatty()
        self._every = every
        self._clock = clock
        self._line = ""  # what stands on the terminal's last line
        self._printed_at = -math.inf

    def progress(self, line: str, *, step: int, last: bool) -> None:
        """Shows a step's line: in place on a terminal, else at most every 2 s (always the last step)."""
        now = self._clock()
        due = now - self._printed_at >= (TTY_INTERVAL_S if self._tty else PLAIN_INTERVAL_S)
        chosen = not self._tty and self._every > 0 and step % self._every == 0
        if not (due or chosen or last):
            return
        self._printed_at = now
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            self._line = line if len(line) <= width else line[: width - 1] + "…"
            self._write("\r\x1b[2K" + self._line)
        else:
            self._write(line + "\n")

    def keep(self) -> None:
        """Ends the line that is being rewritten, so that it stays."""
        if self._line:
            self._line = ""
            self._write("\n")
        self._printed_at = -math.inf

    def say(self, text: str) -> None:
        """Prints a line of its own; a progress line in place is put back below it."""
        if self._line:
            self._write("\r\x1b[2K" + text + "\n" + self._line)
        else:
            self._write(text + "\n")

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError, UnicodeEncodeError):
            self._stream = None
