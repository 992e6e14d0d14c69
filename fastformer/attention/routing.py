"""Routing attention: a token sees those of its own cluster (Roy et al. 2020, 2003.05997)."""

from __future__ import annotations

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import clusters
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.clusters import Shared
from fastformer.attention.scores import Mask
from fastformer.core.errors import require
from fastformer.core.seq import Seq


def nearest(x_BTHK: jax.Array, centroid_HRK: jax.Array) -> jax.Array:
    """Return the index of the nearest of R centroids, [B, T, H] int32."""
    x, mu = jax.lax.stop_gradient((x_BTHK, centroid_HRK))
    score = jnp.einsum("BTHK,HRK->BTHR", x, mu) - 0.5 * jnp.sum(mu * mu, axis=-1)[None, None]
    return jnp.argmax(score, axis=-1).astype(jnp.int32)


def spread(x_BTHK: jax.Array, centroid_HRK: jax.Array, nearest_BTH: jax.Array, seq: Seq) -> jax.Array:
    """Return the mean over tokens and heads of half the squared distance to the nearest centroid.

    Its gradient moves centroids only.
    """
    heads = jnp.arange(len(centroid_HRK))[None, None, :]
    distance = jax.lax.stop_gradient(x_BTHK) - centroid_HRK[heads, nearest_BTH]
    real_BT1 = (seq.segment_BT > 0)[..., None]
    each_BTH = jnp.where(real_BT1, 0.5 * jnp.sum(distance * distance, axis=-1), 0.0)
    return each_BTH.sum() / (jnp.maximum(real_BT1.sum(), 1) * len(centroid_HRK))


@jax.custom_vjp
def also_minimise(x: jax.Array, penalty: jax.Array) -> jax.Array:
    """Return ``x``; the gradient of the loss is that of the loss plus ``penalty``."""
    return x


also_minimise.defvjp(lambda x, penalty: (x, None), lambda _, dx: (dx, jnp.ones((), jnp.float32)))


def reference(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    cluster_BTH1: jax.Array,
    *,
    seq: Seq,
    window: int,
    causal: bool = True,
) -> jax.Array:
    """Return softmax attention to the nearest ``window`` keys of the query's cluster, float32 (eq. 8-11)."""
    return clusters.reference(q_BTHK, k_BTHK, v_BTHP, cluster_BTH1, seq=seq, mask=Mask(causal, window))


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    cluster_BTH1: jax.Array,
    *,
    seq: Seq,
    window: int,
    state: KVState | None = None,
    causal: bool = True,
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``: windows over tokens sorted by cluster.

    Args:
      window: keys of the cluster that a token sees at most, itself among them; twice that in both directions.
      causal: False lets every token see those after it (no state).
      block: tokens in a block of the sorted sequence.
    """
    options = {"seq": seq, "mask": Mask(causal, window), "state": state, "block": block}
    y_BTHP, grown = clusters.forward(q_BTHK, k_BTHK, v_BTHP, cluster_BTH1, **options)
    return y_BTHP, grown if causal else None


init_state = clusters.init_state


class Routing(Shared):
    """Attention within clusters that are learned by online k-means.

    Queries and keys are one normalised vector, as in the paper's causal models. Every token is in the cluster
    of its nearest centroid and sees the newest ``window`` of it, where the paper's code balances clusters by
    letting each centroid pick its nearest tokens of the whole row, those to come among them. Centroids go
    down the gradient of half the squared distance to their tokens, by the optimiser of the other weights, in
    place of a moving average.

    Attributes:
      clusters_per_head: R, centroids a head. window: W in tokens.
    """

    small: ClassVar[dict] = {"clusters_per_head": 3, "window": 8}

    clusters_per_head: int = 16
    window: int = 128

    def __post_init__(self):
        for field in ("clusters_per_head", "window"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        super().__post_init__()

    def clusters(self, x_BTHK, seq):
        centred = x_BTHK - jnp.mean(x_BTHK, axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6)
        x_BTHK = centred / deviation
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("H", "R", "K"))
        centroid_HRK = self.param("centroid", init, (self.heads, self.clusters_per_head, self.head_width))
        nearest_BTH = nearest(x_BTHK, centroid_HRK)
        x_BTHK = also_minimise(x_BTHK, spread(x_BTHK, centroid_HRK, nearest_BTH, seq))
        return x_BTHK, x_BTHK, nearest_BTH[..., None]

    def mix(self, qkv, seqs, state):
        options = {"window": self.window, "state": state, "causal": not self.bidirectional_mode}
        return forward(*qkv, seq=seqs[0], **options)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], window=self.window, causal=not self.bidirectional_mode)
