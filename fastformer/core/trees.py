"""Parameter trees: paths, counts, sizes and checksums."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCANNED = "layers"  # what holds the parameters of scanned layers, each with a leading axis of layers


def paths(tree: Any) -> dict[str, Any]:
    """Return ``{"layers/0/mixer/query": leaf, …}`` for every leaf of a tree."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count(tree: Any) -> int:
    """Return the number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Return the size in bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def checksums(tree: Any) -> Any:
    """Return a uint32 checksum per array: a sum of its words, each times an odd weight, mod 2^32.

    Integer sums do not depend on their order, so the checksum is the same on any mesh, and it
    changes when any bit of a word does.
    """
    return jax.tree.map(_checksum, tree)


def _checksum(x: jax.Array) -> jax.Array:
    x = jnp.asarray(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    weight = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        weight = weight * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(words * (weight * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)
