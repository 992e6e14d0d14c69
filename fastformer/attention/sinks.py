"""Attention sinks: a window and the first tokens (StreamingLLM, Xiao et al. 2023, 2309.17453, 3.2)."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import dense, first_seen, first_tokens, join, scored
from fastformer.attention.positions import rope
from fastformer.attention.scores import Bend, masked_softmax
from fastformer.attention.windows import Windows, band, distances, slots
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def far_view(q_BTHK: jax.Array, seq: Seq, size: int, rope_base: float) -> tuple[jax.Array, Seq]:
    """Return the queries as the sinks see them: at their place in a cache of ``size`` tokens.

    Positions are those within the cache, not those in the text (section 3.2): a query stands at
    ``size - 1`` once the cache is full, however far the text has gone on.
    """
    place_BT = jnp.minimum(seq.position_BT, size - 1)
    if rope_base:
        # Rotations add up: this turns the query from its position in the text to that in the cache.
        q_BTHK = rope(q_BTHK, place_BT - seq.position_BT, rope_base)
    return q_BTHK, Seq(seq.segment_BT, place_BT)


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    window: int,
    sinks: int,
    rope_base: float = 0.0,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return softmax attention under a dense mask of the window and the sinks, float32."""
    batch, time, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    far, far_seq = far_view(q, seq, window + sinks, rope_base)

    def scores(q: jax.Array, q_seq: Seq) -> jax.Array:
        q = q.reshape(batch, time, groups, heads // groups, width)
        products = jnp.einsum("BTGMK,BSGK->BGMTS", q, k) / math.sqrt(width)
        return scored(products, distances(q_seq, seq), bend)

    near_BTS = Windows(True, window).visible(seq, seq)
    sink_BTS = Windows(True).visible(seq, seq) & (seq.position_BT < sinks)[:, None, :]
    both = jnp.where(near_BTS[:, None, None], scores(q, seq), scores(far, far_seq))
    visible = (near_BTS | sink_BTS)[:, None, None]
    weights = masked_softmax(both, visible)
    return jnp.einsum("BGMTS,BSGP->BTGMP", weights, v).reshape(batch, time, heads, -1)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    window: int,
    sinks: int,
    state: KVState | None = None,
    rope_base: float = 0.0,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)``: the window in blocks, the sinks gathered for each query.

    Args:
      window: W; a token sees itself and the W - 1 before it.
      sinks: the first tokens of the segment, that are seen from everywhere.
      rope_base: with which q and k were rotated to their positions in the text; 0 if they were not.
      block: tokens in a block.
    """
    q_BTHK, k_BTGK, v_BTGP = (zero_padding(x, seq) for x in (q_BTHK, k_BTGK, v_BTGP))
    mask = Windows(True, window)
    far_BTHK, far_seq = far_view(q_BTHK, seq, window + sinks, rope_base)
    every_U = jnp.arange(sinks).reshape(-1, 1, 1)
    seen_UBT = first_seen(seq, sinks) & (seq.position_BT[None] - every_U >= window)
    parts = [
        band(q_BTHK, k_BTGK, v_BTGP, seq, mask, bend, block),
        first_tokens(far_BTHK, k_BTGK, v_BTGP, seen_UBT, (seq, far_seq.position_BT), bend),
    ]
    if state is None:
        widths = {"key_width": k_BTGK.shape[3], "value_width": v_BTGP.shape[3]}
        sizes = {"window": window, "sinks": sinks, "kv_heads": k_BTGK.shape[2]}
        state = init_state(len(k_BTGK), 0, k_BTGK.dtype, **sizes, **widths)
    else:
        start, ring = (KVState(*(x[:, cut] for x in state[:4]), None) for cut in _cuts(sinks))
        parts.append(slots(q_BTHK, ring, seq, mask, bend, block))
        k_BSGK, v_BSGP = (zero_padding(x, start.seq) for x in (start.key_BSGK, start.value_BSGP))
        near_BTS, seen_BTS = (m.visible(seq, start.seq) for m in (mask, Windows(True)))
        distance = distances(seq, start.seq)
        parts.append(dense(q_BTHK, k_BSGK, v_BSGP, near_BTS, distance, bend))
        far_distance = distances(far_seq, start.seq)
        parts.append(dense(far_BTHK, k_BSGK, v_BSGP, seen_BTS & ~near_BTS, far_distance, bend))
    y_BTHP, _ = join(parts)
    return y_BTHP.astype(v_BTGP.dtype), cache.append(state, k_BTGK, v_BTGP, seq, first=sinks)


def _cuts(sinks: int) -> tuple[slice, slice]:
    return slice(None, sinks), slice(sinks, None)


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    window: int,
    sinks: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
) -> KVState:
    """Return empty slots of the sinks, then a ring of W: B (sinks + W) G (K + P) elements and indices."""
    return cache.empty(batch, sinks + window, kv_heads, (key_width, value_width), dtype)


class Sinks(Mixer):
    """A sliding window and the first tokens: O(T (W + sinks)) to train, a state of W + sinks slots.

    Attributes:
      window: W in tokens, itself among them.
      sinks: first tokens of a segment that every token sees.
    """

    order: ClassVar[str] = "T"
    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    small: ClassVar[dict] = {"window": 12, "sinks": 3}

    window: int = 1020
    sinks: int = 4

    def __post_init__(self):
        for field in ("window", "sinks"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "a number of tokens, 1 or more")
        super().__post_init__()

    @property
    def _base(self) -> float:
        return self.rope_base if self.positions == "rope" else 0.0

    def mix(self, qkv, seqs, state):
        sizes = {"window": self.window, "sinks": self.sinks, "rope_base": self._base}
        return forward(*qkv, seq=seqs[0], state=state, bend=self.bend, **sizes)

    def refer(self, qkv, seqs):
        sizes = {"window": self.window, "sinks": self.sinks, "rope_base": self._base}
        return reference(*qkv, seq=seqs[0], bend=self.bend, **sizes)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        sizes = {"window": self.window, "sinks": self.sinks, "kv_heads": self.groups}
        return init_state(batch, capacity, dtype, **sizes, **widths)
