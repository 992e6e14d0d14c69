"""Compressed blocks of native sparse attention: made once, attended to, and pointing at blocks to select.

Yuan et al. 2025, Native Sparse Attention, 2502.11089, section 3.3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.blocked import BLOCK
from fastformer.attention.chosen import Timeline, complete_blocks, of_blocks
from fastformer.attention.parts import ends, softmax_part, take, tiles, untiled
from fastformer.attention.scores import Mask
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

FIXED = 3  # blocks that are always selected: the first, the query's own and the one before (section 3.3.2)


class Sizes(NamedTuple):
    """Tokens: l of a compressed block, d between them, l' of a selected one; n; W; and worked on together."""

    compress: int
    stride: int
    select: int
    selected: int
    window: int
    block: int = BLOCK


class Squeeze(NamedTuple):
    """phi of eq. 7: a block's tokens and their places in it, through one hidden layer, become one vector.

    Attributes:
      place_CK: added to the tokens of a block. inner_CKR, outer_RK: weights.
    """

    place_CK: jax.Array
    inner_CKR: jax.Array
    outer_RK: jax.Array

    def __call__(self, x_BNCGK: jax.Array) -> jax.Array:
        x = x_BNCGK + self.place_CK.astype(x_BNCGK.dtype)[None, None, :, None]
        hidden = jnp.einsum("BNCGK,CKR->BNGR", x, self.inner_CKR.astype(x.dtype))
        return jnp.einsum("BNGR,RK->BNGK", jax.nn.gelu(hidden), self.outer_RK.astype(x.dtype))


def new_blocks(
    line: Timeline, squeezes: tuple[Squeeze, Squeeze], sizes: Sizes
) -> tuple[jax.Array, jax.Array, Seq]:
    """Return keys, values and Seq of the compressed blocks that end in the new tokens (eq. 7)."""
    past = min(line.past, sizes.compress - 1)
    k, v, seq = jax.tree.map(lambda x: x[:, line.past - past :], line[:3])
    end_BU = _compressed_ends(seq, sizes)
    segment_BU = jnp.where(end_BU >= past, take(seq.segment_BT, end_BU), 0)
    where = Seq(segment_BU, take(seq.position_BT, end_BU))
    tokens = (of_blocks(x, end_BU, sizes.compress) for x in (k, v))
    k_BUGK, v_BUGP = (zero_padding(f(x), where) for f, x in zip(squeezes, tokens))
    return k_BUGK, v_BUGP, where


def _placed(every: Timeline, there_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return keys and values of compressed blocks where they end in time, zero where none does.

    Args:
      every: the blocks in the order of time, of which the newest are there.
    """
    order_BX = jnp.argsort(every.seq.segment_BT > 0, axis=1, stable=True)
    later_BU = jnp.cumsum(there_BU[:, ::-1], axis=1)[:, ::-1] - there_BU
    index_BU = take(order_BX, order_BX.shape[1] - 1 - later_BU)
    real = Seq(there_BU.astype(jnp.int32), there_BU)
    return tuple(zero_padding(take(x, index_BU), real) for x in (every.k_BSGK, every.v_BSGP))


def compressed(
    q_BTGMK, line_seq: Seq, every: Timeline, seq: Seq, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Return the compressed branch, and the blocks that its weights select (eq. 8 to 11), [B, T, G, J]."""
    batch, time, groups, share, width = q_BTGMK.shape
    end_BU = _compressed_ends(line_seq, sizes)
    there_BU = end_BU >= 0
    k_BUGK, v_BUGP = _placed(every, there_BU) if every.past else every[:2]
    k_seq = Seq(jnp.where(there_BU, take(line_seq.segment_BT, end_BU), 0), take(line_seq.position_BT, end_BU))

    @jax.checkpoint
    def attend(at: tuple[jax.Array, Seq]) -> tuple[jax.Array, jax.Array]:
        q, q_seq = at
        scores = jnp.einsum("BTGMK,BUGK->BGMTU", q, k_BUGK, preferred_element_type=jnp.float32)
        visible = Mask().visible(q_seq, k_seq)[:, None, None]
        weights, _ = softmax_part(scores / math.sqrt(width), visible)
        y = jnp.einsum(
            "BGMTU,BUGP->BTGMP", weights.astype(v_BUGP.dtype), v_BUGP, preferred_element_type=jnp.float32
        )
        return y, _select(jax.lax.stop_gradient(weights).sum(axis=2), q_seq, line_seq, end_BU, sizes)

    work = jax.tree.map(lambda x: tiles(x, min(sizes.block, time)), (q_BTGMK, seq))
    y_BTGMP, choice_BTGJ = (untiled(x, time) for x in jax.lax.map(attend, work))
    return y_BTGMP.reshape(batch, time, groups * share, -1), choice_BTGJ


def _compressed_ends(seq: Seq, sizes: Sizes) -> jax.Array:
    """Return the index of the last token of each compressed block, [B, U], -1 where there is none."""
    late = Seq(seq.segment_BT, seq.position_BT - sizes.compress + sizes.stride)
    early_BT = late.position_BT < 0
    return ends(Seq(jnp.where(early_BT, 0, late.segment_BT), late.position_BT), sizes.stride)


def _select(weights_BGTU, q_seq: Seq, k_seq: Seq, end_BU, sizes: Sizes) -> jax.Array:
    blocks = complete_blocks(k_seq, sizes.select)
    count = blocks.end_BN.shape[1]
    # Compressed blocks by the strips that they share with each selected one.
    first, last = 1 - sizes.compress // sizes.stride, sizes.select // sizes.stride
    likes_BGTN = 0.0
    for step in range(first, last):
        low, high = max(step, 0), min(step + sizes.compress // sizes.stride, last)
        at_BN = blocks.end_BN - sizes.select + step * sizes.stride + sizes.compress
        index_BN = at_BN // sizes.stride
        is_BN = (take(end_BU, index_BN) == at_BN) & (at_BN >= 0) & (index_BN < end_BU.shape[1])
        found = jax.vmap(lambda w, i: w[:, :, i])(weights_BGTU, jnp.clip(index_BN, 0, end_BU.shape[1] - 1))
        likes_BGTN += jnp.where(is_BN[:, None, None], (high - low) * found, 0.0)
    same = (q_seq.segment_BT[:, :, None] == blocks.segment_BN[:, None]) & (blocks.segment_BN > 0)[:, None]
    behind_BTN = q_seq.position_BT[:, :, None] // sizes.select - blocks.number_BN[:, None]
    far = same & (behind_BTN >= 2)
    zeroth = far & (blocks.number_BN == 0)[:, None]
    home_BT1 = jnp.where(zeroth.any(axis=-1), jnp.argmax(zeroth, axis=-1), count)[..., None]
    likes, index = jax.lax.top_k(
        jnp.where((far & ~zeroth)[:, None], likes_BGTN, -jnp.inf), min(sizes.selected - FIXED, count)
    )
    choice_BTGJ = jnp.where(likes > -jnp.inf, index, count).swapaxes(1, 2)
    home = jnp.broadcast_to(home_BT1[:, :, None], (*choice_BTGJ.shape[:3], 1))
    return jnp.concatenate([home, choice_BTGJ], axis=-1)
