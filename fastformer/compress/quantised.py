"""A model whose linear maps are rounded as it runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from fastformer.compress.method import Wrapped
from fastformer.compress.numerics import (
    Format,
    dequantise,
    is_stored,
    linear,
    quantise_weight,
    replace_leaves,
    straight_through,
)
from fastformer.compress.sites import Site
from fastformer.core.layers import Linear


@dataclass(frozen=True)
class Quantised(Wrapped):
    """A model whose linear maps are rounded, from float weights or from stored ones.

    Attributes:
      forms: (site, format) of every matrix that is rounded.
      start: updates before it begins.
      active: whether it has, True or a traced boolean.
    """

    forms: tuple[tuple[Site, Format], ...]
    start: int = 0
    active: Any = True

    def at(self, step: jax.Array) -> Quantised:
        """Return the model as it is trained after ``step`` updates."""
        active = step >= self.start if self.start else True
        return dataclasses.replace(super().at(step), active=active)

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``."""
        forms, args = {site.path: (site, form) for site, form in self.forms}, list(args)

        def table(path: str, weight: Any) -> Any:
            if path not in forms or not forms[path][0].table:
                return weight
            if is_stored(weight):
                # Tied to the tokens, for the same reason as in numerics.linear.
                args[0], weight = jax.lax.optimization_barrier((args[0], weight))
                return dequantise(weight)
            return straight_through(weight, dequantise(quantise_weight(weight, *forms[path])), self.active)

        def rounded(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, "/".join((*context.module.path, "weight"))
            mine = isinstance(module, Linear) and context.method_name == "__call__" and path in forms
            if not mine or forms[path][0].table:
                return next_call(*args, **kwargs)
            site, form = forms[path]
            one = dataclasses.replace(site, shape=module.shape)  # of scanned layers, the one at work
            weight = module.get_variable("params", "weight")
            y = linear(one, module.dtype, args[0], weight, form, self.active)
            return module.with_bias(y, module.get_variable("params", "bias")) if module.bias else y

        params = replace_leaves(variables["params"], table)
        with nn.intercept_methods(rounded):
            return self.inner.apply({**variables, "params": params}, *args, **kwargs)


def forms_of(model: Any) -> dict[str, tuple[Site, Format]]:
    """Return what a model rounds, by path."""
    while not isinstance(model, Quantised):
        model = model.inner
    return {site.path: (site, form) for site, form in model.forms}


def rounding_only(model: Any, paths: frozenset[str]) -> Any:
    """Return the model with the matrices at ``paths`` rounded, and no others."""
    if isinstance(model, Quantised):
        return dataclasses.replace(model, forms=tuple(x for x in model.forms if x[0].path in paths))
    return dataclasses.replace(model, inner=rounding_only(model.inner, paths))


def without_rounding(model: Any) -> Any:
    """Return the model with nothing rounded."""
    if isinstance(model, Quantised):
        return dataclasses.replace(model, forms=(), inner=without_rounding(model.inner))
    return (
        dataclasses.replace(model, inner=without_rounding(model.inner))
        if isinstance(model, Wrapped)
        else model
    )
