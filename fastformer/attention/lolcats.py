"""LoLCATs: softmax within a window and a learned feature map beyond it, under one normaliser.

Zhang et al. 2024, 2410.10254, section 3.3, eq. 6; the feature map is Hedgehog's (2402.04347).
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.cache import KVState
from fastformer.attention.chosen import Timeline, led, timeline
from fastformer.attention.hedgehog import Hedgehog, features
from fastformer.attention.linear import divided
from fastformer.attention.parts import grouped, tiles, untiled
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, recur
from fastformer.attention.scores import Mask
from fastformer.core.errors import lookup, require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

# Whether the window and what is beyond it count.
BRANCHES = {"both": (True, True), "window": (True, False), "linear": (False, True)}
SHARE = 0.1  # gamma at first, as published


class HybridState(NamedTuple):
    """The newest W tokens, and the memory of those before them.

    In bytes, B W G (K + P) of dtype + 8 B W + 4 B for the window, 8 B G K (P + 1) + 4 B beyond it.

    Attributes:
      key_BSGK, value_BSGP, segment_BS, position_BS, written_B: as in KVState.
      memory_BGKP, segment_B: as in Memory, of 2 K features and P + 1 values.
    """

    key_BSGK: jax.Array
    value_BSGP: jax.Array
    segment_BS: jax.Array
    position_BS: jax.Array
    written_B: jax.Array
    memory_BGKP: jax.Array
    segment_B: jax.Array


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    query_HKR: jax.Array,
    key_GKR: jax.Array,
    mixing_H: jax.Array,
    *,
    seq: Seq,
    window: int,
    branch: str = "both",
) -> jax.Array:
    """Return the values averaged by ``gamma exp(q_t.k_s / sqrt(K) - c_t)`` within the window and by
    ``phi(q_t).phi(k_s)`` beyond it, float32 (2410.10254, eq. 6).

    ``gamma = sigmoid(mixing)``, and ``c_t`` is the largest score of the window, as in the published code.
    """
    share = q_BTHK.shape[2] // k_BSGK.shape[2]
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    near_BHTS = Mask(True, window).visible(seq, seq)[:, None]
    far_BHTS = Mask(True).visible(seq, seq)[:, None] & ~near_BHTS
    phi_k_BSHR = jnp.repeat(features(k, key_GKR), share, axis=2)
    k_BSHK, v_BSHP = jnp.repeat(k, share, axis=2), jnp.repeat(v, share, axis=2)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q, k_BSHK) / math.sqrt(q.shape[-1])
    top_BHT1 = jnp.max(jnp.where(near_BHTS, scores_BHTS, -1e30), axis=-1, keepdims=True)
    gamma = jax.nn.sigmoid(mixing_H).reshape(1, -1, 1, 1)
    exact_BHTS = gamma * jnp.exp(jnp.where(near_BHTS, scores_BHTS - top_BHT1, -jnp.inf))
    similar_BHTS = jnp.einsum("BTHR,BSHR->BHTS", features(q, query_HKR), phi_k_BSHR)
    counts = BRANCHES[branch]
    weights_BHTS = counts[0] * exact_BHTS + counts[1] * jnp.where(far_BHTS, similar_BHTS, 0.0)
    total_BHT1 = jnp.sum(weights_BHTS, axis=-1, keepdims=True)
    return jnp.einsum("BHTS,BSHP->BTHP", weights_BHTS / jnp.where(total_BHT1 > 0, total_BHT1, 1.0), v_BSHP)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    query_HKR: jax.Array,
    key_GKR: jax.Array,
    mixing_H: jax.Array,
    *,
    seq: Seq,
    window: int,
    state: HybridState | None = None,
    branch: str = "both",
) -> tuple[jax.Array, HybridState]:
    """Return ``(y_BTHP, state)``: the window in tiles, a running memory of what has left it.

    Args:
      query_HKR, key_GKR: weights of the feature map. mixing_H: sigmoid gives the window's share, gamma.
      window: W; a token sees itself and the W - 1 before it exactly.
      branch: a row of BRANCHES.
    """
    q_BTHK = zero_padding(q_BTHK, seq)
    sizes = {"window": window, "kv_heads": k_BTGK.shape[2]}
    widths = {"key_width": k_BTGK.shape[3], "value_width": v_BTGP.shape[3]}
    begin = init_state(len(k_BTGK), 0, k_BTGK.dtype, **sizes, **widths) if state is None else state
    ring, memory = KVState(*begin[:5]), Memory(*begin[5:])
    after = cache.append(ring, k_BTGK, v_BTGP, seq)
    new = (q_BTHK, k_BTGK, v_BTGP, seq)
    # Tokens that go on with a segment of the past must stand beside it.
    q, k, v, moved = new if state is None else led(new, seq)
    line = timeline(ring, k, v, moved)
    near, far = BRANCHES[branch]
    sums, memory = _beyond(features(q, query_HKR), key_GKR, line, moved, memory)
    y, total = far * sums[..., :-1], far * sums[..., -1:]
    exact, exact_total = _window(q, line, moved, window)
    gamma = near * jax.nn.sigmoid(mixing_H).reshape(1, 1, -1, 1)
    y = divided(y + gamma * exact, total + gamma * exact_total[..., None]).astype(v_BTGP.dtype)
    y = y if state is None else led((y,), seq, back=True)[0]
    return y, HybridState(*after, *memory)


def _beyond(
    phi_q_BTHR: jax.Array, key_GKR: jax.Array, line: Timeline, seq: Seq, memory: Memory
) -> tuple[jax.Array, Memory]:
    """Return the sums over what has left each token's window, of values and of weights, and the memory."""
    time, window = seq.segment_BT.shape[1], line.past
    old = jax.tree.map(lambda x: x[:, :time], line.seq)  # each token a window back
    same_BT = (old.segment_BT == seq.segment_BT) & (seq.position_BT - old.position_BT == window)
    leaves = same_BT[..., None, None]
    k_BTGR = jnp.where(leaves, features(line.k_BSGK[:, :time], key_GKR), 0.0)
    v_BTGP = jnp.where(leaves, line.v_BSGP[:, :time].astype(jnp.float32), 0.0)
    v_BTGP = jnp.concatenate([v_BTGP, jnp.ones((*v_BTGP.shape[:3], 1))], axis=-1)
    return recur(Tokens(grouped(phi_q_BTHR, k_BTGR.shape[2]), k_BTGR, v_BTGP), seq, memory)


