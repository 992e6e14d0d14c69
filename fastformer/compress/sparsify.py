"""Pruning that looks at text: which weights of a matrix go, and what becomes of the others."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from fastformer.compress.calibrate import Inputs, blocks, unblocks
from fastformer.compress.second_order import sparsegpt
from fastformer.compress.sites import Site


@partial(jax.jit, static_argnums=(0, 3, 4))
def by_wanda(
    site: Site, weight: jax.Array, inputs: Inputs, sparsity: float, kept_of: tuple[int, int]
) -> jax.Array:
    """Return a weight with zeros where ``|w_ij| ||x_i||`` is least among the inputs of an output.

    Sun et al. 2023, 2306.11695, eq. 1; nothing else is changed.

    Args:
      sparsity: fraction of zeros; of no account where ``kept_of`` is (N, M) with M > 0: N of every M
        neighbouring inputs stay.
    """
    matrices = blocks(site, weight)
    norms_SI = jnp.sqrt(jnp.diagonal(inputs.gram, axis1=1, axis2=2))
    scores = jnp.abs(matrices) * norms_SI[:, :, None]
    n, m = kept_of
    groups = scores.reshape(scores.shape[0], -1, m or scores.shape[1], scores.shape[2])
    rank = jnp.argsort(jnp.argsort(groups, axis=2), axis=2)
    gone = rank < ((m - n) if m else round(sparsity * scores.shape[1]))
    return unblocks(site, jnp.where(gone.reshape(scores.shape), 0.0, matrices)).astype(weight.dtype)


@partial(jax.jit, static_argnums=(0, 3, 4))
def by_sparsegpt(
    site: Site, weight: jax.Array, inputs: Inputs, sparsity: float, kept_of: tuple[int, int]
) -> jax.Array:
    """Return a weight pruned by SparseGPT (second_order.sparsegpt), arguments as in ``by_wanda``."""
    each = jax.vmap(lambda weight_IO, gram_II: sparsegpt(weight_IO, gram_II, sparsity, kept_of))
    return unblocks(site, each(blocks(site, weight), inputs.gram)).astype(weight.dtype)
