"""Linformer: keys and values projected along time to a fixed number (Wang et al. 2020, 2006.04768)."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.compressed import attend_sums, dense_sums
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Mask
from fastformer.core.errors import lookup, require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

# Projections of keys and of values, and whether each key/value head has its own (section 4).
SHARES = {"none": (2, True), "heads": (2, False), "keys_and_values": (1, False)}


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    key_LGR: jax.Array,
    value_LGR: jax.Array,
    *,
    seq: Seq,
) -> jax.Array:
    """Return ``softmax(q (E^T k)^T / sqrt(K)) F^T v`` of each segment, [B, T, H, P] float32 (eq. 7).

    Args:
      key_LGR, value_LGR: E and F, of each position; one for all heads where G is 1.
    """
    q_BTHK, k_BSGK, v_BSGP = (zero_padding(x, seq) for x in (q_BTHK, k_BSGK, v_BSGP))
    weights = (w[:, None] for w in rows((key_LGR, value_LGR), seq, k_BSGK.shape[2]))
    same_BTS = Mask(causal=False).visible(seq, seq).astype(jnp.float32)
    return dense_sums(q_BTHK, k_BSGK, v_BSGP, tuple(weights), same_BTS)


def rows(tables: tuple[jax.Array, ...], seq: Seq, groups: int) -> tuple[jax.Array, ...]:
    """Return the weights of each token by its position, [B, T, G, R] each."""
    found = (table[seq.position_BT] for table in tables)
    return tuple(jnp.broadcast_to(x, (*x.shape[:2], groups, x.shape[-1])) for x in found)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    key_LGR: jax.Array,
    value_LGR: jax.Array,
    *,
    seq: Seq,
    state: None = None,
) -> tuple[jax.Array, None]:
    """Return ``(y_BTHP, None)`` by sums over each segment, O(T R).

    Args:
      key_LGR, value_LGR: as in ``reference``.
      state: None; this variant does not stream.
    """
    weights = rows((key_LGR, value_LGR), seq, k_BTGK.shape[2])
    y_BTHP, _ = attend_sums(q_BTHK, k_BTGK, v_BTGP, weights, seq, causal=False)
    return y_BTHP.astype(v_BTGP.dtype), None


class Linformer(Mixer):
    """Attention of an encoder to R mixtures of all keys and values: O(T R).

    The weights are those of positions within a segment, up to ``length``. A text shorter than it meets the
    first rows of E and F, as if the rest were padding.

    Attributes:
      rank: R, 256 in the paper's models.
      share: what one projection serves, a row of SHARES.
    """

    bidirectional: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T"
    small: ClassVar[dict] = {"rank": 8}

    rank: int = 256
    share: str = "heads"

    def __post_init__(self):
        lookup(SHARES, self.share, "share")
        require(self.rank >= 1, "rank", self.rank, "1 or more")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        time = x_BTD.shape[1]
        require(self.length >= time, "length", self.length, f"{time}, the tokens of a row, or more")
        count, own = SHARES[self.share]
        init = nn.with_logical_partitioning(nn.initializers.normal(self.length**-0.5), ("T", "G", "R"))
        shape = (self.length, self.groups if own else 1, self.rank)
        tables = [self.param(name, init, shape) for name in ("key_rows", "value_rows")[:count]]
        return tables[0], tables[-1]

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0])

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0])
