"""cosFormer: rectified features, weighted by the cosine of the distance (Qin et al. 2022, 2202.08791)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from fastformer.attention.linear import Kernel, average, dense_average, init_state
from fastformer.attention.recurrence import Memory
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

__all__ = ["Cosformer", "forward", "init_state", "reference"]

# Of every feature: the gradient of an average is the inverse of the query's size, which may be nothing.
LEAST = 1e-3


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, *, seq: Seq, length: int, causal: bool = True
) -> jax.Array:
    """Return the values averaged by ``relu(q_t).relu(k_s) cos(pi (t - s) / 2 M)``, float32 (eq. 8, 10)."""

    def phi(x: jax.Array) -> jax.Array:
        return jax.nn.relu(zero_padding(x, seq).astype(jnp.float32)) + LEAST

    distance_BTS = seq.position_BT[:, :, None] - seq.position_BT[:, None, :]
    weights_BTS = jnp.cos((0.5 * math.pi / length) * distance_BTS.astype(jnp.float32))
    weights_BTSG = jnp.repeat(weights_BTS[..., None], k_BSGK.shape[2], axis=-1)
    return dense_average(phi(q_BTHK), phi(k_BSGK), v_BSGP, seq, causal=causal, weights_BTSG=weights_BTSG)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    length: int,
    state: Memory | None = None,
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` by the chunked sums of ``linear``, the cosine split in two (eq. 11).

    Args:
      length: M, the distance whose weight is 0; a row must not be longer.
    """
    angle_BT11 = (0.5 * math.pi / length) * seq.position_BT.astype(jnp.float32)[:, :, None, None]
    cos, sin = jnp.cos(angle_BT11), jnp.sin(angle_BT11)

    def phi(x: jax.Array) -> jax.Array:
        x = jax.nn.relu(zero_padding(x, seq).astype(jnp.float32)) + LEAST
        return jnp.concatenate([x * cos, x * sin], axis=-1)

    return average(phi(q_BTHK), phi(k_BTGK), v_BTGP, seq, state, causal=causal, chunk=chunk)


class Cosformer(Kernel):
    """Rectified kernel attention with a bias to what is near: O(T) to train, a state of 2 K features.

    M is ``length``, the most tokens of a row: the published code takes that of the batch at hand, which a
    stream cannot know. Past it, which training refuses, the weights of a stream turn negative. A thousandth
    is added to every feature, where the published code divides by 1e-6 when a query has no positive feature
    in common with any key. Queries and keys are projected in float32, as routers are: a rounding that turns
    a sign turns a gradient on or off.
    """

    @property
    def rank(self):
        return 2 * self.head_width

    def linear(self, name, x_BTD, spec, *sizes, exact=False):
        return super().linear(name, x_BTD, spec, *sizes, exact=exact or name in ("query", "key"))

    def mix(self, qkv, seqs, state):
        if state is None:
            self._within(seqs[0])
        causal = not self.bidirectional_mode
        return forward(*qkv, seq=seqs[0], length=self.length, state=state, causal=causal)

    def refer(self, qkv, seqs):
        self._within(seqs[0])
        return reference(*qkv, seq=seqs[0], length=self.length, causal=not self.bidirectional_mode)

    def _within(self, seq: Seq) -> None:
        time = seq.segment_BT.shape[1]
        require(self.length >= time, "length", self.length, f"{time}, the tokens of a row, or more")
