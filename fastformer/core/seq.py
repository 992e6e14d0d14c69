"""Which segment each token belongs to, and its position there: all that masking needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Seq(NamedTuple):
    """Segment and position of every token.

    Attributes:
      segment_BT: int32; 0 is padding, and tokens of different segments never see each other.
        The tokens of one segment stand side by side within one call, in order.
      position_BT: int32; 0, 1, 2, … within a segment. In streaming they go on where the last
        call stopped.
    """

    segment_BT: jax.Array
    position_BT: jax.Array


def whole(batch: int, time: int, start: int | jax.Array = 0) -> Seq:
    """Return the Seq of ``batch`` unpadded rows of ``time`` tokens, each one segment."""
    position_BT = jnp.broadcast_to(start + jnp.arange(time, dtype=jnp.int32), (batch, time))
    return Seq(jnp.ones((batch, time), jnp.int32), position_BT)
