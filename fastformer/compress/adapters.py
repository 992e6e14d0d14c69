"""Low-rank adapters: a product of two narrow matrices beside a weight (Hu et al. 2021, 2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fastformer.compress.method import Wrapped, at
from fastformer.compress.sites import Site

KEY = "linearise"  # of the adapters among the weights


@dataclass(frozen=True)
class Adapted(Wrapped):
    """A model whose weights at some sites are ``W + scale A B``, A of R columns and B zero at first (eq. 3).

    Attributes:
      sites: that have adapters. rank: R. scale: alpha / R.
      step: updates made, int32, where it is trained; else None.
    """

    sites: tuple[Site, ...]
    rank: int
    scale: float
    step: Any = None

    def at(self, step: jax.Array) -> Adapted:
        """Return the model as it is trained after ``step`` updates."""
        return dataclasses.replace(self, inner=at(self.inner, step), step=step)

    def init(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the initial variables, adapters that change nothing among them."""
        variables = self.inner.init(key, *args, **kwargs)
        if not self.sites:
            return variables
        made = {}
        for site, own in zip(self.sites, jax.random.split(jax.random.fold_in(key, 2), len(self.sites))):
            reads, writes = _letters(site)
            inputs, outputs = (tuple(site.shape[i] for i in axes) for axes in (site.inputs, site.outputs))
            normal = nn.initializers.normal(math.prod(inputs) ** -0.5)
            down = nn.with_logical_partitioning(normal, (*reads, "R"))
            up = nn.with_logical_partitioning(nn.initializers.zeros, ("R", *writes))
            made[f"{_name(site)}/down"] = down(own, (*inputs, self.rank))
            made[f"{_name(site)}/up"] = up(own, (self.rank, *outputs))
        return {**variables, "params": {**variables["params"], KEY: unflatten_dict(made, sep="/")}}

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``; of merged weights, where there are no adapters."""
        params = self.merged(variables["params"])
        return self.inner.apply({**variables, "params": params}, *args, **kwargs)

    def merged(self, params: Any) -> Any:
        """Return ordinary weights that do what ``params`` do with their adapters."""
        if KEY not in params:
            return params
        flat = flatten_dict({name: x for name, x in params.items() if name != KEY}, sep="/")
        adapters = flatten_dict(params[KEY], sep="/")
        for site in self.sites:
            down, up = (adapters[f"{_name(site)}/{part}"] for part in ("down", "up"))
            reads, writes = _letters(site)
            product = jnp.einsum(f"{reads}R,R{writes}->{site.letters}", down, up)
            flat[site.path] = flat[site.path] + self.scale * product
        return unflatten_dict(flat, sep="/")


def adapted(model: Any) -> Adapted:
    """Return the Adapted within a model."""
    while not isinstance(model, Adapted):
        model = model.inner
    return model


def _name(site: Site) -> str:
    return site.path.removesuffix("/weight")


def _letters(site: Site) -> tuple[str, str]:
    """Return the letters that a weight reads, and those that it writes."""
    return tuple("".join(site.letters[i] for i in axes) for axes in (site.inputs, site.outputs))
