"""How float weights become the numbers that are stored: to nearest, or knowing what they will be given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from qwix import QArray

from fastformer.compress import awq
from fastformer.compress.calibrate import Inputs, Text, blocks, by_stages, unblocks
from fastformer.compress.method import Calibration
from fastformer.compress.numerics import Format, dequantise, is_stored, quantise_weight, replace_leaves
from fastformer.compress.quantised import forms_of, rounding_only
from fastformer.compress.second_order import gptq
from fastformer.compress.sites import Site
from fastformer.core.errors import FieldError


def to_nearest(model: Any, params: Any, calibration: Calibration) -> Any:
    """Return the weights rounded to nearest; the text is not read."""
    return _rounded(params, forms_of(model))


def by_gptq(model: Any, params: Any, calibration: Calibration) -> Any:
    """Return the weights rounded by GPTQ, block by block, each given what those before it now give.

    The scales are those of rounding to nearest. Embedding and head are rounded to nearest, and so is what
    the task's loss never comes to.
    """
    forms = forms_of(model)
    tables = {path: form for path, form in forms.items() if form[0].table}
    maps = {path: site for path, (site, _) in forms.items() if not site.table}
    params = _rounded(params, tables)

    def model_after(done: frozenset[str]) -> Any:
        return rounding_only(model, done | frozenset(tables))

    def change(site: Site, weight: jax.Array, inputs: Inputs) -> QArray:
        return _gptq(site, forms[site.path][1], weight, inputs.gram)

    return _rounded(by_stages(Text(calibration), model_after, params, maps, change), forms)


def by_awq(model: Any, params: Any, calibration: Calibration) -> Any:
    """Return the weights rounded to nearest after AWQ has moved scales between them.

    Raises:
      FieldError: the model has no place where a scale can be moved.
    """
    forms = forms_of(model)
    scaled = awq.scale(rounding_only(model, frozenset()), params, forms, Text(calibration))
    if scaled is None:
        raise FieldError(
            "rounding", "awq finds no norm or matrix whose scale it can move; use gptq or nearest"
        )
    return _rounded(scaled, forms)


ROUNDINGS = {"nearest": to_nearest, "gptq": by_gptq, "awq": by_awq}


def _rounded(params: Any, forms: dict[str, tuple[Site, Format]]) -> Any:
    def one(path: str, weight: Any) -> Any:
        return quantise_weight(weight, *forms[path]) if path in forms and not is_stored(weight) else weight

    return jax.jit(lambda params: replace_leaves(params, one))(params)


def _gptq(site: Site, form: Format, weight: jax.Array, gram_SII: jax.Array) -> QArray:
    def to_grid(x: jax.Array) -> jax.Array:
        stored = jnp.dtype(form.weights)
        if jnp.issubdtype(stored, jnp.integer):
            least, most = jnp.iinfo(stored).min, jnp.iinfo(stored).max
            return jnp.clip(jnp.round(x), least, most)
        most = jnp.finfo(stored).max.astype(jnp.float32)
        return jnp.clip(x, -most, most).astype(stored).astype(jnp.float32)

    @jax.jit
    def rounded(weight: jax.Array, gram_SII: jax.Array) -> QArray:
        nearest = quantise_weight(weight, site, form)
        scale = dequantise(dataclasses.replace(nearest, qvalue=jnp.ones_like(nearest.qvalue)))
        each = jax.vmap(lambda *args: gptq(*args, to_grid))
        numbers = each(blocks(site, weight), blocks(site, scale), gram_SII)
        return dataclasses.replace(nearest, qvalue=unblocks(site, numbers).astype(nearest.qvalue.dtype))

    return rounded(weight.astype(jnp.float32), gram_SII)
