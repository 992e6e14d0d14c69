"""Differential attention: the difference of two softmaxes (Ye et al. 2024, 2410.05258)."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, masked_softmax, reference_attention
from fastformer.attention.softmax import other_seq, seen, slot_scores, slot_values
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm
from fastformer.core.seq import Seq

NORM_EPSILON = 1e-5


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    weight: jax.Array,
    *,
    seq: Seq,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bends: tuple[Bend, Bend] = (Bend(), Bend()),
) -> jax.Array:
    """Return ``(softmax(q1 k1^T / sqrt(K)) - weight softmax(q2 k2^T / sqrt(K))) v``, float32 (eq. 1).

    Args:
      q_BTHK, k_BSGK: q1 and k1 of each differential head at even indices, q2 and k2 at odd ones.
      v_BSGP: half as many heads, of twice the width.
      weight: lambda, a scalar.
      bends: of the scores of the even and of the odd heads.
    """
    seqs, mask = (seq, kv_seq or seq), Mask(causal)
    one, other = (
        reference_attention(q, k, v_BSGP, *seqs, mask, bend)
        for q, k, bend in zip(_halves(q_BTHK), _halves(k_BSGK), bends)
    )
    return one - weight * other


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    weight: jax.Array,
    *,
    seq: Seq,
    state: KVState | None = None,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bends: tuple[Bend, Bend] = (Bend(), Bend()),
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``, each softmax in blocks, or against the slots of a state when T = 1.

    Args:
      q_BTHK, k_BSGK, v_BSGP, weight, bends: as in ``reference``.
      kv_seq: the Seq of another sequence that k and v come from (cross-attention, no state).
      causal: False lets every token see those after it (no state).
      block: tokens in a block.
    """
    if kv_seq is not None or not causal:
        keys, grown = cache.growing(k_BSGK, v_BSGP, kv_seq or seq), None
        mask, past = Mask(False), (None if kv_seq is not None else 0)
    else:
        keys, past, grown = seen(state, k_BSGK, v_BSGP, seq)
        mask = Mask(True)
    if state is not None and q_BTHK.shape[1] == 1:
        return decode(q_BTHK, keys, weight, seq=seq, bends=bends), grown
    options = {"past": past, "block": block}
    one, other = (
        attend_part(q, k, keys.value_BSGP, seq, keys.seq, mask, bend, **options)[0]
        for q, k, bend in zip(_halves(q_BTHK), _halves(keys.key_BSGK), bends)
    )
    # In float32: what the two have in common cancels.
    return (one - weight * other).astype(v_BSGP.dtype), grown


def decode(
    q_B1HK: jax.Array, state: KVState, weight: jax.Array, *, seq: Seq, bends: tuple[Bend, Bend]
) -> jax.Array:
    """Return the attention of one token a row over the slots, [B, 1, H, P]."""
    visible = Mask(True).visible(seq, state.seq)[:, :, None]
    weights = []
    for q, k, bend in zip(_halves(q_B1HK), _halves(state.key_BSGK), bends):
        scores = slot_scores(q, state._replace(key_BSGK=k), seq, bend)
        weights.append(masked_softmax(scores, visible))
    return slot_values(weights[0] - weight * weights[1], state)


def _halves(x_BTHK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the even and the odd heads."""
    return x_BTHK[:, :, 0::2], x_BTHK[:, :, 1::2]


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity (G K + G P / 2) elements and indices."""
    state = cache.empty(batch, capacity, kv_heads, (key_width, 0), dtype)
    return state._replace(value_BSGP=jnp.zeros((batch, capacity, kv_heads // 2, value_width), dtype))


class Differential(Mixer):
    """Softmax attention with the noise that two softmaxes share taken away.

    ``heads`` and ``kv_heads`` count softmaxes: H / 2 differential heads, with values of width 2 K, so that
    there are as many weights as in ``softmax``. The weight lambda of the second softmax is learned, one a
    layer (eq. 2), and starts by the depth; each head's output is RMS-normalised and scaled (eq. 3).
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True

    def __post_init__(self):
        for field, number in (("heads", self.heads), ("kv_heads", self.groups)):
            require(number % 2 == 0, field, number, "even: two softmaxes make a differential head")
        super().__post_init__()

    @property
    def start(self) -> float:
        """Return what lambda starts at, 0.8 - 0.6 exp(-0.3 layer), layer 0, 1, … (section 2.1)."""
        return 0.8 - 0.6 * math.exp(-0.3 * self.layer)

    @property
    def bends(self) -> tuple[Bend, Bend]:
        """Return the bends of even and of odd heads."""
        return tuple(self.bend._replace(slopes=self.bend.slopes[n::2]) for n in (0, 1))

    def gates(self, x_BTD, seq):
        init = nn.with_logical_partitioning(nn.initializers.normal(0.1), ("K",))
        names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
        q1, k1, q2, k2 = (self.param(name, init, (self.head_width,)) for name in names)
        return (jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + self.start,)

    def finish(self, y_BTHP, x_BTD):
        y_BTHP = RMSNorm("P", NORM_EPSILON, name="head_norm")(y_BTHP) * (1.0 - self.start)
        return super().finish(y_BTHP, x_BTD)

    def mix(self, qkv, seqs, state):
        options = {"kv_seq": other_seq(seqs), "causal": not self.bidirectional_mode}
        return forward(*_paired(qkv), seq=seqs[0], state=state, bends=self.bends, **options)

    def refer(self, qkv, seqs):
        kv_seq = other_seq(seqs)
        causal = kv_seq is None and not self.bidirectional_mode
        return reference(*_paired(qkv), seq=seqs[0], kv_seq=kv_seq, causal=causal, bends=self.bends)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": 2 * self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)


def _paired(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Return q, k, v, lambda with the values of every two heads side by side."""
    q, k, v_BSGP, weight = qkv
    batch, time, groups, width = v_BSGP.shape
    return q, k, v_BSGP.reshape(batch, time, groups // 2, 2 * width), weight
