"""The family of attention variants as a table, derived from the classes and their arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fastformer.attention import VARIANTS, make
from fastformer.core.seq import whole
from fastformer.core.trees import count, nbytes
from fastformer.report import tables

WIDTH, HEADS, LENGTHS = 256, 4, (1024, 32768)
ABILITIES = ("causal", "bidirectional", "cross", "streaming", "context_parallel")


def table() -> str:
    """Return the Markdown table of docs/attention.md: what each row declares, its weights and its state.

    A layer of width 256 and 4 heads in float32, nothing but defaults; the state is that of one sequence.
    """
    headers = ["variant", "can be", "training", "parameters", *(f"state at {length:,}" for length in LENGTHS)]
    return tables.table(headers, [_row(name) for name in VARIANTS])


def _row(name: str) -> tuple[str, ...]:
    variant = VARIANTS[name]

    def layer(length: int):
        shared = {"heads": HEADS, "head_width": WIDTH // HEADS, "length": length}
        return make(name, {}, shared | {"bidirectional_mode": not variant.causal})

    short, seq = jnp.zeros((1, 1, WIDTH)), whole(1, 1)
    params = jax.eval_shape(layer(LENGTHS[0]).init, jax.random.key(0), short, seq)
    states = ["none"] * len(LENGTHS)
    if variant.streaming:
        empty = (jax.eval_shape(lambda n=n: layer(n).init_state(1, n)) for n in LENGTHS)
        states = [tables.nbytes(nbytes(state)) for state in empty]
    able = ", ".join(ability for ability in ABILITIES if getattr(variant, ability))
    return (f"`{name}`", able, f"O({variant.order})", tables.number(count(params)), *states)


if __name__ == "__main__":
    print(table())
