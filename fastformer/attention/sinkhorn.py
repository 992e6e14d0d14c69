"""Sparse Sinkhorn attention: blocks of keys are sorted by a learned soft permutation.

Tay et al. 2020, Sparse Sinkhorn Attention, 2002.11296, section 3.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.chosen import lengths
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import join, starts, take
from fastformer.attention.scores import Mask, masked_softmax
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

NEVER = -1e30  # the logarithm of what is no block


class Sort(NamedTuple):
    """The sorting network, one for each key/value head, float32.

    Attributes:
      hidden_BTGR: ``x W_P``; outer_GRN: W_B.
    """

    hidden_BTGR: jax.Array
    outer_GRN: jax.Array


class Sizes(NamedTuple):
    """N, the most blocks of a segment; the temperature and the rounds of the normalisation."""

    blocks: int
    temperature: float
    iterations: int


class Places(NamedTuple):
    """Where each token stands in its segment, all [B, T].

    Attributes:
      size, count: tokens in each block of the segment, and blocks.
      part, offset: the token's block, and its place in it.
      home: index in time of the first token of its block.
    """

    size: jax.Array
    count: jax.Array
    part: jax.Array
    offset: jax.Array
    home: jax.Array


def places(seq: Seq, blocks: int) -> Places:
    """Return where tokens stand when every segment is cut into ``blocks`` at most, as large as that needs."""
    length_BT = lengths(seq)
    size = -(-length_BT // blocks)
    offset = seq.position_BT % size
    home = jnp.where(seq.segment_BT > 0, jnp.arange(seq.segment_BT.shape[1])[None, :] - offset, -1)
    return Places(size, -(-length_BT // size), seq.position_BT // size, offset, home)


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, sort: Sort, *, seq: Seq, sizes: Sizes
) -> jax.Array:
    """Return softmax attention to the query's block and to the one sorted to its place, float32."""
    time, share = q_BTHK.shape[1], q_BTHK.shape[2] // k_BSGK.shape[2]
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    where = places(seq, sizes.blocks)
    same_BTS = Mask(causal=False).visible(seq, seq)
    mates_BTS = same_BTS & (where.part[:, :, None] == where.part[:, None, :])
    mates = mates_BTS.astype(jnp.float32)
    mean_BTGR = jnp.einsum("BTS,BSGR->BTGR", mates, zero_padding(sort.hidden_BTGR, seq))
    mean_BTGR /= jnp.maximum(mates.sum(axis=-1), 1.0)[..., None, None]
    scores_BTGN = jnp.einsum("BTGR,GRN->BTGN", jax.nn.relu(mean_BTGR), sort.outer_GRN)
    # Of the first tokens of blocks t and s: how well block s would stand in the place of t.
    number_BSN = jax.nn.one_hot(where.part, sizes.blocks)
    table = jnp.einsum("BTGN,BSN->BGTS", scores_BTGN, number_BSN) / sizes.temperature
    first_BT = (where.offset == 0) & (seq.segment_BT > 0)
    firsts = (same_BTS & first_BT[:, :, None] & first_BT[:, None, :])[:, None]
    table = jnp.where(firsts, table, NEVER)
    for _ in range(sizes.iterations):
        for axis in (-1, -2):
            table = table - jax.nn.logsumexp(table, axis=axis, keepdims=True)
            table = jnp.where(firsts, table, NEVER)
    home_BTU = jax.nn.one_hot(where.home, time)
    table = jnp.einsum("BTU,BGUS->BGTS", home_BTU, jnp.exp(table))
    table = jnp.einsum("BGTU,BSU->BGTS", table, home_BTU)
    table *= (where.offset[:, :, None] == where.offset[:, None, :])[:, None]
    sorted_k, sorted_v = (jnp.einsum("BGTS,BSGK->BTGK", table, x) for x in (k, v))
    k, v = (jnp.repeat(jnp.concatenate(x, axis=1), share, axis=2) for x in ((k, sorted_k), (v, sorted_v)))
    scores = jnp.einsum("BTHK,BSHK->BHTS", q, k) * q.shape[-1] ** -0.5
    visible = jnp.concatenate([mates_BTS, mates_BTS], axis=-1)[:, None]
    weights = masked_softmax(scores, visible)
    return jnp.einsum("BHTS,BSHP->BTHP", weights, v)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    sort: Sort,
    *,
    seq: Seq,
    sizes: Sizes,
    block: int = BLOCK,
) -> tuple[jax.Array, None]:
    """Return ``(y_BTHP, None)``: one sum over blocks sorts, then blocks are segments of their own.

    Args:
      block: tokens worked on together.
    """
    q_BTHK, k_BTGK, v_BTGP = (zero_padding(x, seq) for x in (q_BTHK, k_BTGK, v_BTGP))
    where = places(seq, sizes.blocks)
    weight_BTGN = permutation(sort, seq, where, sizes)
    own = Seq(where.home + 1, where.offset)
    mask = Mask(False, -(-q_BTHK.shape[1] // sizes.blocks))
    moved = (_sorted(x, weight_BTGN, seq, where).astype(x.dtype) for x in (k_BTGK, v_BTGP))
    parts = [attend_part(q_BTHK, *kv, own, own, mask, block=block) for kv in ((k_BTGK, v_BTGP), moved)]
    return join(parts)[0].astype(v_BTGP.dtype), None


def permutation(sort: Sort, seq: Seq, where: Places, sizes: Sizes) -> jax.Array:
    """Return the share that each block of the segment has in what is sorted to a token's place, [B, T, G, N].

    Eq. 2 to 5: scores of blocks, whose exponentials are divided by the sums of rows and columns in turn.
    """
    time, heads = seq.segment_BT.shape[1], sort.hidden_BTGR.shape[2]
    real_BT = seq.segment_BT > 0

    def total(x: jax.Array, index_BT: jax.Array) -> jax.Array:
        """Sum over tokens of the same index, at that index."""
        return jax.vmap(lambda x, i: jnp.zeros((time + 1, *x.shape[1:])).at[i].add(x)[:time])(x, index_BT)

    # Blocks are known by their first token, and so are segments.
    home_BT, start_BT = (jnp.where(real_BT, x, time) for x in (where.home, jnp.maximum(starts(seq), 0)))
    hidden = total(zero_padding(sort.hidden_BTGR, seq), home_BT)
    tokens = jnp.maximum(total(jnp.ones(home_BT.shape), home_BT), 1.0)
    hidden = jax.nn.relu(hidden / tokens[..., None, None])
    number = jnp.arange(sizes.blocks).reshape(1, 1, 1, -1)
    first = ((where.offset == 0) & real_BT)[..., None, None] & (number < where.count[..., None, None])
    first = jnp.broadcast_to(first, (*first.shape[:2], heads, sizes.blocks))
    table = jnp.einsum("BTGR,GRN->BTGN", hidden, sort.outer_GRN) / sizes.temperature
    table = jnp.where(first, table, NEVER)

    def highest(x: jax.Array, i: jax.Array) -> jax.Array:
        return jnp.full((time + 1, *x.shape[1:]), NEVER).at[i].max(x)[i]

    @jax.checkpoint
    def round(table: jax.Array, _: None) -> tuple[jax.Array, None]:
        table = jnp.where(first, table - jax.nn.logsumexp(table, axis=-1, keepdims=True), NEVER)
        top = jax.vmap(highest)(jax.lax.stop_gradient(table), start_BT)
        sums = take(total(jnp.exp(table - top), start_BT), start_BT)
        return jnp.where(first, table - top - jnp.log(jnp.where(first, sums, 1.0)), NEVER), None

    table, _ = jax.lax.scan(round, table, None, length=sizes.iterations)
    return take(jnp.exp(table), where.home)


def _sorted(x_BTGK: jax.Array, weight_BTGN: jax.Array, seq: Seq, where: Places) -> jax.Array:
    """Return at each token the mean of those that stand where it does in the blocks, float32."""
    length_BT = lengths(seq)

    @jax.checkpoint
    def add(y_BTGK: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, weight_BTG = at
        position_BT = number * where.size + where.offset
        there_BT = (seq.segment_BT > 0) & (position_BT < length_BT)
        weight_BTG = jnp.where(there_BT[..., None], weight_BTG, 0.0)
        found = take(x_BTGK, starts(seq) + position_BT).astype(jnp.float32)
        return y_BTGK + weight_BTG[..., None] * found, None

    numbers = jnp.arange(weight_BTGN.shape[-1])
    y_BTGK, _ = jax.lax.scan(add, jnp.zeros(x_BTGK.shape), (numbers, jnp.moveaxis(weight_BTGN, -1, 0)))
    return y_BTGK


class Sinkhorn(Mixer):
    """The query's block of an encoder's segment, and the one that is sorted to its place: O(T² / N + T N).

    A segment is cut into N blocks of equal size, the last of which may be short: what is missing in it
    counts as zeros. Every key/value head sorts for itself. Deviations: the sorting network sees the mean of
    a block in place of the sum, has no biases and no rectifier at its end; no Gumbel noise is added. Left
    out is the causal form, whose blocks are of one size, and of any number.

    Attributes:
      blocks: N. temperature: of the scores; the lower, the nearer to a permutation.
      iterations: of the normalisation.
    """

    bidirectional: ClassVar[bool] = True
    small: ClassVar[dict] = {"blocks": 5}

    blocks: int = 32
    temperature: float = 0.75
    iterations: int = 7

    def __post_init__(self):
        for field in ("blocks", "iterations"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        super().__post_init__()

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.blocks, self.temperature, self.iterations)

    def gates(self, x_BTD, seq):
        sizes = (self.groups, self.head_width)
        hidden = self.linear("sort_inner", x_BTD, "BTD,DGR->BTGR", *sizes, exact=True)
        init = nn.with_logical_partitioning(nn.initializers.normal(self.head_width**-0.5), ("G", "R", "N"))
        return (Sort(hidden, self.param("sort_outer", init, (*sizes, self.blocks))),)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], sizes=self._sizes)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], sizes=self._sizes)
