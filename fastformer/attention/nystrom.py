"""Nyströmformer: softmax attention from its values at a few landmarks (Xiong et al. 2021, 2102.03902)."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.blocked import attend_part
from fastformer.attention.compressed import numbers
from fastformer.attention.mixer import Mixer
from fastformer.attention.recurrence import grouped
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


class Places(NamedTuple):
    """Where the landmarks of each token's segment are; segments of R tokens or fewer have none.

    Attributes:
      wide_BT: whether the token's segment has more than R tokens.
      slot_BT: the number, 0, 1, …, of the segment among those of the row.
      part_BT: the landmark that the token is averaged in, 0, …, R - 1.
    """

    wide_BT: jax.Array
    slot_BT: jax.Array
    part_BT: jax.Array


def places(seq: Seq, landmarks: int) -> Places:
    """Return where tokens belong: a segment is cut into R parts whose sizes differ by one at most."""
    number_BT = numbers(seq)

    def sizes(number_T: jax.Array) -> jax.Array:
        ones_T = jnp.ones(number_T.shape, jnp.int32)
        return jax.ops.segment_sum(ones_T, number_T, len(number_T) + 1)[number_T]

    size_BT = jax.vmap(sizes)(number_BT)
    wide_BT = (seq.segment_BT > 0) & (size_BT > landmarks)
    slot_BT = jnp.cumsum(wide_BT & (seq.position_BT == 0), axis=1) - 1
    return Places(wide_BT, slot_BT, seq.position_BT * landmarks // size_BT)


def inverse(matrix: jax.Array, iterations: int) -> jax.Array:
    """Return the pseudo-inverse of matrices whose rows sum to one, approximately (eq. 14; theorem 2)."""
    eye = jnp.eye(matrix.shape[-1]).reshape((1,) * (matrix.ndim - 2) + (matrix.shape[-1],) * 2)
    # |A|_inf is one, and |A|_1 the largest sum of a column.
    z = matrix.swapaxes(-1, -2) / matrix.sum(axis=-2).max(axis=-1)[..., None, None]
    for _ in range(iterations):
        az = matrix @ z
        z = 0.25 * z @ (13.0 * eye - az @ (15.0 * eye - az @ (7.0 * eye - az)))
    return z


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    skip_WH: jax.Array | None = None,
    *,
    seq: Seq,
    landmarks: int,
    iterations: int,
) -> jax.Array:
    """Return ``softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v``, [B, T, H, P] float32 (eq. 13).

    Scores are divided by ``sqrt(K)``. q~ and k~ are the landmarks of the token's segment, means of R parts of
    it; a segment of R tokens or fewer has exact attention. A convolution of v is added.

    Args:
      skip_WH: its weights of the W tokens around each, of its segment.
    """
    share = q_BTHK.shape[2] // k_BSGK.shape[2]
    q = zero_padding(q_BTHK, seq).astype(jnp.float32)
    k, v = (jnp.repeat(zero_padding(x, seq), share, axis=2).astype(jnp.float32) for x in (k_BSGK, v_BSGP))
    same_BTS = Mask(causal=False).visible(seq, seq)
    wide_BT, _, part_BT = places(seq, landmarks)
    member_BSR = jax.nn.one_hot(part_BT, landmarks)
    mean_BTSR = same_BTS[..., None] * member_BSR[:, None]
    mean_BTSR = mean_BTSR / jnp.maximum(mean_BTSR.sum(axis=2, keepdims=True), 1.0)
    scale = 1.0 / math.sqrt(q.shape[-1])
    marks = (jnp.einsum("BTSR,BSHK->BTRHK", mean_BTSR, x) for x in (q, k))
    q_BTRHK, k_BTRHK = marks
    near_BTHR = jax.nn.softmax(jnp.einsum("BTHK,BTRHK->BTHR", q, k_BTRHK) * scale, axis=-1)
    core_BTHRR = jax.nn.softmax(jnp.einsum("BTRHK,BTQHK->BTHRQ", q_BTRHK, k_BTRHK) * scale, axis=-1)
    scores_BTHRS = jnp.einsum("BTRHK,BSHK->BTHRS", q_BTRHK, k) * scale
    far_BTHRS = jax.nn.softmax(jnp.where(same_BTS[:, :, None, None], scores_BTHRS, -1e30), axis=-1)
    mixed_BTHRP = inverse(core_BTHRR, iterations) @ jnp.einsum("BTHRS,BSHP->BTHRP", far_BTHRS, v)
    y_BTHP = jnp.einsum("BTHR,BTHRP->BTHP", near_BTHR, mixed_BTHRP)
    exact_BTHP = reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, seq, Mask(causal=False), Bend())
    y_BTHP = jnp.where(wide_BT[..., None, None], y_BTHP, exact_BTHP)
    if skip_WH is not None:
        offset_BTS = seq.position_BT[:, None] - seq.position_BT[:, :, None] + len(skip_WH) // 2
        inside_BTS = same_BTS & (offset_BTS >= 0) & (offset_BTS < len(skip_WH))
        weight_BTSH = jnp.where(
            inside_BTS[..., None], skip_WH[jnp.clip(offset_BTS, 0, len(skip_WH) - 1)], 0.0
        )
        y_BTHP += jnp.einsum("BTSH,BSHP->BTHP", weight_BTSH, v)
    return y_BTHP


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    skip_WH: jax.Array | None = None,
    *,
    seq: Seq,
    landmarks: int,
    iterations: int,
    state: None = None,
) -> tuple[jax.Array, None]:
    """Return ``(y_BTHP, None)``, O(T R): sums over parts and segments, and windows for short segments.

    Args:
      skip_WH: as in ``reference``.
      landmarks: R.
      iterations: of the pseudo-inverse.
      state: None; this variant does not stream.
    """
    where = places(seq, landmarks)
    short = seq._replace(segment_BT=jnp.where(where.wide_BT, 0, seq.segment_BT))
    # A segment of at most R tokens is within a window of R.
    y_BTHP, _ = attend_part(q_BTHK, k_BTGK, v_BTGP, short, short, Mask(False, landmarks))
    clean = [zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BTGK, v_BTGP)]
    if q_BTHK.shape[1] > landmarks:
        q_BTGMK = grouped(clean[0], k_BTGK.shape[2])
        rows = jax.vmap(lambda qkv, where: _row(qkv, where, landmarks, iterations))
        y_BTHP += rows((q_BTGMK, *clean[1:]), where).reshape(y_BTHP.shape)
    if skip_WH is not None:
        y_BTHP += around(clean[2], skip_WH, seq)
    return y_BTHP.astype(v_BTGP.dtype), None


def _row(
    qkv: tuple[jax.Array, jax.Array, jax.Array], where: Places, landmarks: int, iterations: int
) -> jax.Array:
    """Return ``y_TGMP`` of one row, zero where a segment has no landmarks.

    A chunk of R tokens meets two such segments at most, for they are longer: L segments, N chunks of C
    tokens, S = 2 R landmarks that a chunk sees.
    """
    time, slots = len(where.wide_BT), len(where.wide_BT) // (landmarks + 1)
    index_T = jnp.where(where.wide_BT, where.slot_BT * landmarks + where.part_BT, slots * landmarks)
    count = jax.ops.segment_sum(jnp.ones(time), index_T, slots * landmarks + 1)[:-1]

    def means(x: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(x, index_T, slots * landmarks + 1)[:-1]
        sums = sums / jnp.maximum(count, 1.0).reshape(-1, *(1 for _ in x.shape[1:]))
        return sums.reshape(slots, landmarks, *x.shape[1:])

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -time % landmarks)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, landmarks, *x.shape[1:])

    wide_NC, slot_NC = chunks(where.wide_BT), chunks(where.slot_BT)
    first_N = jnp.where(wide_NC, slot_NC, slots).min(axis=1)
    slot_N2 = first_N[:, None] + jnp.arange(2)[None, :]
    mine_NC2 = wide_NC[..., None] & (slot_NC[..., None] == slot_N2[:, None])
    mine_NCS = jnp.repeat(mine_NC2, landmarks, axis=-1)
    # What is out of range belongs to no token.
    slot_N2 = jnp.minimum(slot_N2, slots - 1)

    def seen(x_LR: jax.Array) -> jax.Array:
        return x_LR[slot_N2].reshape(len(slot_N2), 2 * landmarks, *x_LR.shape[2:])

    q_LRGMK, k_LRGK = means(qkv[0]), means(qkv[1])
    q, k, v = (chunks(x) for x in qkv)
    scale = 1.0 / math.sqrt(q.shape[-1])
    # softmax(q~ k^T) v, over all chunks of a segment.
    scores_NSGMC = jnp.einsum("NSGMK,NCGK->NSGMC", seen(q_LRGMK), k) * scale
    mine = mine_NCS.swapaxes(1, 2)[:, :, None, None]
    values_LRGMP = _segment_softmax(jnp.where(mine, scores_NSGMC, -jnp.inf), v, slot_N2, slots)
    core_LGMRR = jax.nn.softmax(jnp.einsum("LRGMK,LQGK->LGMRQ", q_LRGMK, k_LRGK) * scale, axis=-1)
    mixed_LRGMP = jnp.einsum("LGMRQ,LQGMP->LRGMP", inverse(core_LGMRR, iterations), values_LRGMP)
    # softmax(q k~^T), of a token's own landmarks.
    scores_NCGMS = jnp.einsum("NCGMK,NSGK->NCGMS", q, seen(k_LRGK)) * scale
    near = jax.nn.softmax(jnp.where(mine_NCS[:, :, None, None], scores_NCGMS, -1e30), axis=-1)
    near = jnp.where(mine_NCS[:, :, None, None], near, 0.0)
    y_NCGMP = jnp.einsum("NCGMS,NSGMP->NCGMP", near, seen(mixed_LRGMP))
    return y_NCGMP.reshape(-1, *y_NCGMP.shape[2:])[:time]


def _segment_softmax(scores_NSGMC: jax.Array, v_NCGP: jax.Array, slot_N2: jax.Array, slots: int) -> jax.Array:
    """Return the values averaged by the softmax over each segment, whose scores lie in several chunks."""
    chunks, both, *heads, _ = scores_NSGMC.shape

    def by_slot(x_NS: jax.Array) -> jax.Array:
        return x_NS.reshape(chunks * 2, both // 2, *x_NS.shape[2:])

    def seen(x_LR: jax.Array) -> jax.Array:
        return x_LR[slot_N2].reshape(chunks, both, *x_LR.shape[2:])

    top_NSGM = jax.lax.stop_gradient(scores_NSGMC.max(axis=-1))
    top_LRGM = jax.ops.segment_max(by_slot(top_NSGM), slot_N2.ravel(), slots)
    top_LRGM = jnp.where(top_LRGM > -jnp.inf, top_LRGM, 0.0)
    weights_NSGMC = jnp.exp(scores_NSGMC - seen(top_LRGM)[..., None])
    ones_NCG1 = jnp.ones((*v_NCGP.shape[:3], 1))
    both_NCGP = jnp.concatenate([v_NCGP, ones_NCG1], axis=-1)
    sums_NSGMP = jnp.einsum("NSGMC,NCGP->NSGMP", weights_NSGMC, both_NCGP)
    sums_LRGMP = jax.ops.segment_sum(by_slot(sums_NSGMP), slot_N2.ravel(), slots)
    total = sums_LRGMP[..., -1:]
    return sums_LRGMP[..., :-1] / jnp.where(total > 0, total, 1.0)


def around(v_BTGP: jax.Array, skip_WH: jax.Array, seq: Seq) -> jax.Array:
    """Return the convolution of each segment's values, ``sum_w skip_w v_(t + w - W // 2)``, [B, T, H, P]."""
    (batch, time, groups, width), taps = v_BTGP.shape, len(skip_WH)
    skip_WGM = skip_WH.astype(jnp.float32).reshape(taps, groups, -1)
    edges = (taps // 2, taps - 1 - taps // 2)
    v = jnp.pad(v_BTGP, [(0, 0), edges, (0, 0), (0, 0)])
    segment = jnp.pad(seq.segment_BT, [(0, 0), edges])

    @jax.checkpoint
    def tap(offset: jax.Array, skip_GM: jax.Array) -> jax.Array:
        there = jax.lax.dynamic_slice_in_dim(segment, offset, time, axis=1)
        near = jax.lax.dynamic_slice_in_dim(v, offset, time, axis=1)
        near = jnp.where((there == seq.segment_BT)[..., None, None], near, 0.0)
        return near[:, :, :, None] * skip_GM[None, None, :, :, None]

    start = jnp.zeros((batch, time, groups, skip_WGM.shape[-1], width))
    y, _ = jax.lax.scan(lambda y, at: (y + tap(*at), None), start, (jnp.arange(taps), skip_WGM))
    return zero_padding(y, seq).reshape(batch, time, -1, width)


class Nystrom(Mixer):
    """Attention of an encoder by R landmarks of queries and of keys: O(T R).

    Deviations: a segment is cut into parts of near-equal size, where the published code wants one length
    that R divides; and the pseudo-inverse starts from the norm of each matrix, as the paper says, where the
    published code takes the largest of the batch.

    Attributes:
      landmarks: R; a segment of that many tokens or fewer has exact attention.
      iterations: of the pseudo-inverse.
      skip: W, tokens that a convolution of the values beside the attention spans, odd; 0 is none.
    """

    bidirectional: ClassVar[bool] = True
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"landmarks": 6, "skip": 5}

    landmarks: int = 64
    iterations: int = 6
    skip: int = 65

    def __post_init__(self):
        for field in ("landmarks", "iterations"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        odd = self.skip == 0 or (self.skip > 0 and self.skip % 2 == 1)
        require(odd, "skip", self.skip, "an odd number of tokens, or 0")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        if not self.skip:
            return ()
        init = nn.with_logical_partitioning(nn.initializers.normal(self.skip**-0.5), ("W", "H"))
        return (self.param("skip_weight", init, (self.skip, self.heads)),)

    def mix(self, qkv, seqs, state):
        options = {"landmarks": self.landmarks, "iterations": self.iterations}
        return forward(*qkv, seq=seqs[0], **options)

    def refer(self, qkv, seqs):
        options = {"landmarks": self.landmarks, "iterations": self.iterations}
        return reference(*qkv, seq=seqs[0], **options)
