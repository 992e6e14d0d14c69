"""Softmax attention in parts: each part is seen through its own kind of index, and one softmax joins them.

A part is ``(y_BTHP, log_BTH)`` in float32: the attention to some keys, and the log of the sum of its
weights, -inf where there is no such key. Parts over keys that have none in common are joined exactly
(Milakov & Gimelshein 2018, 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.scores import Bend
from fastformer.core.seq import Seq

Part = tuple[jax.Array, jax.Array]


def join(parts: list[Part]) -> Part:
    """Return the attention to the keys of all parts."""
    top = jax.lax.stop_gradient(jnp.max(jnp.stack([log for _, log in parts]), axis=0))
    top = jnp.where(top > -jnp.inf, top, 0.0)
    shares = [jnp.exp(log - top) for _, log in parts]
    total = sum(shares)
    safe = jnp.where(total > 0, total, 1.0)
    y = sum(part[0] * (share / safe)[..., None] for part, share in zip(parts, shares))
    return y, jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)


def scored(scores: jax.Array, distance: jax.Array, bend: Bend) -> jax.Array:
    """Return bent scores [B, G, M, …] of products; ``distance`` is [B, …]."""
    if bend.soft_cap:
        scores = bend.soft_cap * jnp.tanh(scores / bend.soft_cap)
    if bend.slopes:
        _, groups, share, *rest = scores.shape
        slopes = jnp.asarray(bend.slopes, jnp.float32).reshape(1, groups, share, *(1 for _ in rest))
        scores = scores - slopes * jnp.abs(distance).astype(jnp.float32)[:, None, None]
    return scores


def softmax_part(scores: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the softmax over the last axis, zero where nothing is visible, and its log total."""
    scores = jnp.where(visible, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top > -jnp.inf, top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    log = jnp.where(total > 0, jnp.where(total > 0, top, 0.0) + jnp.log(safe), -jnp.inf)
    return weights / safe, log[..., 0]


def grouped(q_BTHK: jax.Array, groups: int) -> jax.Array:
    """``[B, T, H, K] -> [B, T, G, M, K]``."""
    batch, time, heads, width = q_BTHK.shape
    return q_BTHK.reshape(batch, time, groups, heads // groups, width)


def dense(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    visible_BTS: jax.Array,
    distance_BTS: jax.Array,
    bend: Bend = Bend(),
) -> Part:
    """Return the part of all keys at once: for few queries, or few keys; clean where not visible."""
    batch, time, heads, width = q_BTHK.shape
    q = grouped(q_BTHK, k_BSGK.shape[2])
    scores = jnp.einsum("BTGMK,BSGK->BGMTS", q, k_BSGK, preferred_element_type=jnp.float32) / math.sqrt(width)
    scores = scored(scores, distance_BTS, bend)
    weights, log_BGMT = softmax_part(scores, visible_BTS[:, None, None])
    y = jnp.einsum(
        "BGMTS,BSGP->BTGMP", weights.astype(v_BSGP.dtype), v_BSGP, preferred_element_type=jnp.float32
    )
    log_BTH = log_BGMT.reshape(batch, heads, time).swapaxes(1, 2)
    return y.reshape(batch, time, heads, -1), log_BTH


def tiles(x: jax.Array, size: int) -> jax.Array:
    """``[B, T, …] -> [T / size, B, size, …]``, padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def untiled(x: jax.Array, time: int) -> jax.Array:
    """Undo ``tiles``."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def starts(seq: Seq) -> jax.Array:
    """Return the index in time of the first token of each token's segment; negative in a past call."""
    return jnp.arange(seq.segment_BT.shape[1])[None, :] - seq.position_BT


def take(x: jax.Array, index_BT: jax.Array) -> jax.Array:
    """Return ``x[b, index[b, t]]`` of ``x`` [B, S, …]; an index out of range takes the nearest."""
    index = jnp.clip(index_BT, 0, x.shape[1] - 1)
    return jax.vmap(lambda x, i: x[i])(x, index)


def first_seen(seq: Seq, count: int) -> jax.Array:
    """Return whether token ``u`` of a query's segment is among these tokens, [U, B, T]."""

    def found(u: jax.Array) -> jax.Array:
        index_BT = starts(seq) + u
        inside = (index_BT >= 0) & (index_BT < seq.segment_BT.shape[1]) & (seq.segment_BT > 0)
        return inside & (take(seq.segment_BT, index_BT) == seq.segment_BT)

    return jax.vmap(found)(jnp.arange(count))


def ends(seq: Seq, size: int) -> jax.Array:
    """Return the index of the last token of each complete block of positions, [B, T / size]; -1 where none.

    Two such tokens are ``size`` or more apart, so that each stretch of ``size`` in time has one at most,
    however rows are packed.
    """
    index = jnp.arange(seq.segment_BT.shape[1])[None, :]
    is_end = (seq.segment_BT > 0) & (seq.position_BT % size == size - 1)
    end_BT = jnp.where(is_end, index, -1)
    end_BT = jnp.pad(end_BT, [(0, 0), (0, -end_BT.shape[1] % size)], constant_values=-1)
    return end_BT.reshape(len(end_BT), -1, size).max(axis=-1)


def first_tokens(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    visible_UBT: jax.Array,
    seqs: tuple[Seq, jax.Array],
    bend: Bend = Bend(),
) -> Part:
    """Return the part of the first tokens of each query's segment, clean where not visible; O(T U).

    Args:
      visible_UBT: whether a query sees token ``u`` of its segment.
      seqs: the Seq of the keys, and the positions of the queries for the distance.
    """
    batch, time, heads, width = q_BTHK.shape
    q = grouped(q_BTHK, k_BTGK.shape[2])
    start_BT = starts(seqs[0])
    count = len(visible_UBT)

    @jax.checkpoint
    def score(u: jax.Array) -> jax.Array:
        k = take(k_BTGK, start_BT + u)
        return jnp.einsum("BTGMK,BTGK->BGMT", q, k, preferred_element_type=jnp.float32) / math.sqrt(width)

    @jax.checkpoint
    def value(u: jax.Array, weights_BGMT: jax.Array) -> jax.Array:
        v = take(v_BTGP, start_BT + u)
        weights = weights_BGMT.astype(v.dtype)
        return jnp.einsum("BGMT,BTGP->BTGMP", weights, v, preferred_element_type=jnp.float32)

    every = jnp.arange(count)
    scores = jnp.moveaxis(jax.lax.map(score, every), 0, -1)
    distance = seqs[1][:, :, None] - every[None, None, :]
    weights, log_BGMT = softmax_part(
        scored(scores, distance, bend), jnp.moveaxis(visible_UBT, 0, -1)[:, None, None]
    )
    start = jnp.zeros((*q.shape[:-1], v_BTGP.shape[-1]), jnp.float32)
    y, _ = jax.lax.scan(lambda y, at: (y + value(*at), None), start, (every, jnp.moveaxis(weights, -1, 0)))
    return y.reshape(batch, time, heads, -1), log_BGMT.reshape(batch, heads, time).swapaxes(1, 2)


def by_head(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    bend: Bend,
    count: int,
    run: Callable[[tuple[jax.Array, jax.Array, jax.Array], Bend, int, slice], jax.Array],
) -> jax.Array:
    """Return ``run(qkv, bend, number, of)``, [B, T, H, P], heads taking the numbers in turn.

    Key/value heads do, or, where there are fewer than ``count`` of them, the query heads of each.

    Args:
      run: is given the heads of one number; ``of`` says which key/value heads those are.
    """
    q_BTHK, k_BSGK, v_BSGP = qkv
    (batch, time, heads, width), groups = q_BTHK.shape, k_BSGK.shape[2]
    every = slice(None)
    numbers = min(count, max(groups, heads // groups))
    y = None
    for number in range(numbers):
        mine = slice(number, None, count)
        cut = (mine, every) if groups >= count else (every, mine)
        slopes = np.asarray(bend.slopes).reshape(groups, -1)[cut].ravel().tolist() if bend.slopes else ()
        q = grouped(q_BTHK, groups)[:, :, *cut]
        flat = (q.reshape(batch, time, -1, width), k_BSGK[:, :, cut[0]], v_BSGP[:, :, cut[0]])
        part = run(flat, bend._replace(slopes=tuple(slopes)), number, cut[0])
        part = part.reshape(*q.shape[:-1], -1)
        if y is None:
            y = jnp.zeros((batch, time, groups, heads // groups, part.shape[-1]), part.dtype)
        y = y.at[:, :, *cut].set(part)
    return y.reshape(batch, time, heads, -1)
