"""The decoder: tokens in, logits of the next token out."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.positions import sinusoids
from fastformer.core.alphabet import constrain
from fastformer.core.dtypes import COMPUTE
from fastformer.core.layers import Linear
from fastformer.core.seq import Seq
from fastformer.models.block import NORM_LAYERS, Block, embedding_init
from fastformer.models.config import ModelConfig


class Decoder(nn.Module):
    """A causal language model: embedding, a stack of blocks, norm, head.

    Attributes:
      config: its sizes and kinds.
      vocabulary: V.
      length: T that it is trained at, the most that learned positions can hold.
    """

    config: ModelConfig
    vocabulary: int
    length: int

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, seq: Seq, state: Any = None, deterministic: bool = True
    ) -> tuple[jax.Array, tuple]:
        """Return ``(logits_BTV float32, state)``; ``state`` is a tuple over layers, None an empty past."""
        c, dtype = self.config, COMPUTE[self.config.dtype]
        init = nn.with_logical_partitioning(embedding_init(c.width), ("V", "D"))
        embedding_VD = self.param("embedding", init, (self.vocabulary, c.width))
        x_BTD = jnp.take(embedding_VD, tokens_BT, axis=0).astype(dtype)
        if c.positions == "sinusoidal":
            # At the scale of the embedding, whose rows have length one.
            x_BTD += (sinusoids(seq.position_BT, c.width) * c.width**-0.5).astype(dtype)
        if c.positions == "learned":
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("T", "D"))
            position_TD = self.param("positions", init, (self.length, c.width))
            x_BTD += jnp.take(position_TD, seq.position_BT, axis=0).astype(dtype)
        x_BTD = nn.Dropout(c.dropout)(constrain(x_BTD, "BTD"), deterministic=deterministic)
        states = state or (None,) * c.layers
        ends = []
        for layer in range(c.layers):
            block = Block(c, layer, self.length, name=f"layer_{layer}")
            x_BTD, end = block(x_BTD, seq, states[layer], deterministic)
            ends.append(end)
        x_BTD = NORM_LAYERS[c.norm](name="norm")(x_BTD)
        if c.tied:
            logits = jnp.einsum("BTD,VD->BTV", x_BTD, embedding_VD.astype(dtype))
            logits = constrain(logits, "BTV")
        else:
            logits = Linear("BTD,DV->BTV", (c.width, self.vocabulary), dtype=dtype, name="head")(x_BTD)
        return logits.astype(jnp.float32), tuple(ends)

    def init_state(self, batch: int, capacity: int) -> tuple:
        """Return the empty state of every layer, for ``capacity`` tokens a row."""
        layers = range(self.config.layers)
        mixers = (self.config.mixer(layer, self.length, detached=True) for layer in layers)
        return tuple(mixer.init_state(batch, capacity) for mixer in mixers)
