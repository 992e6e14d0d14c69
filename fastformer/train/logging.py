"""What a run writes down as it goes: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from fastformer.core.errors import require
from fastformer.data.atomic import atomic
from fastformer.report.run_report import METRICS, read_metrics

EVENTS = "tensorboard"


@dataclass(frozen=True)
class LogConfig:
    """Attributes: every, steps between lines; trace_from, trace_steps: which steps the profiler watches."""

    every: int
    trace_from: int
    trace_steps: int

    def __post_init__(self) -> None:
        for field in ("every", "trace_from"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        require(self.trace_steps >= 0, "trace_steps", self.trace_steps, "0 or more")


class MetricsLog:
    """The lines of ``metrics.jsonl``, and the same numbers as TensorBoard events.

    What an interrupted run wrote after the checkpoint that it goes on from is taken back first, so
    that the file ends up as if nothing had happened. Only the first process writes.
    """

    def __init__(self, workdir: Path, step: int):
        """Open the log of the run in ``workdir`` that goes on after ``step``."""
        self._path, self._writes = workdir / METRICS, jax.process_index() == 0
        self._seen: set[tuple] = set()
        self._open(step)

    def _open(self, step: int) -> None:
        if not self._writes:
            return
        lines = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        self._seen = {_key(line) for line in lines}
        with atomic(self._path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file = open(self._path, "a")
        # Written here and now: a thread that writes them may die, of a full disk or a clock that jumps, and
        # leave the run waiting for it.
        folder = self._path.parent / EVENTS
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), f".{time.monotonic_ns()}")
        start = SessionLog(status=SessionLog.START)  # what comes after this step is written anew
        self._events.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def rewind(self, step: int) -> None:
        """Take back what was written after ``step``, from which the run goes on."""
        self.close()
        self._open(step)

    def write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Append a line, unless this very measurement is there already."""
        line = {"step": step, "split": split, **values}
        if not self._writes or _key(line) in self._seen:
            return
        self._seen.add(_key(line))
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            summary = scalar(f"{split}/{name}", value)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def sync(self) -> None:
        """Bring every line to the disk: before a checkpoint says that they are there."""
        if self._writes:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Bring everything to the disk and close the files."""
        if self._writes:
            self.sync()
            self._file.close()
            self._events.close()


def _key(line: dict[str, Any]) -> tuple:
    return line["step"], line["split"], line.get("rows")
