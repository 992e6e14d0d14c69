"""The optimiser and its schedule, from the section config.optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import UserError, lookup, require

Schedule = Callable[[jax.Array | int], jax.Array]

# Decayed are the matrices of linear maps and the embedding, which is the output matrix too when
# tied. Whatever has another name (norms' scales, biases, gates, decays, learned positions) is not,
# even if it has two dimensions.
DECAYED = ("weight", "embedding")


@dataclass(frozen=True)
class OptimiserConfig:
    """Which optimiser, and its numbers; configs/base.py says what each means."""

    name: str
    learning_rate: float
    warmup_steps: int
    final_fraction: float
    b1: float
    b2: float
    weight_decay: float
    clip: float

    def __post_init__(self) -> None:
        lookup(OPTIMISERS, self.name, "name")
        good = 0 < self.learning_rate < math.inf
        require(good, "learning_rate", self.learning_rate, "above 0 and finite")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "from 0 to 1")
        for field in ("b1", "b2"):
            require(0 <= getattr(self, field) < 1, field, getattr(self, field), "from 0 to below 1")
        for field in ("weight_decay", "clip"):
            value = getattr(self, field)
            require(0 <= value < math.inf, field, value, "0 (off) or more")


def decayed(params: Any) -> Any:
    """Return a tree of booleans: which parameters weight decay pulls towards 0."""

    def is_matrix(path: tuple, leaf: Any) -> bool:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return names[-1] in DECAYED and leaf.ndim >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def adamw(config: OptimiserConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov & Hutter 2019, 1711.05101, algorithm 2)."""
    return optax.adamw(schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)


def muon(config: OptimiserConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Return Muon for hidden matrices and AdamW for the rest, at one learning rate.

    Jordan et al. 2024; the update of a matrix is brought to AdamW's root mean square of 0.2 (Liu et
    al. 2025, 2502.16982, eq. 4). ``b1`` and ``b2`` are AdamW's; Muon's own decay is 0.95.
    """
    hidden = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=hidden_matrices,
        consistent_rms=0.2,
    )

    def owner(params: Any) -> Any:
        def name(axes: Any, leaf: Any) -> str:
            return "adamw" if axes is None else "muon"

        found = hidden_matrices(params)
        return jax.tree.map(name, found, params, is_leaf=lambda x: x is None or isinstance(x, tuple))

    return optax.partition({"muon": hidden, "adamw": adamw(config, schedule)}, owner)


def hidden_matrices(params: Any) -> Any:
    """Return for each parameter which axes a linear map reads and writes, None for all but hidden maps."""

    def axes(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1] != "weight" or names[-2] == "head":
            return None
        # Projections to heads are D H K, those from heads H P D.
        reads = tuple(range(leaf.ndim - 1)) if names[-2] == "out" else (0,)
        return optax.contrib.MuonDimensionNumbers(reads, tuple(i for i in range(leaf.ndim) if i not in reads))

    return jax.tree_util.tree_map_with_path(axes, params)


OPTIMISERS: dict[str, Callable[[OptimiserConfig, Schedule], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
}


def make_schedule(config: OptimiserConfig, steps: int) -> Schedule:
    """Return the learning rate by the number of updates already made.

    Update s, counted from 1, is made at ``learning_rate * s / warmup_steps`` while it warms up, at
    ``learning_rate`` when s is ``warmup_steps``, and at ``final_fraction`` of it when s is ``steps``.
    """
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, max(steps - config.warmup_steps, 1), alpha=config.final_fraction
    )
    if not config.warmup_steps:
        return lambda made: cosine(made + 1)
    linear = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    joined = optax.join_schedules([linear, cosine], [config.warmup_steps])
    return lambda made: joined(made + 1)


def make_optimiser(config: ConfigDict) -> tuple[optax.GradientTransformation, Schedule]:
    """Return the gradient transformation and the learning-rate schedule that a configuration asks for.

    Raises:
      UserError: a bad field, or a warm-up longer than the run.
    """
    options = section(OptimiserConfig, config, "optimiser")
    steps = config.train.steps
    if options.warmup_steps > steps:
        raise UserError(
            f"config.optimiser.warmup_steps: {options.warmup_steps} is not allowed; it must be from 0 to "
            f"config.train.steps, {steps}"
        )
    schedule = make_schedule(options, steps)
    tx = OPTIMISERS[options.name](options, schedule)
    return (optax.chain(optax.clip_by_global_norm(options.clip), tx) if options.clip else tx), schedule
