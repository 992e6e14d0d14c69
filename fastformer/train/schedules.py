"""Learning rates over a run: a linear warm-up, then one of a few shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

Schedule = Callable[[jax.Array | int], jax.Array]

STABLE = 0.8  # of wsd's steps after the warm-up, before it decays (Hagele et al. 2024, 2405.18392)


def cosine(top: float, final: float, steps: int, decay_steps: int) -> Schedule:
    """Return half a cosine from ``top`` to ``final`` of it (Loshchilov & Hutter 2017, 1608.03983, eq. 5)."""
    return optax.cosine_decay_schedule(top, steps, alpha=final)


def linear(top: float, final: float, steps: int, decay_steps: int) -> Schedule:
    """Return a straight line from ``top`` to ``final`` of it."""
    return optax.linear_schedule(top, top * final, steps)


def constant(top: float, final: float, steps: int, decay_steps: int) -> Schedule:
    """Return ``top`` throughout."""
    return optax.constant_schedule(top)


def wsd(top: float, final: float, steps: int, decay_steps: int) -> Schedule:
    """Return ``top``, then over the last ``decay_steps`` a straight line to ``final`` of it.

    Warm-up, stable, decay (Hu et al. 2024, 2404.06395, eq. 1, with the straight line of 2405.18392).
    """
    decay = min(decay_steps or max(round((1 - STABLE) * steps), 1), steps)
    parts = [optax.constant_schedule(top), optax.linear_schedule(top, top * final, decay)]
    return optax.join_schedules(parts, [steps - decay])


SCHEDULES: dict[str, Callable[[float, float, int, int], Schedule]] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
}


def make_schedule(options: Any, steps: int) -> Schedule:
    """Return the learning rate by the number of updates already made.

    Update s, counted from 1, is made at ``learning_rate * s / warmup_steps`` while it warms up, at
    ``learning_rate`` when s is ``warmup_steps``, and where the shape ends when s is ``steps``.

    Args:
      options: the OptimiserConfig.
      steps: of the whole run.
    """
    after = max(steps - options.warmup_steps, 1)
    shape = SCHEDULES[options.schedule](
        options.learning_rate, options.final_fraction, after, options.decay_steps
    )
    if not options.warmup_steps:
        return lambda made: shape(made + 1)
    rise = optax.linear_schedule(0.0, options.learning_rate, options.warmup_steps)
    joined = optax.join_schedules([rise, shape], [options.warmup_steps])
    return lambda made: joined(made + 1)
