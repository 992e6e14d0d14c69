"""Attention to a few sums of a segment's keys and values: what linformer and luna share.

A segment of n tokens is compressed to R keys ``sum_s e_sr k_s`` and R values ``sum_s f_sr v_s``. Neither is
ever made: ``q_t . sum_s e_sr k_s = sum_s (q_t . k_s) e_sr`` is linear attention without a normaliser, and so
is the sum of the values. Its chunks know where segments start and end, so the cost is O(T R) however many
segments a row holds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.recurrence import Memory, Tokens, grouped, recur
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


class Compressed(NamedTuple):
    """The sums of the past; in bytes, 4 B G R (K + P) + 8 B.

    Attributes:
      keys: sums of ``k e^T``; values: sums of ``f v^T``.
    """

    keys: Memory
    values: Memory


def numbers(seq: Seq) -> jax.Array:
    """Return each token's number of its segment within the row, 1, 2, …, [B, T]; 0 at padding."""
    before_BT = jnp.pad(seq.segment_BT[:, :-1], [(0, 0), (1, 0)])
    number_BT = jnp.cumsum(seq.segment_BT != before_BT, axis=1)
    return jnp.where(seq.segment_BT > 0, number_BT, 0)


def segment_sums(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    seq: Seq,
    state: Memory | None = None,
    *,
    causal: bool,
) -> tuple[jax.Array, Memory]:
    """Return ``sum_s (q_t . k_s) v_s``, [B, T, H, P] float32, over the segment or up to t, and the state."""
    tokens = Tokens(grouped(q_BTHK, k_BTGK.shape[2]), k_BTGK, v_BTGP)
    before, end = recur(tokens, seq, state)
    if causal:
        return before, end
    turned = (jax.tree.map(lambda x: jnp.flip(x, axis=1), x) for x in (tokens, seq))
    after = jnp.flip(recur(*turned)[0], axis=1)
    # The token itself is in both.
    q, k, v = (zero_padding(x.astype(jnp.float32), seq) for x in tokens[:3])
    own = jnp.einsum("BTGMK,BTGK->BTGM", q, k)[..., None] * v[:, :, :, None]
    return before + after - own.reshape(before.shape), end


def attend_sums(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    seq: Seq,
    state: Compressed | None = None,
    *,
    causal: bool,
) -> tuple[jax.Array, Compressed]:
    """Return ``(y_BTHP, state)`` in float32: softmax attention to the R keys and values of the segment.

    Args:
      weights: e and f, [B, T, G, R] each.
      causal: the sums are those up to each token, divided by how many tokens that is.
    """
    state = Compressed(None, None) if state is None else state
    q_BTHK = q_BTHK.astype(jnp.float32) / math.sqrt(q_BTHK.shape[-1])
    count_BT11 = (seq.position_BT + 1.0 if causal else jnp.ones(seq.position_BT.shape))[..., None, None]
    scores_BTHR, keys = segment_sums(q_BTHK, k_BTGK, weights[0], seq, state.keys, causal=causal)
    chosen_BTHR = jax.nn.softmax(scores_BTHR / count_BT11, axis=-1)
    y_BTHP, values = segment_sums(chosen_BTHR, weights[1], v_BTGP, seq, state.values, causal=causal)
    return y_BTHP / count_BT11, Compressed(keys, values)


def dense_sums(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    seen_BTS: jax.Array,
) -> jax.Array:
    """Return softmax attention to the R keys and values made for each query, [B, T, H, P] float32.

    Args:
      weights: e and f, [B, T or 1, S, G, R] each: of each key, for each query where they differ.
      seen_BTS: the tokens whose keys and values are summed, 0 or 1, or what each is multiplied with.
    """
    share = q_BTHK.shape[2] // k_BSGK.shape[2]

    def compress(x_BSGK: jax.Array, weight_BTSGR: jax.Array) -> jax.Array:
        weight_BTSGR = weight_BTSGR * seen_BTS[..., None, None]
        return jnp.repeat(jnp.einsum("BTSGR,BSGK->BTRGK", weight_BTSGR, x_BSGK), share, axis=3)

    keys_BTRHK, values_BTRHP = (compress(x.astype(jnp.float32), w) for x, w in zip((k_BSGK, v_BSGP), weights))
    q_BTHK = q_BTHK.astype(jnp.float32) / math.sqrt(q_BTHK.shape[-1])
    chosen_BTHR = jax.nn.softmax(jnp.einsum("BTHK,BTRHK->BTHR", q_BTHK, keys_BTRHK), axis=-1)
    return jnp.einsum("BTHR,BTRHP->BTHP", chosen_BTHR, values_BTRHP)
