"""The recurrence behind linear, decayed and delta-rule attention, in chunks and as a loop.

All of them keep a memory M of shape [K, P] a head and differ in what a token does to it:

    M_t = diag(exp(log_decay_t)) M_{t-1} + k_t v_t^T + b_t (r_t^T M_{t-1}),    y_t = M_t^T q_t.

Without ``read`` r and ``erase`` b it is linear attention with decay; a delta rule reads what it is about
to overwrite. Within a chunk the sums over the past are products of matrices (Yang et al. 2023, 2312.06635,
section 4), and what the tokens of a chunk read of each other is one triangular system, the WY form of
products of Householder matrices (Yang et al. 2024, 2406.06484, section 3). Decays stay in log space, only
exponentials of sums that are not positive are taken, and the sum between two tokens is exact whatever came
before them (``Fade``).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.scores import Fade
from fastformer.attention.time_shards import TimeShards, by_shard, time_shards
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

LEAST = -128.0  # a decay's logarithm; float32 has nothing below exp(-104), and sums of 2,048 stay exact
CHUNK = 64  # tokens, where a decay is one number a head
EXACT = jax.lax.Precision.HIGHEST  # TPUs would round the operands to bfloat16
CHANNEL_CHUNK = 16  # tokens, where it is one a channel: pairs of tokens then cost K exponentials


class Memory(NamedTuple):
    """All that is left of the past; in bytes, 4 B G K P + 4 B.

    Attributes:
      memory_BGKP: float32.
      segment_B: int32, the segment it belongs to; 0 is none.
    """

    memory_BGKP: jax.Array
    segment_B: jax.Array


class Tokens(NamedTuple):
    """What tokens do to the memory, float32.

    Attributes:
      q_BTGMK: what is read for the output; M query heads share a memory.
      k_BTGK, v_BTGP: what is written.
      log_BTGK: the decay's logarithm, at most 0 (below -128 taken for -128); K is 1 where a head has one
        decay; None is no decay.
      read_BTGK: r; None is none.
      erase_BTGK: b; None with ``read`` is -k: a delta rule, whose k carries its strength.
    """

    q_BTGMK: jax.Array
    k_BTGK: jax.Array
    v_BTGP: jax.Array
    log_BTGK: jax.Array | None = None
    read_BTGK: jax.Array | None = None
    erase_BTGK: jax.Array | None = None


def empty_memory(batch: int, groups: int, key_width: int, value_width: int) -> Memory:
    """Return an empty memory: 4 B G K P + 4 B bytes, whatever the number of tokens."""
    memory = jnp.zeros((batch, groups, key_width, value_width), jnp.float32)
    return Memory(memory, jnp.zeros((batch,), jnp.int32))


def grouped(q_BTHK: jax.Array, groups: int) -> jax.Array:
    """Return ``q_BTGMK``: query heads by the key/value head that they share."""
    batch, time, heads, width = q_BTHK.shape
    return q_BTHK.reshape(batch, time, groups, heads // groups, width)


def recur(
    tokens: Tokens, seq: Seq, state: Memory | None = None, chunk: int | None = None
) -> tuple[jax.Array, Memory]:
    """Return ``(y_BTHP, state)`` float32, in chunks; rows that are split in time pass their memory on.

    Args:
      state: of the past; None is an empty one.
      chunk: C, tokens in a chunk, on which the result does not depend; None is a good size.
    """
    tokens = _clean(tokens, seq)
    split = time_shards(*seq.segment_BT.shape) if state is None else None
    if split:
        return _recur_split(tokens, seq, split, chunk)
    batch, time, groups, share, _ = tokens.q_BTGMK.shape
    width = tokens.v_BTGP.shape[-1]
    state = empty_memory(batch, groups, tokens.k_BTGK.shape[-1], width) if state is None else state
    by_channel = tokens.log_BTGK.shape[-1] > 1
    chunk = min(chunk or (CHANNEL_CHUNK if by_channel else CHUNK), time)
    segment_NBC = to_chunks(seq.segment_BT, chunk)
    last_NB = last_segments(segment_NBC, state.segment_B)
    before_NB = jnp.concatenate([state.segment_B[None], last_NB[:-1]])
    chunks = (jax.tree.map(lambda x: to_chunks(x, chunk), tokens), segment_NBC, before_NB, last_NB)
    memory, y_NBCGMP = jax.lax.scan(jax.checkpoint(_chunk), state.memory_BGKP, chunks)
    y_BTHP = jnp.moveaxis(y_NBCGMP, 0, 1).reshape(batch, -1, groups * share, width)
    return y_BTHP[:, :time], Memory(memory, last_NB[-1])


def _recur_split(
    tokens: Tokens, seq: Seq, split: TimeShards, chunk: int | None
) -> tuple[jax.Array, Memory]:
    """Return what ``recur`` does, of rows whose time is split over devices.

    What a shard does to the memory that comes in, M, is linear: it goes out as ``transfer M + end``, and
    adds ``lead^T M`` to the outputs. All shards find the three at once, log2 S steps join ``transfer`` and
    ``end`` of those before each, and one product adds what came in. Of decays alone, transfer and lead are
    exponentials of their sums. A delta rule's transfer is a matrix, found by the recurrence itself with K
    more columns of values: zeros that are written to a memory of ones on the diagonal, and whose outputs are
    the lead. So it costs (P + K) / P of the products with values and memories.
    """
    kinds, leaves = jax.tree.structure(tokens), jax.tree.leaves(tokens)

    def local(segment_BT: jax.Array, position_BT: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, ...]:
        tokens, seq = jax.tree.unflatten(kinds, leaves), Seq(segment_BT, position_BT)
        before_B, last_B = split.segments(segment_BT)
        transferred = _by_decay if tokens.read_BTGK is None else _by_matrix
        y_BTGMP, lead_BTGMK, end, transfer = transferred(tokens, seq, before_B, chunk)
        memory = split.passed(end, transfer, _through)
        y_BTGMP += jnp.einsum("BTGMK,BGKP->BTGMP", lead_BTGMK, memory)
        y_BTHP = y_BTGMP.reshape(*segment_BT.shape, -1, y_BTGMP.shape[-1])
        return y_BTHP, split.of_last(end + _through(transfer, memory)), last_B

    spelt = dict(zip(Tokens._fields, ("BTGMK", "BTGK", "BTGP", "BTGK", "BTGK", "BTGK")))
    letters = tuple(spelt[name] for name, x in tokens._asdict().items() if x is not None)
    y, memory, segment = by_shard(local, ("BT", "BT", *letters), ("BTGP", "BGKP", "B"), (*seq[:2], *leaves))
    return y, Memory(memory, segment)


def _by_decay(tokens: Tokens, seq: Seq, before_B: jax.Array, chunk: int | None) -> tuple[jax.Array, ...]:
    """Return ``(y_BTGMP, lead_BTGMK, end_BGKP, transfer_BGK)`` of tokens that only decay the memory."""
    empty = empty_memory(len(before_B), *tokens.k_BTGK.shape[2:], tokens.v_BTGP.shape[-1])
    y_BTHP, end = recur(tokens, seq, Memory(empty.memory_BGKP, before_B), chunk)
    total_BTGK = jnp.cumsum(tokens.log_BTGK, axis=1)
    past = (seq.segment_BT == before_B[:, None])[:, :, None, None]
    lead_BTGMK = tokens.q_BTGMK * jnp.where(past, jnp.exp(total_BTGK), 0.0)[:, :, :, None]
    kept = (end.segment_B == before_B)[:, None, None]
    transfer_BGK = jnp.where(kept, jnp.exp(total_BTGK[:, -1]), 0.0)
    return y_BTHP.reshape(*lead_BTGMK.shape[:-1], -1), lead_BTGMK, end.memory_BGKP, transfer_BGK


def _by_matrix(tokens: Tokens, seq: Seq, before_B: jax.Array, chunk: int | None) -> tuple[jax.Array, ...]:
    """Return ``(y_BTGMP, lead_BTGMK, end_BGKP, transfer_BGKR)`` of tokens that read the memory."""
    groups, keys = tokens.k_BTGK.shape[2:]
    wide = jnp.pad(tokens.v_BTGP, [(0, 0)] * 3 + [(0, keys)])
    empty = jnp.zeros((len(before_B), groups, keys, tokens.v_BTGP.shape[-1]))
    eye = jnp.broadcast_to(jnp.eye(keys), (len(before_B), groups, keys, keys))
    start = Memory(jnp.concatenate([empty, eye], axis=-1), before_B)
    y_BTHP, end = recur(tokens._replace(v_BTGP=wide), seq, start, chunk)
    y_BTGMP, width = y_BTHP.reshape(*tokens.q_BTGMK.shape[:-1], -1), tokens.v_BTGP.shape[-1]
    return *jnp.split(y_BTGMP, [width], axis=-1), *jnp.split(end.memory_BGKP, [width], axis=-1)


def _through(transfer: jax.Array, memory: jax.Array) -> jax.Array:
    """Return what a memory [B, G, K, P], or a transfer, is after a transfer: decays [B, G, K] or a matrix."""
    if transfer.ndim == 4:
        return jnp.einsum("BGKR,BGRP->BGKP", transfer, memory)
    return transfer.reshape(*transfer.shape, *(1,) * (memory.ndim - 3)) * memory


def _clean(tokens: Tokens, seq: Seq) -> Tokens:
    """Return the tokens in float32, with zeros at padding: it writes nothing and does not decay."""
    log = jnp.zeros((*seq.segment_BT.shape, 1, 1)) if tokens.log_BTGK is None else tokens.log_BTGK
    tokens = tokens._replace(log_BTGK=jnp.maximum(log, LEAST))
    return jax.tree.map(lambda x: zero_padding(x.astype(jnp.float32), seq), tokens)


def to_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Return ``[B, T, …] -> [N, B, C, …]``, padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def loop(tokens: Tokens, seq: Seq) -> jax.Array:
    """Return ``y_BTHP`` float32 by the recurrence as written above, token after token: the reference."""
    tokens = _clean(tokens, seq)
    batch, _, groups, _, width = tokens.q_BTGMK.shape

    def step(carry: tuple, token: tuple) -> tuple:
        memory, before_B = carry
        (q, k, v, log, read, erase), segment_B = token
        real = (segment_B > 0)[:, None, None, None]
        fresh = real & (segment_B != before_B)[:, None, None, None]
        memory = jnp.where(fresh, 0.0, memory)
        new = memory * jnp.exp(log)[..., None] + k[..., None] * v[:, :, None]
        if read is not None:
            erase = -k if erase is None else erase
            new += erase[..., None] * jnp.einsum("BGK,BGKP->BGP", read, memory)[:, :, None]
        y = jnp.einsum("BGMK,BGKP->BGMP", q, new)
        return (jnp.where(real, new, memory), jnp.where(segment_B > 0, segment_B, before_B)), y

    start = empty_memory(batch, groups, width, tokens.v_BTGP.shape[-1])
    turned = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, seq.segment_BT))
    _, y_TBGMP = jax.lax.scan(step, tuple(start), turned)
    y_BTGMP = jnp.moveaxis(y_TBGMP, 0, 1)
    return y_BTGMP.reshape(*y_BTGMP.shape[:2], -1, y_BTGMP.shape[-1])


def last_segments(segment_NBC: jax.Array, first_B: jax.Array) -> jax.Array:
    """Return the segment of the last real token up to the end of each chunk, [N, B]."""

    def latest(before_B: jax.Array, segment_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.where(segment_BC > 0, jnp.arange(segment_BC.shape[1])[None, :], -1).max(axis=1)
        found = jnp.take_along_axis(segment_BC, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]
        now_B = jnp.where(index >= 0, found, before_B)
        return now_B, now_B

    return jax.lax.scan(latest, first_B, segment_NBC)[1]


def _chunk(memory: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
    """Take one chunk: ``(memory_BGKP, what is in it) -> (memory_BGKP, y_BCGMP)``."""
    (q, k, v, log, read, erase), segment_BC, before_B, last_B = inputs
    # A token sees those of its segment up to itself; the memory, if its segment came from before;
    # and the memory keeps those of the segment that the chunk ends in.
    same_BCS = segment_BC[:, :, None] == segment_BC[:, None, :]
    order = jnp.tril(jnp.ones(same_BCS.shape[1:], bool))
    sees = (same_BCS & order[None], same_BCS & (order & ~jnp.eye(len(order), dtype=bool))[None])
    past = (segment_BC == before_B[:, None]).astype(jnp.float32)[:, :, None, None]
    stays = (segment_BC == last_B[:, None]).astype(jnp.float32)[:, :, None, None]
    kept = (last_B == before_B).astype(jnp.float32)[:, None, None, None]
    total = Fade.of(log)  # BCGK
    end = jax.tree.map(lambda x: x[:, -1:], total)
    writes = [(k, v)]
    if read is not None:
        before = jax.tree.map(lambda x: jnp.pad(x[:, :-1], [(0, 0), (1, 0), (0, 0), (0, 0)]), total)
        unread = jnp.einsum("BCGK,BGKP->BCGP", read * jnp.exp(sum(before)) * past, memory)
        to_k = _pairs(read[:, :, :, None], k, before, total, sees[1])[:, :, 0]
        if erase is None:
            # u_t = v_t - r_t^T M_{t-1}, where M holds the u of the tokens before.
            writes = [(k, _solve(to_k, v - unread))]
        else:
            # e_t = r_t^T M_{t-1}, where M holds k v and b e of the tokens before.
            to_b = _pairs(read[:, :, :, None], erase, before, total, sees[1])[:, :, 0]
            read_k = unread + jnp.einsum("BGCS,BSGP->BCGP", to_k, v)
            writes.append((erase, _solve(-to_b, read_k)))
    y = jnp.einsum("BCGMK,BGKP->BCGMP", q * (jnp.exp(sum(total)) * past)[:, :, :, None], memory)
    memory = memory * kept * jnp.exp(sum(end)[:, 0])[..., None]
    for key, value in writes:
        y += jnp.einsum("BGMCS,BSGP->BCGMP", _pairs(q, key, total, total, sees[0]), value)
        memory += jnp.einsum("BCGK,BCGP->BGKP", key * jnp.exp(end.since(total)) * stays, value)
    return memory, y


def _pairs(q, k, q_total: Fade, k_total: Fade, sees_BCS) -> jax.Array:
    """Return ``sum_K q_t k_s exp(sum of log after s up to t)`` where t sees s, else 0, [B, G, M, C, S].

    Args:
      q_total, k_total: sums of the decays up to each token, [B, C, G, K].
    """
    late = jax.tree.map(lambda x: x[:, :, None], q_total)
    span_BCSGK = late.since(jax.tree.map(lambda x: x[:, None], k_total))
    weight = jnp.exp(jnp.where(sees_BCS[..., None, None], span_BCSGK, -jnp.inf))
    if weight.shape[-1] > 1:
        return jnp.einsum("BCGMK,BCSGK->BGMCS", q, k[:, None] * weight)
    similar = jnp.einsum("BCGMK,BSGK->BGMCS", q, k)
    return similar * jnp.moveaxis(weight[..., 0], -1, 1)[:, :, None]


def _solve(lower_BGCS: jax.Array, right_BCGP: jax.Array) -> jax.Array:
    """Return the solution of ``(I + lower) x = right``, lower strictly so."""
    return jnp.einsum("BGCS,BSGP->BCGP", unit_inverse(lower_BGCS), right_BCGP, precision=EXACT)


@jax.custom_jvp
def unit_inverse(lower: jax.Array) -> jax.Array:
    """Return ``(I + lower)^-1`` of strictly lower triangular matrices […, C, C], by halves.

    The inverse of [[A, 0], [L, B]] has ``-B^-1 L A^-1`` below its diagonal blocks, so that log2 C products
    of blocks twice as large each find all of them, without the C steps of substitution; what it misses of
    ``(I + lower) X = I`` is 16 to 40 times as much, 4e-5 where keys are nearly equal at strength 2. (XLA's
    own triangular_solve is slow on accelerators, and jaxlib 0.10.2's on CPU waits for ever where as many of
    them as there are cores run at once.)
    """
    size = lower.shape[-1]
    padding = [(0, 0)] * (lower.ndim - 2) + [(0, (1 << (size - 1).bit_length()) - size)] * 2
    lower = jnp.pad(lower, padding)
    inverse = jnp.ones((*lower.shape[:-1], 1, 1), lower.dtype)  # of blocks 1 x 1: […, C, 1, 1]
    while (half := inverse.shape[-1]) < lower.shape[-1]:
        pairs = lower.shape[-1] // (2 * half)
        blocks = lower.reshape(*lower.shape[:-2], pairs, 2 * half, pairs, 2 * half)
        below = jnp.einsum("...nanb->...nab", blocks[..., half:, :, :half])
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        below = -jnp.matmul(jnp.matmul(second, below, precision=EXACT), first, precision=EXACT)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse = jnp.concatenate([above, jnp.concatenate([below, second], axis=-1)], axis=-2)
    return inverse[..., 0, :size, :size]


@unit_inverse.defjvp
def _unit_inverse_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    inverse = unit_inverse(*primals)
    change = jnp.matmul(jnp.tril(tangents[0], -1), inverse, precision=EXACT)
    return inverse, -jnp.matmul(inverse, change, precision=EXACT)
