"""Integers and small floats for numbers: how a matrix and its inputs are rounded, and multiplied so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from qwix import QArray

from fastformer.compress.sites import Site
from fastformer.core.alphabet import constrain


@dataclass(frozen=True)
class Format:
    """How a linear map is rounded.

    Attributes:
      weights: name of the dtype of the weights.
      inputs: name of the dtype of what they are multiplied with; "" leaves it in float.
      group: neighbouring inputs that share a scale, of one head where inputs have heads; 0 is all that an
        output sums over.
    """

    weights: str
    inputs: str = ""
    group: int = 0


FORMATS: dict[str, Format | None] = {
    "float": None,
    "int8": Format("int8", "int8"),
    "int8_weights": Format("int8"),
    "int4": Format("int4"),
    "fp8": Format("float8_e4m3fn", "float8_e4m3fn"),
}


def quantise_weight(weight: jax.Array, site: Site, form: Format) -> QArray:
    """Return the weight rounded to nearest, with a float32 scale per output or a bfloat16 one per group."""
    *others, last = site.inputs
    tiles = {axis: 1 for axis in others} | {last: form.group}
    return qwix.quantize(
        weight.astype(jnp.float32),
        jnp.dtype(form.weights),
        channelwise_axes=site.outputs,
        tiled_axes=tiles if form.group else None,
        scale_dtype=jnp.bfloat16 if form.group else None,
    )


def quantise_inputs(x: jax.Array, spec: str, form: Format) -> QArray:
    """Return the inputs of a linear map rounded to nearest, with a scale per token, of the dtype of ``x``."""
    operands, out = spec.split("->")
    kept = tuple(i for i, letter in enumerate(operands.split(",")[0]) if letter in out)
    return qwix.quantize(x, jnp.dtype(form.inputs), channelwise_axes=kept)


def is_stored(weight: Any) -> bool:
    """Return whether a leaf is a QArray: integers (or small floats) and their scales."""
    return isinstance(weight, QArray)


def dequantise(weight: QArray) -> jax.Array:
    """Return the float32 numbers that stored ones stand for."""
    return qwix.dequantize(weight.astype(jnp.float32))


def replace_leaves(params: Any, new: Callable[[str, Any], Any]) -> Any:
    """Return the tree with ``new(path, leaf)`` in place of each leaf; a QArray is one leaf."""

    def one(path: tuple, leaf: Any) -> Any:
        return new(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_stored)


def straight_through(x: jax.Array, rounded: jax.Array, active: Any) -> jax.Array:
    """Return ``rounded`` to the bit, with the gradient of ``x``, where ``active``; elsewhere ``x``.

    Bengio et al. 2013, 1308.3432, section 4.
    """
    rounded = rounded.astype(x.dtype)
    if active is not True:
        rounded = jnp.where(active, rounded, x)
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))


def linear(site: Site, dtype: jnp.dtype, x: jax.Array, weight: Any, form: Format, active: Any) -> jax.Array:
    """Return ``einsum(site.spec, x, weight)`` as it is with both rounded by ``form``.

    Stored weights are multiplied as they are: integers with integers where the inputs are rounded too.
    Float ones are rounded on the way, and gradients go straight through (Jacob et al. 2017, 1712.05877,
    section 3).

    Args:
      dtype: of the product.
      active: whether float weights are rounded at all, True or a traced boolean.
    """
    x = x.astype(dtype)
    if is_stored(weight):
        # Tied to x, for XLA would take what depends on weights alone out of a decode loop: floats, kept.
        x, weight = jax.lax.optimization_barrier((x, weight))
        left = quantise_inputs(x, site.spec, form) if form.inputs else x
        y = qwix.einsum(site.spec, left, weight.astype(dtype))
        return constrain(y.astype(dtype), site.spec.split("->")[1])
    weight = straight_through(weight, dequantise(quantise_weight(weight, site, form)), active)
    if form.inputs:
        x = straight_through(x, qwix.dequantize(quantise_inputs(x, site.spec, form)), active)
    return constrain(jnp.einsum(site.spec, x, weight.astype(dtype)), site.spec.split("->")[1])
