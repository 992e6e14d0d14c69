"""Cross-entropy of the next token, a chunk of the row at a time: [B, T, V] logits never exist."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def chunked(
    logits: Callable[[jax.Array], jax.Array], x_BTD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """Return the nats of every target, [B, T] float32.

    Each chunk's logits live while the scan is at it; the backward pass computes them again. Chunk n has the
    tokens n, n + N, …: some of each device, where time is split, so that none is moved.

    Args:
      logits: ``x_BCD -> logits_BCV`` float32.
      chunk: C, tokens of each row at once; 0 is all.
    """
    time = targets_BT.shape[1]
    if not chunk or chunk >= time:
        return optax.softmax_cross_entropy_with_integer_labels(logits(x_BTD), targets_BT)
    chunks = -(-time // chunk)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, chunks, *x.shape[2:]), 2, 0)

    @jax.checkpoint
    def one(_: None, part: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, optax.softmax_cross_entropy_with_integer_labels(logits(part[0]), part[1])

    nats_NBC = jax.lax.scan(one, None, (split(x_BTD), split(targets_BT)))[1]
    return jnp.moveaxis(nats_NBC, 0, 2).reshape(targets_BT.shape[0], -1)[:, :time]
