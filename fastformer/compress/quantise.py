"""Quantisation: training that knows the rounding, and weights stored as true integers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from fastformer.compress.method import Calibration, Method, Wrapped
from fastformer.compress.numerics import (
    FORMATS,
    Format,
    dequantise,
    is_stored,
    linear,
    quantise_weight,
    replace_leaves,
    straight_through,
)
from fastformer.compress.sites import Site, matching, sites
from fastformer.core.errors import FieldError, lookup, require
from fastformer.core.layers import Linear


@dataclass(frozen=True)
class Quantise(Method):
    """Round the matrices of linear maps, and what they are multiplied with, to few bits.

    Norms, biases, decays and every other parameter that is no matrix of a linear map stay float.

    Attributes:
      format: a row of FORMATS, of the matrices that no rule names; gates, what computes in float32 whatever
        the dtype, embedding and head are float unless a rule names them.
      rules: ``"REGEX=FORMAT"`` each, the regular expression over whole parameter paths; the first that
        matches counts.
      group: inputs that share a scale in formats that leave inputs float; 0 is one scale an output.
      start: updates in float before the rounding begins; at all steps of the run, it is at the end alone.

    Raises:
      FieldError: an unknown format, or a rule that cannot be read.
    """

    format: str
    rules: tuple[str, ...]
    group: int
    start: int

    def __post_init__(self) -> None:
        lookup(FORMATS, self.format, "format")
        for field in ("group", "start"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        for index, rule in enumerate(self.rules):
            field, (_, found, form) = f"rules[{index}]", rule.rpartition("=")
            require(bool(found), field, rule, "REGEX=FORMAT, as in '.*/mlp/.*=int4'")
            lookup(FORMATS, form, field)

    def on_model(self, model: Any) -> Quantised:
        """Return the model with its linear maps rounded.

        Raises:
          FieldError: a rule matches nothing, a group does not divide, or nothing is quantised.
        """
        found = sites(model)
        forms = tuple((found[path], form) for path, form in self.forms(found).items())
        return Quantised(model, forms, self.start)

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights with those that are quantised as ``QArray``: integers and their scales."""
        forms = {site.path: (site, form) for site, form in self.on_model(model).forms}

        def one(path: str, weight: jax.Array) -> Any:
            return quantise_weight(weight, *forms[path]) if path in forms else weight

        return jax.jit(lambda params: replace_leaves(params, one))(params)

    def forms(self, found: Mapping[str, Site]) -> dict[str, Format]:
        """Return the format of every matrix that is quantised, by its path."""
        left, forms = dict(found), {}
        for index, rule in enumerate(self.rules):
            pattern, _, name = rule.rpartition("=")
            for path in matching(pattern, f"rules[{index}]", list(left)):
                forms[path] = FORMATS[name]
                del left[path]
        for path, site in left.items():
            forms[path] = None if site.kept else FORMATS[self.format]
        chosen = {path: self._grouped(found[path], form) for path, form in forms.items() if form}
        if not chosen:
            raise FieldError("format", f"{self.format!r} and the rules leave every matrix float")
        return {path: chosen[path] for path in found if path in chosen}

    def _grouped(self, site: Site, form: Format) -> Format:
        if not self.group or form.inputs:
            return form
        inputs = site.shape[site.inputs[-1]]
        if inputs % self.group:
            raise FieldError("group", f"{self.group} does not divide the {inputs} inputs of {site.path}")
        return dataclasses.replace(form, group=self.group)


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
            return linear(one, module.dtype, args[0], weight, form, self.active)

        params = replace_leaves(variables["params"], table)
        with nn.intercept_methods(rounded):
            return self.inner.apply({**variables, "params": params}, *args, **kwargs)