def _window(q_BTHK: jax.Array, line: Timeline, seq: Seq, window: int) -> tuple[jax.Array, jax.Array]:
    """Return ``sum exp(score - top) v``, [B, T, H, P], and ``sum exp(score - top)``, [B, T, H].

    Both are float32 and of each token's window; top is the largest score there.
    """
    time, heads, width = q_BTHK.shape[1:]
    size, mask, groups = min(window, time), Mask(True, window), line.k_BSGK.shape[2]
    keys = (line.k_BSGK, line.v_BSGP, line.seq)
    if size == time:
        keys = jax.tree.map(lambda x: x[None], keys)
    else:
        # A tile sees itself and the one before; the past is the first.
        blocks = jax.tree.map(lambda x: tiles(x, size), keys)
        keys = jax.tree.map(lambda x: jnp.concatenate([x[:-1], x[1:]], axis=2), blocks)

    @jax.checkpoint
    def attend(at: tuple) -> tuple[jax.Array, jax.Array]:
        q, q_seq, (k, v, k_seq) = at
        q = grouped(q, groups)
        scores = jnp.einsum("BTGMK,BSGK->BTGMS", q, k, preferred_element_type=jnp.float32)
        visible = mask.visible(q_seq, k_seq)[:, :, None, None]
        scores = jnp.where(visible, scores / math.sqrt(width), -jnp.inf)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0.0))
        y = jnp.einsum(
            "BTGMS,BSGP->BTGMP", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return y, jnp.sum(weights, axis=-1)

    work = (tiles(q_BTHK, size), jax.tree.map(lambda x: tiles(x, size), seq), keys)
    y, total = (untiled(x, time) for x in jax.lax.map(attend, work))
    return y.reshape(*y.shape[:2], heads, -1), total.reshape(*total.shape[:2], heads)


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    window: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
) -> HybridState:
    """Return an empty state, of constant size: see HybridState."""
    ring = cache.empty(batch, window, kv_heads, (key_width, value_width), dtype)
    return HybridState(*ring, *empty_memory(batch, kv_heads, 2 * key_width, value_width + 1))


class Lolcats(Hedgehog):
    """Softmax over a window and kernel attention beyond it: O(T W) to train, a state of W slots and a memory.

    Made to take over a trained softmax (compress/linearise.py). The window's share is learned, one a head.

    Attributes:
      window: W in tokens, itself among them.
      branch: a row of BRANCHES: "window" or "linear" leaves the other out of both sums, which tells how much
        either does (Benfeghoul et al. 2025, 2510.05901); beyond its window a first token sees nothing.
    """

    bidirectional: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = False
    branches: ClassVar[tuple[str, ...]] = ("window", "linear")
    small: ClassVar[dict] = {"window": 6}

    window: int = 64
    branch: str = "both"

    def __post_init__(self):
        require(self.window >= 1, "window", self.window, "a number of tokens, 1 or more")
        lookup(BRANCHES, self.branch, "branch")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        init = nn.initializers.constant(math.log(SHARE / (1 - SHARE)))
        mixing_H = self.param("mixing", nn.with_logical_partitioning(init, ("H",)), (self.heads,))
        return *super().gates(x_BTD, seq), mixing_H

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], window=self.window, state=state, branch=self.branch)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], window=self.window, branch=self.branch)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, window=self.window, kv_heads=self.groups, **widths)
