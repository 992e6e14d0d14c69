"""The optimiser and its schedule, from the section config.optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import UserError, lookup, require
from fastformer.train import groups as grouping
from fastformer.train.groups import names, stacked
from fastformer.train.schedules import SCHEDULES, Schedule, make_schedule


@dataclass(frozen=True)
class OptimiserConfig:
    """Which optimiser, and its numbers; configs/base.py says what each means."""

    name: str
    learning_rate: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    final_fraction: float
    b1: float
    b2: float
    weight_decay: float
    clip: float
    groups: tuple[tuple, ...]
    average: float

    def __post_init__(self) -> None:
        lookup(OPTIMISERS, self.name, "name")
        lookup(SCHEDULES, self.schedule, "schedule")
        good = 0 < self.learning_rate < math.inf
        require(good, "learning_rate", self.learning_rate, "above 0 and finite")
        for field in ("warmup_steps", "decay_steps"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "from 0 to 1")
        for field in ("b1", "b2", "average"):
            require(0 <= getattr(self, field) < 1, field, getattr(self, field), "from 0 to below 1")
        for field in ("weight_decay", "clip"):
            value = getattr(self, field)
            require(0 <= value < math.inf, field, value, "0 (off) or more")
        grouping.read(self.groups)


def adamw(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return AdamW's direction (Loshchilov & Hutter 2019, 1711.05101, algorithm 2)."""
    return optax.scale_by_adam(config.b1, config.b2)


def lion(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return Lion's direction, a sign (Chen et al. 2023, 2302.06675, program 1): one moment, not two.

    Its steps are longer than AdamW's at the same rate; a third to a tenth of AdamW's is usual.
    """
    return optax.scale_by_lion(config.b1, config.b2)


def adafactor(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return Adafactor's direction (Shazeer & Stern 2018, 1804.04235, algorithm 4).

    The second moment of a matrix of 128 or more rows and columns is kept as a row and a column (attention's
    projections have three axes, width, heads and their width, and stay whole where that is below 128);
    its decay rises as 1 - t^-0.8 up to ``b2`` (Zhai et al. 2021, 2106.04560, section 3.4). ``b1``
    is the decay of a first moment, which makes it larger; 0 is none, as published.
    """

    def rising(step: jax.Array, power: float) -> jax.Array:
        return jnp.minimum(1.0 - (step.astype(jnp.float32) + 1.0) ** -power, config.b2)

    parts = [
        optax.scale_by_factored_rms(decay_rate_fn=rising),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    ]
    return optax.chain(*parts, *([optax.ema(config.b1, debias=False)] if config.b1 else []))


def muon(config: OptimiserConfig) -> optax.GradientTransformation:
    """Return Muon's direction for hidden matrices and AdamW's for the rest.

    Jordan et al. 2024; the update of a matrix is brought to AdamW's root mean square of 0.2 (Liu et
    al. 2025, 2502.16982, eq. 4). ``b1`` and ``b2`` are AdamW's; Muon's own decay is 0.95.
    """
    # At a rate of -1 it gives what is to be multiplied by -rate, as the other directions.
    hidden = optax.contrib.muon(-1.0, muon_weight_dimension_numbers=hidden_matrices, consistent_rms=0.2)

    def owner(params: Any) -> Any:
        def name(axes: Any, leaf: Any) -> str:
            return "adamw" if axes is None else "muon"

        found = hidden_matrices(params)
        return jax.tree.map(name, found, params, is_leaf=lambda x: x is None or isinstance(x, tuple))

    return optax.partition({"muon": hidden, "adamw": adamw(config)}, owner)


def hidden_matrices(params: Any) -> Any:
    """Return for each parameter which axes a linear map reads and writes, None for all but hidden maps."""

    def axes(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        name, first = names(path), stacked(path)
        if name[-1] != "weight" or name[-2] == "head":
            return None
        # Projections to heads are D H K, those from heads H P D; layers before them are a batch.
        own = range(first, leaf.ndim)
        reads = tuple(own[:-1]) if name[-2] == "out" else (first,)
        return optax.contrib.MuonDimensionNumbers(reads, tuple(i for i in own if i not in reads))

    return jax.tree_util.tree_map_with_path(axes, params)


# Each gives a direction; decay, the groups' rates and the learning rate are the same for all.
OPTIMISERS: dict[str, Callable[[OptimiserConfig], optax.GradientTransformation]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}


def make_optimiser(config: ConfigDict) -> tuple[optax.GradientTransformation, Schedule]:
    """Return the gradient transformation and the learning-rate schedule that a configuration asks for.

    Raises:
      UserError: a bad field, or a warm-up and a decay longer than the run.
    """
    options = section(OptimiserConfig, config, "optimiser")
    steps = config.train.steps
    for field, allowed in (
        ("warmup_steps", steps),
        ("decay_steps", steps - options.warmup_steps),
    ):
        if getattr(options, field) > allowed:
            less = " less the warm-up" if field == "decay_steps" else ""
            raise UserError(
                f"config.optimiser.{field}: {getattr(options, field)} is not allowed; it must be from 0 to "
                f"config.train.steps{less}, {allowed}"
            )
    schedule = make_schedule(options, steps)
    groups = grouping.read(options.groups)
    clip = [optax.clip_by_global_norm(options.clip)] if options.clip else []
    tail = [*grouping.decay(groups, options.weight_decay), *grouping.rates(groups)]
    tx = optax.chain(*clip, OPTIMISERS[options.name](options), *tail, optax.scale_by_learning_rate(schedule))
    return tx, schedule
