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


def last_norm(config: ModelConfig, x_BTD: jax.Array, name: str = "norm") -> jax.Array:
    """Return the stream after a stack, normalised unless its last block did; in a compact method."""
    return x_BTD if config.norm_placement == "post" else norm_of(config)(name=name)(x_BTD)


class MLP(nn.Module):
    """``gelu(x W) W'`` or ``(silu(x W) * x U) W'`` (SwiGLU: Shazeer 2020, 2002.05202, eq. 6).

    GELU (Hendrycks & Gimpel 2016, 1606.08415) is GPT-2's by tanh, or ``gelu_erf``, exact as BERT's.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, dtype = self.config, COMPUTE[self.config.dtype]
        up, kind = (c.width, c.hidden), {"dtype": dtype, "bias": c.bias}
        h_BTF = Linear("BTD,DF->BTF", up, **kind, name="up")(x_BTD)
        if c.mlp == "swiglu":
            h_BTF *= nn.silu(Linear("BTD,DF->BTF", up, **kind, name="gate")(x_BTD))
        else:
            h_BTF = nn.gelu(h_BTF, approximate=c.mlp == "gelu")
        scale = (2 * c.layers) ** -0.5  # GPT-2: branches that join a stream of 2 L of them
        return Linear("BTF,FD->BTD", up[::-1], scale, **kind, name="down")(h_BTF)


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))`` (pre-norm: Xiong et al. 2020, 2002.04745).

    With ``norm_placement`` "post" ``norm(x + mixer(x))``, then ``norm(x + mlp(x))`` (Vaswani et al. 2017,
    1706.03762, section 5.4; so is BERT).

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
        norm, rate, post = norm_of(self.config), self.config.dropout, self.config.norm_placement == "post"

        def before(x_BTD: jax.Array, name: str) -> jax.Array:
            return x_BTD if post else norm(name=name)(x_BTD)

        def joined(x_BTD: jax.Array, branch_BTD: jax.Array, name: str) -> jax.Array:
            x_BTD += nn.Dropout(rate)(branch_BTD, deterministic=deterministic)
            return norm(name=name)(x_BTD) if post else x_BTD

        mixer = self.config.encoder_mixer if self.stack == "encoder" else self.config.mixer
        mixed, state = mixer(self.layer, self.length)(before(x_BTD, "mixer_norm"), seq, state)
        x_BTD = joined(x_BTD, mixed, "mixer_norm")
        if self.stack == "decoder":
            look = self.config.cross_mixer(self.layer, self.length)
            seen, _ = look(before(x_BTD, "cross_norm"), seq, None, context)
            x_BTD = joined(x_BTD, seen, "cross_norm")
        h_BTD = MLP(self.config, name="mlp")(before(x_BTD, "mlp_norm"))
        return constrain(joined(x_BTD, h_BTD, "mlp_norm"), "BTD"), state


def embedding_init(width: int) -> nn.initializers.Initializer:
    """Return the initialiser of embeddings: with a tied head, logits of deviation one."""
    return nn.initializers.normal(jnp.sqrt(1.0 / width))
