"""States of decoding in eight bits: what a layer remembers is rounded when it is put away.

A layer's own code sees floats: its state is made float again before it runs and rounded after, so that every
variant that streams is served. Which arrays are rounded is read off their names: those of four letters or
more, as key_BSGK and memory_BGKP. Fewer letters are vectors that decide over many numbers at once
(normalisers, levels, decays, positions), and small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import Mixer
from fastformer.core.seq import Seq
from fastformer.core.wrapped import Wrapped

STATES = ("float", "int8")  # what config.generate.state may be
LETTERS = 4  # of the names of arrays that are rounded
LARGEST = 127  # of int8, the same on both sides of zero
SLOTS = frozenset("SW")  # letters of arrays that keep tokens, each written once
GOLDEN, SPREAD = 2654435769, 2246822519  # odd, for Weyl sequences over time and over the numbers of an array


class Rounded(NamedTuple):
    """An array of a state, rounded; in bytes, 1 a number, 2 a row along the last axis, and ``exact``.

    Attributes:
      numbers: int8. scale: bfloat16, of each row along the last axis, which has length one.
      exact: the columns that are not rounded, none or more, in the dtype of the array.
    """

    numbers: jax.Array
    scale: jax.Array
    exact: jax.Array


@dataclass(frozen=True)
class Int8State(Wrapped):
    """A model that keeps its state in int8 between calls."""

    def init_state(self, *args: Any) -> Any:
        """Return the empty state, as the model's own ``init_state`` but for what is rounded."""
        with nn.intercept_methods(_between):
            return self.inner.init_state(*args)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``; a state is one of ``init_state``."""
        with nn.intercept_methods(_between):
            return self.inner.apply(*args, **kwargs)


def stored(model: Any, state: str) -> Any:
    """Return the model with its states kept as ``state`` says, one of STATES."""
    return Int8State(model) if state == "int8" else model


def _between(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Stand between a mixer and its state."""
    if isinstance(context.module, Mixer) and context.method_name == "init_state":
        return _first(next_call(*args, **kwargs), context.module.exact_columns)
    if not isinstance(context.module, Mixer) or context.method_name != "__call__" or args[2] is None:
        return next_call(*args, **kwargs)
    x_BTD, seq, old, *rest = args
    floats = load(old)
    y_BTD, new = next_call(x_BTD, seq, floats, *rest, **kwargs)
    return y_BTD, store(new, old, floats, seq)


def _first(state: Any, exact_columns: Any) -> Any:
    """Return an empty state with the arrays that are to be rounded as Rounded."""

    def one(path: tuple, x: jax.Array) -> Any:
        if len(_letters(path)) < LETTERS or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        width = x.shape[-1] - exact_columns.get(path[-1].name, 0)
        scale = jnp.zeros((*x.shape[:-1], 1), jnp.bfloat16)
        return Rounded(x[..., :width].astype(jnp.int8), scale, x[..., width:])

    return jax.tree_util.tree_map_with_path(one, state)


def load(state: Any) -> Any:
    """Return a state with its rounded arrays as floats again."""

    def one(x: Any) -> Any:
        if not isinstance(x, Rounded):
            return x
        floats = x.numbers.astype(jnp.float32) * x.scale.astype(jnp.float32)
        return jnp.concatenate([floats.astype(x.exact.dtype), x.exact], axis=-1)

    # What is read must be to the bit what it is compared with afterwards, whatever is fused with either.
    return jax.lax.optimization_barrier(jax.tree.map(one, state, is_leaf=_is_rounded))


def store(new: Any, old: Any, before: Any, seq: Seq) -> Any:
    """Return the state ``new``, of floats, rounded where ``old`` is.

    Slots that hold what they held stay as they are, so that a cache is rounded once however long it is kept.
    What is written anew with every token is rounded up or down in turns, by how far it lies between: to the
    nearest one, a change of less than half a number would be lost each time, and errors add up to more.

    Args:
      before: ``old`` as floats, which ``new`` was made from. seq: of the tokens between them.
    """
    real_B = jnp.any(seq.segment_BT > 0, axis=1)
    position_B = jnp.max(jnp.where(seq.segment_BT > 0, seq.position_BT, 0), axis=1)

    def one(path: tuple, old: Any, before: jax.Array, new: jax.Array) -> Any:
        if not _is_rounded(old):
            return new
        slots = SLOTS & set(_letters(path))
        width = old.numbers.shape[-1]
        rounded = _round(new[..., :width], None if slots else position_B)
        kept = jnp.all(new == before, axis=-1, keepdims=True) if slots else ~_like(real_B, new)
        numbers, scale = (jnp.where(kept, a, b) for a, b in zip(old[:2], rounded))
        return Rounded(numbers, scale, new[..., width:])

    return jax.tree_util.tree_map_with_path(one, old, before, new, is_leaf=_is_rounded)


def _round(x: jax.Array, position_B: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return int8 numbers and their scales, to the nearest or in turns by the position."""
    x = x.astype(jnp.float32)
    wide = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / LARGEST
    if position_B is not None:
        # Up to the next bfloat16: the largest would be cut off at each step, and never grow. But a scale
        # that is one already stays, whichever way the division was rounded.
        bits = jax.lax.bitcast_convert_type(wide * (1 - 2.0**-20), jnp.uint32) + jnp.uint32(0xFFFF)
        wide = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    scale = wide.astype(jnp.bfloat16)
    wide = scale.astype(jnp.float32)
    x = x / jnp.where(wide > 0, wide, 1.0)
    x = jnp.round(x) if position_B is None else jnp.floor(x + _turns(position_B, x.shape))
    return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.int8), scale


def _turns(position_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return numbers from 0 to below 1, evenly spread over time (a Weyl sequence) and over the array."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(1, len(shape)):
        index = index * jnp.uint32(shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    turn = _like(position_B.astype(jnp.uint32), index) * jnp.uint32(GOLDEN) + index * jnp.uint32(SPREAD)
    return (turn >> 8).astype(jnp.float32) * 2.0**-24


def _like(x_B: jax.Array, x: jax.Array) -> jax.Array:
    return x_B.reshape(-1, *(1,) * (x.ndim - 1))


def _is_rounded(x: Any) -> bool:
    return isinstance(x, Rounded)


def _letters(path: tuple) -> str:
    """Return the letters that the name of an array ends in, which spell its shape."""
    return getattr(path[-1], "name", "").rpartition("_")[2]
