"""Activation-aware scaling (AWQ: Lin et al. 2023, 2306.00978): inputs that matter are rounded more finely.

A matrix whose input channel i is multiplied by s_i, with what feeds the channel divided by it, computes
what it did (eq. 2), but its rounding errs less there and more elsewhere. s is ``mean|x|^a`` with a from a
grid (eq. 4, 5), the one whose rounded matrices err least on calibration text. Their code also searches for
a range to clip weights to; that is not done here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.compress.calibrate import Inputs, Text, blocks, letters_of, plain
from fastformer.compress.method import within
from fastformer.compress.numerics import Format, dequantise, quantise_weight, replace_leaves
from fastformer.compress.sites import Site, sites
from fastformer.core.trees import paths

GRID = 20  # values of a, from 0 to 0.95
EXACT = 2e-5  # relative change of the nats at which moving a scale is not held to be exact


@dataclass(frozen=True)
class Feed:
    """A place where a scale can be moved.

    Attributes:
      source: parameters that are divided: a norm's, or a matrix by its outputs, and its bias.
      sites: of the matrices that are multiplied by their inputs, all that read what the source gives.
    """

    source: tuple[str, ...]
    sites: tuple[Site, ...]


def feeds(params: Any, known: Mapping[str, Site]) -> Iterator[Feed]:
    """Yield the places where scales may move, by the names of parameters; none is sure before it is tried.

    They are values to the output projection, the linear part of the MLP to its end, and each norm to the
    matrices of the mixer or MLP after it.
    """
    flat = paths(params)
    for end, source in (("mixer/out", "mixer/value"), ("mlp/down", "mlp/up")):
        for path, site in known.items():
            before = path.removesuffix(f"{end}/weight") + source
            weight, bias = f"{before}/weight", f"{before}/bias"
            ends = path.endswith(f"{end}/weight") and weight in known
            if ends and _outputs(known[weight]) == _inputs(site):
                yield Feed((weight, bias) if bias in flat else (weight,), (site,))
    for path in flat:
        head, _, name = path.rpartition("/")
        if name == "scale" and head.endswith("_norm") and head.count("/") == 1:
            inside = head.removesuffix("_norm") + "/"
            readers = [s for p, s in known.items() if p.startswith(inside) and letters_of(s)[:2] == ("", "D")]
            bias = (f"{head}/bias",) if f"{head}/bias" in flat else ()
            if readers:
                yield Feed((path, *bias), tuple(readers))


def scale(model: Any, params: Any, forms: Mapping[str, tuple[Site, Format]], text: Text) -> Any:
    """Return weights that compute the same and round better, or None where nothing can be moved.

    Args:
      model: in float. forms: what will be rounded, and how.
    """
    known = sites(model)
    exact = _exact(model, params, text)
    found = [feed for feed in feeds(params, known) if any(site.path in forms for site in feed.sites)]
    found = [feed for feed in found if exact(feed)]
    if not found:
        return None
    inputs = text.inputs(model, params, {site.path: site for feed in found for site in feed.sites})
    for feed in found:
        params = _searched(params, feed, forms, inputs)
    return params


def _exact(model: Any, params: Any, text: Text) -> Any:
    """Return whether a feed's scales can be moved without changing what the model computes."""
    batch = next(iter(text.calibration.batches()))
    # In few bits the noise of another order of sums would be larger than what is looked for.
    probe = within(plain(model), lambda x: x.clone(config=dataclasses.replace(x.config, dtype="float32")))

    @jax.jit
    def nats(params: Any) -> jax.Array:
        return jax.numpy.divide(*text.calibration.loss(probe, params, batch, None))

    before = float(nats(params))

    def exact(feed: Feed) -> bool:
        size = math.prod(_inputs(feed.sites[0]))
        s = jnp.exp(jax.random.uniform(jax.random.key(0), (size,), minval=-0.7, maxval=0.7))
        return abs(float(nats(_moved(params, feed, s))) - before) <= EXACT * before

    return exact


def _searched(
    params: Any, feed: Feed, forms: Mapping[str, tuple[Site, Format]], inputs: Mapping[str, Inputs]
) -> Any:
    flat = paths(params)
    mine = [
        (flat[site.path], *forms[site.path], inputs[site.path]) for site in feed.sites if site.path in forms
    ]
    seen = mine[0][3]
    mean = jnp.maximum(seen.size[0] / seen.count, 1e-8)

    def s_of(a: jax.Array) -> jax.Array:
        s = mean**a
        return s / jnp.sqrt(s.max() * s.min())

    def error(a: jax.Array) -> jax.Array:
        """Return how far the rounded matrices' outputs are from the float ones', squared (eq. 4)."""
        s, total = s_of(a), 0.0
        for weight, site, form, seen in mine:
            shape = _along(site, s)
            rounded = dequantise(quantise_weight(weight * shape, site, form)) / shape
            apart = blocks(site, rounded - weight)
            total += jnp.einsum("SIO,SIJ,SJO->", apart, seen.gram, apart)
        return total

    grid = jnp.arange(GRID) / GRID
    best = grid[jnp.argmin(jax.lax.map(jax.jit(error), grid))]
    return _moved(params, feed, s_of(best))


def _moved(params: Any, feed: Feed, s: jax.Array) -> Any:
    readers = {site.path: site for site in feed.sites}

    def one(path: str, leaf: Any) -> Any:
        if path in feed.source:
            # The outputs of a matrix are its last axes, and a norm or a bias has no other.
            return (leaf.reshape(-1, len(s)) / s[None]).reshape(leaf.shape)
        return leaf * _along(readers[path], s) if path in readers else leaf

    return replace_leaves(params, one)


def _along(site: Site, s: jax.Array) -> jax.Array:
    """Return a scale of the inputs in the shape of the weight."""
    shape = [size if axis in site.inputs else 1 for axis, size in enumerate(site.shape)]
    return s.reshape(shape)


def _inputs(site: Site) -> tuple[int, ...]:
    return tuple(site.shape[axis] for axis in site.inputs)


def _outputs(site: Site) -> tuple[int, ...]:
    return tuple(site.shape[axis] for axis in site.outputs)
