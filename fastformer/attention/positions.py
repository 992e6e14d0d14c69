"""Positions: rotary, linear biases, sinusoids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.core.errors import require

KINDS = ("rope", "alibi", "sinusoidal", "learned", "none")


def rope(x_BTHK: jax.Array, position_BT: jax.Array, base: float) -> jax.Array:
    """Rotate the pairs (i, i + K/2) of each head by ``position * base^(-2i/K)`` radians.

    Su et al. 2021, RoFormer, 2104.09864, eq. 15 (half-split pairs).

    Raises:
      FieldError: K is odd.
    """
    width = x_BTHK.shape[-1]
    require(width % 2 == 0, "positions", "rope", f"another where a head's width is odd, as {width} is")
    half = width // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency.reshape(1, 1, 1, half)
    # Without the barrier XLA fuses the cosines into each use and computes them anew for every head.
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angle), jnp.sin(angle)))
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """Return the slope of each head's distance penalty, [H] float32.

    The geometric sequence 2^(-8/n), 2^(-16/n), … for n heads, a power of two; other numbers of
    heads take every second term of the sequence for 2n besides. Press et al. 2021, 2108.12409, section 3.
    """
    whole = 2 ** int(np.floor(np.log2(heads)))
    slopes = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    between = 2.0 ** (-8.0 * np.arange(1, 2 * whole + 1, 2) / (2 * whole))
    return np.concatenate([slopes, between[: heads - whole]]).astype(np.float32)


def sinusoids(position_BT: jax.Array, width: int) -> jax.Array:
    """Return sines then cosines of the positions, [B, T, D] float32, D even.

    Vaswani et al. 2017, 1706.03762, section 3.5 (halves instead of alternating columns).
    """
    frequency = 10000.0 ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))
    angle = position_BT[:, :, None].astype(jnp.float32) * frequency.reshape(1, 1, -1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
