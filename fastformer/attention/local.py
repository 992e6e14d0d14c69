"""Local attention: softmax over a sliding window of tokens (Beltagy et al. 2020, 2004.05150, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.attention.softmax import attend_sunk, sink_logits, stream
from fastformer.core.errors import require
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    seq: Seq,
    window: int,
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return softmax attention under a dense mask of tokens less than ``window`` apart, float32."""
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, seq, Mask(causal, window), bend, sink_H=sink_H)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    seq: Seq,
    window: int,
    state: KVState | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
    implementation: str = "auto",
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)`` from the blocks that the window touches.

    Args:
      sink_H: as in ``softmax.forward``.
      window: W; a token sees itself and the W - 1 before it (and after it when not causal).
      implementation: a row of IMPLEMENTATIONS, or "auto".
    """
    mask = Mask(causal, window)
    if not causal:
        options = {"past": 0, "implementation": implementation, "sink_H": sink_H}
        return attend_sunk(q_BTHK, k_BTGK, v_BTGP, (seq, seq), mask, bend, **options), None
    y_BTHP, grown = stream(q_BTHK, k_BTGK, v_BTGP, seq, state, mask, bend, implementation, sink_H)
    if state is not None:
        return y_BTHP, grown
    empty = cache.empty(
        len(k_BTGK), window, k_BTGK.shape[2], (k_BTGK.shape[3], v_BTGP.shape[3]), k_BTGK.dtype
    )
    return y_BTHP, cache.append(empty, k_BTGK, v_BTGP, seq)


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    window: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
) -> KVState:
    """Return an empty ring of W slots: B W G (K + P) elements and indices, whatever the capacity."""
    return cache.empty(batch, window, kv_heads, (key_width, value_width), dtype)


class Local(Mixer):
    """Sliding-window attention: O(T W) to train, a ring buffer of W slots as state.

    Attributes:
      window: W in tokens, itself among them.
      learned_sinks: as those of ``softmax``.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    kernels: ClassVar[bool] = True
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"window": 16}

    window: int = 128
    learned_sinks: bool = False

    def __post_init__(self):
        require(
            isinstance(self.window, int) and self.window >= 1,
            "window",
            self.window,
            "a number of tokens, 1 or more",
        )
        super().__post_init__()

    def gates(self, x_BTD, seq):
        return sink_logits(self)

    def mix(self, qkv, seqs, state):
        causal = not self.bidirectional_mode
        options = {"causal": causal, "bend": self.bend, "implementation": self.implementation}
        return forward(*qkv, seq=seqs[0], window=self.window, state=state, **options)

    def refer(self, qkv, seqs):
        causal = not self.bidirectional_mode
        return reference(*qkv, seq=seqs[0], window=self.window, causal=causal, bend=self.bend)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(
            batch, capacity, dtype, window=self.window, kv_heads=self.groups, **widths
        )
