"""RWKV-7: a delta rule that removes with a strength a channel (Peng et al. 2025, 2503.14456)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fastformer.attention.gating import Recurrent, unit
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, grouped, loop, recur
from fastformer.attention.short_conv import Past, windows
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm
from fastformer.core.seq import Seq

NORM_EPSILON = 64e-5  # of the authors' code


def transition(
    r_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    log_BTGK: jax.Array,
    removed_BTGK: jax.Array,
    rate_BTGK: jax.Array,
) -> Tokens:
    """Return the tokens of ``S_t = S_{t-1} (diag(w) - u^T (a * u)) + v^T k``, ``y_t = S_t r_t`` (eq. 16).

    Args:
      log_BTGK: of the decay w. removed_BTGK: u, of length one. rate_BTGK: a, from 0 to 1.
    """
    erase_BTGK = -removed_BTGK * rate_BTGK
    return Tokens(grouped(r_BTHK, k_BTGK.shape[2]), k_BTGK, v_BTGP, log_BTGK, removed_BTGK, erase_BTGK)


def reference(r_BTHK, k_BTGK, v_BTGP, log_BTGK, removed_BTGK, rate_BTGK, *, seq: Seq) -> jax.Array:
    """Return the recurrence token by token, [B, T, H, P] float32; arguments as in ``transition``."""
    return loop(transition(r_BTHK, k_BTGK, v_BTGP, log_BTGK, removed_BTGK, rate_BTGK), seq)


def forward(
    r_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    log_BTGK: jax.Array,
    removed_BTGK: jax.Array,
    rate_BTGK: jax.Array,
    *,
    seq: Seq,
    state: Memory | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory]:
    """Return ``(y_BTHP, state)`` of the recurrence in chunks; arguments as in ``transition``."""
    tokens = transition(r_BTHK, k_BTGK, v_BTGP, log_BTGK, removed_BTGK, rate_BTGK)
    y_BTHP, state = recur(tokens, seq, state, chunk)
    return y_BTHP.astype(v_BTGP.dtype), state


def init_state(batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, widths: tuple[int, int]) -> Memory:
    """Return an empty memory, 4 B G K P + 4 B bytes; ``widths`` are (K, P), ``heads`` G."""
    return empty_memory(batch, heads, *widths)


class RWKV7(Recurrent):
    """RWKV-7's time mixing (eqs. 3 to 19), whose inputs are mixed with those of the token before.

    The mixing of values with those of the first layer (eq. 9) is left out: a layer here sees no other.

    Attributes:
      gate_rank: of the weights of decay, removal rate and output gate; 0 is K.
    """

    gate_rank: int = 0

    def __post_init__(self):
        require(self.gate_rank >= 0, "gate_rank", self.gate_rank, "0 or more")
        super().__post_init__()

    def past_features(self):
        """The token before, whose inputs are mixed in; with a short convolution, what it needs as well."""
        tokens, features = super().past_features()
        width = self.width or self.heads * self.head_width
        return (tokens, width + features) if tokens else (1, width)

    def project(self, x_BTD, x_BSD, seqs, past):
        tokens, width = self.past_features()[0], x_BTD.shape[-1]
        shifted, convolved = (None, None) if past is None else _split(past, width)
        (now, before, *_), shifted = windows(x_BTD, seqs[0], tokens + 1, shifted)
        half = jax.nn.initializers.constant(0.5)

        def mixed(name: str) -> jax.Array:  # eq. 3
            share = self.vector(f"{name}_mix", "D", now.shape[-1:], half)
            return now + (before - now) * share.astype(now.dtype)

        rank, keys, values = self.gate_rank or self.head_width, self.head_width, self.value_width
        r_BTHK = self.linear("query", mixed("query"), "BTD,DHK->BTHK", self.heads, keys)
        k_BTGK = self.linear("key", mixed("key"), "BTD,DGK->BTGK", self.groups, keys)
        v_BTGP = self.linear("value", mixed("value"), "BTD,DGP->BTGP", self.groups, values)
        shape = (self.groups, keys)
        if self.conv_width:
            convolved = convolved if self.conv_width > 1 else None  # of one token it needs no past
            (r_BTHK, k_BTGK, v_BTGP), convolved = self.convolve((r_BTHK, k_BTGK, v_BTGP), seqs[0], convolved)
            shifted = _joined(shifted, convolved)
        if self.qk_norm:
            r_BTHK, k_BTGK = RMSNorm("K", name="query_norm")(r_BTHK), RMSNorm("K", name="key_norm")(k_BTGK)
        log_BTGK = self.low_rank("decay", mixed("decay"), rank, shape, jnp.tanh)
        log_BTGK += self.vector("decay_bias", "GK", shape, _spread)
        log_BTGK = -math.exp(-0.5) * jax.nn.sigmoid(log_BTGK)  # eq. 8
        rate_BTGK = self.low_rank("rate", mixed("rate"), rank, shape)
        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        rate_BTGK = jax.nn.sigmoid(rate_BTGK + self.vector("rate_bias", "GK", shape, zeros))
        gate_BTHP = self.low_rank("open", mixed("open"), rank, (self.heads, values), jax.nn.sigmoid)
        removed_BTGK = unit(k_BTGK * self.vector("removal", "GK", shape, ones))  # eqs. 5, 15
        k_BTGK *= 1.0 + (rate_BTGK - 1.0) * self.vector("replacement", "GK", shape, ones)  # eq. 6
        return (r_BTHK, k_BTGK, v_BTGP, log_BTGK, removed_BTGK, rate_BTGK, gate_BTHP), shifted

    def mix(self, qkv, seqs, state):
        y_BTHP, state = recur(transition(*qkv[:-1]), seqs[0], state)
        return self._open(y_BTHP, qkv).astype(self.dtype), state

    def refer(self, qkv, seqs):
        return self._open(loop(transition(*qkv[:-1]), seqs[0]), qkv)

    def _open(self, y_BTHP: jax.Array, qkv: tuple[jax.Array, ...]) -> jax.Array:
        """Return the normed heads, with what the token itself adds, times the gate (eqs. 18, 19)."""
        r_BTHK, k_BTGK, v_BTGP, *_, gate_BTHP = qkv
        shape, (zeros, ones) = y_BTHP.shape[2:], (jax.nn.initializers.zeros, jax.nn.initializers.ones)
        centred = y_BTHP - y_BTHP.mean(axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + NORM_EPSILON)
        normed = centred / deviation * self.vector("norm_scale", "HP", shape, ones)
        normed += self.vector("norm_bias", "HP", shape, zeros)
        share = self.heads // self.groups
        k_BTHK, v_BTHP = (jnp.repeat(x, share, axis=2).astype(jnp.float32) for x in (k_BTGK, v_BTGP))
        bonus = self.vector("bonus", "HK", r_BTHK.shape[2:], jax.nn.initializers.normal(0.1))
        own = jnp.sum(r_BTHK * k_BTHK * bonus, axis=-1, keepdims=True) * v_BTHP
        return (normed + own) * gate_BTHP


def _spread(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return biases from -6 to -1 over the channels of a head: some forget slowly, some at once."""
    return jnp.broadcast_to(jnp.linspace(-6.0, -1.0, shape[-1], dtype=dtype), shape)


def _split(past: Past, width: int) -> tuple[Past, Past]:
    """Return the past of the first ``width`` features and that of the others."""
    first, others = past.token_BWR[..., :width], past.token_BWR[..., width:]
    return Past(first, past.segment_BW), Past(others, past.segment_BW)


def _joined(first: Past, others: Past) -> Past:
    """Return one past of the features of both, or the first where the other remembers no token."""
    if not others.token_BWR.shape[1]:
        return first
    return Past(jnp.concatenate([first.token_BWR, others.token_BWR], axis=-1), first.segment_BW)
