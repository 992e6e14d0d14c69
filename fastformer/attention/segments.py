"""Where segments start, for recurrences that begin anew there."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fastformer.core.seq import Seq


def starts(seq: Seq, before_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return whether a token is the first of its segment, [B, T] bool, and each row's last segment, [B].

    Args:
      before_B: the segment that the past of each row ended in; 0 is none.
    """
    real_BT = seq.segment_BT > 0
    # Index of the last real token up to each; 0 stands for the past.
    index_BT = jnp.where(real_BT, jnp.arange(1, real_BT.shape[1] + 1)[None, :], 0)
    upto_BT = jax.lax.cummax(index_BT, axis=1)
    known = jnp.concatenate([before_B[:, None], seq.segment_BT], axis=1)
    previous_BT = jnp.take_along_axis(known, jnp.pad(upto_BT, [(0, 0), (1, 0)])[:, :-1], axis=1)
    last_B = jnp.take_along_axis(known, upto_BT[:, -1:], axis=1)[:, 0]
    return real_BT & (seq.segment_BT != previous_BT), last_B
