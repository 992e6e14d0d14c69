"""The encoder: tokens in, scores of classes out, one set a row or one a token; or logits of the tokens."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import FieldError
from fastformer.core.layers import Linear, zero_padding
from fastformer.core.seq import Seq
from fastformer.models.block import last_norm
from fastformer.models.config import ModelConfig
from fastformer.models.parts import Tables, embed, logits_of
from fastformer.models.stack import run_stack


class Head(NamedTuple):
    """What an encoder ends in.

    Attributes:
      size: R, scores; 0 is none, but what they would be made of: the vectors themselves.
      pooled: of the mean over a row's tokens; else of every token.
    """

    size: int
    pooled: bool = True


class Encoder(nn.Module):
    """Embedding, a stack of blocks, norm; then a head, or logits of each token as a decoder has them.

    With ``config.bidirectional`` every token sees all of its segment; else those before it, which any
    causal mixer can do.

    Attributes:
      config: its sizes and kinds.
      vocabulary: V.
      length: T that it is trained at, the most that learned positions can hold.
      head: what it ends in; None is logits of what each token is.
    """

    config: ModelConfig
    vocabulary: int
    length: int
    head: Head | None = None

    @staticmethod
    def check(config: ModelConfig) -> None:
        """Check what this model cannot be.

        Raises:
          FieldError: a field that it has no use for.
        """
        if config.encoder_layers:
            raise FieldError("encoder_layers", "is of an encoder_decoder; an encoder has config.model.layers")
        if config.prefix_lm:
            raise FieldError("prefix_lm", "is of a decoder; an encoder has config.model.bidirectional")
        if config.loss_chunk:
            raise FieldError("loss_chunk", "an encoder makes its scores at once; set it 0")

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        seq: Seq,
        state: None = None,
        deterministic: bool = True,
        types_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, None]:
        """Return ``(scores_BR, None)`` float32; ``scores_BTR`` of a head not pooled; of none, logits.

        Args:
          types_BT: int32, the kind of each token, below ``config.token_types``; None is 0.
        """
        c = self.config
        tables = Tables.of(self)
        x_BTD = embed(c, tables, tokens_BT, seq, deterministic, types_BT)
        x_BTD, _ = run_stack(c, self.length, x_BTD, seq, None, deterministic)
        x_BTD = zero_padding(last_norm(c, x_BTD), seq)
        if self.head is None:
            return logits_of(c, tables)(x_BTD), None
        if self.head.pooled:
            count_B1 = jnp.sum(seq.segment_BT > 0, axis=1, keepdims=True).astype(jnp.float32)
            mean_BD = jnp.sum(x_BTD, axis=1, dtype=jnp.float32) / jnp.maximum(count_B1, 1)
            x_BTD = mean_BD[:, None]
        if not self.head.size:
            return (x_BTD[:, 0] if self.head.pooled else x_BTD).astype(jnp.float32), None
        shape = (c.width, self.head.size)
        scores = Linear("BTD,DR->BTR", shape, dtype=COMPUTE[c.dtype], name="head")(x_BTD)
        scores = scores.astype(jnp.float32)
        return (scores[:, 0] if self.head.pooled else scores), None
