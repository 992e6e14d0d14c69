"""Evaluation on the held-out split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from fastformer.core.config import section
from fastformer.core.errors import require
from fastformer.core.mesh import batch_sharding, use
from fastformer.train.setup import Run


@dataclass(frozen=True)
class EvaluateConfig:
    """When and on how many held-out rows; configs/base.py says what each field means."""

    every: int
    rows: int
    overlap: int
    batch: int

    def __post_init__(self) -> None:
        for field in ("every", "rows", "overlap", "batch"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")


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


def make_evaluate(run: Run) -> Callable[[Any, int], Evaluation]:
    """Return ``(params, limit) -> Evaluation`` on the first ``limit`` held-out rows (0: all).

    It is compiled once. It draws no random numbers and reads nothing that training reads on.
    """
    options = section(EvaluateConfig, run.config, "evaluate")
    batch_size = options.batch or run.config.train.batch
    layout = batch_sharding(run.mesh, run.rules)
    totals = jax.jit(lambda params, batch: run.task.loss(run.model, params, batch, None))

    def evaluate_rows(params: Any, limit: int) -> Evaluation:
        pending = []
        with use(run.mesh, run.rules):
            for batch in run.data.heldout_batches(batch_size, options.overlap, limit):
                pending.append(totals(params, jax.device_put(batch, layout)))
                if len(pending) > 2:  # keeps the device busy, but not more batches than that in its memory
                    jax.block_until_ready(pending[-3])
        # Each batch's sums are float32; the sum over batches is float64.
        nats, targets = (sum(float(pair[i]) for pair in pending) for i in range(2))
        rows = run.data.heldout_rows(options.overlap)
        size = run.data.heldout_bytes_of(limit, options.overlap)
        return Evaluation(
            nats / max(targets, 1), run.task.quality(nats, targets, size), min(limit or rows, rows)
        )

    return evaluate_rows


def evaluate(run: Run, params: Any, limit: int = 0) -> dict[str, float]:
    """Return the task's metrics of ``params`` on the first ``limit`` held-out rows (0: all)."""
    return make_evaluate(run)(params, limit).quality
