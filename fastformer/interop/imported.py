"""Another project's model as one of ours: settings, weights, tokeniser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fastformer import models
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.data.tokenisers import Tokeniser
from fastformer.interop import families, gguf_file, huggingface


class Imported(NamedTuple):
    """A model from elsewhere.

    Attributes:
      config: of a run that is it. params: float32. tokeniser: of its text. longest: tokens it was made for.
    """

    config: ConfigDict
    params: Any
    tokeniser: Tokeniser
    longest: int


def read(source: str, config: ConfigDict) -> Imported:
    """Return the model in ``source``: a GGUF file, a Hugging Face directory, or the name of one on the hub.

    Args:
      config: whose section ``model`` becomes that of the model; the rest stays.

    Raises:
      UserError: it is not there, unsafe to read, damaged, or of a kind that our models are not.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"--weights: {source} is no .gguf and no directory; other files may run code")
        file, family = gguf_file.File(path), families.LLAMA
        settings, longest = file.settings()
        tokeniser = file.tokeniser()
        vocabulary, theirs = tokeniser.size, file.weights(settings["heads"], settings["kv_heads"])
    else:
        folder = path
        if not path.is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
                raise UserError(f"--weights: there is no {source}")
            folder = huggingface.fetch(source)
        family, settings, longest = huggingface.settings(folder)
        theirs = huggingface.weights(folder, family)
        if family.top[0].theirs not in theirs:
            raise UserError(f"--weights: {folder} has no {family.top[0].theirs}")
        vocabulary = len(theirs[family.top[0].theirs])
        tokeniser = huggingface.tokeniser(folder, vocabulary)
    config = _with(config, settings, longest)
    for row in family.top:
        if row.ours == "positions" and row.theirs in theirs:
            # Those beyond the rows are never asked for.
            theirs[row.theirs] = theirs[row.theirs][: config.data.length]
    model = models.build(config, vocabulary, config.data.length)
    init = lambda: nn.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2)))  # noqa: E731
    shapes = jax.eval_shape(init)["params"]
    params = families.ours(family, theirs, shapes, settings["layers"], settings["tied"])
    return Imported(config, params, tokeniser, longest)


def _with(config: ConfigDict, settings: dict[str, Any], longest: int) -> ConfigDict:
    config = config.copy_and_resolve_references().unlock()
    if config.data.length > longest:
        raise UserError(f"config.data.length: {config.data.length} is not allowed; the model knows {longest}")
    for key, value in settings.items():
        try:
            config.model[key] = ConfigDict(value) if isinstance(value, dict) else value
        except TypeError as error:
            kind = f"config.model.{key} {value!r}, which is of another kind"
            raise UserError(f"--weights: its settings make {kind}") from error
    return config.lock()
