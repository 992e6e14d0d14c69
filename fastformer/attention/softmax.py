"""Softmax attention: MHA (1706.03762), MQA (1911.02150), GQA (2305.13245)."""

from __future__ import annotations

import warnings
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.implementations import attend, attend_split
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, masked_softmax, reference_attention
from fastformer.attention.time_shards import time_shards
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    seq: Seq,
    kv_seq: Seq | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v`` by a dense mask, [B, T, H, P] float32 (1706.03762, eq. 1)."""
    seqs = (seq, kv_seq or seq)
    mask = Mask(causal, prefix=seq.last_BT is not None)
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, *seqs, mask, bend, sink_H=sink_H)


def forward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    sink_H: jax.Array | None = None,
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
      sink_H: the score of one more key a head, whose value is zero.
      kv_seq: the Seq of another sequence that k and v come from (cross-attention, no state).
      causal: False lets every token see those after it (no state).
      implementation: a row of IMPLEMENTATIONS, or "auto".
    """
    if kv_seq is not None or not causal:
        # Without a causal order there is one timeline at most: every block is seen.
        seqs = (seq, kv_seq or seq)
        past = None if kv_seq is not None else 0
        mask = Mask(causal and kv_seq is None)
        options = {"past": past, "implementation": implementation, "sink_H": sink_H}
        return attend_sunk(q_BTHK, k_BSGK, v_BSGP, seqs, mask, bend, **options), None
    mask = Mask(True, prefix=seq.last_BT is not None)
    return stream(q_BTHK, k_BSGK, v_BSGP, seq, state, mask, bend, implementation, sink_H)


def stream(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    seq: Seq,
    state: KVState | None,
    mask: Mask,
    bend: Bend,
    implementation: str,
    sink_H: jax.Array | None = None,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)`` of causal attention that goes on from the keys and values of a state."""
    keys, past, grown = seen(state, k_BTGK, v_BTGP, seq)
    if state is not None and q_BTHK.shape[1] == 1:
        return decode(q_BTHK, keys, seq, mask, bend, sink_H), grown
    options = {"past": past, "sink_H": sink_H, "implementation": implementation if state is None else "auto"}
    seqs = (seq, seq if state is None else keys.seq)
    return attend_sunk(q_BTHK, keys.key_BSGK, keys.value_BSGP, seqs, mask, bend, **options), grown


def seen(
    state: KVState | None, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq
) -> tuple[KVState, int, KVState]:
    """Return the keys that new tokens look at, how many stand before them, and the state after them."""
    if state is None:
        new = cache.growing(k_BTGK, v_BTGP, seq)
        return new, 0, new
    grown = cache.append(state, k_BTGK, v_BTGP, seq)
    if k_BTGK.shape[1] == 1:
        # A token takes its slot first: what it pushes out of a ring is out of its sight anyway.
        return grown, 0, grown
    return cache.joined(state, k_BTGK, v_BTGP, seq), state.segment_BS.shape[1], grown


def attend_sunk(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    seqs: tuple[Seq, Seq],
    mask: Mask,
    bend: Bend,
    *,
    past: int | None,
    implementation: str,
    sink_H: jax.Array | None,
) -> jax.Array:
    """Return ``y_BTHP`` of ``implementations.attend``; with a sink, which no kernel has, of blocked XLA."""
    if sink_H is None:
        options = {"past": past, "implementation": implementation}
        return attend(q_BTHK, k_BSGK, v_BSGP, seqs, mask, bend, **options)
    if implementation not in ("auto", "xla"):
        warnings.warn(f"implementation {implementation} cannot serve: it has no sinks", stacklevel=2)
    split = None if past else time_shards(*q_BTHK.shape[:2])
    if split:
        options = {"split": split, "past": past, "implementation": "xla"}
        y_BTHP, log_BTH = attend_split(q_BTHK, k_BSGK, v_BSGP, seqs, mask, bend, **options)
    else:
        y_BTHP, log_BTH = attend_part(q_BTHK, k_BSGK, v_BSGP, *seqs, mask, bend, past=past)
    # exp(log) / (exp(log) + exp(sink)) is what the sink leaves.
    left_BTH = jax.nn.sigmoid(log_BTH - sink_H.reshape(1, 1, -1).astype(jnp.float32))
    return (y_BTHP * left_BTH[..., None]).astype(v_BSGP.dtype)


def decode(
    q_B1HK: jax.Array,
    state: KVState,
    seq: Seq,
    mask: Mask,
    bend: Bend,
    sink_H: jax.Array | None = None,
) -> jax.Array:
    """Return the attention of one token a row over the slots, [B, 1, H, P]."""
    scores = slot_scores(q_B1HK, state, seq, bend)
    visible = mask.visible(seq, state.seq)[:, :, None]
    weights = masked_softmax(scores, visible)
    if sink_H is not None:
        log_BGM = jax.nn.logsumexp(jnp.where(visible, scores, -1e30), axis=-1)
        sink_BGM = sink_H.astype(jnp.float32).reshape(1, *log_BGM.shape[1:])
        weights *= jax.nn.sigmoid(log_BGM - sink_BGM)[..., None]
    return slot_values(weights, state)


def slot_scores(q_B1HK: jax.Array, state: KVState, seq: Seq, bend: Bend) -> jax.Array:
    """Return the bent scores of one token a row, [B, G, M, S] float32; unused slots hold anything."""
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
    return scores


def slot_values(weights_BGMS: jax.Array, state: KVState) -> jax.Array:
    """Return the weighted sum of the slots' values, [B, 1, H, P] in their dtype."""
    batch, groups, share, _ = weights_BGMS.shape
    used = (state.segment_BS > 0)[:, :, None, None]
    v_BSGP = jnp.where(used, state.value_BSGP, jnp.zeros((), state.value_BSGP.dtype))
    y = jnp.einsum(
        "BGMS,BSGP->BGMP", weights_BGMS.astype(v_BSGP.dtype), v_BSGP, preferred_element_type=jnp.float32
    )
    return y.reshape(batch, 1, groups * share, -1).astype(v_BSGP.dtype)


