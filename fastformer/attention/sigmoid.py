"""Sigmoid attention: each weight by itself, no softmax (Ramapuram et al. 2024, 2409.04431)."""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.attention.softmax import init_state, other_seq, seen, slot_scores, slot_values
from fastformer.core.errors import require
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    bend: Bend,
    kv_seq: Seq | None = None,
    causal: bool = True,
) -> jax.Array:
    """Return ``sigmoid(q k^T / sqrt(K) + b) v`` by a dense mask, [B, T, H, P] float32 (eq. 3)."""
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, kv_seq or seq, Mask(causal), bend)


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    bend: Bend,
    state: KVState | None = None,
    kv_seq: Seq | None = None,
    causal: bool = True,
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)`` in blocks, or against the slots of a state when T = 1.

    Args:
      bend: holds b as its ``sigmoid``.
      kv_seq: the Seq of another sequence that k and v come from (cross-attention, no state).
      causal: False lets every token see those after it (no state).
      block: tokens in a block.
    """
    if kv_seq is not None or not causal:
        past = None if kv_seq is not None else 0
        options = {"past": past, "block": block}
        y_BTHP, _ = attend_part(q_BTHK, k_BSGK, v_BSGP, seq, kv_seq or seq, Mask(False), bend, **options)
        return y_BTHP.astype(v_BSGP.dtype), None
    keys, past, grown = seen(state, k_BSGK, v_BSGP, seq)
    if state is not None and q_BTHK.shape[1] == 1:
        return decode(q_BTHK, keys, seq, bend), grown
    y_BTHP, _ = attend_part(q_BTHK, *keys[:2], seq, keys.seq, Mask(True), bend, past=past, block=block)
    return y_BTHP.astype(v_BSGP.dtype), grown


def decode(q_B1HK: jax.Array, state: KVState, seq: Seq, bend: Bend) -> jax.Array:
    """Return the attention of one token a row over the slots, [B, 1, H, P]."""
    weights = jax.nn.sigmoid(slot_scores(q_B1HK, state, seq, bend) + bend.sigmoid)
    visible = Mask(True).visible(seq, state.seq)[:, :, None]
    return slot_values(jnp.where(visible, weights, 0.0), state)


class Sigmoid(Mixer):
    """Attention by sigmoids: O(T²) to train, a state that grows with the past.

    Attributes:
      tokens: n of the bias b = -log n, which keeps the sum of the weights near that of a softmax at the
        start of training; 0 is ``length``. The paper sets it to the training length.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    small: ClassVar[dict] = {"tokens": 64}

    tokens: int = 0

    def __post_init__(self):
        require(self.tokens >= 0, "tokens", self.tokens, "a number of tokens, or 0 for length")
        super().__post_init__()

    @property
    def bend(self) -> Bend:
        """Return what happens to scores, the bias among it."""
        tokens = self.tokens or self.length
        require(tokens > 0, "tokens", tokens, "1 or more where length is not set")
        return super().bend._replace(sigmoid=-math.log(tokens))

    def mix(self, qkv, seqs, state):
        options = {"kv_seq": other_seq(seqs), "causal": not self.bidirectional_mode}
        return forward(*qkv, seq=seqs[0], bend=self.bend, state=state, **options)

    def refer(self, qkv, seqs):
        causal = other_seq(seqs) is None and not self.bidirectional_mode
        return reference(*qkv, seq=seqs[0], bend=self.bend, kv_seq=other_seq(seqs), causal=causal)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
