"""Native sparse attention: compressed, selected and sliding branches under gates.

Yuan et al. 2025, Native Sparse Attention, 2502.11089, section 3.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.chosen import (
    Neighbours,
    Timeline,
    attend_chosen,
    complete_blocks,
    led,
    near,
    of_blocks,
    timeline,
)
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import ends, grouped, join, softmax_part, take, tiles, untiled
from fastformer.attention.scores import Mask, masked_softmax
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

BRANCHES = ("compress", "select", "window")
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


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    gate_BTHE: jax.Array,
    squeezes: tuple[Squeeze, Squeeze],
    *,
    seq: Seq,
    sizes: Sizes,
) -> jax.Array:
    """Return the gated sum of the three branches by dense masks, float32 (eq. 5, 7 to 12)."""
    batch, time, heads, width = q_BTHK.shape
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    (k_cmp, k_slc, k_win), (v_cmp, v_slc, v_win) = (jnp.split(x, 3, axis=2) for x in (k, v))
    q = grouped(q, k_cmp.shape[2])
    place, causal = seq.position_BT, Mask().visible(seq, seq)
    size, stride, select = sizes[:3]

    def attend(k, v, visible):
        scores = jnp.einsum("BTGMK,BSGK->BGMTS", q, k) / math.sqrt(width)
        weights = masked_softmax(scores, visible)
        return weights, jnp.einsum("BGMTS,BSGP->BTGMP", weights, v).reshape(batch, time, heads, -1)

    index = jnp.clip(jnp.arange(time)[:, None] - size + 1 + jnp.arange(size)[None], 0)
    k_cmp, v_cmp = (f(x[:, index]) for f, x in zip(squeezes, (k_cmp, v_cmp)))
    last_BS = (place >= size - 1) & ((place + 1 - size) % stride == 0)
    weights, compressed = attend(k_cmp, v_cmp, (causal & last_BS[:, None])[:, None, None])

    # Strips of ``stride`` tokens that a compressed block (ending at s) and a selected one (at u) share.
    low = jnp.maximum(place[:, :, None] - size, place[:, None] - select)
    shared = jnp.maximum(jnp.minimum(place[:, :, None], place[:, None]) - low, 0) / stride
    likes = jnp.einsum("BGTS,BSU->BGTU", weights.sum(axis=2), shared * Mask(causal=False).visible(seq, seq))
    block, end_BU = place // select, place % select == select - 1
    behind = block[:, :, None] - block[:, None]
    free = causal & end_BU[:, None] & (behind >= 2) & (block > 0)[:, None]
    likes = jax.lax.stop_gradient(jnp.where(free[:, None], likes, -jnp.inf))
    likes, best = jax.lax.top_k(likes, min(sizes.selected - FIXED, time))
    chosen = (jax.nn.one_hot(best, time) * (likes > -jnp.inf)[..., None]).sum(axis=-2)
    mates = (Mask(causal=False).visible(seq, seq) & (behind == 0)).astype(jnp.float32)
    chosen = jnp.einsum("BGTU,BUS->BGTS", chosen, mates) > 0
    fixed = causal & ((behind < 2) | (block == 0)[:, None])
    _, selected = attend(k_slc, v_slc, (chosen | fixed[:, None])[:, :, None])
    _, recent = attend(k_win, v_win, Mask(True, sizes.window).visible(seq, seq)[:, None, None])
    gate = gate_BTHE.astype(jnp.float32)
    return sum(gate[..., i, None] * y for i, y in enumerate((compressed, selected, recent)))


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    gate_BTHE: jax.Array,
    squeezes: tuple[Squeeze, Squeeze],
    *,
    seq: Seq,
    sizes: Sizes,
    state: KVState | None = None,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)``.

    Args:
      k_BTGK, v_BTGP: of the three branches, one after the other on the axis of heads.
      gate_BTHE: of the three branches.
      squeezes: what compresses keys, and values.
    """
    after = cache.growing(k_BTGK, v_BTGP, seq) if state is None else cache.append(state, k_BTGK, v_BTGP, seq)
    if state is None:
        y_BTHEP = _branches(q_BTHK, k_BTGK, v_BTGP, seq, None, squeezes, sizes)
    else:
        moved = led((q_BTHK, k_BTGK, v_BTGP, seq), seq)
        y_BTHEP = led(_branches(*moved, state, squeezes, sizes), seq, back=True)
    y_BTHP = jnp.sum(gate_BTHE.astype(jnp.float32)[..., None] * y_BTHEP, axis=3)
    return y_BTHP.astype(v_BTGP.dtype), after


