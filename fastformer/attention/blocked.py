"""Exact softmax attention over blocks: memory linear in T, only the blocks that can be seen.

The pairs (query block, key block) that a Mask allows are known before the program runs, so one scan
over that list does all the work, forward and backward, whatever the pattern. The forward pass keeps a
running maximum and sum per query (Rabe & Staats 2021, 2112.05682; Milakov & Gimelshein 2018, 1805.02867);
the backward pass computes the weights anew from the saved log-sum-exp (Dao et al. 2022, 2205.14135,
algorithm 4).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.scores import Bend, Fade, Mask
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

BLOCK = 128


class Plan(NamedTuple):
    """What is known before the program runs: hashable, so that it can be a static argument."""

    pairs: tuple[tuple[int, int], ...]
    mask: Mask
    bend: Bend
    share: int  # M, query heads to a key/value head


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    q_seq: Seq,
    k_seq: Seq,
    mask: Mask = Mask(),
    bend: Bend = Bend(),
    *,
    past: int | None = 0,
    block: int = BLOCK,
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v``, [B, T, H, P] in the dtype of ``v``.

    The arguments are those of ``attend_part``.
    """
    y_BTHP, _ = attend_part(q_BTHK, k_BSGK, v_BSGP, q_seq, k_seq, mask, bend, past=past, block=block)
    return y_BTHP.astype(v_BSGP.dtype)


