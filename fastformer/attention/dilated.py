"""Dilated sliding windows, a dilation per head (Longformer, Beltagy et al. 2020, 2004.05150, section 3.1)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import by_head, join
from fastformer.attention.scores import Bend, reference_attention
from fastformer.attention.windows import Windows, band, slots
from fastformer.core.errors import require
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    window: int,
    dilations: tuple[int, ...],
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return softmax attention under a dense mask of tokens 0, d, … (window - 1) d apart, float32."""

    def run(qkv, bend, number, of):
        mask = Windows(causal, window * dilations[number], dilations[number])
        return reference_attention(*qkv, seq, seq, mask, bend)

    return by_head((q_BTHK, k_BSGK, v_BSGP), bend, len(dilations), run)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    window: int,
    dilations: tuple[int, ...],
    state: KVState | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``; each residue of time is a plain window.

    Args:
      window: W; a token sees itself and W - 1 before it (and after it when not causal), d tokens apart.
      dilations: d of the key/value heads in turn.
      block: tokens in a block.
    """

    def run(qkv, bend, number, of):
        mask = Windows(causal, window * dilations[number], dilations[number])
        parts = [band(*qkv, seq, mask, bend, block)]
        if state is not None:
            k_BSGK, v_BSGP = state.key_BSGK[:, :, of], state.value_BSGP[:, :, of]
            ring = state._replace(key_BSGK=k_BSGK, value_BSGP=v_BSGP)
            parts.append(slots(qkv[0], ring, seq, mask, bend, block))
        return join(parts)[0]

    y_BTHP = by_head((q_BTHK, k_BTGK, v_BTGP), bend, len(dilations), run).astype(v_BTGP.dtype)
    if not causal:
        return y_BTHP, None
    if state is None:
        widths = {"key_width": k_BTGK.shape[3], "value_width": v_BTGP.shape[3]}
        sizes = {"window": window, "dilations": dilations, "kv_heads": k_BTGK.shape[2]}
        state = init_state(len(k_BTGK), 0, k_BTGK.dtype, **sizes, **widths)
    return y_BTHP, cache.append(state, k_BTGK, v_BTGP, seq)


def init_state(
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    *,
    window: int,
    dilations: tuple[int, ...],
    kv_heads: int,
    key_width: int,
    value_width: int,
) -> KVState:
    """Return an empty ring of S = W max(d) slots: B S G (K + P) elements and indices."""
    return cache.empty(batch, window * max(dilations), kv_heads, (key_width, value_width), dtype)


class Dilated(Mixer):
    """Windows with holes: O(T W) to train, a reach of W d tokens, a ring of W max(d) slots as state.

    Attributes:
      window: W in tokens seen to one side, itself among them.
      dilations: d of the key/value heads in turn; 1 has no holes.
    """

    order: ClassVar[str] = "T"
    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    small: ClassVar[dict] = {"window": 8, "dilations": (1, 3)}

    window: int = 128
    dilations: tuple = (1, 2)

    def __post_init__(self):
        require(self.window >= 1, "window", self.window, "a number of tokens, 1 or more")
        good = len(self.dilations) > 0 and all(isinstance(d, int) and d >= 1 for d in self.dilations)
        require(good, "dilations", self.dilations, "one or more numbers of tokens, each 1 or more")
        super().__post_init__()

    def mix(self, qkv, seqs, state):
        sizes = {"window": self.window, "dilations": tuple(self.dilations), "bend": self.bend}
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode, **sizes)

    def refer(self, qkv, seqs):
        sizes = {"window": self.window, "dilations": tuple(self.dilations), "bend": self.bend}
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode, **sizes)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        sizes = {"window": self.window, "dilations": tuple(self.dilations), "kv_heads": self.groups}
        return init_state(batch, capacity, dtype, **sizes, **widths)
