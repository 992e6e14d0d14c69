"""What stacks begin and end with: tokens to vectors, and vectors to logits of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.positions import sinusoids
from fastformer.core.alphabet import constrain
from fastformer.core.dtypes import COMPUTE
from fastformer.core.layers import Linear
from fastformer.core.seq import Seq
from fastformer.models.block import embedding_init, norm_of
from fastformer.models.config import ModelConfig


class Tables(NamedTuple):
    """The parameters that a model has per token and per position.

    Attributes:
      embedding_VD: float32. position_TD: of learned positions, else None.
      type_RD: of kinds of tokens, as BERT's two sentences (1810.04805, section 3), else None.
    """

    embedding_VD: jax.Array
    position_TD: jax.Array | None
    type_RD: jax.Array | None

    @classmethod
    def of(cls, module: nn.Module) -> Tables:
        """Return those of ``module``, which is at work and has a config, a vocabulary and a length."""
        c = module.config
        init = nn.with_logical_partitioning(embedding_init(c.width), ("V", "D"))
        embedding_VD = module.param("embedding", init, (module.vocabulary, c.width))

        def small(name: str, letter: str, size: int) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (letter, "D"))
            return module.param(name, init, (size, c.width))

        return cls(
            embedding_VD,
            small("positions", "T", module.length) if c.positions == "learned" else None,
            small("types", "R", c.token_types) if c.token_types else None,
        )


def embed(
    config: ModelConfig,
    tables: Tables,
    tokens_BT: jax.Array,
    seq: Seq,
    deterministic: bool,
    types_BT: jax.Array | None = None,
) -> jax.Array:
    """Return the vectors of tokens at their positions, [B, T, D]; within a module's compact method.

    Args:
      types_BT: int32, the kind of each token; None is 0.
    """
    dtype = COMPUTE[config.dtype]
    x_BTD = jnp.take(tables.embedding_VD, tokens_BT, axis=0).astype(dtype)
    if config.positions == "sinusoidal":
        # At the scale of the embedding, whose rows have length one.
        x_BTD += (sinusoids(seq.position_BT, config.width) * config.width**-0.5).astype(dtype)
    if tables.position_TD is not None:
        x_BTD += jnp.take(tables.position_TD, seq.position_BT, axis=0).astype(dtype)
    if tables.type_RD is not None:
        types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
        x_BTD += jnp.take(tables.type_RD, types_BT, axis=0).astype(dtype)
    if config.embedding_norm:
        x_BTD = norm_of(config)(name="embedding_norm")(x_BTD)
    return nn.Dropout(config.dropout)(constrain(x_BTD, "BTD"), deterministic=deterministic)


def logits_of(config: ModelConfig, tables: Tables, scanned: bool = False) -> Callable[[jax.Array], jax.Array]:
    """Return ``x_BTD -> logits_BTV`` float32, by the embedding or a matrix of their own.

    Args:
      scanned: it is called within a scan, where no module may be made: the matrix is there already.
    """
    dtype = COMPUTE[config.dtype]
    weight, spec = tables.embedding_VD, "BTD,VD->BTV"
    if not config.tied:
        head = Linear("BTD,DV->BTV", tables.embedding_VD.shape[::-1], dtype=dtype, name="head")
        if not scanned:
            return lambda x_BTD: head(x_BTD).astype(jnp.float32)
        weight, spec = head.variables["params"]["weight"], head.spec
    weight = weight.astype(dtype)
    if scanned:
        # Gathered before the scan, whose every turn would gather it again.
        weight = nn.with_logical_constraint(weight, ("V", None) if config.tied else (None, "V"))

    def logits(x_BTD: jax.Array) -> jax.Array:
        logits_BTV = jnp.einsum(spec, x_BTD, weight)
        return constrain(logits_BTV, "BTV").astype(jnp.float32)

    return logits
