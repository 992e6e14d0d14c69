"""Rounding and pruning that make the other weights of an output answer for what each one loses.

Both go through the inputs of a matrix one by one. When input i of an output changes by d, the error of the
output over calibration text grows least if the inputs that are still to come move by
``-d [H^-1]_ij / [H^-1]_ii``, H the Gram matrix of the inputs (Hassibi & Stork 1993). With the upper
triangular factor U of ``H^-1 = UT U`` that is ``-d U_ij / U_ii`` for all j > i (Frantar et al. 2022,
2210.17323, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy.linalg as linalg

DAMPING = 0.01  # of the mean of the diagonal of H, added to it
BLOCK = 128  # most inputs among which SparseGPT chooses what it prunes


def inverse_factor(gram_II: jax.Array) -> jax.Array:
    """Return upper triangular U, [I, I], with ``UT U`` the inverse of the damped Gram matrix."""
    diagonal = jnp.diagonal(gram_II)
    mean = jnp.mean(diagonal)
    # An input that is always zero has no row; any number will do in its place.
    extra = DAMPING * mean + jnp.where(diagonal == 0, jnp.where(mean > 0, mean, 1.0), 0.0)
    damped = gram_II + jnp.diag(extra)
    # H = M MT with M upper triangular, from the Cholesky factor of H read backwards; U = M^-1.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return linalg.solve_triangular(upper, jnp.eye(len(upper)), lower=False)


def gptq(
    weight_IO: jax.Array, scale_IO: jax.Array, gram_II: jax.Array, to_grid: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return the numbers, [I, O] float32, that ``to_grid`` leaves as they are, times scale near the weight.

    Frantar et al. 2022, 2210.17323, with scales that are known before, and inputs in falling order of
    ``H_ii``, as their code has both as options. A weight that is zero, being pruned, stays so.

    Args:
      scale_IO: of the grid. to_grid: rounds to the numbers that can be stored.
    """
    order = jnp.argsort(-jnp.diagonal(gram_II))
    U = inverse_factor(gram_II[order][:, order])
    weight, scale = weight_IO[order], scale_IO[order]
    kept = weight != 0

    def one(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, stored = found
        number = jnp.where(kept[i], to_grid(weight[i] / scale[i]), 0.0)
        lost = (weight[i] - number * scale[i]) / U[i, i]
        return weight - jnp.outer(U[i], lost), stored.at[i].set(number)

    stored = jax.lax.fori_loop(0, len(U), one, (weight, jnp.zeros_like(weight)))[1]
    return jnp.zeros_like(stored).at[order].set(stored)


def sparsegpt(
    weight_IO: jax.Array, gram_II: jax.Array, sparsity: float, kept_of: tuple[int, int]
) -> jax.Array:
    """Return the weight, [I, O], with zeros, and what is left moved to make up for them.

    Frantar & Alistarh 2023, 2301.00774, algorithm 1: the weights of least ``w^2 / U_ii^2`` go, chosen when
    their block of inputs is reached. A block is the largest divisor of I up to 128.

    Args:
      sparsity: fraction of zeros in every block; of no account where ``kept_of`` is (N, M), M > 0, which
        keeps N of every M neighbouring inputs of an output.
    """
    n, m = kept_of
    inputs = len(weight_IO)
    size = m or max(block for block in range(1, min(BLOCK, inputs) + 1) if inputs % block == 0)
    U = inverse_factor(gram_II)
    weight_IO = jnp.where(jnp.diagonal(gram_II)[:, None] == 0, 0.0, weight_IO)

    def block(start: jax.Array, weight: jax.Array) -> jax.Array:
        here = jax.lax.dynamic_slice_in_dim(weight, start, size)
        scores = (here / jax.lax.dynamic_slice_in_dim(jnp.diagonal(U), start, size)[:, None]) ** 2
        axis = 0 if m else None
        rank = jnp.argsort(jnp.argsort(scores if m else scores.ravel(), axis=axis or 0), axis=axis or 0)
        gone = rank < (m - n) if m else (rank < round(sparsity * scores.size)).reshape(scores.shape)

        def one(k: jax.Array, weight: jax.Array) -> jax.Array:
            i = start + k
            lost = jnp.where(gone[k], weight[i], 0.0) / U[i, i]
            return weight - jnp.outer(U[i], lost)

        weight = jax.lax.fori_loop(0, size, one, weight)
        # What has gone is zero but for rounding; zeros must be zeros.
        here = jnp.where(gone, 0.0, jax.lax.dynamic_slice_in_dim(weight, start, size))
        return jax.lax.dynamic_update_slice_in_dim(weight, here, start, 0)

    return jax.lax.fori_loop(0, inputs // size, lambda b, weight: block(b * size, weight), weight_IO)
