"""Pruning: weights of least magnitude become zeros while training goes on, by masks beside the moments."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fastformer.compress.calibrate import Inputs, Text, by_stages, plain
from fastformer.compress.masks import above_global, above_matrix, n_of_m
from fastformer.compress.method import Calibration, Method
from fastformer.compress.quantised import without_rounding
from fastformer.compress.sites import Site, matching, sites
from fastformer.compress.sparsify import by_sparsegpt, by_wanda
from fastformer.core.errors import FieldError, lookup, require

SCOPES = {"global": above_global, "matrix": above_matrix}
SCORES = {"magnitude": None, "wanda": by_wanda, "sparsegpt": by_sparsegpt}


class PruneState(NamedTuple):
    """What the optimiser keeps.

    Attributes:
      masks: booleans, False where a weight is pruned, at the paths of the pruned matrices alone.
      made: int32, updates.
      inner: the state of the optimiser within.
    """

    masks: Any
    made: jax.Array
    inner: Any


@dataclass(frozen=True)
class Prune(Method):
    """Magnitude pruning with the cubic schedule of Zhu & Gupta 2017, 1710.01878, eq. 1.

    A pruned weight stays zero: it has no gradient from then on. Weights that are zeros are stored as one
    bit each; no product becomes faster by them.

    Attributes:
      sparsity: s_f, the fraction that ends as zeros.
      pattern: "N:M" keeps N of every M neighbouring inputs of an output; "" is by sparsity.
      scope: "global" or "matrix", among which weights the least are found, by magnitude.
      matrices: regular expressions over parameter paths; none is all matrices but those that methods
        leave alone.
      start: t_0, updates before the first zeros. end: t_0 + n dt, when the last come; 0 is ``start``.
      every: dt.
      score: a row of SCORES. All but magnitude are known from text: they prune once, at the end of the run.

    Raises:
      FieldError: a value that cannot be.
    """

    sparsity: float
    pattern: str
    scope: str
    matrices: tuple[str, ...]
    start: int
    end: int
    every: int
    score: str

    def __post_init__(self) -> None:
        lookup(SCORES, self.score, "score")
        if self.calibrated:
            for field in ("start", "end"):
                allowed = f"0 with score {self.score}, which prunes at the end of the run alone"
                require(getattr(self, field) == 0, field, getattr(self, field), allowed)
        require(0 < self.sparsity < 1, "sparsity", self.sparsity, "above 0 and below 1")
        lookup(SCOPES, self.scope, "scope")
        for field, least in (("start", 0), ("every", 1), ("end", 0)):
            value = getattr(self, field)
            require(least <= value < 2**31, field, value, f"from {least} to 2^31 - 1")
        good = self.end == 0 or self.end >= self.start
        require(good, "end", self.end, f"0, or start {self.start} or more")
        if self.pattern:
            n, m = self.kept_of
            require(0 < n < m, "pattern", self.pattern, "N:M with 0 < N < M, as in 2:4")

    @property
    def calibrated(self) -> bool:
        """Return whether text says which weights go."""
        return self.score != "magnitude"

    @property
    def kept_of(self) -> tuple[int, int]:
        """Return N and M of the pattern."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def on_model(self, model: Any) -> Any:
        """Return the model itself, for which pruned weights are plain zeros.

        Raises:
          FieldError: a regular expression matches nothing, or M does not divide a matrix's inputs.
          UserError: what is calibrated on text has scanned layers.
        """
        if self.calibrated:
            plain(model)
        self.chosen(model)
        return model

    def on_optimiser(self, tx: optax.GradientTransformation, model: Any) -> optax.GradientTransformation:
        """Return the optimiser that makes weights zeros as the schedule says, and keeps them so."""
        if self.calibrated:
            return tx
        found = self.chosen(model)

        def init(params: Any) -> PruneState:
            flat = flatten_dict(params, sep="/")
            ones = {path: jax.tree.map(lambda x: jnp.ones(x.shape, bool), flat[path]) for path in found}
            return PruneState(unflatten_dict(ones, sep="/"), jnp.zeros((), jnp.int32), tx.init(params))

        def update(gradients: Any, state: PruneState, params: Any) -> tuple[Any, PruneState]:
            masks = flatten_dict(state.masks, sep="/")
            updates, inner = tx.update(_masked(gradients, masks, 0.0), state.inner, params)
            to_zero = jax.tree.map(jnp.negative, params)
            # Moments of earlier gradients would move what is pruned already.
            updates, made = _masked(updates, masks, to_zero), state.made + 1
            flat = flatten_dict(optax.apply_updates(params, updates), sep="/")
            weights = {path: flat[path] for path in found}
            masks = jax.lax.cond(
                self.due(made), lambda: self.masks(weights, found, self.sparsity_at(made)), lambda: masks
            )
            updates = _masked(updates, masks, to_zero)
            return updates, PruneState(unflatten_dict(masks, sep="/"), made, inner)

        return optax.GradientTransformation(init, update)

    def on_export(self, model: Any, params: Any, calibration: Calibration) -> Any:
        """Return the weights at the final sparsity; after a schedule that has ended, as they are."""
        found = self.chosen(model)
        if self.calibrated:
            sparser = SCORES[self.score]

            def change(site: Site, weight: jax.Array, inputs: Inputs) -> jax.Array:
                return sparser(site, weight, inputs, self.sparsity, self.kept_of)

            return by_stages(Text(calibration), lambda _: without_rounding(model), params, found, change)

        @jax.jit
        def pruned(params: Any) -> Any:
            flat = flatten_dict(params, sep="/")
            masks = self.masks({path: flat[path] for path in found}, found, jnp.float32(self.sparsity))
            return _masked(params, masks, 0.0)

        return pruned(params)

    def chosen(self, model: Any) -> dict[str, Site]:
        """Return the matrices to prune, by their paths."""
        found = sites(model)
        paths = [path for path, site in found.items() if not site.kept]
        if self.matrices:
            named = [
                matching(pattern, f"matrices[{index}]", list(found))
                for index, pattern in enumerate(self.matrices)
            ]
            paths = [path for path in found if any(path in names for names in named)]
        if not paths:
            raise FieldError("matrices", "the model has no matrix that may be pruned unless it is named")
        for path in paths if self.calibrated else ():
            if found[path].table:
                raise FieldError("matrices", f"{self.score} has no inputs to know {path} by; name others")
        for path in paths if self.pattern else ():
            inputs = math.prod(found[path].shape[axis] for axis in found[path].inputs)
            if inputs % self.kept_of[1]:
                raise FieldError("pattern", f"{self.pattern} does not divide the {inputs} inputs of {path}")
        return {path: found[path] for path in paths}

    def due(self, made: jax.Array) -> jax.Array:
        """Return whether masks are made anew after ``made`` updates."""
        end = self.end or self.start
        on_time = ((made - self.start) % self.every == 0) | (made == end)
        # An optimiser is first asked after one update, which a start of 0 means too.
        return on_time & (made >= self.start) & (made <= end) | (made == max(self.start, 1))

    def sparsity_at(self, made: jax.Array) -> jax.Array:
        """Return the fraction of zeros after ``made`` updates, float32."""
        length = max((self.end or self.start) - self.start, 0)
        left = jnp.clip(1 - (made - self.start) / length, 0, 1) if length else jnp.float32(0)
        return jnp.float32(self.sparsity) * (1 - left**3)

    def masks(
        self, weights: Mapping[str, jax.Array], found: Mapping[str, Site], sparsity: jax.Array
    ) -> dict[str, jax.Array]:
        """Return the masks of weights by their magnitude."""
        scores = {path: jnp.abs(x).astype(jnp.float32) for path, x in weights.items()}
        if self.pattern:
            return n_of_m(scores, found, *self.kept_of)
        return SCOPES[self.scope](scores, found, sparsity)


def _masked(tree: Any, masks: Mapping[str, jax.Array], other: Any) -> Any:
    """Return the tree with ``other``, a number or a tree of the same kind, where a mask is False."""
    flat = flatten_dict(tree, sep="/")
    others = flatten_dict(other, sep="/") if isinstance(other, Mapping) else None
    for path, mask in masks.items():
        flat[path] = jnp.where(mask, flat[path], other if others is None else others[path])
    return unflatten_dict(flat, sep="/")
