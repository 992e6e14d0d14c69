"""Random feature attention: sines and cosines of random projections (Peng et al. 2021, 2103.02143)."""

from __future__ import annotations

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.linear import Kernel, average, dense_average, init_state
from fastformer.attention.recurrence import Memory
from fastformer.attention.scores import Mask
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

__all__ = ["RandomFeatures", "forward", "gaussians", "init_state", "reference"]

# Sums of sines and cosines can come near zero or below it, where kernels never are.
FLOOR = 0.1


@functools.cache
def gaussians(groups: int, width: int, features: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return standard normal vectors, [G, R, K] float32, that follow from ``seed``."""
    # RandomState's stream is frozen: a checkpoint finds the same features in every version of numpy.
    random = np.random.RandomState(list(seed))
    return random.standard_normal((groups, features, width)).astype(np.float32)


def _features(x: jax.Array, w_GRK: jax.Array, seq: Seq) -> jax.Array:
    """Return ``[sin(w x), cos(w x)] / sqrt(R)`` of x at length one, [B, T, H, 2 R] (eq. 2, section 3.1)."""
    batch, time, heads, width = x.shape
    groups, features, _ = w_GRK.shape
    x = zero_padding(x, seq).astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-6))
    x = x.reshape(batch, time, groups, heads // groups, width)
    angle = jnp.einsum("BTGMK,GRK->BTGMR", x, w_GRK).reshape(batch, time, heads, features)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1) * features**-0.5


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    sigma_GK: jax.Array,
    gate_BTG: jax.Array | None = None,
    *,
    seq: Seq,
    gaussian_GRK: np.ndarray,
    causal: bool = True,
) -> jax.Array:
    """Return the values averaged by ``phi(q).phi(k)``, float32 (2103.02143, eq. 5).

    With gates g a key s weighs ``(1 - g_s) g_{s+1} … g_t`` at t besides: eq. 7 unrolled.
    """
    w_GRK = sigma_GK[:, None] * jnp.asarray(gaussian_GRK)
    weights_BTSG = None
    if gate_BTG is not None:
        log_BTG = zero_padding(jax.nn.log_sigmoid(gate_BTG.astype(jnp.float32)), seq)
        later = jnp.tril(jnp.ones((log_BTG.shape[1],) * 2, bool), -1)[None, :, :, None]
        left_BTSG = jnp.exp(jnp.cumsum(jnp.where(later, log_BTG[:, :, None], 0.0), axis=1))
        weights_BTSG = left_BTSG * jax.nn.sigmoid(-gate_BTG.astype(jnp.float32))[:, None]
        weights_BTSG = jnp.where(Mask(causal).visible(seq, seq)[..., None], weights_BTSG, 0.0)
    q_BTHR, k_BSGR = (_features(x, w_GRK, seq) for x in (q_BTHK, k_BSGK))
    return dense_average(
        q_BTHR, k_BSGR, v_BSGP, seq, causal=causal, floor=FLOOR, weights_BTSG=weights_BTSG
    )


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    sigma_GK: jax.Array,
    gate_BTG: jax.Array | None = None,
    *,
    seq: Seq,
    gaussian_GRK: np.ndarray,
    state: Memory | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` by the chunked sums of ``linear``.

    Args:
      sigma_GK: scale of the random vectors' entries.
      gate_BTG: before its sigmoid; None is no gate.
    """
    w_GRK = sigma_GK[:, None] * jnp.asarray(gaussian_GRK)
    q_BTHR, k_BTGR = (_features(x, w_GRK, seq) for x in (q_BTHK, k_BTGK))
    log_decay_BTG = None
    if gate_BTG is not None:
        gate_BTG = zero_padding(gate_BTG, seq).astype(jnp.float32)
        k_BTGR *= jax.nn.sigmoid(-gate_BTG)[..., None]
        log_decay_BTG = jax.nn.log_sigmoid(gate_BTG)
    return average(
        q_BTHR, k_BTGR, v_BTGP, seq, state,
        causal=causal, chunk=chunk, floor=FLOOR, log_decay_BTG=log_decay_BTG,
    )  # fmt: skip


class RandomFeatures(Kernel):
    """A Gaussian kernel's random features: O(T R) to train, a state of 2 R features.

    As published but for two points: the vectors are drawn once, where training there picks among several
    draws, and the floor of the normaliser is 0.1 of one key's greatest weight, since the published one
    depends on the number of features.

    Attributes:
      features: R random vectors of each key/value head; each makes a sine and a cosine.
      gated: RFA-Gate: a gate a head and token between what was and what comes; causal only.
      seed: of the vectors, with ``layer``.
    """

    small: ClassVar[dict] = {"features": 32}

    features: int = 64
    gated: bool = False
    seed: int = 0

    def __post_init__(self):
        require(self.features >= 1, "features", self.features, "a number of random vectors, 1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        ungated = not (self.gated and self.bidirectional_mode)
        require(ungated, "gated", self.gated, "False where attention is bidirectional")
        super().__post_init__()

    @property
    def rank(self):
        return 2 * self.features

    @property
    def gaussian(self) -> np.ndarray:
        """Return the random vectors before their scale, [G, R, K]."""
        return gaussians(self.groups, self.head_width, self.features, (self.seed, self.layer))

    def gates(self, x_BTD, seq):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("G", "K"))
        sigma_GK = self.param("sigma", init, (self.groups, self.head_width))
        if not self.gated:
            return (sigma_GK,)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("G",))
        bias_G = self.param("decay_bias", zeros, (self.groups,))
        gate_BTG = self.linear("decay", x_BTD, "BTD,DG->BTG", self.groups).astype(jnp.float32)
        return sigma_GK, gate_BTG + bias_G[None, None]

    def mix(self, qkv, seqs, state):
        causal = not self.bidirectional_mode
        return forward(*qkv, seq=seqs[0], gaussian_GRK=self.gaussian, state=state, causal=causal)

    def refer(self, qkv, seqs):
        causal = not self.bidirectional_mode
        return reference(*qkv, seq=seqs[0], gaussian_GRK=self.gaussian, causal=causal)
