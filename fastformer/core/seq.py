"""Which segment each token belongs to, its position there and how far it sees: all that masking needs."""

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
      last_BT: int32; the position of the last token that each sees of its segment, where attention is causal:
        of the tokens of a prefix, which see all of it, its last one. A prefix begins its segment and is whole
        within one call. None is each token's own position.
    """

    segment_BT: jax.Array
    position_BT: jax.Array
    last_BT: jax.Array | None = None


def whole(batch: int, time: int, start: int | jax.Array = 0) -> Seq:
    """Return the Seq of ``batch`` unpadded rows of ``time`` tokens, each one segment."""
    position_BT = jnp.broadcast_to(start + jnp.arange(time, dtype=jnp.int32), (batch, time))
    return Seq(jnp.ones((batch, time), jnp.int32), position_BT)
