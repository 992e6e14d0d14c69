"""Floor 4: models made of one block and a layer pattern."""

from __future__ import annotations

import flax.linen as nn
from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import UserError, lookup
from fastformer.models.config import ModelConfig
from fastformer.models.decoder import Decoder

__all__ = ["MODELS", "Decoder", "ModelConfig", "build"]

MODELS: dict[str, type[nn.Module]] = {"decoder": Decoder}


def build(config: ConfigDict, vocabulary: int, length: int) -> nn.Module:
    """Return the model that the section ``model`` of a configuration describes.

    Args:
      config: the whole configuration.
      vocabulary: V, the tokeniser's size.
      length: T of a training row.

    Raises:
      UserError: a key or value of the section cannot be.
    """
    model = section(ModelConfig, config, "model")
    if length < 1:
        raise UserError(f"config.data.length: {length} is not allowed; it must be 1 or more")
    return lookup(MODELS, model.name, "config.model.name")(model, vocabulary, length)
