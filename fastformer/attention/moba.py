"""MoBA: each query attends to its block and to the blocks whose mean key it likes best.

Lu et al. 2025, Mixture of Block Attention for Long-Context LLMs, 2502.13189, section 2.2.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.chosen import Blocks, attend_apart, complete_blocks, led, near, of_blocks, timeline
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import Part, grouped, join, tiles, untiled
from fastformer.attention.scores import Mask, masked_softmax
from fastformer.attention.windows import Within
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, *, seq: Seq, size: int, best: int
) -> jax.Array:
    """Return softmax attention under the dense mask of the chosen blocks, float32 (eq. 3 to 6)."""
    batch, time, heads, width = q_BTHK.shape
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    q = grouped(q, k.shape[2])
    block_BT = seq.position_BT // size
    mates_BTS = Mask(causal=False).visible(seq, seq) & (block_BT[:, :, None] == block_BT[:, None, :])
    mean_BSGK = jnp.einsum("BTS,BSGK->BTGK", mates_BTS / size, k)
    # A block is known by its last token; the query's own is chosen anyway.
    last_BS = seq.position_BT % size == size - 1
    earlier_BTS = Mask().visible(seq, seq) & ~mates_BTS & last_BS[:, None, :]
    gate = jnp.einsum("BTGMK,BSGK->BGMTS", q, mean_BSGK)
    gate, index = jax.lax.top_k(
        jnp.where(earlier_BTS[:, None, None], jax.lax.stop_gradient(gate), -jnp.inf), min(best - 1, time)
    )
    chosen = (jax.nn.one_hot(index, time) * (gate > -jnp.inf)[..., None]).sum(axis=-2)
    chosen = jnp.einsum("BGMTS,BSU->BGMTU", chosen, mates_BTS.astype(jnp.float32)) > 0
    visible = chosen | (mates_BTS & Mask().visible(seq, seq))[:, None, None]
    scores = jnp.einsum("BTGMK,BSGK->BGMTS", q, k) / math.sqrt(width)
    weights = masked_softmax(scores, visible)
    return jnp.einsum("BGMTS,BSGP->BTGMP", weights, v).reshape(batch, time, heads, -1)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    size: int,
    best: int,
    state: KVState | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)``: the query's own block in blocks, the chosen ones sorted by block.

    Args:
      size: tokens in a block of positions.
      best: blocks that a query sees, its own among them.
      block: tokens worked on together.
    """
    after = cache.growing(k_BTGK, v_BTGP, seq) if state is None else cache.append(state, k_BTGK, v_BTGP, seq)
    if state is None:
        return _forward(q_BTHK, k_BTGK, v_BTGP, seq, None, (size, best, block)), after
    moved = led((q_BTHK, k_BTGK, v_BTGP, seq), seq)
    y_BTHP = _forward(*moved, state, (size, best, block))
    return led(y_BTHP, seq, back=True), after


def _forward(q_BTHK, k_BTGK, v_BTGP, seq: Seq, state: KVState | None, sizes) -> jax.Array:
    size, best, block = sizes
    q_BTHK = zero_padding(q_BTHK, seq)
    line = timeline(state, k_BTGK, v_BTGP, seq)
    parts = [near(q_BTHK, line, seq, Within(size, size), block)]
    blocks = complete_blocks(line.seq, size)
    count = min(best - 1, blocks.end_BN.shape[1])
    if count:
        parts.append(_chosen(q_BTHK, line, seq, blocks, (size, count, block)))
    return join(parts)[0].astype(v_BTGP.dtype)


def _chosen(q_BTHK, line, seq: Seq, blocks: Blocks, sizes) -> Part:
    size, count, block = sizes
    k_BNCGK, v_BNCGP = (of_blocks(x, blocks.end_BN, size) for x in (line.k_BSGK, line.v_BSGP))
    q_BTGMK = grouped(q_BTHK, line.k_BSGK.shape[2])
    mean_BNGK = k_BNCGK.astype(jnp.float32).mean(axis=2)
    choice_BTHJ = choose(q_BTGMK, mean_BNGK, seq, blocks, sizes).reshape(*q_BTHK.shape[:3], -1)
    return attend_apart(q_BTHK, k_BNCGK, v_BNCGP, choice_BTHJ, min(size, block))


def choose(q_BTGMK: jax.Array, mean_BNGK: jax.Array, seq: Seq, blocks: Blocks, sizes) -> jax.Array:
    """Return the ``count`` earlier blocks with the highest products, [B, T, G, M, J]; N is none.

    Args:
      sizes: tokens in a block, ``count``, and queries worked on together.
    """
    size, count, block = sizes
    block = min(block, q_BTGMK.shape[1])

    def best(at: tuple[jax.Array, Seq]) -> jax.Array:
        q, q_seq = at
        gate = jnp.einsum("BTGMK,BNGK->BTGMN", q.astype(jnp.float32), mean_BNGK)
        same_BTN = q_seq.segment_BT[:, :, None] == blocks.segment_BN[:, None, :]
        earlier_BTN = same_BTN & (q_seq.position_BT[:, :, None] // size > blocks.number_BN[:, None, :])
        there_BTN = earlier_BTN & (blocks.segment_BN > 0)[:, None, :]
        gate, index = jax.lax.top_k(jnp.where(there_BTN[:, :, None, None], gate, -jnp.inf), count)
        return jnp.where(gate > -jnp.inf, index, mean_BNGK.shape[1])

    q_BTGMK, mean_BNGK = jax.lax.stop_gradient((q_BTGMK, mean_BNGK))
    work = jax.tree.map(lambda x: tiles(x, block), (q_BTGMK, seq))
    return untiled(jax.lax.map(best, work), q_BTGMK.shape[1])


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class MoBA(Mixer):
    """The query's block and the best earlier ones: O(T (C k + T / C)) to train, a state that grows.

    Each query head chooses for itself. The choice has no gradient. Means of the blocks are taken from the
    cached keys at every step, so that decoding reads the keys of the whole past once.

    Attributes:
      block_size: C, tokens in a block, by position in the segment.
      best: k, blocks that a query sees, its own among them.
    """

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    small: ClassVar[dict] = {"block_size": 8, "best": 3}

    block_size: int = 512
    best: int = 3

    def __post_init__(self):
        require(self.block_size >= 1, "block_size", self.block_size, "a number of tokens, 1 or more")
        require(self.best >= 1, "best", self.best, "a number of blocks, 1 or more")
        super().__post_init__()

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], size=self.block_size, best=self.best, state=state)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], size=self.block_size, best=self.best)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
