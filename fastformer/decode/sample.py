"""From logits to a token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, temperature: float, top_k: int, top_p: float
) -> jax.Array:
    """Return a token per row, [B] int32.

    Args:
      logits_BV: float32.
      keys_B: a random key per row.
      temperature: 0 takes the likeliest token, whatever the rest says.
      top_k: only the k likeliest; 0 is all.
      top_p: only the likeliest that together hold this probability, the one that crosses it included
        (Holtzman et al. 2019, 1904.09751, section 3.1).
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        order_BV = jnp.argsort(-logits_BV, axis=-1)
        sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
        before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
        rank_BV = jnp.argsort(order_BV, axis=-1)
        kept_BV = jnp.take_along_axis(before_BV < top_p, rank_BV, axis=-1)
        logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
