"""Which weights stay: masks from scores, over all matrices or within each, or N of every M inputs."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from fastformer.compress.sites import Site, as_matrices, from_matrices

Scores = Mapping[str, jax.Array]  # by path, each of the shape of its parameter


def above_global(scores: Scores, sites: Mapping[str, Site], sparsity: jax.Array) -> dict[str, jax.Array]:
    """Return masks that drop the fraction ``sparsity`` of all weights together, those of least score."""
    least = _threshold(jnp.concatenate([jnp.ravel(x) for x in scores.values()]), sparsity)
    return {path: x >= least for path, x in scores.items()}


def above_matrix(scores: Scores, sites: Mapping[str, Site], sparsity: jax.Array) -> dict[str, jax.Array]:
    """Return masks that drop the fraction ``sparsity`` of every matrix, of scanned layers' each."""

    def one(path: str, x: jax.Array) -> jax.Array:
        rows = as_matrices(sites[path], x)
        least = jax.vmap(lambda row: _threshold(row, sparsity))(rows.reshape(rows.shape[0], -1))
        return from_matrices(sites[path], rows >= least[:, None, None])

    return {path: one(path, x) for path, x in scores.items()}


def _threshold(scores: jax.Array, sparsity: jax.Array) -> jax.Array:
    """Return the least score that stays; what has the same score stays too."""
    dropped = jnp.round(sparsity * scores.size).astype(jnp.int32)
    # Where all are dropped nothing is high enough.
    padded = jnp.append(jnp.sort(scores), jnp.inf)
    return padded[dropped]


def n_of_m(scores: Scores, sites: Mapping[str, Site], n: int, m: int) -> dict[str, jax.Array]:
    """Return masks that keep the ``n`` of most score among every ``m`` neighbouring inputs of an output.

    Mishra et al. 2021, 2104.08378, section 3.
    """

    def one(site: Site, x: jax.Array) -> jax.Array:
        rows = as_matrices(site, x)
        groups = rows.reshape(rows.shape[0], -1, m, rows.shape[-1])
        # Ranks, not a threshold: of equal scores exactly n stay.
        rank = jnp.argsort(jnp.argsort(-groups, axis=2, stable=True), axis=2)
        return from_matrices(site, (rank < n).reshape(rows.shape))

    return {path: one(sites[path], x) for path, x in scores.items()}
