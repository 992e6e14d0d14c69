"""Where a model has matrices that can be compressed: the weights of its linear maps, and its embedding."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastformer.compress.method import bare
from fastformer.core.errors import FieldError
from fastformer.core.layers import Linear
from fastformer.core.seq import whole
from fastformer.core.trees import paths

EMBEDDING = "embedding"  # its one matrix is read by rows, and is the head's too where they are tied
TABLES = (EMBEDDING, "head")  # matrices of the vocabulary: their products are not always calls of Linear
GATES = r"(.*/)?(mixer|cross)/(.*_)?(gate|decay|step|strength|rate)/weight"


@dataclass(frozen=True)
class Site:
    """A matrix of a model.

    Attributes:
      path: of the parameter, such as ``"layer_0/mixer/query/weight"``.
      spec: of the einsum that it stands in, such as ``"BTD,DHK->BTHK"``.
      shape: of the parameter; scanned layers have one axis more than letters, the first.
      exact: it computes in float32 whatever the dtype, for what comes out is a decay or a strength.
    """

    path: str
    spec: str
    shape: tuple[int, ...]
    exact: bool

    @property
    def letters(self) -> str:
        """Return the letters of the weight."""
        return self.spec.split("->")[0].split(",")[1]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Return the axes of the parameter that are summed over."""
        out, extra = self.spec.split("->")[1], len(self.shape) - len(self.letters)
        return tuple(extra + i for i, letter in enumerate(self.letters) if letter not in out)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Return the axes of the parameter that are not."""
        return tuple(i for i in range(len(self.shape)) if i not in self.inputs)

    @property
    def table(self) -> bool:
        """Return whether it is a matrix of the vocabulary."""
        return bool(set(self.path.split("/")) & set(TABLES))

    @property
    def kept(self) -> bool:
        """Return whether methods leave it alone unless it is named: gates, decays, embedding and head."""
        return self.exact or self.table or bool(re.fullmatch(GATES, self.path))


def sites(model: Any) -> dict[str, Site]:
    """Return the matrices of a model by their paths, in the order of the parameters.

    The model is traced in bfloat16, where what stays in float32 shows.
    """
    module, seen = bare(model), {}
    module = module.clone(config=dataclasses.replace(module.config, dtype="bfloat16"))

    def look(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            seen["/".join((*context.module.path, "weight"))] = context.module
        return next_call(*args, **kwargs)

    with nn.intercept_methods(look):
        shapes = jax.eval_shape(
            lambda: nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2)))
        )["params"]
    found = {}
    for path, leaf in paths(shapes).items():
        if path in seen:
            found[path] = Site(path, seen[path].spec, leaf.shape, seen[path].dtype == jnp.float32)
        elif path.split("/")[-1] == EMBEDDING:
            found[path] = Site(path, "BTD,VD->BTV", leaf.shape, False)
    return found


def as_matrices(site: Site, weight: jax.Array) -> jax.Array:
    """Return the weight as ``[N, I, O]``: N scanned layers or 1, I inputs, O outputs."""
    extra = len(site.shape) - len(site.letters)
    outputs = [axis for axis in site.outputs if axis >= extra]
    order = (*range(extra), *site.inputs, *outputs)
    sizes = [math.prod(site.shape[axis] for axis in axes) for axes in (range(extra), site.inputs, outputs)]
    return weight.transpose(order).reshape(sizes)


def from_matrices(site: Site, matrices: jax.Array) -> jax.Array:
    """Return what ``as_matrices`` was given."""
    extra = len(site.shape) - len(site.letters)
    order = (*range(extra), *site.inputs, *(axis for axis in site.outputs if axis >= extra))
    return matrices.reshape([site.shape[axis] for axis in order]).transpose(np.argsort(order))


def matching(pattern: str, field: str, names: list[str]) -> list[str]:
    """Return those of ``names`` that a regular expression matches as a whole.

    Raises:
      FieldError: it is none, or it matches nothing.
    """
    try:
        found = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise FieldError(field, f"{pattern!r} is no regular expression: {error}") from error
    if not found:
        some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        raise FieldError(field, f"{pattern!r} matches no matrix that is left (there are: {some})")
    return found
