"""The decoder: tokens in, logits of the next token out."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq
from fastformer.models.block import last_norm
from fastformer.models.config import ModelConfig
from fastformer.models.nats import chunked
from fastformer.models.parts import Tables, embed, logits_of
from fastformer.models.stack import init_state, run_stack


class Decoder(nn.Module):
    """A causal language model: embedding, a stack of blocks, norm, head.

    With ``config.prefix_lm`` the tokens of a prefix, of which ``seq.last_BT`` tells, see all of it (Raffel et
    al. 2020, 1910.10683, section 3.2.2; Dong et al. 2019, 1905.03197, as its sequence-to-sequence LM).

    Attributes:
      config: its sizes and kinds.
      vocabulary: V.
      length: T that it is trained at, the most that learned positions can hold.
    """

    reads_sources: ClassVar[bool] = False  # a prompt is the beginning of what it writes

    config: ModelConfig
    vocabulary: int
    length: int

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Check what this model cannot be.

        Raises:
          FieldError: a field that it has no use for.
        """
        if config.token_types:
            raise FieldError("token_types", "a decoder has none; set it 0")
        if config.bidirectional:
            raise FieldError("bidirectional", "a decoder is causal; a model that may be is encoder")
        if config.encoder_layers:
            raise FieldError("encoder_layers", "a decoder has none; an encoder_decoder has")

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        seq: Seq,
        state: Any = None,
        deterministic: bool = True,
        targets_BT: jax.Array | None = None,
        scored_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple]:
        """Return ``(logits_BTV float32, state)``; ``state`` is as ``init_state`` has it, None an empty past.

        With ``targets_BT`` it returns ``(nats_BT float32, state)``, the cross-entropy of each, and holds
        no more logits at once than those of ``config.loss_chunk`` tokens of each row.

        Args:
          scored_BN: int32, the tokens of each row whose nats are wanted, which alone get logits; the others'
            nats are 0. None is all.
        """
        c = self.config
        seq = seq if c.prefix_lm else seq._replace(last_BT=None)
        tables = Tables.of(self)
        x_BTD = embed(c, tables, tokens_BT, seq, deterministic)
        x_BTD, state = run_stack(c, self.length, x_BTD, seq, state, deterministic)
        x_BTD = last_norm(c, x_BTD)
        if targets_BT is None:
            return logits_of(c, tables)(x_BTD), state
        wanted_BT = targets_BT
        if scored_BN is not None:
            x_BTD = jnp.take_along_axis(x_BTD, scored_BN[..., None], axis=1)
            wanted_BT = jnp.take_along_axis(targets_BT, scored_BN, axis=1)
        scanned = 0 < c.loss_chunk < wanted_BT.shape[1]
        nats_BT = chunked(logits_of(c, tables, scanned), x_BTD, wanted_BT, c.loss_chunk)
        if scored_BN is not None:
            row_B1 = jnp.arange(len(targets_BT))[:, None]
            nats_BT = jnp.zeros(targets_BT.shape).at[row_B1, scored_BN].set(nats_BT)
        return nats_BT, state

    def init_state(self, batch: int, capacity: int) -> tuple:
        """Return the empty state of every layer, for ``capacity`` tokens a row."""
        return init_state(self.config, self.length, batch, capacity)
