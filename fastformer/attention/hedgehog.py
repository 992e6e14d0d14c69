"""Hedgehog: a learned feature map, spiky as softmax is (Zhang et al. 2024, 2402.04347)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.linear import Kernel, average, dense_average, init_state
from fastformer.attention.recurrence import Memory
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

__all__ = ["Hedgehog", "features", "forward", "init_state", "reference"]


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    query_HKR: jax.Array,
    key_GKR: jax.Array,
    *,
    seq: Seq,
    causal: bool = True,
) -> jax.Array:
    """Return the values averaged by ``phi(q).phi(k)``, ``phi(x) = softmax([x W, -x W])``, float32 (eq. 6)."""

    def phi(x: jax.Array, weight: jax.Array) -> jax.Array:
        x = jnp.einsum("BTHK,HKR->BTHR", zero_padding(x, seq).astype(jnp.float32), weight)
        x = jnp.concatenate([x, -x], axis=-1)
        x = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))
        return x / jnp.sum(x, axis=-1, keepdims=True)

    return dense_average(phi(q_BTHK, query_HKR), phi(k_BSGK, key_GKR), v_BSGP, seq, causal=causal)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    query_HKR: jax.Array,
    key_GKR: jax.Array,
    *,
    seq: Seq,
    state: Memory | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` by the chunked sums of ``linear``."""

    q_BTHR = features(zero_padding(q_BTHK, seq), query_HKR)
    k_BTGR = features(zero_padding(k_BTGK, seq), key_GKR)
    return average(q_BTHR, k_BTGR, v_BTGP, seq, state, causal=causal, chunk=chunk)


def features(x_BTHK: jax.Array, weight_HKR: jax.Array) -> jax.Array:
    """Return ``softmax([x W, -x W])``, [B, T, H, 2 R] float32: eq. 6 in its stable form (section 4.2)."""
    x_BTHR = jnp.einsum("BTHK,HKR->BTHR", x_BTHK.astype(jnp.float32), weight_HKR)
    return jax.nn.softmax(jnp.concatenate([x_BTHR, -x_BTHR], axis=-1), axis=-1)


class Hedgehog(Kernel):
    """Kernel attention whose feature map is learned: O(T) to train, a state of 2 K features.

    One weight a head for queries and one for keys, the identity at first. The softmax over the features
    is the paper's stable form of its exponentials (section 4.2). What teaches it a trained model's softmax
    is compress/linearise.py.
    """

    @property
    def rank(self):
        return 2 * self.head_width

    def gates(self, x_BTD, seq):
        width = self.head_width

        def identity(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.broadcast_to(jnp.eye(width)[None], shape)

        def weight(name: str, letter: str, heads: int) -> jax.Array:
            init = nn.with_logical_partitioning(identity, (letter, "K", "R"))
            return self.param(name, init, (heads, width, width))

        return weight("query_map", "H", self.heads), weight("key_map", "G", self.groups)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode)