def other_seq(seqs: tuple[Seq, Seq]) -> Seq | None:
    """Return the Seq of keys where it is another sequence's than that of queries."""
    return None if seqs[1] is seqs[0] else seqs[1]


def sink_logits(mixer: Mixer) -> tuple[jax.Array, ...]:
    """Return the score of each head's sink, learned, where the mixer has ``learned_sinks``."""
    if not mixer.learned_sinks:
        return ()
    init = nn.with_logical_partitioning(nn.initializers.zeros, ("H",))
    return (mixer.param("sink", init, (mixer.heads,)),)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class Softmax(Mixer):
    """Exact attention: O(T²) to train, a state that grows with the past.

    Attributes:
      learned_sinks: the softmax of each head has one more score, learned, whose value is zero, so that the
        head can look at nothing (gpt-oss, OpenAI 2025, 2508.10925); blocked XLA serves.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    cross: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    prefix_lm: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    kernels: ClassVar[bool] = True

    learned_sinks: bool = False

    def gates(self, x_BTD, seq):
        return sink_logits(self)

    def mix(self, qkv, seqs, state):
        seq, other = seqs[0], other_seq(seqs)
        causal = not self.bidirectional_mode
        options = {"causal": causal, "bend": self.bend, "implementation": self.implementation}
        return forward(*qkv, seq=seq, state=state, kv_seq=other, **options)

    def refer(self, qkv, seqs):
        seq, other = seqs[0], other_seq(seqs)
        causal = other is None and not self.bidirectional_mode
        return reference(*qkv, seq=seq, kv_seq=other, causal=causal, bend=self.bend)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
