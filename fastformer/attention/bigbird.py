"""BigBird: a window of blocks, global blocks and random blocks.

Zaheer et al. 2020, Big Bird: Transformers for Longer Sequences, 2007.14062, section 2 and appendix D.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.chosen import (
    Blocks,
    Neighbours,
    attend_apart,
    complete_blocks,
    lengths,
    of_blocks,
)
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import grouped, join, softmax_part, starts, take
from fastformer.attention.scores import Mask, masked_softmax
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def draw(seed: int, heads: int, number: jax.Array, last: jax.Array, count: int) -> jax.Array:
    """Return up to ``count`` blocks beyond the ends and the neighbours of each block, [..., H, J] int32.

    All such sets are equally likely (Floyd's sampling; Bentley & Floyd 1987, Comm. ACM 30:9). They depend on
    the seed, the head, the block and how many blocks there are alone, so that packing changes nothing.

    Args:
      number: of a block; last: the number of the last of its segment, of the same shape.

    Returns:
      Numbers of blocks, -1 where there are no more to draw.
    """

    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        """One round of a multiplicative hash: every bit of both reaches every bit of the result."""
        x = (x ^ (y.astype(jnp.uint32) + jnp.uint32(0x9E3779B9))) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    number, last = number[..., None], last[..., None]
    ones = (1,) * (number.ndim - 1)
    start = jnp.full((*ones, heads), seed % 2**32, jnp.uint32)
    bits = mix(mix(start, jnp.arange(heads).reshape(*ones, heads)), number)
    low, high = jnp.maximum(number - 1, 1), jnp.minimum(number + 1, last - 1)  # the neighbours
    near = jnp.maximum(high - low + 1, 0)
    free = jnp.broadcast_to(jnp.maximum(last - 1, 0) - near, bits.shape)
    drawn = []
    for turn in range(count):
        top = free - count + turn
        lot = (mix(bits, jnp.uint32(turn)) % jnp.maximum(top + 1, 1).astype(jnp.uint32)).astype(jnp.int32)
        again = jnp.zeros(lot.shape, bool)
        for other in drawn:
            again |= lot == other
        drawn.append(jnp.where(top >= 0, jnp.where(again, top, lot), -1))
    lots, low, near = jnp.stack(drawn, axis=-1), low[..., None], near[..., None]
    return jnp.where(lots >= 0, lots + 1 + jnp.where(lots + 1 >= low, near, 0), -1)


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, *, seq: Seq, size: int, random: int, seed: int
) -> jax.Array:
    """Return softmax attention under a dense mask for each head, float32."""
    batch, time, heads, width = q_BTHK.shape
    groups = k_BSGK.shape[2]
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    block, last = seq.position_BT // size, (lengths(seq) - 1) // size
    ends_BT = (block == 0) | (block == last)
    same = Mask(causal=False).visible(seq, seq)
    near = Neighbours(size, causal=False).visible(seq, seq)
    around = same & (ends_BT[:, :, None] | ends_BT[:, None, :] | near)
    drawn = draw(seed, heads, block, last, random)
    chosen = (drawn.swapaxes(1, 2)[:, :, :, None] == block[:, None, None, :, None]).any(axis=-1)
    visible = (chosen & same[:, None]) | around[:, None]
    visible = visible.reshape(batch, groups, heads // groups, time, time)
    scores = jnp.einsum("BTGMK,BSGK->BGMTS", grouped(q, groups), k) / math.sqrt(width)
    weights = masked_softmax(scores, visible)
    return jnp.einsum("BGMTS,BSGP->BTGMP", weights, v).reshape(batch, time, heads, -1)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    size: int,
    random: int,
    seed: int,
    block: int = BLOCK,
) -> tuple[jax.Array, None]:
    """Return ``(y_BTHP, None)``: the window in blocks, other blocks sorted, global queries by sums.

    Args:
      size: tokens in a block of positions.
      random: blocks drawn for each block of queries and each head, besides its neighbours and the ends.
      seed: of the draw.
      block: tokens worked on together.
    """
    q_BTHK, k_BTGK, v_BTGP = (zero_padding(x, seq) for x in (q_BTHK, k_BTGK, v_BTGP))
    around = attend_part(q_BTHK, k_BTGK, v_BTGP, seq, seq, Neighbours(size, causal=False), block=block)
    blocks = _all_blocks(seq, size)
    (k_BNCGK, seen_BNC), (v_BNCGP, _) = (_of_blocks(x, seq, blocks, size) for x in (k_BTGK, v_BTGP))
    length_BT = lengths(seq)
    choice_BTHJ = _choose(seq, length_BT, blocks.end_BN.shape[1], (size, random, seed, q_BTHK.shape[2]))
    far = attend_apart(q_BTHK, k_BNCGK, v_BNCGP, choice_BTHJ, min(size, block), seen_BNC)
    y_BTHP, _ = join([around, far])
    number_BT, last_BT = seq.position_BT // size, (length_BT - 1) // size
    # Where there are no more than two blocks, the window sees all.
    ends_BT = ((number_BT == 0) | (number_BT == last_BT)) & (last_BT > 1) & (seq.segment_BT > 0)
    all_BTHP = _global_queries(q_BTHK, (k_BNCGK, v_BNCGP, seen_BNC), seq, blocks, length_BT)
    y_BTHP = jnp.where(ends_BT[:, :, None, None], all_BTHP, y_BTHP)
    return y_BTHP.astype(v_BTGP.dtype), None


def _all_blocks(seq: Seq, size: int) -> Blocks:
    """Return complete blocks, then the short last blocks of segments of more than two blocks.

    A stretch of ``size`` tokens in time holds the end of one such segment at most. ``end_BN`` of a short
    block is where it would end were it complete.
    """
    whole = complete_blocks(seq, size)
    time = seq.segment_BT.shape[1]
    following = jnp.pad(seq.segment_BT[:, 1:], [(0, 0), (0, 1)])
    is_end = (seq.segment_BT > 0) & (following != seq.segment_BT) & (seq.position_BT >= 2 * size)
    is_end &= seq.position_BT % size != size - 1
    index_BT = jnp.where(is_end, jnp.arange(time)[None, :], -1)
    index_BT = jnp.pad(index_BT, [(0, 0), (0, -time % size)], constant_values=-1)
    index_BN = index_BT.reshape(len(index_BT), -1, size).max(axis=-1)
    position_BN = take(seq.position_BT, index_BN)
    end_BN = jnp.where(index_BN >= 0, index_BN + size - 1 - position_BN % size, -1)
    segment_BN = jnp.where(index_BN >= 0, take(seq.segment_BT, index_BN), 0)
    short = Blocks(end_BN, segment_BN, position_BN // size)
    return Blocks(*(jnp.concatenate(pair, axis=1) for pair in zip(whole, short)))


def _of_blocks(x: jax.Array, seq: Seq, blocks: Blocks, size: int) -> tuple[jax.Array, jax.Array]:
    """Return the tokens of each block, and which of them are there."""
    longer = [jnp.pad(a, [(0, 0), (0, size)] + [(0, 0)] * (a.ndim - 2)) for a in (x, seq.segment_BT)]
    tokens, segment_BNC = (of_blocks(a, blocks.end_BN, size) for a in longer)
    there_BNC = (segment_BNC == blocks.segment_BN[:, :, None]) & (blocks.segment_BN > 0)[:, :, None]
    return jnp.where(there_BNC[..., None, None], tokens, jnp.zeros((), x.dtype)), there_BNC


def _home(seq: Seq, length_BT: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """Return where the block of a number [B, T, …] is among all; the token's segment has three or more."""
    rest = (1,) * (number.ndim - 2)
    start, length = (x.reshape(*x.shape, *rest) for x in (starts(seq), length_BT))
    whole = (start + (number + 1) * size - 1) // size
    short = -(-seq.segment_BT.shape[1] // size) + (start + length - 1) // size
    return jnp.where((number + 1) * size <= length, whole, short)


def _choose(seq: Seq, length_BT: jax.Array, count: int, sizes) -> jax.Array:
    """Return the blocks beyond its window that a query sees, [B, T, H, J]: the two ends, then random ones.

    Args:
      count: of all blocks, which is none of them.
    """
    size, random, seed, heads = sizes
    number_BT, last_BT = seq.position_BT // size, (length_BT - 1) // size
    ends = (jnp.where(number_BT > 1, 0, -1), jnp.where(number_BT < last_BT - 1, last_BT, -1))
    ends_BTHJ = jnp.repeat(jnp.stack(ends, axis=-1)[:, :, None], heads, axis=2)
    chosen_BTHJ = jnp.concatenate([ends_BTHJ, draw(seed, heads, number_BT, last_BT, random)], axis=-1)
    # The two ends see all.
    asks_BT = (number_BT > 0) & (number_BT < last_BT) & (seq.segment_BT > 0)
    asks_BTHJ = asks_BT[:, :, None, None] & (chosen_BTHJ >= 0)
    return jnp.where(asks_BTHJ, _home(seq, length_BT, chosen_BTHJ, size), count)


def _global_queries(q_BTHK, keys, seq: Seq, blocks: Blocks, length_BT: jax.Array) -> jax.Array:
    """Return what the first and the last block of long segments see of all of it, [B, T, H, P]; O(T C).

    Every block of keys meets the two blocks of queries of its segment; sums over a segment's blocks make
    the softmax.
    """
    k_BNCGK, v_BNCGP, seen_BNC = keys
    batch, count, size, groups, width = k_BNCGK.shape
    heads = q_BTHK.shape[2]
    start_BN = blocks.end_BN - size + 1 - blocks.number_BN * size
    length_BN = take(length_BT, start_BN)
    long_BN = (blocks.segment_BN > 0) & (length_BN > 2 * size)
    last_BN = (length_BN - 1) // size * size
    # A segment is known by its first block, the sums of which stand there.
    home_BN = jnp.where(long_BN, (start_BN + size - 1) // size, count)
    every = jnp.arange(size)[None, None]
    index_BNEC = jnp.stack([start_BN[:, :, None] + every, (start_BN + last_BN)[:, :, None] + every], axis=2)
    q = grouped(take(q_BTHK, index_BNEC.reshape(batch, -1)), groups)
    q = q.reshape(batch, count, 2 * size, groups, heads // groups, width)

    def total(x_BN: jax.Array) -> jax.Array:
        return jax.vmap(lambda x, i: jax.ops.segment_sum(x, i, count))(x_BN, home_BN)

    @jax.checkpoint
    def attend(at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, seen = at
        scores = jnp.einsum("BQGMK,BCGK->BQGMC", q, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        weights, log = softmax_part(scores, seen[:, None, None, None])
        weights = weights.astype(v.dtype)
        return jnp.einsum("BQGMC,BCGP->BQGMP", weights, v, preferred_element_type=jnp.float32), log

    work = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k_BNCGK, v_BNCGP, seen_BNC))
    y, log = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(attend, work))
    long = long_BN[:, :, None, None, None]
    highest = jax.vmap(lambda x, i: jax.ops.segment_max(x, i, count))(jax.lax.stop_gradient(log), home_BN)
    share = jnp.where(long, jnp.exp(jnp.where(long, log - take(highest, home_BN), 0.0)), 0.0)
    sums = total(share)[..., None]
    y = total(share[..., None] * y) / jnp.where(sums > 0, sums, 1.0)
    y = y.reshape(batch, count, 2 * size, heads, -1)

    number_BT = seq.position_BT // size
    slot_BT = seq.position_BT % size + jnp.where(number_BT == 0, 0, size)
    home_BT = (starts(seq) + size - 1) // size
    flat = y.reshape(batch, count * 2 * size, heads, -1)
    return take(flat, home_BT * 2 * size + slot_BT)


class BigBird(Mixer):
    """Neighbouring, global and random blocks: O(T C (5 + r)) to train.

    Blocks of C positions: each sees itself, the one on either side, the segment's first and last, and r
    random ones; the first and the last see all and are seen by all (the ITC form, with one global block at
    either end). Random blocks differ by head and layer and depend on nothing but the seed.

    Attributes:
      block_size: C. random_blocks: r. seed: of the draw.
    """

    bidirectional: ClassVar[bool] = True
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"block_size": 8, "random_blocks": 1}

    block_size: int = 64
    random_blocks: int = 3
    seed: int = 0

    def __post_init__(self):
        require(self.block_size >= 1, "block_size", self.block_size, "a number of tokens, 1 or more")
        require(self.random_blocks >= 1, "random_blocks", self.random_blocks, "a number of blocks, 1 or more")
        super().__post_init__()

    @property
    def _fields(self) -> dict[str, int]:
        seed = self.seed * 1000 + self.layer
        return {"size": self.block_size, "random": self.random_blocks, "seed": seed}

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], **self._fields)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], **self._fields)
