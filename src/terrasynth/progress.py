"""Progress of anything long, the same everywhere: a bar on a terminal, a plain line now and then in a log file.

    with track(total, "painting", unit="images") as progress:
        for batch in batches:
            ...
            progress.advance(len(batch), loss=0.31)

Everything goes to standard error. `TERRASYNTH_QUIET=1` silences it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

__all__ = ["Tracker", "duration", "say", "track"]

#: Seconds between plain lines, and between redraws of the bar.
_LINE_EVERY = 10.0
_DRAW_EVERY = 0.1

# rich draws one live display at a time, so nested `track`s share it.
_bars: Progress | None = None


def _quiet() -> bool:
    return os.environ.get("TERRASYNTH_QUIET", "") not in ("", "0")


def say(text: str) -> None:
    """Print one line about how it goes, unless asked to be quiet. It appears above a running bar."""
    if not _quiet():
        print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time as people say it: `1 h 05 min`, `2 min 03 s`, `4 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class Tracker:
    """Counts, and passes what it knows to a display.

    Attributes:
        done: units finished so far.
    """

    def __init__(self, total: int, unit: str, done: int, every: float, show: Callable[[int, str], None]) -> None:
        self.total, self.unit, self.done = total, unit, done
        self._every, self._show = every, show
        self._values: dict[str, float] = {}
        self._first, self._start = done, time.monotonic()
        self._shown = self._start

    def advance(self, count: int = 1, **values: float) -> None:
        """Add `count` finished units; `values` (`loss=0.3`) are shown beside the count until they are given anew."""
        self.done += count
        self._values.update(values)
        now = time.monotonic()
        if now - self._shown >= self._every:
            self._shown = now
            self._show(self.done, self._text(now))

    def _text(self, now: float) -> str:
        parts = [f"{name} {value:.4g}" for name, value in self._values.items()]
        # The mean over this sitting: it counts the pauses for validation and checkpoints, as the time left must.
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        if rate > 0:
            speed = f"{rate:.1f} {self.unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit.removesuffix('s')}"
            parts += [speed, f"{duration((self.total - self.done) / rate)} left"]
        return ", ".join(parts)


@contextmanager
def track(total: int, label: str, *, unit: str = "steps", done: int = 0, quiet: bool = False) -> Iterator[Tracker]:
    """Show the progress of a `with` block; what it drew is gone afterwards. May be nested.

    Args:
        total: how many units there are.
        label: what is going on ("training the generator").
        unit: what is counted, in the plural.
        done: units that earlier sittings finished.
        quiet: show nothing; so does `TERRASYNTH_QUIET=1`.
    """
    global _bars
    if quiet or _quiet():
        yield Tracker(total, unit, done, float("inf"), lambda done, text: None)
        return
    console = Console(stderr=True)
    if _bars is None and not console.is_terminal:
        line = f"{label}: {{}}/{total} {unit}, {{}}".format
        yield Tracker(total, unit, done, _LINE_EVERY, lambda done, text: say(line(done, text)))
        return
    outermost = _bars is None
    if _bars is None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}")
        _bars = Progress(*columns, console=console, transient=True)
        _bars.start()
    bars = _bars
    task = bars.add_task(label, total=total, completed=done, text="")
    try:
        yield Tracker(total, unit, done, _DRAW_EVERY, lambda done, text: bars.update(task, completed=done, text=text))
    finally:
        bars.remove_task(task)
        if outermost:
            bars.stop()
            _bars = None
