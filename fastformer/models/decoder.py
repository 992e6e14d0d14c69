"""The decoder: tokens in, logits of the next token out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.positions import sinusoids
from fastformer.core.alphabet import constrain
from fastformer.core.dtypes import COMPUTE
from fastformer.core.layers import Linear
from fastformer.core.seq import Seq
from fastformer.models.block import NORM_LAYERS, embedding_init
from fastformer.models.config import ModelConfig
from fastformer.models.nats import chunked
from fastformer.models.stack import init_state, run_stack


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
        self,
        tokens_BT: jax.Array,
        seq: Seq,
        state: Any = None,
        deterministic: bool = True,
        targets_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """Return ``(logits_BTV float32, state)``; ``state`` is as ``init_state`` has it, None an empty past.

        With ``targets_BT`` it returns ``(nats_BT float32, state)``, the cross-entropy of each, and holds
        no more logits at once than those of ``config.loss_chunk`` tokens of each row.
        """
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
        x_BTD, state = run_stack(c, self.length, x_BTD, seq, state, deterministic)
        x_BTD = NORM_LAYERS[c.norm](name="norm")(x_BTD)
        if targets_BT is None:
            return self._head(embedding_VD, scanned=False)(x_BTD), state
        scanned = 0 < c.loss_chunk < targets_BT.shape[1]
        return chunked(self._head(embedding_VD, scanned), x_BTD, targets_BT, c.loss_chunk), state

    def _head(self, embedding_VD: jax.Array, scanned: bool) -> Callable[[jax.Array], jax.Array]:
        """Return ``x_BTD -> logits_BTV`` float32; one that is ``scanned`` is no module, but its weight."""
        c, dtype = self.config, COMPUTE[self.config.dtype]
        weight, spec = embedding_VD, "BTD,VD->BTV"
        if not c.tied:
            head = Linear("BTD,DV->BTV", (c.width, self.vocabulary), dtype=dtype, name="head")
            if not scanned:
                return lambda x_BTD: head(x_BTD).astype(jnp.float32)
            weight, spec = head.variables["params"]["weight"], head.spec

        weight = weight.astype(dtype)
        if scanned:
            # Gathered before the scan, whose every turn would gather it again.
            axes = ("V", None) if c.tied else (None, "V")
            weight = nn.with_logical_constraint(weight, axes)

        def logits(x_BTD: jax.Array) -> jax.Array:
            logits_BTV = jnp.einsum(spec, x_BTD, weight)
            return constrain(logits_BTV, "BTV").astype(jnp.float32)

        return logits

    def init_state(self, batch: int, capacity: int) -> tuple:
        """Return the empty state of every layer, for ``capacity`` tokens a row."""
        return init_state(self.config, self.length, batch, capacity)
