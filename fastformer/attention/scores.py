"""What variants with scores share: who sees whom, how a score is bent, and the dense truth."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

GRAIN = 64.0  # Fade.coarse counts in 1 / GRAIN


class Mask(NamedTuple):
    """Who sees whom within a segment.

    Attributes:
      causal: keys after the query are hidden.
      window: keys at a distance of ``window`` tokens or more are hidden; 0 is no limit.
      prefix: a causal query sees up to its ``last_BT``, wherever that is.
    """

    causal: bool = True
    window: int = 0
    prefix: bool = False

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        same = q_seq.segment_BT[:, :, None] == k_seq.segment_BT[:, None, :]
        distance = q_seq.position_BT[:, :, None] - k_seq.position_BT[:, None, :]
        seen = same & (k_seq.segment_BT > 0)[:, None, :]
        if self.causal and self.prefix:
            seen &= k_seq.position_BT[:, None, :] <= q_seq.last_BT[:, :, None]
        elif self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= jnp.abs(distance) < self.window
        return seen

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool.

        Args:
          first_q: index in time of each query block's first token; first_k: the same of keys.
          size: tokens in a block.
        """
        distance = first_q[:, None] - first_k[None, :]
        seen = np.ones(distance.shape, bool)
        if self.causal and not self.prefix:
            seen &= distance > -size
        if self.window:
            seen &= np.abs(distance) < self.window + size - 1
        return seen


class Bend(NamedTuple):
    """What happens to a score between the product and the softmax.

    Attributes:
      soft_cap: scores are ``soft_cap * tanh(scores / soft_cap)``; 0 is off (Gemma 2, 2408.00118, section 2).
      slopes: per head, times the distance is taken off the score (ALiBi, 2108.12409); () is off.
      sigmoid: weights are ``sigmoid(score + sigmoid)`` in place of the softmax (2409.04431); None is off.
    """

    soft_cap: float = 0.0
    slopes: tuple[float, ...] = ()
    sigmoid: float | None = None


class Fade(NamedTuple):
    """Sums of the logarithms of gates from the start, which tell exactly what lies between any two of them.

    A difference of plain sums would lose what follows a strong gate: their digits.

    Attributes:
      coarse: float32, of multiples of 1/64, so that sums and differences are exact up to 2^18.
      fine: float32, of what is left, 1/128 at most a token; only this part has a gradient.
    """

    coarse: jax.Array
    fine: jax.Array

    @classmethod
    def of(cls, log: jax.Array) -> Fade:
        """Return the sums up to each token, itself included, of logarithms [B, T, …]."""
        coarse = jax.lax.stop_gradient(jnp.round(log * GRAIN) / GRAIN)
        return cls(*(jnp.cumsum(x, axis=1) for x in (coarse, log - coarse)))

    def since(self, early: Fade) -> jax.Array:
        """Return the sum of the logarithms after ``early``'s tokens up to these."""
        return (self.coarse - early.coarse) + (self.fine - early.fine)


def masked_softmax(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """Return the softmax over the last axis of what is visible; zero elsewhere, and where nothing is."""
    return jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), 0.0)


def reference_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    q_seq: Seq,
    k_seq: Seq,
    mask: Mask,
    bend: Bend,
    *,
    bias_BHTS: jax.Array | None = None,
    sink_H: jax.Array | None = None,
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v`` by the dense mask, [B, T, H, P] float32.

    Vaswani et al. 2017, 1706.03762, eq. 1. A query that sees no key returns zero.

    Args:
      bias_BHTS: added to the scores.
      sink_H: the score of one more key a head, whose value is zero (gpt-oss, 2508.10925).
    """
    heads = q_BTHK.shape[2]
    q_BTHK = zero_padding(q_BTHK, q_seq).astype(jnp.float32)
    k_BSHK = jnp.repeat(zero_padding(k_BSGK, k_seq), heads // k_BSGK.shape[2], axis=2).astype(jnp.float32)
    v_BSHP = jnp.repeat(zero_padding(v_BSGP, k_seq), heads // v_BSGP.shape[2], axis=2).astype(jnp.float32)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / math.sqrt(q_BTHK.shape[-1])
    if bend.soft_cap:
        scores_BHTS = bend.soft_cap * jnp.tanh(scores_BHTS / bend.soft_cap)
    if bend.slopes:
        distance_BTS = jnp.abs(q_seq.position_BT[:, :, None] - k_seq.position_BT[:, None, :])
        slopes_H = jnp.asarray(bend.slopes, jnp.float32).reshape(1, heads, 1, 1)
        scores_BHTS -= slopes_H * distance_BTS[:, None].astype(jnp.float32)
    if bias_BHTS is not None:
        scores_BHTS += bias_BHTS
    visible_BTS = mask.visible(q_seq, k_seq)[:, None]
    scores_BHTS = jnp.where(visible_BTS, scores_BHTS, -1e30)
    if bend.sigmoid is not None:
        weights_BHTS = jax.nn.sigmoid(scores_BHTS + bend.sigmoid)
    elif sink_H is not None:
        sink_BHT1 = jnp.broadcast_to(sink_H.reshape(1, heads, 1, 1), (*scores_BHTS.shape[:3], 1))
        both = jnp.concatenate([scores_BHTS, sink_BHT1.astype(jnp.float32)], axis=-1)
        weights_BHTS = jax.nn.softmax(both, axis=-1)[..., :-1]
    else:
        weights_BHTS = jax.nn.softmax(scores_BHTS, axis=-1)
    return jnp.einsum("BHTS,BSHP->BTHP", jnp.where(visible_BTS, weights_BHTS, 0.0), v_BSHP)