def attend_part(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    q_seq: Seq,
    k_seq: Seq,
    mask: Mask = Mask(),
    bend: Bend = Bend(),
    *,
    past: int | None = 0,
    block: int = BLOCK,
    fades: tuple[Fade, Fade] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return ``(y_BTHP, log_BTH)`` float32: the attention to these keys, and the log of its total weight.

    What joining it with the attention to other keys needs; the log is -inf where no key is seen.

    Args:
      past: the first ``past`` keys stand before the first query, in any order; None when keys and
        queries do not share a timeline (cross-attention).
      block: tokens in a block.
      fades: of queries [B, T, H] and of keys [B, S, H]; their difference is added to the scores.
    """
    seqs, sizes = (q_seq, k_seq), _Sizes.of(q_BTHK, k_BSGK, block)
    plan, blocks = _lay_out(sizes, (q_BTHK, k_BSGK, v_BSGP), seqs, mask, bend, past)
    if fades is not None:
        clean = (Fade(*(zero_padding(x, s) for x in fade)) for fade, s in zip(fades, seqs))
        groups = sizes.groups
        fades = tuple(
            jax.tree.map(lambda x: _heads_first(_to_blocks(x, sizes.block), groups), f) for f in clean
        )
    y_NBGRP, log_NBGR = _attend(plan, *blocks, fades)
    log_BTH = sizes.to_time(log_NBGR[..., None])[..., 0]
    return sizes.to_time(y_NBGRP), jnp.where(log_BTH < jnp.inf, log_BTH, -jnp.inf)


def part_gradients(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    seqs: tuple[Seq, Seq],
    mask: Mask,
    bend: Bend,
    found: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
    *,
    past: int | None = 0,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what these keys give to the gradients of q, k and v, float32, where they are some of many.

    Args:
      found: ``(y_BTHP, log_BTH)`` of the attention to all keys, joined.
      cotangents: of those two.
    """
    q_BTHK, k_BSGK, _ = qkv
    sizes = _Sizes.of(q_BTHK, k_BSGK, block)
    plan, blocks = _lay_out(sizes, qkv, seqs, mask, bend, past)
    log_BTH = jnp.where(found[1] > -jnp.inf, found[1], jnp.inf)
    y, dy = (sizes.to_rows(x) for x in (found[0], cotangents[0]))
    log, dlog = (sizes.to_rows(x[..., None])[..., 0] for x in (log_BTH, cotangents[1]))
    (dq, dk, dv), _ = _gradients(plan, (*blocks, None, y, log), (dy, dlog))
    dk, dv = (jnp.moveaxis(x, 0, 1).swapaxes(2, 3) for x in (dk, dv))
    dk, dv = (x.reshape(x.shape[0], -1, *x.shape[3:])[:, : k_BSGK.shape[1]] for x in (dk, dv))
    clean = zip((sizes.to_time(dq), dk, dv), (seqs[0], seqs[1], seqs[1]))
    return tuple(zero_padding(x, seq) for x, seq in clean)


class _Sizes(NamedTuple):
    """How queries lie in blocks: a block's rows are its queries, for each of the M heads that share keys."""

    batch: int
    time: int
    groups: int
    share: int
    block: int

    @classmethod
    def of(cls, q_BTHK: jax.Array, k_BSGK: jax.Array, block: int) -> _Sizes:
        batch, time, heads, _ = q_BTHK.shape
        keys, groups = k_BSGK.shape[1:3]
        return cls(batch, time, groups, heads // groups, min(block, max(time, keys)))

    def to_rows(self, x_BTHK: jax.Array) -> jax.Array:
        """Return ``x_NBGRK``, R = M C rows."""
        x = _to_blocks(x_BTHK.reshape(self.batch, self.time, self.groups, self.share, -1), self.block)
        rows = (self.batch, self.groups, self.share * self.block)
        return x.transpose(0, 1, 3, 4, 2, 5).reshape(-1, *rows, x_BTHK.shape[-1])

    def to_time(self, x_NBGRK: jax.Array) -> jax.Array:
        """Return ``x_BTHK``."""
        x = x_NBGRK.reshape(*x_NBGRK.shape[:3], self.share, self.block, -1).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.batch, -1, self.groups * self.share, x.shape[-1])[:, : self.time]


def _lay_out(sizes: _Sizes, qkv, seqs: tuple[Seq, Seq], mask: Mask, bend: Bend, past: int | None):
    """Return the plan, and q, k, v and both Seqs in blocks, clean at padding."""
    q_BTHK, k_BSGK, v_BSGP = (zero_padding(x, s) for x, s in zip(qkv, (seqs[0], seqs[1], seqs[1])))
    q_NBGRK = sizes.to_rows(q_BTHK)
    k_NBGCK, v_NBGCP = (_to_blocks(x, sizes.block).transpose(0, 1, 3, 2, 4) for x in (k_BSGK, v_BSGP))
    where = jax.tree.map(lambda x: _to_blocks(x, sizes.block), seqs)
    pairs = _pairs(len(q_NBGRK), len(k_NBGCK), sizes.block, mask, past)
    return Plan(pairs, mask, bend, sizes.share), (q_NBGRK, k_NBGCK, v_NBGCP, where)


def _pairs(queries: int, keys: int, block: int, mask: Mask, past: int | None) -> tuple[tuple[int, int], ...]:
    first_q, first_k = np.arange(queries) * block, np.arange(keys) * block
    if past is None:
        seen = np.ones((queries, keys), bool)
    else:
        seen = mask.blocks(first_q, first_k - past, block)
        # The past is in any order (a ring): its blocks are seen by every query within reach of its end.
        reach = (first_q < mask.window) if mask.window else np.ones(queries, bool)
        seen |= reach[:, None] & (first_k < past)[None, :]
    return tuple((int(i), int(j)) for i, j in np.argwhere(seen))


def _to_blocks(x: jax.Array, block: int) -> jax.Array:
    """``[B, T, …] -> [N, B, C, …]``, padded with zeros."""
    short = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _heads_first(x_NBCH: jax.Array, groups: int) -> jax.Array:
    """``[N, B, C, H] -> [N, B, G, M, C]``."""
    x_NBCGM = x_NBCH.reshape(*x_NBCH.shape[:3], groups, -1)
    return x_NBCGM.transpose(0, 1, 3, 4, 2)


def _block_scores(plan: Plan, q_BGRK, k_BGCK, seqs: tuple[Seq, Seq], fades: tuple[Fade, Fade] | None):
    """Return the scores [B, G, R, C], -inf where hidden, and their slope through the soft cap."""
    q_seq, k_seq = seqs
    scale = 1.0 / math.sqrt(q_BGRK.shape[-1])
    scores = jnp.einsum("BGRK,BGCK->BGRC", q_BGRK, k_BGCK, preferred_element_type=jnp.float32) * scale
    slope = None
    if plan.bend.soft_cap:
        squashed = jnp.tanh(scores / plan.bend.soft_cap)
        scores, slope = squashed * plan.bend.soft_cap, 1.0 - squashed * squashed
    batch, groups, _, size = scores.shape
    split = scores.reshape(batch, groups, plan.share, -1, size)
    if plan.bend.slopes:
        distance = jnp.abs(q_seq.position_BT[:, :, None] - k_seq.position_BT[:, None, :]).astype(jnp.float32)
        slopes = jnp.asarray(plan.bend.slopes, jnp.float32).reshape(1, groups, plan.share, 1, 1)
        split = split - slopes * distance[:, None, None]
    if fades is not None:
        # The parts one by one: each difference of neighbours is small and exact.
        for late, early in zip(*fades):
            split = split + (late[..., :, None] - early[..., None, :])
    visible = plan.mask.visible(q_seq, k_seq)[:, None, None]
    return jnp.where(visible, split, -jnp.inf).reshape(scores.shape), slope


def _take(tree, index):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(x: jax.Array, index: jax.Array, value: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, index, 0)


def _pair_arrays(plan: Plan) -> jax.Array:
    return jnp.asarray(plan.pairs, jnp.int32).reshape(-1, 2)


def _at(i: jax.Array, j: jax.Array, pair):
    """Return block ``i`` of what belongs to queries and block ``j`` of what belongs to keys."""
    return None if pair is None else (_take(pair[0], i), _take(pair[1], j))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q_NBGRK, k_NBGCK, v_NBGCP, seqs, fades):
    return _forward(plan, q_NBGRK, k_NBGCK, v_NBGCP, seqs, fades)[0]


