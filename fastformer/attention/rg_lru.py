"""RG-LRU: Griffin's gated linear recurrence, a number a channel instead of a matrix a head.

De et al. 2024, Griffin, 2402.19427, section 2.4. With gates r and i in (0, 1),

    log a_t = -8 softplus(Lambda) r_t,    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),

and the first token of a segment enters whole, without the root, as in the authors' code.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.gating import Recurrent
from fastformer.attention.recurrence import to_chunks
from fastformer.attention.segments import starts
from fastformer.attention.short_conv import windows
from fastformer.attention.time_shards import TimeShards, by_shard, time_shards
from fastformer.core.alphabet import constrain
from fastformer.core.layers import Linear, zero_padding
from fastformer.core.seq import Seq

RATE = 8.0  # the paper's c
CHUNK = 128  # tokens between which the backward pass keeps h
# Of 1 - a^2, so that the slope of its root is at most 1000 as in the authors' code.
FLOOR = 2.5e-7


class LRUState(NamedTuple):
    """All that is left of the past; in bytes, 4 B G P + 4 B.

    Attributes:
      h_BGP: float32.
      segment_B: int32, the segment it belongs to; 0 is none.
    """

    h_BGP: jax.Array
    segment_B: jax.Array


def entering(
    x_BTGP: jax.Array, log_BTGP: jax.Array, seq: Seq, before_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log of what each token leaves of h, what it adds, and each row's last segment."""
    x, log = (zero_padding(part.astype(jnp.float32), seq) for part in (x_BTGP, log_BTGP))
    fresh_BT, last_B = starts(seq, before_B)
    fresh = fresh_BT[..., None, None]
    root = jnp.sqrt(jnp.maximum(-jnp.expm1(2.0 * log), FLOOR))
    return jnp.where(fresh, -jnp.inf, log), x * jnp.where(fresh, 1.0, root), last_B


def reference(x_BTGP: jax.Array, log_BTGP: jax.Array, *, seq: Seq) -> jax.Array:
    """Return h token by token, [B, T, G, P] float32 (eq. 4).

    Args:
      x_BTGP: i x. log_BTGP: log a, at most 0.
    """
    log, add, _ = entering(x_BTGP, log_BTGP, seq, jnp.zeros_like(seq.segment_BT[:, 0]))

    def step(h_BGP: jax.Array, token: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h_BGP = jnp.exp(token[0]) * h_BGP + token[1]
        return h_BGP, h_BGP

    turned = tuple(jnp.moveaxis(part, 1, 0) for part in (log, add))
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(add[:, 0]), turned)[1], 0, 1)


def forward(
    x_BTGP: jax.Array, log_BTGP: jax.Array, *, seq: Seq, state: LRUState | None = None, chunk: int = CHUNK
) -> tuple[jax.Array, LRUState]:
    """Return ``(h_BTGP, state)`` by an associative scan within each chunk; arguments as in ``reference``.

    Args:
      chunk: C, tokens in a chunk, on which the result does not depend.
    """
    split = time_shards(*x_BTGP.shape[:2]) if state is None else None
    if split:
        h_BTGP, state = _split(x_BTGP, log_BTGP, seq, split, chunk)
        return h_BTGP.astype(x_BTGP.dtype), state
    batch, _, groups, width = x_BTGP.shape
    state = init_state(batch, 0, jnp.float32, heads=groups, width=width) if state is None else state
    log, add, last_B = entering(x_BTGP, log_BTGP, seq, state.segment_B)
    h_BTGP, h_BGP = _chunked(log, add, state.h_BGP, chunk)
    return h_BTGP.astype(x_BTGP.dtype), LRUState(h_BGP, last_B)


