"""One process's part of a run: what the loop holds, and how it watches the steps that it started."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax

from fastformer.report.run_report import SLOW_DATA
from fastformer.train.checkpoint import Checkpoints
from fastformer.train.evaluate import Evaluation
from fastformer.train.gauge import Gauge, Trace
from fastformer.train.logging import MetricsLog
from fastformer.train.precision import Plan
from fastformer.train.progress import ProgressLine
from fastformer.train.setup import Run
from fastformer.train.state import TrainState
from fastformer.train.step import CompiledStep, peak_memory_bytes, put_batch
from fastformer.train.stop import Stop
from fastformer.train.times import Times

# Steps that may be under way while the host goes on: the devices never wait for it, and yet every
# loss is looked at a moment after it is there.
LOOKAHEAD = 2
KNOWN = 50  # steps of a process before it is said that it waits for data
HELP = "what is read may lie on a faster disk (config.data.directory), or the cores may have other work"


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
      gauge, trace: what speed is measured against (none in a run of no steps), and the profiler.
      first: the step that this process went on from.
      config_sha256: of the configuration that the workdir is bound to.
      owed: the evaluation that is due at this step was not made, for it was to stop.
      marked: (step, seconds stepping, seconds waiting) of the last line written.
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
    gauge: Gauge | None
    trace: Trace
    config_sha256: str
    last: tuple[int, Evaluation] | None = None
    pending: collections.deque = field(default_factory=collections.deque)
    first: int = 0
    owed: bool = False
    marked: tuple[int, float, float] = (0, 0.0, 0.0)
    streak: int = 0
    rollbacks: list[dict[str, int]] = field(default_factory=list)
    _said_waiting: bool = False
    _tick: float = field(default_factory=time.perf_counter)

    @property
    def program(self) -> CompiledStep:
        """Return the step in the precision that is due."""
        return self.programs[self.plan.at(self.step)]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time within it as none of training's own, once all that was started has ended."""
        self.look(all_of_them=True)
        try:
            yield
        finally:
            now = time.perf_counter()
            self.times.run += now - self._tick
            self._tick = now

    def count(self) -> None:
        """Add the time since the last call to both clocks."""
        now = time.perf_counter()
        self.times.run += now - self._tick
        self.times.stepping += now - self._tick
        self._tick = now

    def mark(self) -> None:
        """Let the next line of the log tell of the steps from here on."""
        self.marked = self.step, self.times.stepping, self.times.waiting

    def advance(self) -> None:
        """Start one more step."""
        start = time.perf_counter()
        batch = next(self.iterator)
        if self.step > self.first:
            self.times.waiting += time.perf_counter() - start
        with self.trace.step(self.step + 1):
            self.state, metrics = self.program.call(self.state, put_batch(self.run, batch))
        self.step += 1
        self.pending.append((self.step, metrics, self.iterator.get_state()))
        self.look()
        if self.trace.ends_with(self.step):
            with self.pause():
                self.trace.close()

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
        steps = step - self.marked[0]
        pace = steps / max(self.times.stepping - self.marked[1], 1e-9)
        speed = pace * config.train.batch * config.data.length
        if step % config.log.every == 0:
            values = {"loss": loss, "learning_rate": float(metrics["learning_rate"]), "gradient_norm": norm}
            values |= {"tokens_per_second": speed, "seconds": self.times.run}
            utilisation = self.gauge.utilisation(pace)
            values |= {} if utilisation is None else {"utilisation": utilisation}
            values |= {"data_wait": (self.times.waiting - self.marked[2]) / max(steps, 1)}
            values |= {"memory_bytes": peak_memory_bytes(self.run.mesh, self.program)}
            values |= {"skipped_steps": skipped} if skipped else {}
            values |= {"loss_scale": float(metrics["loss_scale"])} if "loss_scale" in metrics else {}
            self.log.write(step, "train", values)
            self.marked = step, self.times.stepping, self.times.waiting
            if step - self.first >= KNOWN:
                self.say_waiting()
        self.line.update(step, loss, speed)

    def say_waiting(self) -> None:
        """Say once if much of the time goes into waiting for data."""
        share = self.times.waiting / max(self.times.stepping, 1e-9)
        if share > SLOW_DATA and not self._said_waiting:
            self._said_waiting = True
            self.line.say(f"{share:.0%} of training's time went into waiting for data; {HELP}")

    def _skipped(self, step: int, loss: float, norm: float, skipped: int) -> None:
        self.log.write(step, "skipped", {"skipped_steps": skipped, "streak": self.streak})
        if self.streak == 1:
            self.line.say(f"step {step} is skipped: its loss is {loss}, its gradient norm {norm}")
