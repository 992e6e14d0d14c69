"""What every way to decode is made of: its options, the prompts at once, then one token a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.core.errors import FieldError, lookup, require
from fastformer.core.seq import Seq, whole
from fastformer.decode.stored import STATES
from fastformer.models import Source


@dataclass(frozen=True)
class GenerateConfig:
    """How to continue a prompt; configs/base.py says what each field means.

    Raises:
      FieldError: a value out of range.
    """

    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    prompt: str
    beams: int = 1
    length_penalty: float = 0.6
    state: str = "float"

    def __post_init__(self) -> None:
        for field, most in (("tokens", 2**20), ("beams", 2**10)):
            require(1 <= getattr(self, field) <= most, field, getattr(self, field), f"from 1 to {most:,}")
        lookup(dict.fromkeys(STATES), self.state, "state")
        require(self.length_penalty >= 0, "length_penalty", self.length_penalty, "0 or more")
        require(self.beams == 1 or self.temperature == 0, "beams", self.beams, "1 where temperature is not 0")
        for field in ("temperature", "top_k", "seed"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        # Logits divided by less are beyond float32.
        good = self.temperature == 0 or self.temperature >= 1e-6
        require(good, "temperature", self.temperature, "0 (greedy), or 1e-6 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise FieldError(
                "temperature",
                "0 is greedy, which top_k and top_p cannot change; set it above 0, or top_k=0 and top_p=1",
            )


def prefill(model, params, tokens_BT, lengths_B, capacity: int, end: int) -> tuple[jax.Array, Any, jax.Array]:
    """Return logits of the first new token, [B, V], the state and the first new position, [B].

    A model that reads sources is given the prompts as such, and ``end`` as the beginning of a target; to
    another one each is a prefix.

    Args:
      tokens_BT: prompts, padded right.
      capacity: tokens a row that the state must hold.
    """
    batch, padded = tokens_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), (batch, padded))
    seq = Seq((position_BT < lengths_B[:, None]).astype(jnp.int32), position_BT)
    if model.reads_sources:
        begin_B = jnp.full((batch,), end, jnp.int32)
        source = Source(tokens_BT, seq)
        written = model.apply({"params": params}, begin_B[:, None], whole(batch, 1), source=source)[1]
        state = model.init_state(batch, capacity, written.context)
        first_B = jnp.zeros((batch,), jnp.int32)
        logits_BV, state = decode_step(model, params, begin_B, first_B, jnp.ones((batch,), bool), state)
        return logits_BV, state, first_B + 1
    state = model.init_state(batch, capacity)
    seq = seq._replace(last_BT=jnp.broadcast_to(lengths_B[:, None] - 1, (batch, padded)))
    logits_BTV, state = model.apply({"params": params}, tokens_BT, seq, state)
    last_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return last_BV, state, lengths_B


def decode_step(model, params, token_B, position_B, active_B, state) -> tuple[jax.Array, Any]:
    """Return the logits after one more token a row, [B, V], and the state; inactive rows stay as they are."""
    seq = Seq(active_B.astype(jnp.int32)[:, None], position_B[:, None])
    logits_B1V, state = model.apply({"params": params}, token_B[:, None], seq, state)
    return logits_B1V[:, 0], state
