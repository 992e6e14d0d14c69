"""Luna: attention packed to a few vectors and unpacked again (Ma et al. 2021, 2106.01540)."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.compressed import Compressed, attend_sums, dense_sums, numbers
from fastformer.attention.mixer import Mixer
from fastformer.attention.recurrence import empty_memory
from fastformer.attention.scores import Mask
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    pack_BSGR: jax.Array,
    *,
    seq: Seq,
    causal: bool = True,
) -> jax.Array:
    """Return the two attentions by dense masks, [B, T, H, P] float32 (eq. 4-5; causal, eq. 7-9).

    Args:
      pack_BSGR: the scores of each token for each of the R packed vectors.
    """
    q_BTHK, k_BSGK, v_BSGP = (zero_padding(x, seq) for x in (q_BTHK, k_BSGK, v_BSGP))
    seen_BTS = Mask(causal).visible(seq, seq)
    if causal:
        weight_BTSGR = softplus(pack_BSGR)[:, None]
        mean_BTS = seen_BTS / jnp.maximum(seen_BTS.sum(axis=-1, keepdims=True), 1)
        return dense_sums(q_BTHK, k_BSGK, v_BSGP, (weight_BTSGR, weight_BTSGR), mean_BTS)
    scores_BTSGR = jnp.where(seen_BTS[..., None, None], pack_BSGR[:, None], -1e30)
    weight_BTSGR = jax.nn.softmax(scores_BTSGR, axis=2)
    return dense_sums(q_BTHK, k_BSGK, v_BSGP, (weight_BTSGR, weight_BTSGR), seen_BTS.astype(jnp.float32))


def softplus(x: jax.Array) -> jax.Array:
    """Return ``log2(1 + 2^x)``, which is 1 at 0: the activation of the causal form."""
    return jax.nn.softplus(x * math.log(2.0)) / math.log(2.0)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    pack_BTGR: jax.Array,
    *,
    seq: Seq,
    state: Compressed | None = None,
    causal: bool = True,
) -> tuple[jax.Array, Compressed | None]:
    """Return ``(y_BTHP, state)`` by sums over each segment, O(T R).

    Args:
      pack_BTGR: as in ``reference``.
      causal: False lets every token see those after it (no state).
    """
    weight_BTGR = softplus(pack_BTGR) if causal else segment_softmax(pack_BTGR, seq)
    weights = (weight_BTGR, weight_BTGR)
    y_BTHP, state = attend_sums(q_BTHK, k_BTGK, v_BTGP, weights, seq, state, causal=causal)
    return y_BTHP.astype(v_BTGP.dtype), state if causal else None


def segment_softmax(x_BTGR: jax.Array, seq: Seq) -> jax.Array:
    """Return the softmax over the tokens of each segment, 0 at padding."""
    time = seq.segment_BT.shape[1]
    number_BT = numbers(seq)

    def row(x_TGR: jax.Array, number_T: jax.Array) -> jax.Array:
        sizes = {"num_segments": time + 1, "indices_are_sorted": False}
        top = jax.ops.segment_max(jax.lax.stop_gradient(x_TGR), number_T, **sizes)
        weight = jnp.exp(x_TGR - top[number_T])
        return weight / jax.ops.segment_sum(weight, number_T, **sizes)[number_T]

    return zero_padding(jax.vmap(row)(zero_padding(x_BTGR, seq), number_BT), seq)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, rank: int, key_width: int, value_width: int
) -> Compressed:
    """Return empty sums: 4 B G R (K + P) + 8 B bytes, whatever the capacity and dtype."""
    keys = empty_memory(batch, kv_heads, key_width, rank)
    return Compressed(keys, empty_memory(batch, kv_heads, rank, value_width))


class Luna(Mixer):
    """Two nested attentions, O(T R): R learned vectors attend to the tokens, the tokens to what came of it.

    Deviations: each layer learns its R packed queries, which the paper hands on from layer to layer; and each
    head packs its own keys and values, as the paper's causal form does, where its bidirectional form packs
    the values once and projects the packed ones, over all heads, to keys and values.

    Attributes:
      rank: R, 16 in the paper's translation models.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"rank": 5}

    rank: int = 16

    def __post_init__(self):
        require(self.rank >= 1, "rank", self.rank, "1 or more")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        key_BTGK = self.linear("pack_key", x_BTD, "BTD,DGK->BTGK", self.groups, self.head_width)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("R", "G", "K"))
        query_RGK = self.param("pack_query", init, (self.rank, self.groups, self.head_width))
        scale = 1.0 / math.sqrt(self.head_width)
        return (jnp.einsum("BTGK,RGK->BTGR", key_BTGK.astype(jnp.float32), query_RGK) * scale,)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode)

    def empty(self, batch, capacity, dtype):
        sizes = {"kv_heads": self.groups, "rank": self.rank}
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, **sizes, **widths)
