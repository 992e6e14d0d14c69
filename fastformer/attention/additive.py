"""Fastformer's additive attention: one global query and one global key (Wu et al. 2021, 2108.09084)."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.packed import running_sums, runs, take
from fastformer.attention.scores import Mask
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def _parts(q_BTHK, k_BSGK, v_BSGP, seq: Seq) -> list[jax.Array]:
    """Return queries, keys and values in float32, of all heads alike."""
    heads = q_BTHK.shape[2]
    parts = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BSGK, v_BSGP))
    return [jnp.repeat(x, heads // x.shape[2], axis=2) for x in parts]


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    query_HK: jax.Array,
    key_HK: jax.Array,
    mix_RR: jax.Array,
    *,
    seq: Seq,
) -> jax.Array:
    """Return ``q + (k* v) W``, where * is a softmax-weighted sum over a segment, float32 (eq. 3-6).

    The global query q* is that of q by ``q w_q / sqrt(K)``; the global key k* that of ``p = q* k`` by
    ``p w_k / sqrt(K)``.
    """
    q, k, v = _parts(q_BTHK, k_BSGK, v_BSGP, seq)
    same_BTS1 = Mask(causal=False).visible(seq, seq)[..., None]

    def whole(x_BSHK: jax.Array, weight_HK: jax.Array) -> jax.Array:
        logit_BSH = jnp.einsum("BSHK,HK->BSH", x_BSHK, weight_HK) / math.sqrt(x_BSHK.shape[-1])
        weights_BTSH = jax.nn.softmax(jnp.where(same_BTS1, logit_BSH[:, None], -1e30), axis=2)
        return jnp.einsum("BTSH,BSHK->BTHK", weights_BTSH, x_BSHK)

    p = whole(q, query_HK) * k
    u = whole(p, key_HK) * v
    return q + jnp.einsum("BTR,RF->BTF", u.reshape(*u.shape[:2], -1), mix_RR).reshape(u.shape)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    query_HK: jax.Array,
    key_HK: jax.Array,
    mix_RR: jax.Array,
    *,
    seq: Seq,
) -> jax.Array:
    """Return ``y_BTHP`` in O(T): a segment's sum stands at its last token, when summed from left to right."""
    q, k, v = _parts(q_BTHK, k_BTGK, v_BTGP, seq)
    last_BT = runs(seq.segment_BT).last_BT

    def whole(x_BTHK: jax.Array, weight_HK: jax.Array) -> jax.Array:
        logit_BTH = jnp.einsum("BTHK,HK->BTH", x_BTHK, weight_HK) / math.sqrt(x_BTHK.shape[-1])
        sums = running_sums(logit_BTH[..., None], x_BTHK, seq.segment_BT)
        return take(sums.average(), last_BT)

    p = zero_padding(whole(q, query_HK) * k, seq)
    u = (zero_padding(whole(p, key_HK), seq) * v).astype(v_BTGP.dtype)
    mixed = jnp.einsum("BTR,RF->BTF", u.reshape(*u.shape[:2], -1), mix_RR.astype(u.dtype)).reshape(u.shape)
    return (q + mixed.astype(jnp.float32)).astype(v_BTGP.dtype)


class Additive(Mixer):
    """Attention by products with a global query and a global key: O(T), bidirectional only.

    As published but for biases, which it has none of, and for values of their own, which the published
    code takes from the queries. Keys and values that heads share are repeated. Rotary positions rotate
    nothing here: there are no products of two tokens that would tell their distance.
    """

    bidirectional: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T"

    def gates(self, x_BTD, seq):
        heads, width = self.heads, self.head_width
        # As ``Linear`` has it: of deviation 1 / sqrt(fan in).
        single = nn.with_logical_partitioning(nn.initializers.normal(width**-0.5), ("H", "K"))
        square = nn.with_logical_partitioning(nn.initializers.normal((heads * width) ** -0.5), (None, "R"))
        weights = (self.param(name, single, (heads, width)) for name in ("query_weight", "key_weight"))
        return *weights, self.param("mix", square, (heads * width, heads * width))

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0]), None

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0])