def _branches(q_BTHK, k_BTGK, v_BTGP, seq: Seq, state, squeezes, sizes: Sizes) -> jax.Array:
    q_BTHK = zero_padding(q_BTHK, seq)
    line = timeline(state, k_BTGK, v_BTGP, seq)
    keys, values = jnp.split(line.k_BSGK, 3, axis=2), jnp.split(line.v_BSGP, 3, axis=2)
    lines = [Timeline(k, v, line.seq, line.past) for k, v in zip(keys, values)]
    compressed, choice_BTGJ = _compressed(grouped(q_BTHK, keys[0].shape[2]), lines[0], seq, squeezes, sizes)
    parts = [near(q_BTHK, lines[1], seq, Neighbours(sizes.select), sizes.block)]
    end_BN = complete_blocks(line.seq, sizes.select).end_BN
    blocks = (of_blocks(x, end_BN, sizes.select) for x in (lines[1].k_BSGK, lines[1].v_BSGP))
    chunk = min(sizes.select, sizes.block)
    parts.append(attend_chosen(grouped(q_BTHK, keys[1].shape[2]), *blocks, choice_BTGJ, chunk))
    recent, _ = near(q_BTHK, lines[2], seq, Mask(True, sizes.window), sizes.block)
    return jnp.stack([compressed, join(parts)[0], recent], axis=3)


def _compressed(q_BTGMK, line: Timeline, seq: Seq, squeezes, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """Return the compressed branch, and the blocks that its weights select (eq. 8 to 11), [B, T, G, J]."""
    batch, time, groups, share, width = q_BTGMK.shape
    end_BU = _compressed_ends(line.seq, sizes)
    there_BU = end_BU >= 0
    tokens = (of_blocks(x, end_BU, sizes.compress) for x in line[:2])
    k_BUGK, v_BUGP = (f(x) for f, x in zip(squeezes, tokens))
    k_seq = Seq(jnp.where(there_BU, take(line.seq.segment_BT, end_BU), 0), take(line.seq.position_BT, end_BU))
    k_BUGK, v_BUGP = zero_padding(k_BUGK, k_seq), zero_padding(v_BUGP, k_seq)

    @jax.checkpoint
    def attend(at: tuple[jax.Array, Seq]) -> tuple[jax.Array, jax.Array]:
        q, q_seq = at
        scores = jnp.einsum("BTGMK,BUGK->BGMTU", q, k_BUGK, preferred_element_type=jnp.float32)
        visible = Mask().visible(q_seq, k_seq)[:, None, None]
        weights, _ = softmax_part(scores / math.sqrt(width), visible)
        y = jnp.einsum(
            "BGMTU,BUGP->BTGMP", weights.astype(v_BUGP.dtype), v_BUGP, preferred_element_type=jnp.float32
        )
        return y, _select(jax.lax.stop_gradient(weights).sum(axis=2), q_seq, line.seq, end_BU, sizes)

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


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices.

    Args:
      kv_heads: of the three branches together.
    """
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class NativeSparse(Mixer):
    """Compressed blocks, the blocks they point at, and a window, each with keys and values of its own.

    O(T (T / d + n l' + W)) to train. All query heads of a key/value head select together; the selection has
    no gradient. phi has one hidden layer of 2 K (the paper does not say). Compressed keys are made anew from
    the cache at every step, so that decoding reads the keys of the whole past once.

    Attributes:
      compress_size: l, tokens in a compressed block. compress_stride: d, from one to the next.
      select_size: l', tokens in a selected block. selected: n of them, the three fixed ones included.
      window: W in tokens.
    """

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    small: ClassVar[dict] = {
        "compress_size": 1,
        "compress_stride": 1,
        "select_size": 4,
        "selected": 5,
        "window": 6,
    }

    compress_size: int = 32
    compress_stride: int = 16
    select_size: int = 64
    selected: int = 16
    window: int = 512

    def __post_init__(self):
        stride = self.compress_stride
        require(stride >= 1, "compress_stride", stride, "a number of tokens, 1 or more")
        for field in ("compress_size", "select_size"):
            size = getattr(self, field)
            require(size >= 1 and size % stride == 0, field, size, f"a multiple of compress_stride, {stride}")
        require(self.selected > FIXED, "selected", self.selected, f"more than the {FIXED} fixed blocks")
        require(self.window >= 1, "window", self.window, "a number of tokens, 1 or more")
        super().__post_init__()

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.compress_size, self.compress_stride, self.select_size, self.selected, self.window)

    @property
    def groups(self):
        """Return the key/value heads of all branches together."""
        return len(BRANCHES) * (self.kv_heads or self.heads)

    def gates(self, x_BTD, seq):
        gate = jax.nn.sigmoid(self.linear("branch_gate", x_BTD, "BTD,DHE->BTHE", self.heads, len(BRANCHES)))
        return gate, (self._squeeze("key", self.head_width), self._squeeze("value", self.value_width))

    def _squeeze(self, name: str, width: int) -> Squeeze:
        size, hidden = self.compress_size, 2 * width

        def weight(part: str, letters: tuple, shape: tuple, deviation: float) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(deviation), letters)
            return self.param(f"{name}_{part}", init, shape)

        return Squeeze(
            weight("place", ("C", "K"), (size, width), 0.02),
            weight("inner", ("C", "K", "R"), (size, width, hidden), (size * width) ** -0.5),
            weight("outer", ("R", "K"), (hidden, width), hidden**-0.5),
        )

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], sizes=self._sizes, state=state)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], sizes=self._sizes)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
