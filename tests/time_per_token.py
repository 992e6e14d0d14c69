"""Time per token at 4096 and 8192 tokens, for every row of the table that declares O(T), or those named.

Both lengths take turns; medians of forward and backward pass of one layer (width 64, 2 heads, float32).

Command: python tests/time_per_token.py [NAME ...] (about ten minutes on two quiet CPU cores)
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import flax.linen as nn
import jax

from fastformer.attention import VARIANTS, make
from fastformer.attention.mixer import ORDERS
from fastformer.core import large_pages
from fastformer.core.seq import whole
from fastformer.report import tables

LENGTHS, WIDTH, HEADS, REPEATS, ALLOWED = (4096, 8192), 64, 2, 15, 1.2


def call_of(name: str, length: int):
    """Return the compiled pass of a layer."""
    fields = {"heads": HEADS, "head_width": WIDTH // HEADS, "length": LENGTHS[-1], "width": WIDTH}
    mixer = make(name, {}, fields | {"bidirectional_mode": not VARIANTS[name].causal})
    x, seq = jax.random.normal(jax.random.key(0), (1, length, WIDTH)), whole(1, length)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, seq))
    step = jax.jit(jax.grad(lambda params, x: mixer.apply(params, x, seq)[0].sum(), (0, 1)))
    return lambda: jax.block_until_ready(step(params, x))


def seconds_of(name: str) -> list[float]:
    """Return the median seconds of each length."""
    calls = [call_of(name, length) for length in LENGTHS]
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(REPEATS):
        for call, times in zip(calls, found):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def main() -> bool:
    linear = [name for name, variant in VARIANTS.items() if ORDERS[variant.order] == 2]
    rows, good = [], True
    for name in sys.argv[1:] or linear:
        per_token = [1e6 * s / length for s, length in zip(seconds_of(name), LENGTHS)]
        growth = per_token[1] / per_token[0]
        good &= growth <= ALLOWED
        rows.append((f"`{name}`", *(f"{value:.2f}" for value in per_token), f"{growth:.2f}"))
        print(*rows[-1], flush=True)
    print(tables.table(["variant", *(f"µs a token at {length:,}" for length in LENGTHS), "growth"], rows))
    return good


if __name__ == "__main__":
    large_pages.start_again()
    sys.exit(0 if main() else 1)
