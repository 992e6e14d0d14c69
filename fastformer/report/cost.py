"""What a program costs, counted from its trace: floating-point operations, states, parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core as jex

from fastformer.core.trees import count, nbytes


def flops(fn: Callable[..., Any], *args: Any) -> int:
    """Return the matrix-product FLOPs of ``fn(*args)``: 2 per multiply-add of every product and convolution.

    The program is traced, not run, and counted as it stands: the body of a scan once for each of
    its turns, what a checkpoint computes again once more, of a conditional its dearest branch,
    what a shard_map does on each of its devices. (XLA's own cost analysis counts a scan's body
    once.) Products whose results nobody uses are left out, for XLA leaves them out.

    Args:
      fn: any traceable function.
      args: arrays or ``jax.ShapeDtypeStruct``, in any tree.

    Raises:
      ValueError: a product stands in a while loop, whose number of turns the trace does not tell.
    """
    return flops_of(jax.make_jaxpr(fn)(*args))


def flops_of(program: jex.ClosedJaxpr) -> int:
    """Return the same of a program that was traced already; it raises the same."""
    return _of_jaxpr(program.jaxpr)


def state_bytes(model: nn.Module, length: int) -> int:
    """Return the bytes that decoding keeps for one sequence of ``length`` tokens."""
    return nbytes(jax.eval_shape(lambda: model.init_state(1, length)))


def parameters(params: Any) -> int:
    """Return the number of weights in a tree."""
    return count(params)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(eqn) for eqn in _live(jaxpr))


def _live(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations that an output or an effect depends on, last first."""
    needed = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            needed.update(var for var in eqn.invars if not isinstance(var, jex.Literal))
            yield eqn


def _of_equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * (math.prod(kernel) // out_features)
    inner = [_of_jaxpr(jaxpr) for value in eqn.params.values() for jaxpr in programs(value)]
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and sum(inner):
        raise ValueError(
            "a while loop holds matrix products; its number of turns is not known before it runs"
        )
    if name == "shard_map":
        mesh = eqn.params["mesh"]
        return math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"]) * sum(inner)
    return sum(inner)


def programs(value: Any) -> Iterator[Any]:
    """Yield the programs inside a parameter of an equation."""
    if isinstance(value, jex.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, jex.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from programs(item)
