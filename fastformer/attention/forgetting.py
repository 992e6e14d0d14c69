"""The Forgetting Transformer: softmax attention with a forget gate (Lin et al. 2025, 2503.02130)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Fade, Mask, masked_softmax, reference_attention
from fastformer.attention.softmax import seen, slot_scores, slot_values
from fastformer.core.layers import Linear, zero_padding
from fastformer.core.seq import Seq


class ForgettingState(NamedTuple):
    """A cache of keys and values, and of what was forgotten up to each; 8 B S H + 8 B H bytes besides.

    Attributes:
      tokens: keys and values.
      coarse_BSH, fine_BSH: float32, the Fade of each slot.
      total: the Fade of the newest token, [B, 1, H] each.
    """

    tokens: KVState
    coarse_BSH: jax.Array
    fine_BSH: jax.Array
    total: Fade

    @property
    def segment_BS(self) -> jax.Array:
        """Return the segments of the slots, 0 where unused."""
        return self.tokens.segment_BS


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    log_BTH: jax.Array,
    *,
    seq: Seq,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K) + D) v``, ``D_ts = sum_{s < l <= t} log f_l``, float32 (eq. 4-6)."""
    log_BHT = zero_padding(log_BTH, seq).swapaxes(1, 2)
    time = log_BHT.shape[-1]
    later_TS = jnp.tril(jnp.ones((time, time), bool), -1)[None, None]
    bias_BHTS = jnp.cumsum(jnp.where(later_TS, log_BHT[..., None], 0.0), axis=2)
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, seq, Mask(True), bend, bias_BHTS=bias_BHTS)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    log_BTH: jax.Array,
    *,
    seq: Seq,
    state: ForgettingState | None = None,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, ForgettingState]:
    """Return ``(y_BTHP, state)`` in blocks, or against the slots of a state when T = 1.

    Args:
      log_BTH: float32, the forget gates' logarithms, 0 or less.
      block: tokens in a block.
    """
    start = Fade(*(jnp.zeros_like(log_BTH[:, :1]),) * 2) if state is None else state.total
    fade = running(log_BTH, seq, start)
    total = Fade(*(x[:, -1:] for x in fade))
    keys, past, tokens = seen(state and state.tokens, k_BTGK, v_BTGP, seq)
    if state is None:
        y_BTHP, _ = attend_part(
            q_BTHK, k_BTGK, v_BTGP, seq, seq, Mask(True), bend, block=block, fades=(fade, fade)
        )
        return y_BTHP.astype(v_BTGP.dtype), ForgettingState(tokens, *fade, total)
    kept = KVState(state.coarse_BSH[..., None], state.fine_BSH[..., None], *state.tokens[2:])
    new = tuple(x[..., None] for x in fade)
    written = cache.append(kept, *new, seq)
    after = ForgettingState(tokens, written.key_BSGK[..., 0], written.value_BSGP[..., 0], total)
    if q_BTHK.shape[1] == 1:
        return decode(q_BTHK, after, seq, bend), after
    both = cache.joined(kept, *new, seq)
    k_fade = Fade(both.key_BSGK[..., 0], both.value_BSGP[..., 0])
    seqs, fades = (seq, keys.seq), (fade, k_fade)
    y_BTHP, _ = attend_part(q_BTHK, *keys[:2], *seqs, Mask(True), bend, past=past, block=block, fades=fades)
    return y_BTHP.astype(v_BTGP.dtype), after


def running(log_BTH: jax.Array, seq: Seq, start: Fade) -> Fade:
    """Return the sums of the logs up to each token, after ``start``; padding adds nothing."""
    return jax.tree.map(jnp.add, Fade.of(zero_padding(log_BTH, seq)), start)


def decode(q_B1HK: jax.Array, state: ForgettingState, seq: Seq, bend: Bend) -> jax.Array:
    """Return the attention of one token a row over the slots, [B, 1, H, P]."""
    scores = slot_scores(q_B1HK, state.tokens, seq, bend)
    for now_B1H, then_BSH in zip(state.total, (state.coarse_BSH, state.fine_BSH)):
        scores += (now_B1H - then_BSH).swapaxes(1, 2).reshape(scores.shape)
    visible = Mask(True).visible(seq, state.tokens.seq)[:, :, None]
    return slot_values(masked_softmax(scores, visible), state.tokens)


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    heads: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
) -> ForgettingState:
    """Return an empty cache: B capacity G (K + P) elements, 8 B H (capacity + 1) bytes and indices."""
    tokens = cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)
    slots, total = jnp.zeros((batch, capacity, heads)), jnp.zeros((batch, 1, heads))
    return ForgettingState(tokens, slots, slots, Fade(total, total))


class Forgetting(Mixer):
    """Exact attention whose scores fade by learned, data-dependent gates: O(T²), a state that grows.

    FoX as published knows order by its gates alone: ``positions`` "rope" rotates nothing here. Its Pro
    block is ``qk_norm`` and ``output_gate``, with data-dependent shifts of keys and values that are left out.
    The gates are per query head, also where heads share keys.
    """

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    rotary: ClassVar[bool] = False

    def gates(self, x_BTD, seq):
        # In float32, for errors of the logs would add up over time.
        gate = Linear("BTD,DH->BTH", (x_BTD.shape[-1], self.heads), name="forget")
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("H",))
        bias_H = self.param("forget_bias", zeros, (self.heads,))
        return (jax.nn.log_sigmoid(gate(x_BTD) + bias_H.reshape(1, 1, -1)),)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], state=state, bend=self.bend)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], bend=self.bend)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, heads=self.heads, kv_heads=self.groups, **widths)
