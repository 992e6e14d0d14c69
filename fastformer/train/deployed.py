"""The weights as they are deployed: made at the end of a run, stored, and read again."""

from __future__ import annotations

import dataclasses
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save as to_safetensors

from fastformer.compress import store
from fastformer.compress.method import Calibration, bare
from fastformer.compress.store import WEIGHTS
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.models.stack import unstack
from fastformer.train.checkpoint import FOLDER as CHECKPOINTS
from fastformer.train.checkpoint import restore_params
from fastformer.train.logging import METRICS
from fastformer.train.setup import Run
from fastformer.train.state import abstract_params
from fastformer.train.step import part_read, put_batch


def frozen(run: Run) -> dict[str, Any]:
    """Return what compression's losses read besides the batch, on the mesh; within core.mesh.use."""

    def place(x: Any, letters: tuple[str, ...]) -> jax.Array:
        axes = nn.logical_to_mesh_axes(letters, run.rules)
        whole = NamedSharding(run.mesh, PartitionSpec())
        split = NamedSharding(run.mesh, axes)
        sizes = (math.prod(run.mesh.shape[a] for a in _axes(axis)) for axis in axes)
        even = all(size % shards == 0 for size, shards in zip(x.shape, sizes))
        return jax.device_put(x, split if even else whole)

    return run.compression.frozen(run.model, run.data.tokeniser, place) if run.compression else {}


def _axes(axis: Any) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def export(run: Run, params: Any) -> Any:
    """Return the weights to deploy; ``params`` themselves in a run without compression."""
    if not run.compression:
        return params

    return run.compression.export(run.model, params, calibration(run))


def calibration(run: Run) -> Calibration:
    """Return the text on which weights are looked at."""

    def batches():
        return (put_batch(run, batch) for batch in islice(_first_batches(run), run.config.compress.batches))

    return Calibration(batches, run.task.loss)


def _first_batches(run: Run):
    """Return training's batches of an order of its own, always the same."""
    return run.data.train_iterator(run.config.train.batch, run.config.seed, *part_read(run))


def to_bytes(run: Run, weights: Any) -> bytes:
    """Return the file of the weights, every array whole; all processes take part."""
    if jax.process_count() > 1:
        weights = multihost_utils.process_allgather(weights, tiled=True)
    weights = weights if run.compression else unstack(weights)
    arrays = {path: np.asarray(x) for path, x in paths(weights).items()}
    return store.dump(arrays) if run.compression else to_safetensors(arrays)


def is_imported(workdir: Path) -> bool:
    """Return whether a workdir holds the weights of a model from elsewhere, which never trained here."""
    return (workdir / WEIGHTS).exists() and not any((workdir / x).exists() for x in (CHECKPOINTS, METRICS))


def restore(run: Run) -> Any:
    """Return the weights to run: as stored of a finished run with compression and of an imported one, of its
    checkpoint otherwise.

    Raises:
      UserError: there are none that are whole and fit the model.
    """
    path = run.workdir / WEIGHTS
    if not path.exists() or not (run.compression or is_imported(run.workdir)):
        return restore_params(run)
    params = store.tree(store.load(path))
    with use(run.mesh, run.rules):
        wanted = abstract_params(dataclasses.replace(run, model=bare(run.model)))
        store.check_fits(params, wanted, str(path))
        params = jax.device_put(params, NamedSharding(run.mesh, PartitionSpec()))
    if jax.process_index() == 0:
        print(f"weights as stored in {path}", file=sys.stderr, flush=True)
    return params
