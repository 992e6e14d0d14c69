"""The gradient of a batch, all at once or a part of its rows after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.compress import at
from fastformer.train.setup import Run

Batch = Mapping[str, jax.Array]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Gradients(NamedTuple):
    """What a batch says.

    Attributes:
      loss: nats per target over the whole batch, float32.
      targets: that counted, float32.
      mean: gradients of the loss, a tree as the weights, float32.
    """

    loss: jax.Array
    targets: jax.Array
    mean: Any


def make_gradients(run: Run) -> Callable[..., Gradients]:
    """Return ``(params, batch, key, scale, step, frozen) -> Gradients``, ``config.train.accumulate`` parts.

    The loss is multiplied by ``scale`` on the way back, and its gradients divided by it at the end;
    ``step`` counts the updates made, and ``frozen`` is what compression's losses read besides the batch.

    Sums over the parts are divided once, by the targets of all: each target weighs the same, in
    whichever part its row lies and however many its neighbours there have.
    """
    parts, loss_of = run.config.train.accumulate, run.compression.loss(run.task.loss)

    def of_part(model: Any, params: Any, batch: Batch, key: jax.Array, factor: jax.Array | float) -> tuple:
        def nats(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            total, targets = loss_of(model, params, batch, key)
            return total * factor, (total, targets)

        (_, sums), gradients = jax.value_and_grad(nats, has_aux=True)(params)
        return *sums, gradients

    def of_batch(
        params: Any,
        batch: Batch,
        key: jax.Array,
        scale: jax.Array | float = 1.0,
        step: jax.Array | int = 0,
        frozen: Mapping[str, Any] = NOTHING,
    ) -> Gradients:
        factor, model = scale / _unit(batch), at(run.model, step)
        if parts == 1:
            nats, targets, gradients = of_part(model, params, {**batch, **frozen}, key, factor)
        else:

            def add(sums: tuple, part: tuple[jax.Array, Batch]) -> tuple[tuple, None]:
                index, rows = part
                found = of_part(model, params, {**rows, **frozen}, jax.random.fold_in(key, index), factor)
                return jax.tree.map(jnp.add, sums, found), None

            zero = jnp.zeros((), jnp.float32)
            start = zero, zero, jax.tree.map(jnp.zeros_like, params)
            (nats, targets, gradients), _ = jax.lax.scan(add, start, (jnp.arange(parts), split(batch, parts)))
        count = jnp.maximum(targets, 1)
        return Gradients(nats / count, targets, jax.tree.map(lambda x: x / (factor * count), gradients))

    return of_batch


def _unit(batch: Batch) -> float:
    """Return about how many targets a batch has: sums of gradients are kept in this unit, near their mean."""
    return float(max(math.prod(x.shape) for x in batch.values()))


def split(batch: Batch, parts: int) -> Batch:
    """Return the rows of a batch as ``[parts, B / parts, …]``.

    Part p has rows p, p + parts, …: some of each device, so that none is moved.
    """

    def one(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
        return nn.with_logical_constraint(x, (None, "B") + (None,) * (x.ndim - 2))

    return {name: one(x) for name, x in batch.items()}