def _forward(plan, q_NBGRK, k_NBGCK, v_NBGCP, seqs, fades):
    def visit(carry, pair):
        top_N, total_N, y_N = carry
        i, j = pair
        v = _take(v_NBGCP, j)
        qk = _at(i, j, (q_NBGRK, k_NBGCK))
        scores, _ = _block_scores(plan, *qk, _at(i, j, seqs), _at(i, j, fades))
        top, total, y = _take(carry, i)
        if plan.bend.sigmoid is not None:
            new_top, shrink = top, jnp.ones_like(total)
            weights = jax.nn.sigmoid(scores + plan.bend.sigmoid)
        else:
            new_top = jnp.maximum(top, scores.max(axis=-1))
            finite_top = jnp.where(new_top > -jnp.inf, new_top, 0.0)
            weights = jnp.exp(scores - finite_top[..., None])
            shrink = jnp.exp(top - finite_top)
        total = total * shrink + weights.sum(axis=-1)
        update = jnp.einsum("BGRC,BGCP->BGRP", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        y = y * shrink[..., None] + update
        return (_put(top_N, i, new_top), _put(total_N, i, total), _put(y_N, i, y)), None

    rows = q_NBGRK.shape[:-1]
    start = (
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, v_NBGCP.shape[-1]), jnp.float32),
    )
    (top, total, y), _ = jax.lax.scan(visit, start, _pair_arrays(plan))
    if plan.bend.sigmoid is None:
        y = y / jnp.where(total > 0, total, 1.0)[..., None]
        log_total = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), jnp.inf)
    else:
        log_total = jnp.zeros_like(total)  # nothing is normalised
    return (y, log_total), (q_NBGRK, k_NBGCK, v_NBGCP, seqs, fades, y, log_total)


def _backward(plan, saved, cotangents):
    gradients, dfades = _gradients(plan, saved, cotangents)
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(gradients, saved))
    if dfades is not None:
        dfades = tuple(Fade(jnp.zeros_like(d), d) for d in dfades)
    return dq, dk, dv, None, dfades


def _gradients(plan, saved, cotangents):
    q_NBGRK, k_NBGCK, v_NBGCP, seqs, fades, y_NBGRP, log_total_NBGR = saved
    dy_NBGRP, dlog_NBGR = cotangents
    inner_NBGR = jnp.sum(dy_NBGRP * y_NBGRP, axis=-1) - dlog_NBGR
    scale = 1.0 / math.sqrt(q_NBGRK.shape[-1])
    dtype = v_NBGCP.dtype

    def visit(carry, pair):
        dq_N, dk_N, dv_N, dfades = carry
        i, j = pair
        q, k, v = _take(q_NBGRK, i), _take(k_NBGCK, j), _take(v_NBGCP, j)
        dy, inner, log_total = _take((dy_NBGRP, inner_NBGR, log_total_NBGR), i)
        scores, slope = _block_scores(plan, q, k, _at(i, j, seqs), _at(i, j, fades))
        dy = dy.astype(dtype)
        dweights = jnp.einsum("BGRP,BGCP->BGRC", dy, v, preferred_element_type=jnp.float32)
        if plan.bend.sigmoid is not None:
            weights = jax.nn.sigmoid(scores + plan.bend.sigmoid)
            dscores = weights * (1.0 - weights) * dweights
        else:
            weights = jnp.exp(scores - log_total[..., None])
            dscores = weights * (dweights - inner[..., None])
        if fades is not None:
            by_head = dscores.reshape(*dscores.shape[:2], plan.share, -1, dscores.shape[-1])
            late_N, early_N = dfades
            late_N = _put(late_N, i, _take(late_N, i) + by_head.sum(axis=-1))
            dfades = (late_N, _put(early_N, j, _take(early_N, j) - by_head.sum(axis=-2)))
        dscores = dscores * scale
        dscores = (dscores if slope is None else dscores * slope).astype(dtype)
        dq = jnp.einsum("BGRC,BGCK->BGRK", dscores, k, preferred_element_type=jnp.float32)
        dk = jnp.einsum("BGRC,BGRK->BGCK", dscores, q, preferred_element_type=jnp.float32)
        dv = jnp.einsum("BGRC,BGRP->BGCP", weights.astype(dtype), dy, preferred_element_type=jnp.float32)
        sums = (_put(dq_N, i, _take(dq_N, i) + dq), _put(dk_N, j, _take(dk_N, j) + dk))
        return (*sums, _put(dv_N, j, _take(dv_N, j) + dv), dfades), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_NBGRK, k_NBGCK, v_NBGCP))
    none = None if fades is None else tuple(jnp.zeros_like(fade.fine) for fade in fades)
    (dq, dk, dv, dfades), _ = jax.lax.scan(visit, (*start, none), _pair_arrays(plan))
    return (dq, dk, dv), dfades


_attend.defvjp(_forward, _backward)
