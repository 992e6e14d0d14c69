"""Evaluation on the held-out split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from fastformer.core.config import section
from fastformer.core.errors import require
from fastformer.core.mesh import batch_sharding, use
from fastformer.data.tokenisers import Tokeniser
from fastformer.decode import GenerateConfig, TokenByToken, check_rows, complete, stored
from fastformer.tasks.task import Complete
from fastformer.train.setup import Run


@dataclass(frozen=True)
class EvaluateConfig:
    """When and on how many held-out rows; configs/base.py says what each field means."""

    every: int
    rows: int
    overlap: int
    batch: int
    state_rows: int = 32

    def __post_init__(self) -> None:
        for field in ("every", "rows", "overlap", "batch", "state_rows"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(self.batch <= 2**20, "batch", self.batch, f"at most {2**20:,}")


class Evaluation(NamedTuple):
    """How weights do on held-out rows.

    Attributes:
      loss: nats per target.
      quality: the task's metrics.
      rows: evaluated.
    """

    loss: float
    quality: dict[str, float]
    rows: int


class BrokenOff(Exception):
    """An evaluation that was not made to its end."""


def make_evaluate(run: Run, stop: Callable[[], bool] | None = None) -> Callable[[Any, int], Evaluation]:
    """Return ``(params, limit) -> Evaluation`` on the first ``limit`` held-out rows (0: all).

    It is compiled once. It draws no random numbers and reads nothing that training reads on. Where ``stop()``
    comes true meanwhile, on all processes, it raises BrokenOff.
    """
    options = section(EvaluateConfig, run.config, "evaluate")
    batch_size = options.batch or run.config.train.batch
    layout = batch_sharding(run.mesh, run.rules)
    totals = jax.jit(lambda params, batch: run.task.totals(run.model, params, batch))

    def evaluate_rows(params: Any, limit: int) -> Evaluation:
        pending = []
        with use(run.mesh, run.rules):
            for batch in run.data.heldout_batches(batch_size, options.overlap, limit):
                if stop and stop():
                    raise BrokenOff
                pending.append(totals(params, jax.device_put(batch, layout)))
                if len(pending) > 2:  # keeps the device busy, but not more batches than that in its memory
                    jax.block_until_ready(pending[-3])
        # Each batch's sums are float32; the sum over batches is float64.
        sums = {name: _gathered([found[name] for found in pending]) for name in pending[0]}
        rows = run.data.heldout_rows(options.overlap)
        quality = run.task.quality(sums, run.data, limit, options.overlap)
        return Evaluation(sums["nats"] / max(sums["targets"], 1), quality, min(limit or rows, rows))

    return evaluate_rows


def _gathered(values: Sequence[jax.Array]) -> Any:
    """Return the sum of scalars, or the rows of all arrays one below another."""
    return np.concatenate(values) if values[0].ndim else sum(map(float, values))


def evaluate(run: Run, params: Any, limit: int = 0) -> dict[str, float]:
    """Return the task's metrics of ``params`` on the first ``limit`` held-out rows (0: all).

    What the model generates counts too: in training it is measured at the end alone, for it takes long.
    """
    quality = make_evaluate(run)(params, limit).quality
    return quality | apart(run, params, limit) | decoded(run, params, limit)


def apart(run: Run, params: Any, limit: int = 0) -> dict[str, float]:
    """Return the task's metric of what compression wants to see apart, such as a branch of a hybrid alone."""
    found, name = {}, run.task.metric
    for part, model in run.compression.apart(run.model).items():
        alone = make_evaluate(dataclasses.replace(run, model=model))(params, limit)
        found[f"{name}_{part}"] = alone.quality[name]
    return found


def decoded(run: Run, params: Any, limit: int = 0) -> dict[str, float]:
    """Return the metrics of what ``params`` generate for the first ``limit`` held-out rows (0: all)."""
    with use(run.mesh, run.rules):
        found = run.task.decoded(completer(run, params, run.data.tokeniser), run.data, limit)
    return found | through_state(run, params)


def through_state(run: Run, params: Any) -> dict[str, float]:
    """Return the task's first metric of held-out rows that are read token by token, as decoding reads.

    Once through the state as it is and once as config.generate.state stores it, so that the difference is
    what storing it costs. Empty where it is stored as it is, and of models that have no state of their
    rows, or whose prefixes are not read so.
    """
    state, metric = section(GenerateConfig, run.config, "generate").state, run.task.metric
    model = run.model
    if state == "float" or not hasattr(model, "init_state") or model.reads_sources or model.config.prefix_lm:
        return {}
    found = {}
    for name in ("float", state):
        model = TokenByToken(stored(run.model, name))
        rows = section(EvaluateConfig, run.config, "evaluate").state_rows
        quality = make_evaluate(dataclasses.replace(run, model=model))(params, rows).quality
        found[f"{metric}_{name}_state"] = quality[metric]
    return found


def completer(run: Run, params: Any, tokeniser: Tokeniser) -> Complete:
    """Return how prompts in tokens are completed, by config.generate; within core.mesh.use."""
    options = section(GenerateConfig, run.config, "generate")
    return lambda rows: complete(run.model, params, rows, tokeniser.eod, options, run.config.data.length)


def check_samples(run: Run) -> None:
    """Check before the first step that all that is decoded after the last can be.

    Raises:
      UserError: a prompt is too long for the model, or it cannot be searched so.
    """
    options = section(GenerateConfig, run.config, "generate")

    def nothing(rows: Sequence[Sequence[int]]) -> list[list[int]]:
        check_rows(run.model, rows, options, run.config.data.length)
        return [[] for _ in rows]

    run.task.samples(nothing, run.data, options.prompt)
    if run.model.config.positions == "learned":  # no others are too few for a prompt
        run.task.decoded(nothing, run.data, 0)
