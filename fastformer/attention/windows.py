"""Windows with holes: the mask of dilated sliding windows, over time and over the slots of a ring."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.blocked import attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.parts import Part, dense
from fastformer.attention.scores import Bend, Mask
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


class Windows(NamedTuple):
    """Who sees whom within a segment; as ``scores.Mask``, with holes.

    Attributes:
      causal: keys after the query are hidden.
      window: keys at a distance of ``window`` tokens or more are hidden; 0 is no limit.
      step: distances that are no multiple of ``step`` are hidden.
      beyond: distances up to ``beyond`` are hidden; -1 is none.
    """

    causal: bool = True
    window: int = 0
    step: int = 1
    beyond: int = -1

    def near(self, distance: jax.Array) -> jax.Array:
        """Return whether keys at these distances (negative: after the query) are seen."""
        seen = distance % self.step == 0
        if self.causal:
            seen &= distance >= 0
        if self.window:
            seen &= jnp.abs(distance) < self.window
        return seen & (jnp.abs(distance) > self.beyond)

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        same = Mask(causal=False).visible(q_seq, k_seq)
        return same & self.near(distances(q_seq, k_seq))

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        seen = Mask(self.causal, self.window).blocks(first_q, first_k, size)
        return seen & (np.abs(first_q[:, None] - first_k[None, :]) + size - 1 > self.beyond)


class Within(NamedTuple):
    """Keys of the query's own block of positions, up to the query; the last ``columns`` of the block."""

    stride: int
    columns: int

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        q_block, k_block = (x.position_BT // self.stride for x in (q_seq, k_seq))
        summary = k_seq.position_BT % self.stride >= self.stride - self.columns
        seen = (q_block[:, :, None] == k_block[:, None, :]) & summary[:, None, :]
        return seen & Mask().visible(q_seq, k_seq)

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        return Mask(window=self.stride).blocks(first_q, first_k, size)

    @property
    def window(self) -> int:
        """Return the reach in tokens."""
        return self.stride


class Folded(NamedTuple):
    """The mask of one residue of time: neighbours are ``mask.step`` tokens apart."""

    mask: Windows

    @property
    def window(self) -> int:
        """Return the reach in neighbours, 0 for no limit."""
        return -(-self.mask.window // self.mask.step)

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S]; positions are those of the whole."""
        return self.mask.visible(q_seq, k_seq)

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        step = self.mask.step
        return self.mask.blocks(first_q * step, first_k * step, size * step)


def distances(q_seq: Seq, k_seq: Seq) -> jax.Array:
    """Return positions of queries less those of keys, [B, T, S]."""
    return q_seq.position_BT[:, :, None] - k_seq.position_BT[:, None, :]


def fold(x: jax.Array, step: int) -> jax.Array:
    """``[B, T, …] -> [B step, T / step, …]``: the residues of time apart; padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % step)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, step, *x.shape[2:])
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])


def unfold(x: jax.Array, step: int, time: int) -> jax.Array:
    """Undo ``fold``."""
    x = jnp.moveaxis(x.reshape(-1, step, *x.shape[1:]), 1, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def band(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq, mask: Windows, bend: Bend, block: int
) -> Part:
    """Return the part of the keys that ``mask`` shows among these tokens.

    Tokens of a segment stand side by side, so that a multiple of ``step`` in position is one in time:
    residues of time never see each other, and each is a sequence without holes.
    """
    if mask.step == 1:
        return attend_part(q_BTHK, k_BTGK, v_BTGP, seq, seq, mask, bend, block=block)
    apart = jax.tree.map(lambda x: fold(x, mask.step), seq)
    q, k, v = (fold(x, mask.step) for x in (q_BTHK, k_BTGK, v_BTGP))
    part = attend_part(q, k, v, apart, apart, Folded(mask), bend, block=block)
    return tuple(unfold(x, mask.step, q_BTHK.shape[1]) for x in part)


def slots(q_BTHK: jax.Array, state: KVState, seq: Seq, mask: Windows, bend: Bend, block: int) -> Part:
    """Return the part of the keys that ``mask`` shows among the slots of a state, in any order."""
    if q_BTHK.shape[1] > 1:
        ring = (state.key_BSGK, state.value_BSGP, seq, state.seq)
        return attend_part(q_BTHK, *ring, mask, bend, past=state.segment_BS.shape[1], block=block)
    k_BSGK, v_BSGP = (zero_padding(x, state.seq) for x in (state.key_BSGK, state.value_BSGP))
    visible, distance = mask.visible(seq, state.seq), distances(seq, state.seq)
    return dense(q_BTHK, k_BSGK, v_BSGP, visible, distance, bend)
