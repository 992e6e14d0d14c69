"""Keys and values of the past: a ring of slots, for every variant that keeps them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastformer.core.seq import Seq


class KVState(NamedTuple):
    """The newest tokens of each row, in ``S`` slots; in bytes, B S G (K + P) of dtype + 8 B S + 4 B.

    Attributes:
      key_BSGK, value_BSGP: as projected (keys with their rotary positions), in the compute dtype.
      segment_BS, position_BS: int32; segment 0 marks a slot that is not used.
      written_B: int32, tokens written so far; the next goes to slot ``written mod S``. None in a
        state that grows: it has as many slots as tokens were written.
    """

    key_BSGK: jax.Array
    value_BSGP: jax.Array
    segment_BS: jax.Array
    position_BS: jax.Array
    written_B: jax.Array | None

    @property
    def seq(self) -> Seq:
        """Return segments and positions of the slots."""
        return Seq(self.segment_BS, self.position_BS)


def empty(batch: int, slots: int, groups: int, widths: tuple[int, int], dtype: jnp.dtype) -> KVState:
    """Return an empty ring of ``slots``; ``widths`` are (K, P)."""
    return KVState(
        jnp.zeros((batch, slots, groups, widths[0]), dtype),
        jnp.zeros((batch, slots, groups, widths[1]), dtype),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((batch, slots), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
    )


def growing(k_BSGK: jax.Array, v_BSGP: jax.Array, seq: Seq) -> KVState:
    """Return a state of just these tokens, to which ``append`` adds slots."""
    return KVState(k_BSGK, v_BSGP, seq.segment_BT, seq.position_BT, None)


def joined(state: KVState, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq) -> KVState:
    """Return slots and new tokens side by side, as a growing state."""
    new = growing(k_BTGK.astype(state.key_BSGK.dtype), v_BTGP.astype(state.value_BSGP.dtype), seq)
    return KVState(*(jnp.concatenate(pair, axis=1) for pair in zip(state[:4], new[:4])), None)


def append(
    state: KVState, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq, first: int = 0
) -> KVState:
    """Return the state with the new tokens written; padding is not, and the oldest give way.

    Args:
      first: the first ``first`` slots are no part of the ring: they keep the first tokens of the newest
        segment, each at its position.
    """
    if state.written_B is None:
        return joined(state, k_BTGK, v_BTGP, seq)
    slots = state.segment_BS.shape[1] - first
    real_BT = (seq.segment_BT > 0) & (seq.position_BT >= first)
    rank_BT = jnp.cumsum(real_BT.astype(jnp.int32), axis=1) - 1
    count_B = rank_BT[:, -1] + 1
    kept_BT = real_BT & (rank_BT >= count_B[:, None] - slots)
    # A slot out of range is dropped by the scatter.
    slot_BT = jnp.where(kept_BT, first + (state.written_B[:, None] + rank_BT) % slots, first + slots)
    if first:
        time = seq.segment_BT.shape[1]
        last_B1 = jnp.max(jnp.where(seq.segment_BT > 0, jnp.arange(time)[None, :], 0), axis=1, keepdims=True)
        newest_BT = seq.segment_BT == jnp.take_along_axis(seq.segment_BT, last_B1, axis=1)
        starts_BT = newest_BT & (seq.segment_BT > 0) & (seq.position_BT < first)
        slot_BT = jnp.where(starts_BT, seq.position_BT, slot_BT)
    row_B1 = jnp.arange(slot_BT.shape[0])[:, None]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[row_B1, slot_BT].set(new.astype(old.dtype), mode="drop")

    new = (k_BTGK, v_BTGP, seq.segment_BT, seq.position_BT)
    return KVState(*(write(a, b) for a, b in zip(state[:4], new)), state.written_B + count_B)
