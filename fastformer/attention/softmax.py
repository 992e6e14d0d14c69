"""Softmax attention: MHA (1706.03762), MQA (1911.02150), GQA (2305.13245)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.cache import KVState
from fastformer.attention.implementations import attend
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v`` by a dense mask, [B, T, H, P] float32 (1706.03762, eq. 1)."""
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, kv_seq or seq, Mask(causal), bend)


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    state: KVState | None = None,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
    implementation: str = "auto",
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)`` in blocks, or against the slots of a state when T = 1.

    Args:
      kv_seq: the Seq of another sequence that k and v come from (cross-attention, no state).
      causal: False lets every token see those after it (no state).
      implementation: a row of IMPLEMENTATIONS, or "auto".
    """
    if kv_seq is not None or not causal:
        # Without a causal order there is one timeline at most: every block is seen.
        seqs = (seq, kv_seq or seq)
        past = None if kv_seq is not None else 0
        mask = Mask(causal and kv_seq is None)
        y_BTHP = attend(
            q_BTHK, k_BSGK, v_BSGP, seqs, mask, bend, past=past, implementation=implementation
        )
        return y_BTHP, None
    return stream(q_BTHK, k_BSGK, v_BSGP, seq, state, Mask(True), bend, implementation)


def stream(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    seq: Seq,
    state: KVState | None,
    mask: Mask,
    bend: Bend,
    implementation: str,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)`` of causal attention that goes on from the keys and values of a state."""
    if state is None:
        y_BTHP = attend(q_BTHK, k_BTGK, v_BTGP, (seq, seq), mask, bend, implementation=implementation)
        return y_BTHP, cache.growing(k_BTGK, v_BTGP, seq)
    if q_BTHK.shape[1] == 1:
        # The token takes its slot first: what it pushes out of a ring is out of its sight anyway.
        state = cache.append(state, k_BTGK, v_BTGP, seq)
        return decode(q_BTHK, state, seq, mask, bend), state
    slots = state.segment_BS.shape[1]
    keys = cache.joined(state, k_BTGK, v_BTGP, seq)
    seqs = (seq, keys.seq)
    y_BTHP = attend(q_BTHK, keys.key_BSGK, keys.value_BSGP, seqs, mask, bend, past=slots)
    return y_BTHP, cache.append(state, k_BTGK, v_BTGP, seq)


def decode(q_B1HK: jax.Array, state: KVState, seq: Seq, mask: Mask, bend: Bend) -> jax.Array:
    """Return the attention of one token a row over the slots, [B, 1, H, P]."""
    batch, _, heads, width = q_B1HK.shape
    groups = state.key_BSGK.shape[2]
    q_BGMK = q_B1HK.reshape(batch, groups, heads // groups, width)
    scores = jnp.einsum("BGMK,BSGK->BGMS", q_BGMK, state.key_BSGK, preferred_element_type=jnp.float32)
    scores = scores / jnp.sqrt(jnp.float32(width))
    if bend.soft_cap:
        scores = bend.soft_cap * jnp.tanh(scores / bend.soft_cap)
    if bend.slopes:
        distance_BS = jnp.abs(seq.position_BT - state.position_BS).astype(jnp.float32)
        scores -= jnp.asarray(bend.slopes).reshape(1, groups, -1, 1) * distance_BS[:, None, None, :]
    visible = mask.visible(seq, state.seq)[:, :, None]
    weights = jnp.where(visible, jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1), 0.0)
    used = (state.segment_BS > 0)[:, :, None, None]
    v_BSGP = jnp.where(used, state.value_BSGP, jnp.zeros((), state.value_BSGP.dtype))
    y = jnp.einsum(
        "BGMS,BSGP->BGMP", weights.astype(v_BSGP.dtype), v_BSGP, preferred_element_type=jnp.float32
    )
    return y.reshape(batch, 1, heads, -1).astype(v_BSGP.dtype)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class Softmax(Mixer):
    """Exact attention: O(T²) to train, a state that grows with the past."""

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    kernels: ClassVar[bool] = True

    def mix(self, qkv, seqs, state):
        seq, other = self._seqs(seqs)
        causal = not self.bidirectional_mode
        options = {"causal": causal, "bend": self.bend, "implementation": self.implementation}
        return forward(*qkv, seq=seq, state=state, kv_seq=other, **options)

    def refer(self, qkv, seqs):
        seq, other = self._seqs(seqs)
        causal = other is None and not self.bidirectional_mode
        return reference(*qkv, seq=seq, kv_seq=other, causal=causal, bend=self.bend)

    @staticmethod
    def _seqs(seqs: tuple[Seq, Seq]) -> tuple[Seq, Seq | None]:
        """Return the Seq of queries, and that of keys where it is another sequence's."""
        return seqs[0], None if seqs[1] is seqs[0] else seqs[1]

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
