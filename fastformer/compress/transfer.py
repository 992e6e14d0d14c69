"""Attention transfer: how far each layer's attention is from a teacher's, given what the teacher's reads.

Zhang et al. 2024, LoLCATs, 2410.10254, section 3.2: the mean squared error of what attention puts out,
before the output projection. (Hedgehog, 2402.04347, eq. 7, takes the cross-entropy of attention weights,
which a fast form never makes.)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import Mixer
from fastformer.compress.method import bare
from fastformer.core.layers import Linear
from fastformer.core.seq import Seq
from fastformer.tasks.task import apply


class Attention(NamedTuple):
    """One layer's attention.

    Attributes:
      x_BTD: what its mixer reads. y_BTHP: what the output projection reads.
    """

    x_BTD: jax.Array
    y_BTHP: jax.Array


def of_teacher(model: nn.Module, weights: Any, batch: Mapping[str, jax.Array]) -> list[Attention]:
    """Return the attention of every layer of a model on a batch."""
    # From within what is computed again nothing could be noted, and no gradient asks for that here.
    model = model.clone(config=dataclasses.replace(model.config, remat=("none",)))
    with _heard() as (read, written):
        apply(model, weights, batch, None)
    return [Attention(*pair) for pair in zip(read, written, strict=True)]


def error(model: Any, params: Any, told: list[Attention], seq: Seq) -> jax.Array:
    """Return the squared error of each token, [B, T] float32, the mean of layers, heads and features."""
    module, total = bare(model), 0.0
    for layer, (x_BTD, y_BTHP) in enumerate(told):
        mixer = module.config.mixer(layer, module.length, detached=True)
        with _heard() as (_, written):
            mixer.apply({"params": params[f"layer_{layer}"]["mixer"]}, x_BTD, seq)
        (mine_BTHP,) = written
        far = mine_BTHP.astype(jnp.float32) - y_BTHP.astype(jnp.float32)
        total += jnp.mean(far * far, axis=(2, 3))
    return total / len(told)


@contextlib.contextmanager
def _heard() -> Iterator[tuple[list[jax.Array], list[jax.Array]]]:
    """Note what mixers read and what their output projections do, in the order of the calls."""
    read, written = [], []

    def listen(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and isinstance(module, Mixer):
            read.append(args[0])
        elif context.method_name == "__call__" and isinstance(module, Linear) and module.name == "out":
            written.append(args[0])
        return next_call(*args, **kwargs)

    with nn.intercept_methods(listen):
        yield read, written
