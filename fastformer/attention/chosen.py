"""Attention to chosen blocks of keys: every query names a few blocks, and only those are read.

Pairs (query, block) are sorted by block, so that queries that chose the same block meet it together in
dense products, as tokens meet experts. Nothing depends on where in a row a block stands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.blocked import attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.parts import Part, dense, ends, grouped, join, softmax_part, starts, take
from fastformer.attention.scores import Mask
from fastformer.attention.windows import distances
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


class Neighbours(NamedTuple):
    """Keys of the query's block of ``size`` positions, of the one before and, unless causal, the next."""

    size: int
    causal: bool = True

    @property
    def window(self) -> int:
        """Return the reach in tokens."""
        return 2 * self.size

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        q_block, k_block = (x.position_BT // self.size for x in (q_seq, k_seq))
        near = jnp.abs(q_block[:, :, None] - k_block[:, None, :]) < 2
        return Mask(self.causal).visible(q_seq, k_seq) & near

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        return Mask(self.causal, self.window).blocks(first_q, first_k, size)


def lengths(seq: Seq) -> jax.Array:
    """Return how many tokens each token's segment has, [B, T]."""
    time = seq.segment_BT.shape[1]
    home_BT = jnp.where(seq.segment_BT > 0, jnp.clip(starts(seq), 0), time)
    last = jax.vmap(lambda p, i: jnp.zeros((time + 1,), jnp.int32).at[i].max(p))(seq.position_BT, home_BT)
    return jnp.take_along_axis(last, home_BT, axis=1) + 1


class Blocks(NamedTuple):
    """The complete blocks of positions, in the order of time; N is keys / size, rounded up.

    Attributes:
      end_BN: index of the last token, -1 where a stretch of time has no such token.
      segment_BN, number_BN: the segment, 0 where there is none, and position // size.
    """

    end_BN: jax.Array
    segment_BN: jax.Array
    number_BN: jax.Array


def complete_blocks(k_seq: Seq, size: int) -> Blocks:
    """Return the complete blocks of ``size`` positions."""
    end_BN = ends(k_seq, size)
    segment_BN = jnp.where(end_BN >= 0, take(k_seq.segment_BT, end_BN), 0)
    return Blocks(end_BN, segment_BN, take(k_seq.position_BT, end_BN) // size)


def of_blocks(x_BSGK: jax.Array, end_BN: jax.Array, size: int) -> jax.Array:
    """Return the ``size`` tokens up to each end, [B, N, C, …], zero where there is no block."""
    index = end_BN[:, :, None] - size + 1 + jnp.arange(size)[None, None, :]
    found = take(x_BSGK, index.reshape(len(end_BN), -1)).reshape(*index.shape, *x_BSGK.shape[2:])
    there = (end_BN >= 0).reshape(*end_BN.shape, *(1 for _ in found.shape[2:]))
    return jnp.where(there, found, jnp.zeros((), found.dtype))


class Timeline(NamedTuple):
    """Keys, values and Seq of the past and the new tokens, in the order of time; ``past`` are not new."""

    k_BSGK: jax.Array
    v_BSGP: jax.Array
    seq: Seq
    past: int


def timeline(state: KVState | None, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq) -> Timeline:
    """Return the tokens of a state and the new ones, so that those of a segment stand side by side."""
    k_BTGK, v_BTGP = zero_padding(k_BTGK, seq), zero_padding(v_BTGP, seq)
    if state is None:
        return Timeline(k_BTGK, v_BTGP, seq, 0)
    slots = state.segment_BS.shape[1]
    age_BS = jnp.broadcast_to(jnp.arange(slots)[None, :], state.segment_BS.shape)
    if state.written_B is not None:
        age_BS = (age_BS - state.written_B[:, None]) % slots
    # What holds no token stands before all that does.
    order_BS = jnp.argsort(jnp.where(state.segment_BS > 0, age_BS, -1), axis=1)
    old = (take(x, order_BS) for x in (state.key_BSGK, state.value_BSGP, state.segment_BS, state.position_BS))
    new = (k_BTGK, v_BTGP, *seq[:2])
    k, v, *both = (jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(old, new))
    both = Seq(*both)
    return Timeline(zero_padding(k, both), zero_padding(v, both), both, slots)


def led(tree: tuple, seq: Seq, back: bool = False) -> tuple:
    """Return arrays [B, T, …] with the padding that a row begins with moved to its end, or back."""
    time = seq.segment_BT.shape[1]
    shift_B1 = jnp.argmax(seq.segment_BT > 0, axis=1, keepdims=True)
    index_BT = (jnp.arange(time)[None, :] + (-shift_B1 if back else shift_B1)) % time
    return jax.tree.map(lambda x: take(x, index_BT), tree)


def near(q_BTHK: jax.Array, line: Timeline, seq: Seq, mask: NamedTuple, block: int) -> Part:
    """Return the part that ``mask`` shows, whose ``window`` says how far back that can be."""
    past = min(line.past, mask.window - 1)
    k, v, k_seq = jax.tree.map(lambda x: x[:, line.past - past :], line[:3])
    if q_BTHK.shape[1] == 1:
        return dense(q_BTHK, k, v, mask.visible(seq, k_seq), distances(seq, k_seq))
    return attend_part(q_BTHK, k, v, seq, k_seq, mask, past=past, block=block)


class Routes(NamedTuple):
    """Where each pair of a sheet (a row of the batch and a head) is worked on, X chunks of C pairs.

    Attributes:
      slot_AR: of each pair in the chunks laid end to end; X C where the pair has no block.
      pair_AXC: the pair in each slot; R where there is none.
      block_AX: the block of each chunk.
    """

    slot_AR: jax.Array
    pair_AXC: jax.Array
    block_AX: jax.Array


def route(block_AR: jax.Array, blocks: int, chunk: int) -> Routes:
    """Return slots for pairs that chose ``block_AR``, ``blocks`` for none: chunks of one block each."""
    pairs = block_AR.shape[1]
    chunks = pairs // chunk + blocks  # every block wastes less than one chunk

    def sheet(block_R: jax.Array) -> Routes:
        order_R = jnp.argsort(block_R)
        sorted_R = block_R[order_R]
        count_N = jax.ops.segment_sum(jnp.ones((pairs,), jnp.int32), block_R, blocks + 1)
        first_N = jnp.cumsum(count_N) - count_N
        last_N = jnp.cumsum(-(-count_N[:blocks] // chunk))
        chunk_N = jnp.append(last_N, chunks) - jnp.append(-(-count_N[:blocks] // chunk), 0)
        slot_R = chunk_N[sorted_R] * chunk + jnp.arange(pairs) - first_N[sorted_R]
        slot_R = jnp.where(sorted_R < blocks, slot_R, chunks * chunk)
        pair_XC = jnp.full((chunks * chunk,), pairs, jnp.int32).at[slot_R].set(order_R, mode="drop")
        block_X = jnp.minimum(jnp.searchsorted(last_N, jnp.arange(chunks), side="right"), blocks - 1)
        slot_R = jnp.zeros((pairs,), slot_R.dtype).at[order_R].set(slot_R)
        return Routes(slot_R, pair_XC.reshape(chunks, chunk), block_X)

    return jax.vmap(sheet)(block_AR)


def attend_chosen(
    q_BTGMK: jax.Array,
    k_BNCGK: jax.Array,
    v_BNCGP: jax.Array,
    choice_BTGJ: jax.Array,
    chunk: int,
    seen_BNC: jax.Array | None = None,
) -> Part:
    """Return the part of the chosen blocks, [B, T, G M, P] and [B, T, G M].

    Args:
      q_BTGMK: G heads of M queries that choose together.
      k_BNCGK: the keys of N blocks of C tokens.
      choice_BTGJ: J different blocks for each; N is none.
      chunk: pairs that are worked on together.
      seen_BNC: which keys of a block are there; None is all.
    """
    batch, time, groups, share, width = q_BTGMK.shape
    blocks, size = k_BNCGK.shape[1:3]
    count = choice_BTGJ.shape[-1]

    if time * count <= blocks:
        return _gathered(q_BTGMK, k_BNCGK, v_BNCGP, choice_BTGJ, seen_BNC)

    def sheets(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(x, axis, 1)
        return x.reshape(batch * groups, *x.shape[2:])

    routes = route(sheets(choice_BTGJ, 2).reshape(batch * groups, -1), blocks, chunk)
    q_ATMK, k_ANCK, v_ANCP = sheets(q_BTGMK, 2), sheets(k_BNCGK, 3), sheets(v_BNCGP, 3)
    seen_BNC = jnp.ones(k_BNCGK.shape[:3], bool) if seen_BNC is None else seen_BNC
    seen_ANC = jnp.repeat(seen_BNC, groups, axis=0)
    used_AXC = routes.pair_AXC < time * count
    query_AXC = jnp.minimum(routes.pair_AXC // count, time - 1)
    q_AXCMK = jax.vmap(lambda x, i: x[i])(q_ATMK, query_AXC)
    work = [jax.vmap(lambda x, i: x[i])(x, routes.block_AX) for x in (k_ANCK, v_ANCP, seen_ANC)]

    @jax.checkpoint
    def attend(at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        k_ASK, v_ASP, seen_AS, q_ACMK, used_AC = at
        scores = jnp.einsum("ACMK,ASK->ACMS", q_ACMK, k_ASK, preferred_element_type=jnp.float32)
        visible = used_AC[:, :, None, None] & seen_AS[:, None, None, :]
        weights, log_ACM = softmax_part(scores / math.sqrt(width), visible)
        weights = weights.astype(v_ASP.dtype)
        return jnp.einsum("ACMS,ASP->ACMP", weights, v_ASP, preferred_element_type=jnp.float32), log_ACM

    work = tuple(jnp.moveaxis(x, 1, 0) for x in (*work, q_AXCMK, used_AXC))
    y, log = (jnp.moveaxis(x, 0, 1) for x in jax.lax.map(attend, work))
    slots = y.shape[1] * chunk

    def to_time(x_AXCM: jax.Array, empty: float) -> jax.Array:
        x = x_AXCM.reshape(batch * groups, slots, *x_AXCM.shape[3:])
        x = jax.vmap(lambda x, i: x[jnp.minimum(i, slots - 1)])(x, routes.slot_AR)
        there = (routes.slot_AR < slots).reshape(*routes.slot_AR.shape, *(1 for _ in x.shape[2:]))
        x = jnp.where(there, x, empty).reshape(batch, groups, time, count, *x.shape[2:])
        return jnp.moveaxis(x, 1, 3)  # [B, T, J, G, M, …]

    y, log = to_time(y, 0.0), to_time(log, -jnp.inf)
    y, log = y.reshape(*y.shape[:3], groups * share, -1), log.reshape(*log.shape[:3], groups * share)
    return join([(y[:, :, j], log[:, :, j]) for j in range(count)])


def _gathered(q_BTGMK, k_BNCGK, v_BNCGP, choice_BTGJ, seen_BNC: jax.Array | None) -> Part:
    """Return what ``attend_chosen`` does, by a copy of each query's blocks: for few queries."""
    batch, time, groups, share, width = q_BTGMK.shape
    blocks, size = k_BNCGK.shape[1:3]
    index_BGTJ = jnp.minimum(choice_BTGJ, blocks - 1).swapaxes(1, 2)

    def of_each(x_BNCG: jax.Array) -> jax.Array:
        found = jax.vmap(jax.vmap(lambda x, i: x[i]))(jnp.moveaxis(x_BNCG, 3, 1), index_BGTJ)
        return found.swapaxes(1, 2).reshape(batch, time, groups, -1, *x_BNCG.shape[4:])

    k_BTGSK, v_BTGSP = of_each(k_BNCGK), of_each(v_BNCGP)
    visible_BTGS = jnp.repeat(choice_BTGJ < blocks, size, axis=3)
    if seen_BNC is not None:
        visible_BTGS &= of_each(jnp.repeat(seen_BNC[..., None], groups, axis=3))
    scores = jnp.einsum("BTGMK,BTGSK->BTGMS", q_BTGMK, k_BTGSK, preferred_element_type=jnp.float32)
    weights, log_BTGM = softmax_part(scores / math.sqrt(width), visible_BTGS[:, :, :, None])
    weights = weights.astype(v_BTGSP.dtype)
    y = jnp.einsum("BTGMS,BTGSP->BTGMP", weights, v_BTGSP, preferred_element_type=jnp.float32)
    return y.reshape(batch, time, groups * share, -1), log_BTGM.reshape(batch, time, groups * share)


def attend_apart(
    q_BTHK: jax.Array,
    k_BNCGK: jax.Array,
    v_BNCGP: jax.Array,
    choice_BTHJ: jax.Array,
    chunk: int,
    seen_BNC: jax.Array | None = None,
) -> Part:
    """Return the part of the blocks that each query head chose for itself, [B, T, H, P] and [B, T, H].

    The arguments are those of ``attend_chosen``, but for every head by itself.
    """
    batch, time, heads, _ = q_BTHK.shape
    groups = k_BNCGK.shape[3]

    def alone(x_BTHK: jax.Array) -> jax.Array:
        """Heads that share keys become queries of their own."""
        return grouped(x_BTHK, groups).swapaxes(2, 3).reshape(batch, -1, groups, x_BTHK.shape[-1])

    def together(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, time, -1, *x.shape[2:]).swapaxes(2, 3)
        return x.reshape(batch, time, heads, *x.shape[4:])

    q_BTGK, choice_BTGJ = alone(q_BTHK), alone(choice_BTHJ)
    y, log = attend_chosen(q_BTGK[:, :, :, None], k_BNCGK, v_BNCGP, choice_BTGJ, chunk, seen_BNC)
    return together(y), together(log)
