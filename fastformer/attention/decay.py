"""Linear attention with decay: retention, GLA, HGRN2 and Mamba-2."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.gating import Expanded, Recurrent
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, grouped, loop, recur
from fastformer.attention.short_conv import Past
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm
from fastformer.core.seq import Seq


def decayed(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGP: jax.Array, log_BTGK: jax.Array) -> Tokens:
    """Return the tokens of ``M_t = diag(exp(log_t)) M_{t-1} + k_t v_t^T``, ``y_t = M_t^T q_t / sqrt(K)``."""
    q_BTHK = q_BTHK.astype(jnp.float32) * q_BTHK.shape[-1] ** -0.5
    return Tokens(grouped(q_BTHK, k_BTGK.shape[2]), k_BTGK, v_BTGP, log_BTGK)


def reference(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGP: jax.Array, log_BTGK: jax.Array, *, seq: Seq
) -> jax.Array:
    """Return attention with decay token by token, [B, T, H, P] float32 (Yang et al. 2023, 2312.06635, eq. 3).

    Args:
      log_BTGK: the decays' logarithms, at most 0; K may be 1: one decay for all channels.
    """
    return loop(decayed(q_BTHK, k_BTGK, v_BTGP, log_BTGK), seq)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    log_BTGK: jax.Array,
    *,
    seq: Seq,
    state: Memory | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory]:
    """Return ``(y_BTHP, state)`` of attention with decay, in chunks (2312.06635, section 4)."""
    y_BTHP, state = recur(decayed(q_BTHK, k_BTGK, v_BTGP, log_BTGK), seq, state, chunk)
    return y_BTHP.astype(v_BTGP.dtype), state


def init_state(batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, widths: tuple[int, int]) -> Memory:
    """Return an empty memory, 4 B G K P + 4 B bytes; ``widths`` are (K, P), ``heads`` G."""
    return empty_memory(batch, heads, *widths)


class _Expanded(Expanded):
    """Attributes: value_expand: P / K."""

    value_expand: float = 2.0

    def tokens(self, q_BTHK, k_BTGK, v_BTGP, log_BTGK):
        return decayed(q_BTHK, k_BTGK, v_BTGP, log_BTGK)

    def finish(self, y_BTHP, x_BTD):
        return super().finish(self.normed(y_BTHP, x_BTD), x_BTD)


class Retention(_Expanded):
    """Retention: a fixed decay a head, 1 - 2^(-5-h) (Sun et al. 2023, 2307.08621, eq. 8).

    Rotary positions are its xPos; its scale factors that the norm of a head undoes are left out, and that
    norm is an RMS norm, as in the authors' code.

    Attributes:
      value_expand: P / K.
    """

    rotary: ClassVar[bool] = True

    def gates(self, x_BTD, seq):
        log_G = np.log1p(-(2.0 ** (-5.0 - np.arange(self.groups)))).astype(np.float32)
        return (jnp.broadcast_to(log_G.reshape(1, 1, -1, 1), (*x_BTD.shape[:2], self.groups, 1)),)


class GLA(_Expanded):
    """Gated linear attention: a decay a channel, sigmoid(x W)^(1/16) (Yang et al. 2023, 2312.06635, eq. 4).

    The norm of a head is an RMS norm, as in the authors' code.

    Attributes:
      value_expand: P / K.
      gate_rank: of the gate's weights.
      temperature: the sigmoid's root that is taken.
    """

    gate_rank: int = 16
    temperature: float = 16.0

    def __post_init__(self):
        require(self.gate_rank >= 1, "gate_rank", self.gate_rank, "1 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        shape = (self.groups, self.head_width)
        gate_BTGK = self.low_rank("decay", x_BTD, self.gate_rank, shape)
        gate_BTGK += self.vector("decay_bias", "GK", shape, jax.nn.initializers.zeros)
        return (jax.nn.log_sigmoid(gate_BTGK) / self.temperature,)


class HGRN2(Recurrent):
    """HGRN2: the forget gate f is the decay, and 1 - f the key (Qin et al. 2024, 2404.07904, eq. 9).

    One RMS norm goes over all heads together, as in the authors' code. The paper learns the lower bound of f
    over all layers together; here it is a number.

    Attributes:
      lower_bound: f = lower_bound + (1 - lower_bound) sigmoid(x W).
    """

    exact_keys: ClassVar[bool] = True

    lower_bound: float = 0.0

    def __post_init__(self):
        require(0 <= self.lower_bound < 1, "lower_bound", self.lower_bound, "from 0 to below 1")
        super().__post_init__()

    def tokens(self, q_BTHK, k_BTGK, v_BTGP):
        gate_BTGK = k_BTGK.astype(jnp.float32)
        log_BTGK = jnp.logaddexp(
            jnp.log(self.lower_bound) if self.lower_bound else -jnp.inf,
            jnp.log1p(-self.lower_bound) + jax.nn.log_sigmoid(gate_BTGK),
        )
        k_BTGK = (1.0 - self.lower_bound) * jax.nn.sigmoid(-gate_BTGK)
        return Tokens(grouped(jax.nn.silu(q_BTHK.astype(jnp.float32)), self.groups), k_BTGK, v_BTGP, log_BTGK)

    def finish(self, y_BTHP, x_BTD):
        shape = y_BTHP.shape
        y_BTR = RMSNorm("R", name="inner_norm")(y_BTHP.reshape(*shape[:2], -1))
        return super().finish(y_BTR.reshape(shape), x_BTD)


class Mamba2(_Expanded):
    """Mamba-2: the state-space duality (Dao & Gu 2024, 2405.21060, section 7).

    Queries are its C, keys its B, values its x: H heads of values share the queries and keys of G groups,
    K is its state size N. Decay exp(-exp(A) dt), input scaled by dt, skip D x, and a gated RMS norm.

    Attributes:
      value_expand: P / K; 2 with H K = D is the published inner width 2 D. The published models have
        K = 128 and P = 64 (0.5), D / 32 heads and one key/value head.
    """

    convolution: ClassVar[int] = 4

    def project(self, x_BTD, x_BSD, seqs, past: Past | None):
        q_BTGK = self.linear("query", x_BTD, "BTD,DGK->BTGK", self.groups, self.head_width)
        k_BTGK = self.linear("key", x_BTD, "BTD,DGK->BTGK", self.groups, self.head_width)
        v_BTHP = self.linear("value", x_BTD, "BTD,DHP->BTHP", self.heads, self.value_width)
        if self.conv_width:
            (q_BTGK, k_BTGK, v_BTHP), past = self.convolve((q_BTGK, k_BTGK, v_BTHP), seqs[0], past, bias=True)
        if self.qk_norm:
            q_BTGK, k_BTGK = RMSNorm("K", name="query_norm")(q_BTGK), RMSNorm("K", name="key_norm")(k_BTGK)
        return (q_BTGK, k_BTGK, v_BTHP), past

    def past_features(self):
        features = 2 * self.groups * self.head_width + self.heads * self.value_width
        return max(self.conv_width - 1, 0), features

    def gates(self, x_BTD, seq):
        log_BTH, step_BTH = self.decay(self.linear("step", x_BTD, "BTD,DH->BTH", self.heads, exact=True))
        skip = self.vector("skip", "H", (self.heads,), jax.nn.initializers.ones)
        return log_BTH[..., None], step_BTH[..., None], skip[..., None]

    def tokens(self, q_BTGK, k_BTGK, v_BTHP, log_BTHK, step_BTHK, skip):
        share = self.heads // self.groups
        q_BTHK, k_BTHK = (jnp.repeat(x, share, axis=2) for x in (q_BTGK, k_BTGK))
        return Tokens(q_BTHK[:, :, :, None], k_BTHK, v_BTHP * step_BTHK, log_BTHK)

    def mix(self, qkv, seqs, state):
        y_BTHP, state = recur(self.tokens(*qkv), seqs[0], state)
        return (y_BTHP + qkv[2] * qkv[5]).astype(self.dtype), state

    def refer(self, qkv, seqs):
        return loop(self.tokens(*qkv), seqs[0]) + qkv[2] * qkv[5]

    def empty(self, batch, capacity, dtype):
        return empty_memory(batch, self.heads, self.head_width, self.value_width)

    def finish(self, y_BTHP, x_BTD):
        shape = y_BTHP.shape
        y_BTHP *= jax.nn.silu(self.linear("swish_gate", x_BTD, "BTD,DHP->BTHP", *shape[2:]))
        y_BTR = RMSNorm("R", name="inner_norm")(y_BTHP.reshape(*shape[:2], -1))
        return super(_Expanded, self).finish(y_BTR.reshape(shape), x_BTD)
