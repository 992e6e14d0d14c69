"""Top-k attention: each query keeps its k best keys (Gupta et al. 2021, 2106.06899, section 2)."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import grouped, scored, softmax_part, tiles, untiled
from fastformer.attention.scores import Bend, Mask, masked_softmax
from fastformer.attention.windows import distances
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    best: int,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return softmax attention to the visible keys that score at least the k-th best of them, float32."""
    k_seq = kv_seq or seq
    batch, time, heads, width = q_BTHK.shape
    q_BTHK = zero_padding(q_BTHK, seq).astype(jnp.float32)
    k_BSGK, v_BSGP = (zero_padding(x, k_seq).astype(jnp.float32) for x in (k_BSGK, v_BSGP))
    scores = jnp.einsum("BTGMK,BSGK->BGMTS", grouped(q_BTHK, k_BSGK.shape[2]), k_BSGK) / math.sqrt(width)
    # Compared with themselves below: without the barrier XLA may round two copies of them differently.
    scores = jax.lax.optimization_barrier(scored(scores, distances(seq, k_seq), bend))
    visible = Mask(causal).visible(seq, k_seq)[:, None, None]
    ranked = jnp.sort(jnp.where(visible, scores, -jnp.inf), axis=-1)
    kept = visible & (scores >= ranked[..., -min(best, ranked.shape[-1])][..., None])
    weights = masked_softmax(scores, kept)
    return jnp.einsum("BGMTS,BSGP->BTGMP", weights, v_BSGP).reshape(batch, time, heads, -1)


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    best: int,
    state: KVState | None = None,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``, the scores of one block of queries at a time.

    Args:
      best: k; a key that scores as much as the k-th best is kept too.
      kv_seq: the Seq of another sequence that k and v come from (cross-attention, no state).
      causal: False lets every token see those after it (no state).
      block: queries in a block.
    """
    mask = Mask(causal)
    if kv_seq is not None or not causal:
        return _attend(q_BTHK, k_BSGK, v_BSGP, (seq, kv_seq or seq), best, mask, bend, block), None
    if state is None:
        y_BTHP = _attend(q_BTHK, k_BSGK, v_BSGP, (seq, seq), best, mask, bend, block)
        return y_BTHP, cache.growing(k_BSGK, v_BSGP, seq)
    after = cache.append(state, k_BSGK, v_BSGP, seq)
    # One token finds itself in the new state; a block may push out what its first tokens still see.
    keys = after if q_BTHK.shape[1] == 1 else cache.joined(state, k_BSGK, v_BSGP, seq)
    kv = (keys.key_BSGK, keys.value_BSGP)
    return _attend(q_BTHK, *kv, (seq, keys.seq), best, mask, bend, block), after


def _attend(q_BTHK, k_BSGK, v_BSGP, seqs, best: int, mask: Mask, bend: Bend, block: int) -> jax.Array:
    batch, time, heads, width = q_BTHK.shape
    q_seq, k_seq = seqs
    block, best = min(block, time), min(best, k_BSGK.shape[1])
    q_BTHK = zero_padding(q_BTHK, q_seq)
    k_BSGK, v_BSGP = (zero_padding(x, k_seq) for x in (k_BSGK, v_BSGP))

    # The backward pass makes the scores anew, but need not search them again.
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("limit"))
    def attend(at: tuple[jax.Array, Seq]) -> jax.Array:
        q, q_seq = at
        scores = jnp.einsum("BTGMK,BSGK->BGMTS", q, k_BSGK, preferred_element_type=jnp.float32)
        scores = scored(scores / math.sqrt(width), distances(q_seq, k_seq), bend)
        visible = mask.visible(q_seq, k_seq)[:, None, None]
        limit = checkpoint_name(limits(jnp.where(visible, scores, -jnp.inf), best), "limit")
        weights, _ = softmax_part(scores, visible & (scores >= limit))
        return jnp.einsum(
            "BGMTS,BSGP->BTGMP", weights.astype(v_BSGP.dtype), v_BSGP, preferred_element_type=jnp.float32
        )

    work = jax.tree.map(lambda x: tiles(x, block), (grouped(q_BTHK, k_BSGK.shape[2]), q_seq))
    y_BTGMP = untiled(jax.lax.map(attend, work), time)
    return y_BTGMP.reshape(batch, time, heads, -1).astype(v_BSGP.dtype)


def limits(scores: jax.Array, best: int) -> jax.Array:
    """Return what lies half way between the score of the k-th best key and the next lower one, [..., 1].

    Scores that are made anew may be rounded differently: none of them stands at the limit.
    """
    scores = jax.lax.stop_gradient(scores)
    worst = kth_largest(scores, best)
    below = jnp.max(jnp.where(scores < worst, scores, -jnp.inf), axis=-1, keepdims=True)
    return worst / 2 + below / 2


def kth_largest(x: jax.Array, k: int) -> jax.Array:
    """Return the k-th largest float32 of the last axis, [..., 1], exactly; bit by bit, without sorting."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # Unsigned integers in the order of the floats.
    ranks = jax.lax.bitcast_convert_type(jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31))), jnp.uint32)

    def step(low: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        high = low | bit
        enough = jnp.sum(ranks >= high, axis=-1, keepdims=True) >= k
        return jnp.where(enough, high, low), None

    start = jnp.zeros((*x.shape[:-1], 1), jnp.uint32)
    rank, _ = jax.lax.scan(step, start, jnp.uint32(1) << jnp.arange(31, -1, -1, dtype=jnp.uint32))
    bits = jax.lax.bitcast_convert_type(rank, jnp.int32)
    bits = jnp.where(bits < 0, bits ^ jnp.int32(-(2**31)), ~bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class TopK(Mixer):
    """The k best keys of each query and head: O(T²) scores in O(T) memory, a state that grows with the past.

    The choice has no gradient; queries and keys learn from the weights of those chosen.

    Attributes:
      best: k.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    small: ClassVar[dict] = {"best": 20}

    best: int = 64

    def __post_init__(self):
        require(self.best >= 1, "best", self.best, "a number of keys, 1 or more")
        super().__post_init__()

    def _fields(self, seqs: tuple[Seq, Seq]) -> dict:
        other = None if seqs[1] is seqs[0] else seqs[1]
        causal = other is None and not self.bidirectional_mode
        return {"seq": seqs[0], "kv_seq": other, "best": self.best, "causal": causal, "bend": self.bend}

    def mix(self, qkv, seqs, state):
        return forward(*qkv, state=state, **self._fields(seqs))

    def refer(self, qkv, seqs):
        return reference(*qkv, **self._fields(seqs))

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
