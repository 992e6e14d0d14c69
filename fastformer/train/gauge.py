"""How well a run uses its devices: a ceiling, the useful part of a step, a profiler's trace."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastformer.compress import within
from fastformer.compress.method import bare
from fastformer.core.dtypes import POLICIES
from fastformer.core.mesh import use
from fastformer.train.logging import EVENTS, LogConfig
from fastformer.train.setup import Run
from fastformer.train.state import TrainState
from fastformer.train.step import CompiledStep, abstract_batch, count, jit_train_step

SIDES = {"cpu": 512}  # of the matrices by platform
LARGE = 8192  # where no side is named: what fills a GPU or TPU
PRODUCTS, REPEATS = 4, 3  # in a row, without waiting; the best of so many rows counts


@dataclasses.dataclass(frozen=True)
class Gauge:
    """What training's speed is measured against.

    Attributes:
      step_flops: of the matrix products of one step that computes nothing twice, over all devices; None
        where they cannot be counted.
      ceiling: FLOPs a second that all devices reach together in a product of large matrices.
      origin: how the ceiling was measured, in words.
    """

    step_flops: int | None
    ceiling: float
    origin: str

    def utilisation(self, steps_per_second: float) -> float | None:
        """Return the part of the ceiling used: model FLOPs utilisation (Chowdhery et al., 2204.02311)."""
        return None if self.step_flops is None else self.step_flops * steps_per_second / self.ceiling


def make_gauge(
    run: Run, tx: Any, schedule: Any, abstract: TrainState, program: CompiledStep, frozen: Mapping[str, Any]
) -> Gauge:
    """Measure the ceiling, once in a process, and count a step; within core.mesh.use."""
    dtype = jnp.dtype(POLICIES[program.policy].compute).name
    platform = run.mesh.devices.flat[0].platform
    side = SIDES.get(platform, LARGE)
    config = bare(run.model).config
    once = _once(config, platform)
    if once == config and run.mesh.shape["sequence"] == 1:
        counted = program.flops
    else:
        plain = dataclasses.replace(run, model=within(run.model, lambda inner: inner.clone(config=once)))
        step, batch = jit_train_step(plain, tx, schedule, abstract, program.policy), abstract_batch(run)
        with use(run.mesh, ()):  # of whole rows: where time is split, shards do more than those
            counted = count(step.trace(abstract, batch, dict(frozen)))
    origin = f"products of {side} x {side} matrices in {dtype}, at the start"
    return Gauge(counted, ceiling(run.mesh, dtype), origin)


def _once(config: Any, platform: str) -> Any:
    """Return the model's configuration in which nothing is computed twice, and a trace shows all products."""
    if set(config.remat) != {"none"} or config.loss_chunk:
        config = dataclasses.replace(config, remat=("none",), loss_chunk=0)
    if platform != "cpu":  # kernels hide their products
        config = dataclasses.replace(config, implementation="xla")
    return config


@functools.cache
def ceiling(mesh: Mesh, dtype: str) -> float:
    """Return FLOPs a second of all devices of a mesh, each of which multiplies large matrices."""
    side = SIDES.get(mesh.devices.flat[0].platform, LARGE)
    each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.jit(lambda: jnp.ones((mesh.size, side, side), dtype), out_shardings=each)()
    product = jax.jit(lambda a, b: a @ b / side, out_shardings=each)  # it neither grows nor vanishes

    def row() -> float:
        start, found = time.perf_counter(), ones
        for _ in range(PRODUCTS):
            found = product(found, ones)
        jax.block_until_ready(found)
        return time.perf_counter() - start

    row()  # compiles
    return mesh.size * PRODUCTS * 2 * side**3 / min(row() for _ in range(REPEATS))


class Trace:
    """A profiler's trace of some steps, in the folder of TensorBoard's events.

    Only the first process writes one, of its own devices.
    """

    def __init__(self, options: LogConfig, workdir: Path):
        self._first, self._last = options.trace_from, options.trace_from + options.trace_steps - 1
        self._folder, self._on = workdir / EVENTS, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Start step ``number`` within it; the trace begins with the first that is due."""
        if self._first <= number <= self._last and not self._on and jax.process_index() == 0:
            jax.profiler.start_trace(self._folder)
            self._on = True
        with contextlib.ExitStack() as stack:
            if self._on:  # or TensorBoard shows no steps
                stack.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=number))
            yield

    def ends_with(self, number: int) -> bool:
        """Return whether ``number`` is the last step of a trace under way."""
        return self._on and number >= self._last

    def close(self) -> None:
        """Write the trace, if one is under way."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
