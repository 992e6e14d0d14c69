"""The one block: a mixer over time, then an MLP over width, each on a normalised residual stream."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import Context
from fastformer.core.alphabet import constrain
from fastformer.core.dtypes import COMPUTE
from fastformer.core.layers import LayerNorm, Linear, RMSNorm
from fastformer.core.seq import Seq
from fastformer.models.config import ModelConfig

NORM_LAYERS = {"rms": RMSNorm, "layer": LayerNorm}


def norm_of(config: ModelConfig) -> Callable[..., nn.Module]:
    """Return what makes a norm of the residual stream."""
    epsilon = {"epsilon": config.norm_epsilon} if config.norm_epsilon else {}
    return functools.partial(NORM_LAYERS[config.norm], **epsilon)


class MLP(nn.Module):
    """``gelu(x W) W'`` or ``(silu(x W) * x U) W'`` (SwiGLU: Shazeer 2020, 2002.05202, eq. 6)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, dtype = self.config, COMPUTE[self.config.dtype]
        up, kind = (c.width, c.hidden), {"dtype": dtype, "bias": c.bias}
        h_BTF = Linear("BTD,DF->BTF", up, **kind, name="up")(x_BTD)
        if c.mlp == "swiglu":
            h_BTF *= nn.silu(Linear("BTD,DF->BTF", up, **kind, name="gate")(x_BTD))
        else:
            h_BTF = nn.gelu(h_BTF)
        scale = (2 * c.layers) ** -0.5  # GPT-2: branches that join a stream of 2 L of them
        return Linear("BTF,FD->BTD", up[::-1], scale, **kind, name="down")(h_BTF)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` (pre-norm: Xiong et al. 2020, 2002.04745).

    Attributes:
      config: of the model. layer: index in its stack. length: the most tokens of a row.
      stack: "" is of the model's only stack; "encoder" sees in both directions; "decoder" looks at a
        context between mixer and MLP.
    """

    config: ModelConfig
    layer: int
    length: int
    stack: str = ""

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        seq: Seq,
        state: Any = None,
        deterministic: bool = True,
        context: Context | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return ``(x_BTD, state)``."""
        norm, rate = norm_of(self.config), self.config.dropout
        mixer = self.config.encoder_mixer if self.stack == "encoder" else self.config.mixer
        mixed, state = mixer(self.layer, self.length)(norm(name="mixer_norm")(x_BTD), seq, state)
        x_BTD += nn.Dropout(rate)(mixed, deterministic=deterministic)
        if self.stack == "decoder":
            look = self.config.cross_mixer(self.layer, self.length)
            seen, _ = look(norm(name="cross_norm")(x_BTD), seq, None, context)
            x_BTD += nn.Dropout(rate)(seen, deterministic=deterministic)
        h_BTD = MLP(self.config, name="mlp")(norm(name="mlp_norm")(x_BTD))
        return constrain(x_BTD + nn.Dropout(rate)(h_BTD, deterministic=deterministic), "BTD"), state


def embedding_init(width: int) -> nn.initializers.Initializer:
    """Return the initialiser of embeddings: with a tied head, logits of deviation one."""
    return nn.initializers.normal(jnp.sqrt(1.0 / width))
