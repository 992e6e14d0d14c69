"""What the inputs of a model's matrices are on calibration text: their Gram matrices, stage by stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.compress.method import Calibration, Wrapped, bare, within
from fastformer.compress.numerics import replace_leaves
from fastformer.compress.sites import Site
from fastformer.core.errors import UserError
from fastformer.core.layers import Linear
from fastformer.core.trees import paths


class Inputs(NamedTuple):
    """What a matrix was multiplied with; S are the letters that it shares with inputs and outputs.

    Attributes:
      gram: sum of ``x xT`` over tokens, [S, I, I].
      size: sum of ``|x|``, [S, I].
      count: of tokens, [].
    """

    gram: jax.Array
    size: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class Watched(Wrapped):
    """A model that notes what its matrices are multiplied with.

    Attributes:
      sites: to watch, by path. taken: where the notes go, in the order of the calls.
    """

    sites: Mapping[str, Site]
    taken: dict[str, Inputs]

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs, as ``linen.Module.apply``."""
        # Padding is left out, but where sources stand apart from targets, each with its own.
        apart = getattr(bare(self), "reads_sources", False)
        real_BT = None if apart else args[1].segment_BT > 0

        def watch(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join((*context.module.path, "weight"))
            if (
                isinstance(context.module, Linear)
                and context.method_name == "__call__"
                and path in self.sites
            ):
                found = inputs_of(self.sites[path], args[0], real_BT)
                before = self.taken.get(path)
                self.taken[path] = found if before is None else Inputs(*map(jnp.add, before, found))
            return next_call(*args, **kwargs)

        # Entered before those of the models within, this is asked before them.
        with nn.intercept_methods(watch):
            return self.inner.apply(variables, *args, **kwargs)


def letters_of(site: Site) -> tuple[str, str, str]:
    """Return the letters of a weight that are shared with inputs and outputs, summed over, and new."""
    operands, out = site.spec.split("->")
    x = operands.split(",")[0]
    shared = "".join(letter for letter in site.letters if letter in x and letter in out)
    summed = "".join(letter for letter in site.letters if letter not in out)
    return shared, summed, "".join(letter for letter in site.letters if letter not in x)


def inputs_of(site: Site, x: jax.Array, real_BT: jax.Array | None = None) -> Inputs:
    """Return the statistics of one input of a matrix, float32; of tokens that are real, where it is given."""
    letters = site.spec.split(",")[0]
    shared, summed, _ = letters_of(site)
    tokens = "".join(letter for letter in letters if letter not in shared + summed)
    sizes, x = dict(zip(letters, x.shape)), x.astype(jnp.float32)
    rows, inputs = (math.prod(sizes[letter] for letter in some) for some in (tokens, summed))
    count = jnp.float32(rows)
    if real_BT is not None and tokens == "BT" and real_BT.shape == x.shape[:2]:
        count = real_BT.sum(dtype=jnp.float32)
        x *= real_BT.reshape(real_BT.shape + (1,) * (x.ndim - 2))
    x_SNI = jnp.einsum(f"{letters}->{shared}{tokens}{summed}", x).reshape(-1, rows, inputs)
    gram = jnp.einsum("SNI,SNJ->SIJ", x_SNI, x_SNI, precision="highest")
    return Inputs(gram, jnp.abs(x_SNI).sum(1), count)


def blocks(site: Site, weight: jax.Array) -> jax.Array:
    """Return a weight as ``[S, I, O]``: shared letters, inputs, outputs."""
    sizes, parts = dict(zip(site.letters, site.shape)), letters_of(site)
    shape = [math.prod(sizes[letter] for letter in part) for part in parts]
    return jnp.einsum(f"{site.letters}->{''.join(parts)}", weight).reshape(shape)


def unblocks(site: Site, matrices: jax.Array) -> jax.Array:
    """Return what ``blocks`` was given."""
    sizes, order = dict(zip(site.letters, site.shape)), "".join(letters_of(site))
    return jnp.einsum(f"{order}->{site.letters}", matrices.reshape([sizes[letter] for letter in order]))


def plain(model: Any) -> Any:
    """Return the model without rematerialised layers, from within which nothing can be noted.

    Raises:
      UserError: its layers are scanned, which is the same hindrance and cannot be undone here.
    """
    if bare(model).config.scan:
        raise UserError("config.model.scan: what is calibrated on text needs layers that are not scanned")
    return within(
        model, lambda module: module.clone(config=dataclasses.replace(module.config, remat=("none",)))
    )


@dataclass(frozen=True)
class Text:
    """A model's inputs on calibration text.

    Attributes:
      calibration: of the run.
    """

    calibration: Calibration

    def order(self, model: Any, params: Any, sites: Mapping[str, Site]) -> list[str]:
        """Return the paths of the sites, in the order in which the model comes to them."""
        taken: dict[str, Inputs] = {}
        jax.eval_shape(self._note(model, sites, taken), params, next(iter(self.calibration.batches())))
        return list(taken)

    def inputs(self, model: Any, params: Any, sites: Mapping[str, Site]) -> dict[str, Inputs]:
        """Return what each site was multiplied with; what the model does after the last is not done."""
        one, total = jax.jit(self._note(model, sites, {})), None
        for batch in self.calibration.batches():
            found = one(params, batch)
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return total

    def nats(self, model: Any, params: Any) -> float:
        """Return the nats a target on the first batch."""
        batch = next(iter(self.calibration.batches()))
        nats, targets = jax.jit(lambda p, b: self.calibration.loss(plain(model), p, b, None))(params, batch)
        return float(nats / targets)

    def _note(self, model: Any, sites: Mapping[str, Site], taken: dict[str, Inputs]) -> Callable[..., Any]:
        def one(params: Any, batch: Mapping[str, jax.Array]) -> dict[str, Inputs]:
            taken.clear()
            self.calibration.loss(Watched(plain(model), sites, taken), params, batch, None)
            return dict(taken)

        return one


def by_stages(
    text: Text,
    model_after: Callable[[frozenset[str]], Any],
    params: Any,
    sites: Mapping[str, Site],
    change: Callable[[Site, jax.Array, Inputs], Any],
) -> Any:
    """Return ``params`` with each matrix changed by what it is given once all blocks before it are.

    Args:
      model_after: from the paths that are changed already to the model that runs on them.
      change: from a site, its weight and its inputs to what stands in its place.
    """
    order, done = text.order(model_after(frozenset()), params, sites), frozenset()
    for stage in dict.fromkeys(map(_stage, order)):
        mine = {path: sites[path] for path in order if _stage(path) == stage}
        found = text.inputs(model_after(done), params, mine)

        flat = paths(params)
        new = {path: change(site, flat[path], found[path]) for path, site in mine.items()}
        params, done = replaced(params, new), done | set(mine)
    return params


def _stage(path: str) -> str:
    return path.split("/")[0]


def replaced(params: Any, new: Mapping[str, Any]) -> Any:
    """Return the tree with other leaves at the paths of ``new``."""
    return replace_leaves(params, lambda path, leaf: new.get(path, leaf))
