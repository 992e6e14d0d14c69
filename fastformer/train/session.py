"""One process's part of a run: what the loop holds, and how it watches the steps that it started."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from fastformer.train.checkpoint import Checkpoints
from fastformer.train.evaluate import Evaluation
from fastformer.train.logging import MetricsLog
from fastformer.train.precision import Plan
from fastformer.train.progress import ProgressLine
from fastformer.train.setup import Run
from fastformer.train.state import TrainState
from fastformer.train.step import CompiledStep
from fastformer.train.stop import Stop

# Steps that may be under way while the host goes on: the devices never wait for it, and yet every
# loss is looked at a moment after it is there.
LOOKAHEAD = 2


@dataclass
class Times:
    """Seconds that went by, those of earlier, interrupted processes included.

    Attributes:
      run: from the first compilation on, without what lies between two processes.
      stepping: of those, in training steps alone.
    """

    run: float = 0.0
    stepping: float = 0.0


class BadSteps(Exception):
    """So many steps in a row were skipped that the run had better go back.

    Attributes:
      step: the last of them.
      data: state of the data iterator after its batch.
      loss, norm: its own.
    """

    def __init__(self, step: int, data: Any, loss: float, norm: float):
        super().__init__(f"step {step}")
        self.step, self.data, self.loss, self.norm = step, data, loss, norm


@dataclass
class Session:
    """One process's part of a run.

    Attributes:
      state: of the step that was started last; the host's ``step`` is the same without waiting for it.
      best: (step, metric) of the best evaluation so far.
      last: the newest evaluation in this process and its step.
      pending: (step, metrics, state of the data iterator) of steps that the host has not looked at yet.
      marked: (step, seconds) of the last line written.
      streak: steps skipped in a row up to the last that was looked at.
      rollbacks: ``{"from": step, "to": step}`` of each time that the run went back.
    """

    run: Run
    stop: Stop
    plan: Plan
    programs: dict[str, CompiledStep]
    checkpoints: Checkpoints
    log: MetricsLog
    line: ProgressLine
    evaluate: Callable[[Any, int], Evaluation]
    iterator: Any
    state: TrainState
    step: int
    best: tuple[int, float] | None
    times: Times
    last: tuple[int, Evaluation] | None = None
    pending: collections.deque = field(default_factory=collections.deque)
    marked: tuple[int, float] = (0, 0.0)
    streak: int = 0
    rollbacks: list[dict[str, int]] = field(default_factory=list)
    _tick: float = field(default_factory=time.perf_counter)

    @property
    def program(self) -> CompiledStep:
        """Return the step in the precision that is due."""
        return self.programs[self.plan.at(self.step)]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time within it as none of training's own, once all that was started has ended."""
        self.look(all_of_them=True)
        yield
        now = time.perf_counter()
        self.times.run += now - self._tick
        self._tick = now

    def count(self) -> None:
        """Add the time since the last call to both clocks."""
        now = time.perf_counter()
        self.times.run += now - self._tick
        self.times.stepping += now - self._tick
        self._tick = now

    def look(self, all_of_them: bool = False) -> None:
        """Look at steps that were started: all, or all but the newest few.

        Raises:
          BadSteps: it is time to go back.
        """
        while len(self.pending) > (0 if all_of_them else LOOKAHEAD):
            step, metrics, data = self.pending.popleft()
            self._look_at(step, jax.device_get(metrics), data)

    def _look_at(self, step: int, metrics: dict[str, Any], data: Any) -> None:
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        self.streak, skipped = int(metrics["streak"]), int(metrics["skipped"])
        self.count()
        if not metrics["taken"]:
            self._skipped(step, loss, norm, skipped)
            if self.streak >= self.run.config.train.bad_steps:
                raise BadSteps(step, data, loss, norm)
            return
        config = self.run.config
        since = self.times.stepping - self.marked[1]
        speed = (step - self.marked[0]) * config.train.batch * config.data.length / max(since, 1e-9)
        if step % config.log.every == 0:
            values = {"loss": loss, "learning_rate": float(metrics["learning_rate"]), "gradient_norm": norm}
            values |= {"tokens_per_second": speed, "seconds": self.times.run}
            values |= {"skipped_steps": skipped} if skipped else {}
            values |= {"loss_scale": float(metrics["loss_scale"])} if "loss_scale" in metrics else {}
            self.log.write(step, "train", values)
            self.marked = step, self.times.stepping
        self.line.update(step, loss, speed)

    def _skipped(self, step: int, loss: float, norm: float, skipped: int) -> None:
        self.log.write(step, "skipped", {"skipped_steps": skipped, "streak": self.streak})
        if self.streak == 1:
            self.line.say(f"step {step} is skipped: its loss is {loss}, its gradient norm {norm}")
