"""The short causal convolution before queries, keys and values, and the tokens of the past it needs.

Published results of recurrent mixers depend on it: H3 (Dao et al. 2022, 2212.14052, section 3), Mamba
(Gu & Dao 2023, 2312.00752, section 3.4), DeltaNet (Yang et al. 2024, 2406.06484, section 3.4).
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.time_shards import by_shard, time_shards
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


class Past(NamedTuple):
    """The newest real tokens of each row, oldest first; in bytes, B W R of dtype + 4 B W.

    Attributes:
      token_BWR: what the layer saw of the last W tokens.
      segment_BW: int32, their segments; 0 where there was no token yet.
    """

    token_BWR: jax.Array
    segment_BW: jax.Array


def empty_past(batch: int, tokens: int, features: int, dtype: jnp.dtype) -> Past:
    """Return a past of ``tokens`` tokens that never were."""
    return Past(jnp.zeros((batch, tokens, features), dtype), jnp.zeros((batch, tokens), jnp.int32))


def windows(x_BTR: jax.Array, seq: Seq, width: int, past: Past | None) -> tuple[list[jax.Array], Past]:
    """Return ``[x_t, x_{t-1}, …, x_{t-width+1}]`` as arrays [B, T, R], zero beyond the segment, and the past.

    Args:
      width: W + 1, tokens that a window holds.
      past: of W tokens; None is an empty one.
    """
    batch, _, features = x_BTR.shape
    clean_BTR = zero_padding(x_BTR, seq)
    old = empty_past(batch, width - 1, features, x_BTR.dtype) if past is None else past
    token = jnp.concatenate([old.token_BWR.astype(x_BTR.dtype), clean_BTR], axis=1)
    segment = jnp.concatenate([old.segment_BW, seq.segment_BT], axis=1)
    # Index of the last real token before each, and before the end; -1 where there is none.
    real = jnp.where(segment > 0, jnp.arange(segment.shape[1])[None, :], -1)
    upto = jax.lax.cummax(real, axis=1)
    before = jnp.pad(upto, [(0, 0), (1, 0)], constant_values=-1)

    def take(values: jax.Array, index: jax.Array) -> jax.Array:
        shape = index.shape + (1,) * (values.ndim - 2)
        taken = jnp.take_along_axis(values, jnp.maximum(index, 0).reshape(shape), axis=1)
        return jnp.where((index >= 0).reshape(shape), taken, jnp.zeros((), values.dtype))

    index, end, newest = before[:, width - 1 : -1], before[:, -1:], []
    found = [clean_BTR] if past is not None else _fresh(clean_BTR, seq, width)
    for _ in range(width - 1):
        if past is not None:
            same = (take(segment, index) == seq.segment_BT) & (seq.segment_BT > 0)
            found.append(jnp.where(same[..., None], take(token, index), jnp.zeros((), token.dtype)))
        newest.append(end)
        index, end = (jnp.where(i >= 0, take(before, jnp.maximum(i, 0)), -1) for i in (index, end))
    last = jnp.concatenate(newest[::-1], axis=1) if newest else jnp.zeros((batch, 0), jnp.int32)
    kept = Past(take(token, last), take(segment, last))
    return found, jax.tree.map(lambda new, old: new.astype(old.dtype), kept, old)


def _fresh(x_BTR: jax.Array, seq: Seq, width: int) -> list[jax.Array]:
    """Return what ``windows`` does without a past: no search, for a segment's tokens stand side by side.

    Where time is split over devices, a shard gets the width - 1 tokens before it.
    """
    split = time_shards(*seq.segment_BT.shape)

    def local(x_BTR: jax.Array, segment_BT: jax.Array) -> tuple[jax.Array, ...]:
        def widened(x: jax.Array) -> jax.Array:
            if split is None:
                return jnp.pad(x, [(0, 0), (width - 1, 0)] + [(0, 0)] * (x.ndim - 2))
            return jnp.concatenate([split.halo(x, width - 1), x], axis=1)

        token, segment = widened(x_BTR), widened(segment_BT)
        found = [x_BTR]
        for first in range(width - 2, -1, -1):
            cut = slice(first, first + x_BTR.shape[1])
            same = (segment[:, cut] == segment_BT) & (segment_BT > 0)
            found.append(jnp.where(same[..., None], token[:, cut], jnp.zeros((), x_BTR.dtype)))
        return tuple(found)

    args = (x_BTR, seq.segment_BT)
    if split is None:
        return list(local(*args))
    return list(by_shard(local, ("BTR", "BT"), ("BTR",) * width, args, split.axes))


class ShortConv(nn.Module):
    """``silu(sum_w tap_w * x_{t-w})`` of each feature by itself, never across segments.

    Attributes:
      width: tokens that a window holds, the token itself among them.
      bias: add one before the SiLU.
    """

    width: int
    bias: bool = False

    @nn.compact
    def __call__(self, x_BTR: jax.Array, seq: Seq, past: Past | None = None) -> tuple[jax.Array, Past]:
        """Return ``(y_BTR, past)``."""
        features = x_BTR.shape[-1]
        init = nn.initializers.normal(self.width**-0.5)
        init = nn.with_logical_partitioning(init, ("W", "R"))
        tap_WR = self.param("taps", init, (self.width, features))
        window, past = windows(x_BTR, seq, self.width, past)
        y_BTR = sum(x.astype(jnp.float32) * w.reshape(1, 1, -1) for x, w in zip(window, tap_WR))
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("R",))
            y_BTR += self.param("bias", zeros, (features,)).reshape(1, 1, -1)
        return jax.nn.silu(y_BTR).astype(x_BTR.dtype), past
