"""The weights that a run begins with when another run's are to be its first."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.compress.inherit import inherit
from fastformer.compress.method import bare
from fastformer.compress.teacher import open_teacher
from fastformer.core.errors import FieldError, UserError
from fastformer.train import deployed
from fastformer.train.setup import Run
from fastformer.train.state import TrainState

LAYERS = {"even": False, "change": True}


def begun(run: Run, state: TrainState, abstract: TrainState) -> tuple[TrainState, str]:
    """Return the state with the weights of the run in ``config.train.init``, and what there is to say of it.

    Raises:
      UserError: there is no such run, or its weights are none for this model.
    """
    options, model = run.config.train, bare(run.model)
    if model.config.scan:
        raise UserError("config.train.init: weights of layers go to layers that are not scanned")
    try:
        other = open_teacher(options.init, model.vocabulary, "float32")
        other.check_text(run.data.tokeniser, model.length)
        weights = other.weights(jnp.float32, lambda x, letters: x)
        found = inherit(
            state.params, model, other.model, weights, other.letters(), deployed.calibration(run),
            LAYERS[options.init_layers],
        )  # fmt: skip
    except FieldError as error:
        raise UserError(f"config.train.init: {options.init}: {error.message}") from error
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), found.params, abstract.params)
    average = jax.tree.map(jnp.copy, params) if state.average is not None else None
    return dataclasses.replace(state, params=params, average=average), _said(options.init, found)


def _said(name: str, found: Any) -> str:
    text = f"begins with {name}, its layers {', '.join(map(str, found.layers))}"
    if found.cut:
        text += f"; {len(found.cut)} arrays cut down"
    if found.fresh:
        shown = ", ".join(found.fresh[:3]) + (", …" if len(found.fresh) > 3 else "")
        text += f"; {len(found.fresh)} it does not have begin at random: {shown}"
    return text
