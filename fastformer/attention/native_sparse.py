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
from fastformer.attention.compressed_blocks import FIXED, Sizes, Squeeze, compressed, new_blocks
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import grouped, join
from fastformer.attention.scores import Mask, masked_softmax
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

BRANCHES = ("compress", "select", "window")


class SparseState(NamedTuple):
    """The tokens of the past, and its compressed blocks.

    Attributes:
      tokens: keys and values of the three branches.
      blocks: keys and values of compressed blocks, with the segment and position of their last tokens.
    """

    tokens: KVState
    blocks: KVState

    @property
    def segment_BS(self) -> jax.Array:
        """Return the segments of the tokens' slots, 0 where unused."""
        return self.tokens.segment_BS


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
    state: SparseState | None = None,
) -> tuple[jax.Array, SparseState]:
    """Return ``(y_BTHP, state)``.

    Args:
      k_BTGK, v_BTGP: of the three branches, one after the other on the axis of heads.
      gate_BTHE: of the three branches.
      squeezes: what compresses keys, and values.
    """
    if state is None:
        y_BTHEP, blocks = _branches(q_BTHK, k_BTGK, v_BTGP, seq, None, squeezes, sizes)
        after = SparseState(cache.growing(k_BTGK, v_BTGP, seq), blocks)
    else:
        moved = led((q_BTHK, k_BTGK, v_BTGP, seq), seq)
        y_BTHEP, blocks = _branches(*moved, state, squeezes, sizes)
        y_BTHEP = led(y_BTHEP, seq, back=True)
        after = SparseState(cache.append(state.tokens, k_BTGK, v_BTGP, seq), blocks)
    y_BTHP = jnp.sum(gate_BTHE.astype(jnp.float32)[..., None] * y_BTHEP, axis=3)
    return y_BTHP.astype(v_BTGP.dtype), after


def _branches(q_BTHK, k_BTGK, v_BTGP, seq: Seq, state, squeezes, sizes: Sizes) -> tuple[jax.Array, KVState]:
    q_BTHK = zero_padding(q_BTHK, seq)
    line = timeline(state and state.tokens, k_BTGK, v_BTGP, seq)
    keys, values = jnp.split(line.k_BSGK, 3, axis=2), jnp.split(line.v_BSGP, 3, axis=2)
    lines = [Timeline(k, v, line.seq, line.past) for k, v in zip(keys, values)]
    new = new_blocks(lines[0], squeezes, sizes)
    blocks = cache.growing(*new) if state is None else cache.append(state.blocks, *new)
    every = timeline(state and state.blocks, *new)
    coarse, choice_BTGJ = compressed(grouped(q_BTHK, keys[0].shape[2]), lines[0].seq, every, seq, sizes)
    parts = [near(q_BTHK, lines[1], seq, Neighbours(sizes.select), sizes.block)]
    end_BN = complete_blocks(line.seq, sizes.select).end_BN
    selected = (of_blocks(x, end_BN, sizes.select) for x in (lines[1].k_BSGK, lines[1].v_BSGP))
    chunk = min(sizes.select, sizes.block)
    parts.append(attend_chosen(grouped(q_BTHK, keys[1].shape[2]), *selected, choice_BTGJ, chunk))
    recent, _ = near(q_BTHK, lines[2], seq, Mask(True, sizes.window), sizes.block)
    return jnp.stack([coarse, join(parts)[0], recent], axis=3), blocks


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    kv_heads: int,
    key_width: int,
    value_width: int,
    stride: int,
) -> SparseState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) (1 + 1 / 3 d) elements and indices.

    Args:
      kv_heads: of the three branches together. stride: d.
    """
    widths = (key_width, value_width)
    tokens = cache.empty(batch, capacity, kv_heads, widths, dtype)
    blocks = cache.empty(batch, capacity // stride + 1, kv_heads // len(BRANCHES), widths, dtype)
    return SparseState(tokens, blocks)


class NativeSparse(Mixer):
    """Compressed blocks, the blocks they point at, and a window, each with keys and values of its own.

    O(T (T / d + n l' + W)) to train. All query heads of a key/value head select together; the selection has
    no gradient. phi has one hidden layer of 2 K (the paper does not say).

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
        return init_state(
            batch, capacity, dtype, kv_heads=self.groups, stride=self.compress_stride, **widths
        )
