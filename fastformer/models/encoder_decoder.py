"""Encoder and decoder: a source is read in both directions, then the target is written looking at it."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import Context
from fastformer.core.alphabet import constrain
from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import FieldError
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq, whole
from fastformer.models.block import Block, last_norm
from fastformer.models.config import ModelConfig
from fastformer.models.parts import Tables, embed, logits_of
from fastformer.models.stack import init_state


class Source(NamedTuple):
    """What is to be read: tokens_BS and their Seq; a target sees the source of its own segment."""

    tokens_BS: jax.Array
    seq: Seq


class Written(NamedTuple):
    """The state of a target: its source as the encoder left it, and the state of every layer.

    Its bytes are B S D of the compute dtype + 8 B S, and those of the layers' states.
    """

    context: Context
    layers: tuple


class EncoderDecoder(nn.Module):
    """Two stacks of blocks over one embedding (Vaswani et al. 2017, 1706.03762, section 3.1, pre-norm).

    Attributes:
      config: its sizes and kinds; the decoder has ``layers``, the encoder ``encoder_layers``.
      vocabulary: V.
      length: T and S that it is trained at, the most that learned positions can hold.
    """

    reads_sources: ClassVar[bool] = True  # prompts are its sources

    config: ModelConfig
    vocabulary: int
    length: int

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Check what this model cannot be.

        Raises:
          FieldError: it has no encoder, its decoder is not causal, or a field that it has no use for.
        """
        if config.token_types:
            raise FieldError("token_types", "an encoder_decoder has none; set it 0")
        if config.bidirectional:
            raise FieldError("bidirectional", "is of an encoder; that of an encoder_decoder always is")
        if config.prefix_lm:
            raise FieldError("prefix_lm", "is of a decoder; the sources of an encoder_decoder always see all")
        if not config.encoder_layers:
            raise FieldError("encoder_layers", "0 is not allowed; an encoder_decoder needs 1 or more")
        if config.scan:
            raise FieldError("scan", "an encoder_decoder has no scanned layers; set it False")
        if set(config.remat) != {"none"}:
            raise FieldError("remat", f"{config.remat} is not allowed; an encoder_decoder takes none")
        if config.embedding_norm:
            raise FieldError("embedding_norm", "is of a decoder or an encoder; set it False")
        if config.loss_chunk:
            raise FieldError("loss_chunk", "an encoder_decoder has its logits at once; set it 0")

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        seq: Seq,
        state: Written | None = None,
        deterministic: bool = True,
        source: Source | None = None,
    ) -> tuple[jax.Array, Written]:
        """Return ``(logits_BTV float32, state)``.

        Args:
          state: of the target so far, with its source; None is an empty past.
          source: of a target that begins here; None with no state is an empty one.
        """
        tables = Tables.of(self)
        if state is None:
            context = self._encode(tables, source or _nothing(tokens_BT.shape[0]), deterministic)
        else:
            context = state.context
        x_BTD = embed(self.config, tables, tokens_BT, seq, deterministic)
        states = state.layers if state else (None,) * self.config.layers
        ends = []
        for layer in range(self.config.layers):
            block = Block(self.config, layer, self.length, "decoder", name=f"layer_{layer}")
            x_BTD, end = block(x_BTD, seq, states[layer], deterministic, context)
            ends.append(end)
        x_BTD = last_norm(self.config, x_BTD)
        return logits_of(self.config, tables)(x_BTD), Written(context, tuple(ends))

    def _encode(self, tables: Tables, source: Source, deterministic: bool) -> Context:
        x_BSD = embed(self.config, tables, source.tokens_BS, source.seq, deterministic)
        for layer in range(self.config.encoder_layers):
            block = Block(self.config, layer, self.length, "encoder", name=f"encoder_{layer}")
            x_BSD, _ = block(x_BSD, source.seq, None, deterministic)
        x_BSD = last_norm(self.config, x_BSD, "encoder_norm")
        return Context(constrain(zero_padding(x_BSD, source.seq), "BSD"), source.seq)

    def init_state(self, batch: int, capacity: int, context: Context | None = None) -> Written:
        """Return the empty state of ``capacity`` tokens a row; without a context, of an empty source."""
        c = self.config
        if context is None:
            x_BSD = jnp.zeros((batch, self.length, c.width), COMPUTE[c.dtype])
            nothing = jnp.zeros((batch, self.length), jnp.int32)
            context = Context(x_BSD, Seq(nothing, nothing))
        return Written(context, init_state(c, self.length, batch, capacity))


def _nothing(batch: int) -> Source:
    """Return sources of one token that is padding."""
    seq = whole(batch, 1)
    return Source(jnp.zeros((batch, 1), jnp.int32), Seq(0 * seq.segment_BT, seq.position_BT))
