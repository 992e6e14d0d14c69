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
    """Return the state with the weights of another run, and what there is to say of it; none is "".

    It is the run in ``config.train.init``, or else that which a method of compression begins with.

    Raises:
      UserError: there is no such run, or its weights are none for this model.
    """
    options, model = run.config.train, bare(run.model)
    own = ("config.train.init", options.init)
    field, init = own if options.init else run.compression.begins_with
    if not init:
        return state, ""
    if model.config.scan:
        raise UserError("config.train.init: weights of layers go to layers that are not scanned")
    try:
        other = open_teacher(init, model.vocabulary, "float32")
        other.check_text(run.data.tokeniser, model.length)
        weights = other.weights(jnp.float32, lambda x, letters: x)
        found = inherit(
            state.params, model, other.model, weights, other.letters(), deployed.calibration(run),
            LAYERS[options.init_layers],
        )  # fmt: skip
    except FieldError as error:
        raise UserError(f"{field}: {init}: {error.message}") from error
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), found.params, abstract.params)
    average = jax.tree.map(jnp.copy, params) if state.average is not None else None
    return dataclasses.replace(state, params=params, average=average), _said(init, found)


def _said(name: str, found: Any) -> str:
    text = f"begins with {name}, its layers {', '.join(map(str, found.layers))}"
    if found.cut:
        text += f"; {len(found.cut)} arrays cut down"
    if found.merged:
        text += f"; key/value heads of {len(found.merged)} arrays merged"
    if found.fresh:
        shown = ", ".join(found.fresh[:3]) + (", …" if len(found.fresh) > 3 else "")
        text += f"; {len(found.fresh)} it does not have begin anew: {shown}"
    return text
