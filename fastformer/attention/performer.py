"""Performer: positive orthogonal random features of the softmax (Choromanski et al. 2020, 2009.14794)."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.linear import Kernel, average, dense_average, init_state
from fastformer.attention.recurrence import Memory
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

__all__ = ["Performer", "forward", "init_state", "projections", "reference"]

# exp(70), summed over a row of values, is below float32's largest number, and exp(-70) above its smallest.
LARGEST = 70.0


@functools.cache
def projections(groups: int, width: int, features: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return Gaussian vectors w, orthogonal within each block of K, [G, R, K] float32 (section 2.4).

    A block's directions are uniform on the sphere; the norms are those of Gaussian vectors.

    Args:
      seed: numbers that the vectors follow from; heads get different ones.
    """
    # RandomState's stream is frozen: a checkpoint finds the same features in every version of numpy.
    random = np.random.RandomState(list(seed))
    blocks = -(-features // width)
    directions = np.linalg.qr(random.standard_normal((groups, blocks, width, width)))[0]
    # A QR of Gaussian rows is uniform once each direction's sign is drawn.
    directions = directions.swapaxes(-1, -2) * random.choice([-1.0, 1.0], (groups, blocks, width, 1))
    norms = np.linalg.norm(random.standard_normal((groups, blocks * width, width)), axis=-1, keepdims=True)
    vectors = directions.reshape(groups, blocks * width, width) * norms
    return vectors[:, :features].astype(np.float32)


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    projection_GRK: np.ndarray,
    causal: bool = True,
) -> jax.Array:
    """Return the values averaged by ``phi(q).phi(k)``, float32, where (2009.14794, lemma 1 and eq. 5).

    ``phi(x) = exp(w x' - |x'|² / 2) / sqrt(R)`` and ``x' = x / K^(1/4)``: in expectation ``phi(q).phi(k) =
    exp(q k / sqrt(K))``.
    """
    groups, features, width = projection_GRK.shape

    def phi(x: jax.Array) -> jax.Array:
        x = zero_padding(x, seq).astype(jnp.float32) * width**-0.25
        w_HRK = jnp.repeat(jnp.asarray(projection_GRK), x.shape[2] // groups, axis=0)
        half = 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)
        return jnp.exp(jnp.einsum("BTHK,HRK->BTHR", x, w_HRK) - half) * features**-0.5

    return dense_average(phi(q_BTHK), phi(k_BSGK), v_BSGP, seq, causal=causal)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    projection_GRK: np.ndarray,
    state: Memory | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` by the chunked sums of ``linear``.

    Every exponential is bounded without a maximum over keys, which would depend on what came before:
    ``w k' - |k'|² / 2`` is at most ``|w|² / 2``, of which what is above LARGEST moves from the keys to the
    queries, and a query's own largest feature cancels in the average. No more than LARGEST moves, or keys of
    heads wider than 250 would be nothing; there a key that is all but a random vector is cut to exp(LARGEST).
    Of keys so large that ``|k'|² / 2`` underflows in all features nothing is left, and a query of such keys
    alone is answered with 0: normalise them (``qk_norm``).
    """
    batch, time, heads, width = q_BTHK.shape
    groups = projection_GRK.shape[0]
    w_GRK = jnp.asarray(projection_GRK)
    moved_GR = jnp.clip(0.5 * jnp.sum(w_GRK * w_GRK, axis=-1) - LARGEST, 0.0, LARGEST)
    q = zero_padding(q_BTHK, seq).astype(jnp.float32) * width**-0.25
    k = zero_padding(k_BTGK, seq).astype(jnp.float32) * width**-0.25
    q = q.reshape(batch, time, groups, heads // groups, width)
    log_q = jnp.einsum("BTGMK,GRK->BTGMR", q, w_GRK) + moved_GR[None, None, :, None]
    log_q -= jax.lax.stop_gradient(jnp.max(log_q, axis=-1, keepdims=True))
    log_k = jnp.einsum("BTGK,GRK->BTGR", k, w_GRK) - 0.5 * jnp.sum(k * k, axis=-1, keepdims=True)
    log_k = jnp.minimum(log_k - moved_GR[None, None], LARGEST)
    phi_q = jnp.exp(log_q).reshape(batch, time, heads, -1)
    return average(phi_q, jnp.exp(log_k), v_BTGP, seq, state, causal=causal, chunk=chunk)


class Performer(Kernel):
    """Softmax attention in expectation (FAVOR+): O(T R) to train, a state of R features.

    As published but for two points: the vectors are drawn once, not anew in training, and no constant is
    added to the features, which the published code does to keep its averages from dividing by zero.

    Attributes:
      features: R, random features of each key/value head.
      seed: of the vectors, with ``layer``.
    """

    small: ClassVar[dict] = {"features": 32}

    features: int = 256
    seed: int = 0

    def __post_init__(self):
        require(self.features >= 1, "features", self.features, "a number of random features, 1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        super().__post_init__()

    @property
    def rank(self):
        return self.features

    @property
    def projection(self) -> np.ndarray:
        """Return the random vectors, [G, R, K]."""
        return projections(self.groups, self.head_width, self.features, (self.seed, self.layer))

    def mix(self, qkv, seqs, state):
        causal = not self.bidirectional_mode
        return forward(*qkv, seq=seqs[0], projection_GRK=self.projection, state=state, causal=causal)

    def refer(self, qkv, seqs):
        causal = not self.bidirectional_mode
        return reference(*qkv, seq=seqs[0], projection_GRK=self.projection, causal=causal)
