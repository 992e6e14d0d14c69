"""Precision of the training step: a model of each policy, and which step is made in which."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import qwix
from ml_collections import ConfigDict

from fastformer.compress import within
from fastformer.core.dtypes import POLICIES, Policy
from fastformer.core.errors import FieldError, lookup, require
from fastformer.train.setup import Run

# The linear maps of every block; not what attention multiplies, nor embedding and head.
LINEAR_MAPS = r".*/(mlp|mixer|cross)/[^/]+"


def phases(config: ConfigDict) -> tuple[tuple[str, float], ...]:
    """Return ``(policy, share of a cycle)`` in order: config.train.precision, or model.dtype throughout.

    Raises:
      FieldError: an unknown policy, or a share that is not above 0.
    """
    found = tuple(config.train.precision) or ((config.model.dtype, 1.0),)
    for index, phase in enumerate(found):
        field = f"config.train.precision[{index}]" if config.train.precision else "config.model.dtype"
        if not isinstance(phase, (tuple, list)) or len(phase) != 2:
            raise FieldError(field, f"{phase!r} is not (policy, share)")
        lookup(POLICIES, phase[0], field)
        good = isinstance(phase[1], (int, float)) and phase[1] > 0
        require(good, field, phase[1], "a share above 0, of any unit")
    cycles = config.train.precision_cycles
    allowed = "from 1 to config.train.steps / the number of phases"
    good = 1 <= cycles <= max(config.train.steps // len(found), 1)
    require(good, "config.train.precision_cycles", cycles, allowed)
    return found


class Plan:
    """Which policy a step is made in: the phases, gone through ``config.train.precision_cycles`` times.

    Low precision first and full precision at the end, or cycles of both (Fu et al. 2021, 2101.09868).

    Attributes:
      names: the policies that are used, each once, in order.
    """

    def __init__(self, config: ConfigDict):
        """Raises FieldError as ``phases``."""
        self._phases, self._steps = phases(config), max(config.train.steps, 1)
        self._cycles = config.train.precision_cycles
        self._ends = list(itertools.accumulate(share for _, share in self._phases))
        self.names = tuple(dict.fromkeys(name for name, _ in self._phases))

    def at(self, step: int) -> str:
        """Return the policy of the update after ``step`` updates; past the end, that of the last."""
        step = min(step, self._steps - 1)
        place = (step * self._cycles % self._steps) / self._steps * self._ends[-1]
        return self._phases[min(bisect.bisect_right(self._ends, place), len(self._phases) - 1)][0]


def in_policy(run: Run, name: str) -> Run:
    """Return the run with its model in the precision ``name``: the same weights, other activations."""

    def model(inner: Any) -> Any:
        return _rounded(inner.clone(config=dataclasses.replace(inner.config, dtype=name)), POLICIES[name])

    return dataclasses.replace(run, model=within(run.model, model))


def _rounded(model: Any, policy: Policy) -> Any:
    """Return the model with the operands of its linear maps rounded, in the backward pass too."""
    if not policy.product:
        return model
    rule = qwix.QtRule(
        module_path=LINEAR_MAPS,
        weight_qtype=jnp.dtype(policy.product),
        act_qtype=jnp.dtype(policy.product),
        bwd_qtype=jnp.dtype(policy.gradient),
    )
    return qwix.quantize_model(model, qwix.QtProvider([rule]))
