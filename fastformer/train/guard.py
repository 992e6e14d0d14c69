"""What watches each step: is it one to take, and at which scale float16 has room for it.

It is a function of numbers that are the same on every device, so that all take a step or none does.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

FIRST_SCALE, LARGEST_SCALE = 2.0**16, 2.0**24  # without a bound it doubles to infinity where gradients are 0
PATIENCE = 1000  # steps without an overflow before the scale doubles (Micikevicius et al. 2018, 1710.03740)
MEMORY = 0.98  # decay of the average of the loss that a spike stands out from
KNOWN = 20  # steps before spikes are looked for


@struct.dataclass
class Guard:
    """What the steps so far came to; every field is one number.

    Attributes:
      scale: float32, of the loss in float16; its gradients are divided by it.
      since: int32, finite steps since the scale was last changed.
      skipped: int32, steps that were not taken.
      streak: int32, of those, in a row up to now; overflows that a smaller scale may mend do not count.
      mean, variance: float32, of the loss over the steps taken, those long ago counting less.
      taken: int32, steps.
    """

    scale: jax.Array
    since: jax.Array
    skipped: jax.Array
    streak: jax.Array
    mean: jax.Array
    variance: jax.Array
    taken: jax.Array


def new() -> Guard:
    """Return the guard at step 0."""
    zero, number = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    return Guard(jnp.asarray(FIRST_SCALE, jnp.float32), zero, zero, zero, number, number, zero)


def judge(
    guard: Guard, loss: jax.Array, norm: jax.Array, scaled: bool, spike: float
) -> tuple[jax.Array, Guard]:
    """Return whether the step is to be taken, a boolean, and the guard after it.

    Args:
      norm: of the gradients of all weights.
      scaled: the step was made at ``guard.scale``.
      spike: standard deviations above its average at which a loss is a spike; 0 is never.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    good = finite & ~_is_spike(guard, loss, spike) if spike else finite
    mendable = ~finite & (guard.scale > 1) if scaled else jnp.zeros((), bool)
    taken = guard.taken + good
    # Weights 1, MEMORY, MEMORY^2, ... of the newest and those before; differences, for squares would cancel.
    share = (1 - MEMORY) / (1 - MEMORY ** jnp.maximum(taken, 1).astype(jnp.float32))
    step = jnp.where(good, share * (loss - guard.mean), 0.0)  # or a NaN would stay
    change = jnp.where(good, (1 - share) * (guard.variance + step * (loss - guard.mean)), guard.variance)
    return good, Guard(
        **_scale(guard, finite) if scaled else {"scale": guard.scale, "since": guard.since},
        skipped=guard.skipped + ~good,
        streak=jnp.where(good, 0, guard.streak + ~mendable),
        mean=guard.mean + step,
        variance=change,
        taken=taken,
    )


def _is_spike(guard: Guard, loss: jax.Array, spike: float) -> jax.Array:
    return (guard.taken >= KNOWN) & (loss > guard.mean + spike * jnp.sqrt(guard.variance))


def _scale(guard: Guard, finite: jax.Array) -> dict[str, Any]:
    grow = finite & (guard.since + 1 >= PATIENCE)
    scale = jnp.where(grow, guard.scale * 2, jnp.where(finite, guard.scale, guard.scale / 2))
    since = jnp.where(finite & ~grow, guard.since + 1, 0)
    return {"scale": jnp.clip(scale, 1.0, LARGEST_SCALE), "since": since}
