"""Based: the exponential's second-order Taylor series as a kernel (Arora et al. 2024, 2402.18668)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.linear import Kernel, average, dense_average, init_state
from fastformer.attention.positions import rope
from fastformer.attention.recurrence import Memory
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm, zero_padding
from fastformer.core.seq import Seq

__all__ = ["Based", "forward", "init_state", "reference", "taylor_features"]


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, *, seq: Seq, causal: bool = True
) -> jax.Array:
    """Return the values averaged by ``1 + s + s² / 2``, ``s = q k / sqrt(K)``, float32 (2402.18668, eq. 4).

    As a feature map: ``phi(x) = [1, x, x ⊗ x / sqrt(2)]`` of ``x / K^(1/4)``.
    """

    def phi(x: jax.Array) -> jax.Array:
        x = zero_padding(x, seq).astype(jnp.float32) * x.shape[-1] ** -0.25
        square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1) / math.sqrt(2)
        return jnp.concatenate([jnp.ones((*x.shape[:-1], 1), jnp.float32), x, square], axis=-1)

    return dense_average(phi(q_BTHK), phi(k_BSGK), v_BSGP, seq, causal=causal)


def taylor_features(x: jax.Array) -> jax.Array:
    """Return the 1 + K + K (K + 1) / 2 features of ``x`` [..., K]: each product of two entries once.

    The same kernel as with all K² products: the two of a pair are one feature, times sqrt(2).
    """
    width = x.shape[-1]
    x = x.astype(jnp.float32) * width**-0.25
    left, right = np.triu_indices(width)
    weight = np.where(left == right, math.sqrt(0.5), 1.0).astype(np.float32)
    square = x[..., left] * x[..., right] * weight.reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.concatenate([jnp.ones((*x.shape[:-1], 1), jnp.float32), x, square], axis=-1)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    state: Memory | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` by the chunked sums of ``linear``."""
    q_BTHR, k_BTGR = (taylor_features(zero_padding(x, seq)) for x in (q_BTHK, k_BTGK))
    return average(q_BTHR, k_BTGR, v_BTGP, seq, state, causal=causal, chunk=chunk)


class Based(Kernel):
    """Taylor-series attention over narrow queries and keys: O(T) to train, a state of K² / 2 features.

    The paper's architecture alternates it with softmax over small windows, which is a matter of
    ``model.pattern``, such as ("based", "local"). Its short convolutions are layers of their own there.

    Attributes:
      feature_width: K of queries and keys here, in place of ``head_width``, which is that of values.
    """

    feature_width: int = 16

    def __post_init__(self):
        require(self.feature_width >= 1, "feature_width", self.feature_width, "a width, 1 or more")
        whole = self.positions != "rope" or self.feature_width % 2 == 0
        require(whole, "feature_width", self.feature_width, "even where positions are rope")
        super().__post_init__()

    @property
    def rank(self):
        return 1 + self.feature_width + self.feature_width * (self.feature_width + 1) // 2

    def project(self, x_BTD, x_BSD, seqs, past):
        narrow = self.feature_width
        q_BTHK = self.linear("query", x_BTD, "BTD,DHK->BTHK", self.heads, narrow)
        k_BTGK = self.linear("key", x_BSD, "BSD,DGK->BSGK", self.groups, narrow)
        v_BTGP = self.linear("value", x_BSD, "BSD,DGP->BSGP", self.groups, self.value_width)
        if self.conv_width:
            (q_BTHK, k_BTGK, v_BTGP), past = self.convolve((q_BTHK, k_BTGK, v_BTGP), seqs[0], past)
        if self.qk_norm:
            q_BTHK, k_BTGK = RMSNorm("K", name="query_norm")(q_BTHK), RMSNorm("K", name="key_norm")(k_BTGK)
        if self.positions == "rope":
            q_BTHK, k_BTGK = (rope(x, seqs[0].position_BT, self.rope_base) for x in (q_BTHK, k_BTGK))
        return (q_BTHK, k_BTGK, v_BTGP), past

    def past_features(self):
        features = (self.heads + self.groups) * self.feature_width + self.groups * self.value_width
        return max(self.conv_width - 1, 0), features

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode)
