"""One alphabet for variable suffixes, docstring shapes, einsum letters and logical axes.

A name such as ``q_BTHK`` says its shape; ``constrain(q_BTHK, "BTHK")`` says how it is laid out
over the mesh, by the letters alone. Layers never name a mesh axis.
"""

from __future__ import annotations

import flax.linen as nn
import jax

LETTERS = {
    "B": "batch",
    "T": "query time",
    "S": "key time",
    "D": "model width",
    "H": "query heads",
    "G": "key/value heads",
    "M": "query heads that share one key/value head (H = G M)",
    "K": "key width of a head",
    "P": "value width of a head",
    "F": "feed-forward width",
    "V": "vocabulary",
    "C": "chunk",
    "N": "chunks",
    "W": "window",
    "R": "features or rank",
    "E": "experts",
    "L": "layers",
}


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrain the layout of ``x`` over the mesh; without a mesh it returns ``x``.

    Raises:
      ValueError: the letters do not match the rank, or are not in the alphabet.
    """
    if len(letters) != x.ndim or not set(letters) <= set(LETTERS):
        raise ValueError(f"shape {x.shape} cannot be spelt {letters!r}")
    return nn.with_logical_constraint(x, tuple(letters))
