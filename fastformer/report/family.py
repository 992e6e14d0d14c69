"""The family of attention variants as a table, derived from the classes and their arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fastformer.attention import VARIANTS, Mixer, make
from fastformer.core.seq import whole
from fastformer.core.trees import count, nbytes
from fastformer.report import tables
from fastformer.report.cost import flops

WIDTH, HEADS, LENGTHS = 256, 4, (1024, 32768)
ABILITIES = ("causal", "bidirectional", "cross", "streaming", "context_parallel")


def table() -> str:
    """Return the Markdown table of docs/attention.md: what each row declares, weighs, computes and keeps.

    A layer of width 256 and 4 heads in float32, nothing but defaults. Training is forward and backward pass
    of a row of the first length; decoding is one token after so many, and the state is that of one sequence.
    """
    headers = ["variant", "can be", "training", "parameters", f"FLOPs a token, training at {LENGTHS[0]:,}"]
    headers += [f"{what} at {length:,}" for what in ("decoding", "state") for length in LENGTHS]
    return tables.table(headers, [declared(name) + costs(name) for name in VARIANTS])


def declared(name: str) -> tuple[str, ...]:
    """Return the cells of a row that its class gives, and its parameters."""
    variant = VARIANTS[name]
    able = ", ".join(ability for ability in ABILITIES if getattr(variant, ability))
    return f"`{name}`", able, f"O({variant.order})", tables.number(count(_layer(name, LENGTHS[0])[1]))


def costs(name: str) -> tuple[str, ...]:
    """Return the cells of a row that its traces and its states give."""
    decoding, states = zip(*(_decoding(name, length) for length in LENGTHS))
    return tables.count(_training(name, LENGTHS[0])), *decoding, *states


def _layer(name: str, length: int) -> tuple[Mixer, Any]:
    """Return a layer and the shapes of its parameters."""
    shared = {"heads": HEADS, "head_width": WIDTH // HEADS, "length": length, "width": WIDTH}
    layer = make(name, {}, shared | {"bidirectional_mode": not VARIANTS[name].causal})
    return layer, jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)), whole(1, 1))


def _training(name: str, length: int) -> float:
    """Return FLOPs a token."""
    layer, params = _layer(name, length)
    x, seq = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32), whole(1, length)
    both = jax.grad(lambda params, x: layer.apply(params, x, seq)[0].sum(), (0, 1))
    return flops(both, params, x) / length


def _decoding(name: str, length: int) -> tuple[str, str]:
    """Return the FLOPs of the token that fills a state, and the state's bytes."""
    if not VARIANTS[name].streaming:
        return "none", "none"
    layer, params = _layer(name, length)
    x, seq = jax.ShapeDtypeStruct((1, 1, WIDTH), jnp.float32), whole(1, 1, length - 1)
    state = jax.eval_shape(lambda: layer.init_state(1, length))
    work = flops(lambda params, x, state: layer.apply(params, x, seq, state), params, x, state)
    return tables.count(work), tables.nbytes(nbytes(state))


if __name__ == "__main__":
    print(table())
