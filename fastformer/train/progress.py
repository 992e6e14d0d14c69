"""What a user sees while it trains: a live line on a terminal, a few quiet lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

FIRST_PAUSE, GROWTH = 30.0, 0.1  # seconds; of the time since the start


class ProgressLine:
    """Step, loss, tokens per second and time left.

    Off a terminal a line comes at once, then after 30 s or a tenth of the time so far, whichever is
    longer: a log of an hour has some thirty lines.
    """

    def __init__(self, steps: int, step: int):
        self._steps, self._shows = steps, jax.process_index() == 0
        self._first: tuple[int, float] | None = None  # step and time of the first that ended
        self._next, self._bar = 0.0, None
        if self._shows and sys.stdout and sys.stdout.isatty():
            columns = (
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(soft_wrap=True))
            self._task = self._bar.add_task("compiling", total=steps, completed=step)

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show how far training is."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        past = now - self._first[1]
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if step > self._first[0]:
            text += f"  {clock(past / (step - self._first[0]) * (self._steps - step))} left"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
        elif self._shows and (now >= self._next or step == self._steps):
            self._next = now + max(FIRST_PAUSE, GROWTH * past)
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shows:
            print(text, flush=True)


def clock(seconds: float) -> str:
    """Return ``"1:02:03"`` or ``"02:03"``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
