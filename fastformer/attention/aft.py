"""Attention free transformer: values weighted by exponentials of keys (Zhai et al. 2021, 2105.14103)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.packed import LOWEST, Sums, running_sums, take
from fastformer.attention.scores import Mask
from fastformer.core.errors import lookup, require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

KINDS = {
    "simple": "no position biases (section 3.2)",
    "low_rank": "biases of a low rank between positions less than a window apart (AFT-local, section 3.1)",
    "conv": "biases of a head by distance, less than a window apart (section 3.2)",
}


class Bias(NamedTuple):
    """Position biases between tokens less than W apart.

    Attributes:
      left_LR, right_LR: ``w[t, s] = left[t] . right[s]`` by positions, in AFT-local; else None.
      offset_GW: ``w[t, s] = offset[t - s + W - 1]``, in AFT-conv; else None.
      window: W.
    """

    left_LR: jax.Array | None = None
    right_LR: jax.Array | None = None
    offset_GW: jax.Array | None = None
    window: int = 1


class AFTState(NamedTuple):
    """The newest W - 1 tokens and sums over those before them; in bytes, 4 B G P (2 W + 1) + 8 B W - 4 B.

    Attributes:
      top_BGP, total_BGP, value_BGP: float32, softmax sums of the segment that they belong to.
      segment_B: int32, that segment; 0 is none.
      key_BWGP, value_BWGP: float32, oldest first.
      segment_BW, position_BW: int32; segment 0 marks a token that never was.
    """

    top_BGP: jax.Array
    total_BGP: jax.Array
    value_BGP: jax.Array
    segment_B: jax.Array
    key_BWGP: jax.Array
    value_BWGP: jax.Array
    segment_BW: jax.Array
    position_BW: jax.Array


class _Tokens(NamedTuple):
    key: jax.Array
    value: jax.Array
    segment: jax.Array
    position: jax.Array


def reference(
    q_BTHP: jax.Array, k_BSGP: jax.Array, v_BSGP: jax.Array, bias: Bias, *, seq: Seq, causal: bool = True
) -> jax.Array:
    """Return ``sigmoid(q_t) sum_s exp(k_s + w_ts) v_s / sum_s exp(k_s + w_ts)``, float32 (eq. 2)."""
    share = q_BTHP.shape[2] // k_BSGP.shape[2]
    q, k, v = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHP, k_BSGP, v_BSGP))
    distance_BTS = seq.position_BT[:, :, None] - seq.position_BT[:, None, :]
    w_BTSG = jnp.zeros((*distance_BTS.shape, 1))
    if bias.left_LR is not None:
        left, right = bias.left_LR[seq.position_BT], bias.right_LR[seq.position_BT]
        w_BTSG = jnp.einsum("BTR,BSR->BTS", left, right)[..., None]
    if bias.offset_GW is not None:
        w_BTSG = bias.offset_GW.T[jnp.clip(distance_BTS + bias.window - 1, 0, 2 * bias.window - 2)]
    w_BTSG = jnp.where((jnp.abs(distance_BTS) < bias.window)[..., None], w_BTSG, 0.0)
    visible_BTS11 = Mask(causal).visible(seq, seq)[..., None, None]
    scores_BTSGP = jnp.where(visible_BTS11, k[:, None] + w_BTSG[..., None], LOWEST)
    weights_BTSGP = jax.nn.softmax(scores_BTSGP, axis=2)
    context_BTGP = jnp.sum(jnp.where(visible_BTS11, weights_BTSGP, 0.0) * v[:, None], axis=2)
    return jax.nn.sigmoid(q) * jnp.repeat(context_BTGP, share, axis=2)


def forward(
    q_BTHP: jax.Array,
    k_BTGP: jax.Array,
    v_BTGP: jax.Array,
    bias: Bias,
    *,
    seq: Seq,
    state: AFTState | None = None,
    causal: bool = True,
) -> tuple[jax.Array, AFTState | None]:
    """Return ``(y_BTHP, state)`` in O(T W): running sums outside the window, one offset after another in it.

    Args:
      causal: False adds what comes after (no state).
    """
    batch, time, groups, width = k_BTGP.shape
    real_BT = seq.segment_BT > 0
    # Real tokens first, so that what is W tokens away is W places away.
    order_BT = jnp.argsort(~real_BT, axis=1, stable=True)
    parts = [zero_padding(x, seq).astype(jnp.float32) for x in (k_BTGP, v_BTGP)]
    tokens = _Tokens(*take((*parts, *seq[:2]), order_BT))
    if state is None:
        state = init_state(batch, 0, jnp.float32, kv_heads=groups, width=width, window=bias.window)
    past = _Tokens(*state[4:])
    known = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), past, tokens)
    outside, sums = _before(known, tokens.segment, Sums(*state[:3]), state.segment_B)
    offsets, end = (0, bias.window), None
    if causal:
        end = _ended(known, sums, state, jnp.sum(real_BT, axis=1))
    else:
        turned = jax.tree.map(lambda x: jnp.flip(x, axis=1), tokens)
        joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), past, turned)
        after, _ = _before(joined, turned.segment, Sums(*state[:3]), state.segment_B)
        outside = outside.plus(Sums(*(jnp.flip(x, axis=1) for x in after)))
        known = jax.tree.map(lambda new, old: jnp.concatenate([new, old], axis=1), known, past)
        offsets = (1 - bias.window, bias.window)
    context_BTGP = _within(known, tokens, outside, bias, offsets).average()
    context_BTGP = take(context_BTGP, jnp.cumsum(real_BT.astype(jnp.int32), axis=1) - 1)
    context_BTHP = jnp.repeat(context_BTGP, q_BTHP.shape[2] // groups, axis=2)
    gate_BTHP = jax.nn.sigmoid(zero_padding(q_BTHP, seq).astype(jnp.float32))
    return (gate_BTHP * context_BTHP).astype(v_BTGP.dtype), end


def _before(known: _Tokens, segment_BT: jax.Array, start: Sums, segment_B: jax.Array) -> tuple[Sums, Sums]:
    """Return the sums over what is W tokens or more before each, [B, T, G, P], and those up to each known."""
    time = segment_BT.shape[1]
    leaving_BT = known.segment[:, :time]
    sums = running_sums(known.key[:, :time], known.value[:, :time], leaving_BT, (start, segment_B))
    shifted = (jnp.concatenate([a[:, None], b[:, :-1]], axis=1) for a, b in zip(start, sums))
    # A token's sums belong to the segment of the last real token in them.
    belongs_BT = jnp.concatenate([segment_B[:, None], leaving_BT[:, :-1]], axis=1)
    belongs_BT = jnp.where(belongs_BT > 0, belongs_BT, segment_B[:, None])
    same = (belongs_BT == segment_BT)[..., None, None]
    top, total, value = shifted
    outside = Sums(jnp.where(same, top, LOWEST), jnp.where(same, total, 0.0), jnp.where(same, value, 0.0))
    return outside, sums


def _within(known: _Tokens, tokens: _Tokens, outside: Sums, bias: Bias, offsets: tuple[int, int]) -> Sums:
    """Return the sums ``outside`` with those tokens added that are at these offsets before each."""
    time, behind = tokens.segment.shape[1], bias.window - 1
    left_BTR = right_BSR = None
    if bias.left_LR is not None:
        left_BTR, right_BSR = bias.left_LR[tokens.position], bias.right_LR[known.position]

    def at(offset: jax.Array) -> tuple[jax.Array, jax.Array]:
        def shift(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, behind - offset, time, axis=1)

        logit = shift(known.key)
        if left_BTR is not None:
            logit += jnp.einsum("BTR,BTR->BT", left_BTR, shift(right_BSR))[..., None, None]
        if bias.offset_GW is not None:
            logit += bias.offset_GW[:, offset + behind].reshape(1, 1, -1, 1)
        same = (shift(known.segment) == tokens.segment) & (tokens.segment > 0)
        return jnp.where(same[..., None, None], logit, LOWEST), shift(known.value)

    def higher(top: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
        return jnp.maximum(top, jax.lax.stop_gradient(at(offset)[0])), None

    @jax.checkpoint
    def add(sums: tuple[jax.Array, jax.Array], offset: jax.Array) -> tuple[tuple, None]:
        logit, value = at(offset)
        weight = jnp.where(logit > LOWEST, jnp.exp(logit - top), 0.0)
        return (sums[0] + weight, sums[1] + weight * value), None

    steps = jnp.arange(*offsets)
    top, _ = jax.lax.scan(higher, outside.top, steps)
    scale = jnp.exp(outside.top - top)
    (total, value), _ = jax.lax.scan(add, (outside.total * scale, outside.value * scale), steps)
    return Sums(top, total, value)


def _ended(known: _Tokens, sums: Sums, state: AFTState, count_B: jax.Array) -> AFTState:
    """Return the state after ``count_B`` real tokens: as many of the known ones have left the window."""
    behind = state.segment_BW.shape[1]
    kept = take(known, count_B[:, None] + jnp.arange(behind)[None])
    none_B = count_B == 0
    last = take((sums, known.segment), jnp.maximum(count_B - 1, 0)[:, None])

    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(none_B.reshape((-1,) + (1,) * (old.ndim - 1)), old, new[:, 0])

    top, total, value = (chosen(new, old) for new, old in zip(last[0], state[:3]))
    left_B = chosen(last[1], state.segment_B)
    segment_B = jnp.where(left_B > 0, left_B, state.segment_B)
    return AFTState(top, total, value, segment_B, *kept)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, width: int, window: int
) -> AFTState:
    """Return an empty state, of constant size: 4 B G P (2 W + 1) + 8 B W - 4 B bytes."""
    sums, tokens = (batch, kv_heads, width), (batch, window - 1, kv_heads, width)
    none = jnp.zeros((batch, window - 1), jnp.int32)
    zeros, past = jnp.zeros(sums, jnp.float32), jnp.zeros(tokens, jnp.float32)
    start = (jnp.full(sums, LOWEST, jnp.float32), zeros, zeros, jnp.zeros((batch,), jnp.int32))
    return AFTState(*start, past, past, none, none)


class AFT(Mixer):
    """Attention free transformer: O(T W) to train, a state of sums and W - 1 tokens.

    AFT-full, whose biases reach over all pairs of tokens, costs O(T²) and is not here. A key/value head
    that query heads share gives them one context. In AFT-conv every key/value head has one bias an offset,
    two-sided in number even where attention is causal. Rotary positions rotate nothing here: there are no
    products of queries and keys. In "low_rank" a token at position ``length`` or later has the biases of
    the last that training saw.

    Attributes:
      kind: a row of KINDS.
      window: W, tokens that have biases: itself, and those less than W away.
      bias_rank: of the biases of "low_rank".
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"window": 16, "bias_rank": 8}

    kind: str = "low_rank"
    window: int = 32
    bias_rank: int = 128

    def __post_init__(self):
        lookup(KINDS, self.kind, "kind")
        require(self.window >= 1, "window", self.window, "a number of tokens, 1 or more")
        require(self.bias_rank >= 1, "bias_rank", self.bias_rank, "1 or more")
        super().__post_init__()

    @property
    def reach(self) -> int:
        """Return W, 1 where nothing has a bias."""
        return 1 if self.kind == "simple" else self.window

    def gates(self, x_BTD, seq):
        if self.kind == "simple":
            return (Bias(),)
        if self.kind == "low_rank":
            time = x_BTD.shape[1]
            require(self.length >= time, "length", self.length, f"{time}, the tokens of a row, or more")
            init = nn.with_logical_partitioning(nn.initializers.normal(0.01), (None, "R"))
            names = ("bias_left", "bias_right")
            left, right = (self.param(name, init, (self.length, self.bias_rank)) for name in names)
            return (Bias(left, right, window=self.reach),)
        shape, letters = (self.groups, 2 * self.window - 1), ("G", "W")
        raw = self.param("bias", nn.with_logical_partitioning(nn.initializers.normal(1.0), letters), shape)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("G",))
        scale, shift = (self.param(name, zeros, (self.groups,)) for name in ("bias_scale", "bias_shift"))
        raw -= jnp.mean(raw, axis=1, keepdims=True)
        raw *= jax.lax.rsqrt(jnp.mean(raw * raw, axis=1, keepdims=True) + 1e-6)
        return (Bias(offset_GW=scale[:, None] * raw + shift[:, None], window=self.reach),)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode)

    def empty(self, batch, capacity, dtype):
        return init_state(
            batch, capacity, jnp.float32, kv_heads=self.groups, width=self.head_width, window=self.reach
        )