def _chunked(
    log: jax.Array, add: jax.Array, h_BGP: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return h after each token and after all, from what ``entering`` returns and h before them."""
    batch, time, *sizes = add.shape
    chunk = min(chunk, time)

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return a[0] * b[0], a[1] * b[0] + b[1]

    def take(h_BGP: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, add = jax.lax.associative_scan(join, (jnp.exp(part[0]), part[1]), axis=1)
        h_BCGP = keep * h_BGP[:, None] + add
        return h_BCGP[:, -1], h_BCGP

    # The zeros that fill the last chunk up are decays of 1: they leave h as it is.
    h_BGP, h_NBCGP = jax.lax.scan(jax.checkpoint(take), h_BGP, (to_chunks(log, chunk), to_chunks(add, chunk)))
    return jnp.moveaxis(h_NBCGP, 0, 1).reshape(batch, -1, *sizes)[:, :time], h_BGP


def _split(
    x_BTGP: jax.Array, log_BTGP: jax.Array, seq: Seq, split: TimeShards, chunk: int
) -> tuple[jax.Array, LRUState]:
    """Return what ``forward`` does, of rows whose time is split over devices: each passes its h on."""

    def local(x_BTGP, log_BTGP, *seq):
        before_B, last_B = split.segments(seq[0])
        log, add, _ = entering(x_BTGP, log_BTGP, Seq(*seq), before_B)
        h_BTGP, end_BGP = _chunked(log, add, jnp.zeros_like(add[:, 0]), chunk)
        keep_BTGP = jnp.exp(jnp.cumsum(log, axis=1))
        h_BTGP += keep_BTGP * split.passed(end_BGP, keep_BTGP[:, -1], jnp.multiply)[:, None]
        return h_BTGP, split.of_last(h_BTGP[:, -1]), last_B

    args = (x_BTGP, log_BTGP, *seq[:2])
    h_BTGP, *state = by_shard(local, ("BTGP", "BTGP", "BT", "BT"), ("BTGP", "BGP", "B"), args)
    return h_BTGP, LRUState(*state)


def init_state(batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, width: int) -> LRUState:
    """Return an empty state, 4 B G P + 4 B bytes whatever the capacity and dtype; ``heads`` are G."""
    return LRUState(jnp.zeros((batch, heads, width), jnp.float32), jnp.zeros((batch,), jnp.int32))


class RGLRU(Recurrent):
    """Griffin's recurrent block (De et al. 2024, 2402.19427, sections 2.3 and 2.4).

    A convolution without SiLU, the recurrence, and a GeLU branch that multiplies it. The gates' matrices
    are block-diagonal by heads. There are no queries and keys: with fewer ``kv_heads`` each head of the
    recurrence is shared by several of the branch, and ``qk_norm`` does nothing. The projections have no
    biases, and heads x head_width stands for the recurrence's width, 4/3 D in the paper and D in
    RecurrentGemma.
    """

    convolution: ClassVar[int] = 4

    def past_features(self):
        return max(self.conv_width - 1, 0), self.groups * self.head_width

    def project(self, x_BTD, x_BSD, seqs, past):
        x_BTGP = self.linear("value", x_BTD, "BTD,DGP->BTGP", self.groups, self.head_width)
        if self.conv_width:
            x_BTGP, past = self._convolved(x_BTGP, seqs[0], past)
        rate = self.vector("rate", "GP", x_BTGP.shape[2:], ring)
        log_BTGP = -RATE * jax.nn.softplus(rate) * self._gate("recurrence_gate", x_BTGP)
        x_BTGP = x_BTGP * self._gate("input_gate", x_BTGP).astype(x_BTGP.dtype)
        return (constrain(x_BTGP, "BTGP"), log_BTGP), past

    def _convolved(self, x_BTGP: jax.Array, seq: Seq, past) -> tuple[jax.Array, tuple]:
        shape, (width, features) = x_BTGP.shape, (self.conv_width, x_BTGP.shape[2] * x_BTGP.shape[3])
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1 / math.sqrt(width)), ("W", "R"))
        taps_WR = self.param("taps", init, (width, features))
        window, past = windows(x_BTGP.reshape(*shape[:2], features), seq, width, past)
        y_BTR = sum(x.astype(jnp.float32) * tap.reshape(1, 1, -1) for x, tap in zip(window, taps_WR))
        y_BTR += self.vector("taps_bias", "R", (features,), nn.initializers.zeros)
        return y_BTR.reshape(shape).astype(x_BTGP.dtype), past

    def _gate(self, name: str, x_BTGP: jax.Array) -> jax.Array:
        shape = (*x_BTGP.shape[2:], self.head_width)
        gate = Linear("BTGP,GPK->BTGK", shape, 0.1, self.dtype, name=name)(x_BTGP).astype(jnp.float32)
        return jax.nn.sigmoid(gate + self.vector(f"{name}_bias", "GP", shape[:2], nn.initializers.zeros))

    def mix(self, qkv, seqs, state):
        h_BTGP, state = forward(*qkv, seq=seqs[0], state=state)
        return self._shared(h_BTGP), state

    def refer(self, qkv, seqs):
        return self._shared(reference(*qkv, seq=seqs[0]))

    def _shared(self, h_BTGP: jax.Array) -> jax.Array:
        return jnp.repeat(h_BTGP, self.heads // self.groups, axis=2)

    def empty(self, batch, capacity, dtype):
        return init_state(batch, capacity, dtype, heads=self.groups, width=self.head_width)

    def finish(self, y_BTHP, x_BTD):
        branch = self.linear("branch", x_BTD, "BTD,DHP->BTHP", *y_BTHP.shape[2:])
        return super().finish(y_BTHP * jax.nn.gelu(branch), x_BTD)


def ring(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return Lambda such that the decay a^8, of a gate r = 1, is uniform in [0.9, 0.999]."""
    decay = jax.random.uniform(key, shape, dtype, 0.9, 0.999)
    return jnp.log(jnp.expm1(-jnp.log(decay) / RATE))
