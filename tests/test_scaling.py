"""What twice the tokens cost, read off the programs: no array of T x S, and the time that a row declares."""

from __future__ import annotations

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from fastformer.attention import VARIANTS, make
from fastformer.attention.mixer import ORDERS
from fastformer.core.seq import whole
from fastformer.report.cost import flops, programs

SHORT, LONG = 2048, 4096


def layer(name, time, both_ways=False):
    both_ways |= not VARIANTS[name].causal
    fields = {"heads": 2, "head_width": 8, "length": LONG, "bidirectional_mode": both_ways}
    mixer = make(name, VARIANTS[name].small, fields)
    x, seq = jnp.zeros((1, time, 16)), whole(1, time)
    params = nn.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, seq))

    def loss(params, x):
        return mixer.apply(params, x, seq)[0].sum()

    return jax.grad(loss, (0, 1)), params, x


def largest_array(fn, *args):
    """Return the number of elements of the largest array in the compiled program."""
    shapes = re.findall(r"\b[a-z][a-z0-9]*\[([0-9,]+)\]", jax.jit(fn).lower(*args).compile().as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_array_of_queries_by_keys(name):
    """Forward and backward, compiled: the largest array at most doubles, and is far from T x T."""
    sizes = [largest_array(*layer(name, time)) for time in (SHORT, LONG)]
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < LONG * LONG / 2


def largest_traced(jaxpr):
    """Return the number of elements of the largest array that a program makes, before it is compiled."""
    sizes = [math.prod(getattr(out.aval, "shape", ())) for eqn in jaxpr.eqns for out in eqn.outvars]
    inner = [part for eqn in jaxpr.eqns for value in eqn.params.values() for part in programs(value)]
    return max([0, *sizes, *map(largest_traced, inner)])


@pytest.mark.parametrize("name", [n for n, row in VARIANTS.items() if row.causal and row.bidirectional])
def test_no_array_of_queries_by_keys_in_the_other_direction(name):
    """As traced: two compilations more a row would tell little more."""
    step, *args = layer(name, LONG, both_ways=True)
    assert largest_traced(jax.make_jaxpr(step)(*args).jaxpr) < LONG * LONG / 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bool_])
def test_the_largest_array_is_seen(dtype):
    """A mask of T x S, too."""
    one = jnp.zeros((SHORT, 1), dtype)

    def pairs(x):
        return jnp.maximum(x, x.T) if dtype == jnp.float32 else x & ~x.T

    assert largest_array(pairs, one) == largest_traced(jax.make_jaxpr(pairs)(one).jaxpr) == SHORT * SHORT


@pytest.mark.parametrize("name", VARIANTS)
def test_time_grows_as_declared(name):
    """The products of forward and backward pass, counted in the traced program."""
    counts = [flops(*layer(name, time)) for time in (SHORT, LONG)]
    order = ORDERS[VARIANTS[name].order]
    assert counts[1] <= 1.05 * order * counts[0]
    if order > 2.5:  # a row should not declare more than it takes
        assert counts[1] > 2.2 * counts[0]
