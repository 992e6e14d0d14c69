"""The factorised patterns of the Sparse Transformer, strided and fixed (Child et al. 2019, 1904.10509).

Each splits full causal attention into two sets, A(1) and A(2) of section 4.3, through which every token
reaches every earlier one in two steps. With l near sqrt(T), as the paper has it, both cost O(T sqrt(T)).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import Part, by_head, ends, join, take
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.attention.windows import Windows, Within, band, slots
from fastformer.core.errors import lookup, require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

# How the two sets are used (section 4.3): one softmax over both; each by every other head; by every
# other layer.
COMBINES = {"merged": (2,), "heads": (0, 1), "layers": (0, 1)}


class Summaries(NamedTuple):
    """The last ``columns`` of every block of positions before the query's own."""

    stride: int
    columns: int
    window: int = 0

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        q_block, k_block = (x.position_BT // self.stride for x in (q_seq, k_seq))
        summary = k_seq.position_BT % self.stride >= self.stride - self.columns
        seen = (q_block[:, :, None] > k_block[:, None, :]) & summary[:, None, :]
        return seen & Mask().visible(q_seq, k_seq)

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which blocks of gathered keys (``columns`` for each ``stride`` of time) are seen."""
        return (first_k // self.columns * self.stride)[None, :] < first_q[:, None] + size


class Either(NamedTuple):
    """What the first or the second mask shows."""

    one: NamedTuple
    other: NamedTuple

    @property
    def window(self) -> int:
        """Return the reach in tokens; 0 is no limit."""
        reach = (self.one.window, self.other.window)
        return max(reach) if all(reach) else 0

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        return self.one.visible(q_seq, k_seq) | self.other.visible(q_seq, k_seq)

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        return Mask().blocks(first_q, first_k, size)


def strided_masks(stride: int) -> tuple[Windows, Windows, Either]:
    """Return A(1), the last l + 1 tokens; A(2), every l-th; and both (section 4.3, strided)."""
    return (
        Windows(True, stride + 1),
        Windows(True, step=stride),
        Either(Windows(True, stride + 1), Windows(True, step=stride, beyond=stride)),
    )


def fixed_masks(stride: int, columns: int) -> tuple[Within, Either, Either]:
    """Return A(1), the block of l; A(2), the last c tokens of each; and both (section 4.3, fixed)."""
    own, last, summaries = Within(stride, stride), Within(stride, columns), Summaries(stride, columns)
    return own, Either(last, summaries), Either(own, summaries)


def reference(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGP: jax.Array, *, seq: Seq, masks: tuple, bend: Bend = Bend()
) -> jax.Array:
    """Return softmax attention under dense masks, which the heads take in turn, float32."""

    def run(qkv, bend, number, of):
        return reference_attention(*qkv, seq, seq, masks[number], bend)

    return by_head((q_BTHK, k_BSGK, v_BSGP), bend, len(masks), run)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    masks: tuple,
    state: KVState | None = None,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)``, each kind of mask by its own way to the keys.

    Args:
      masks: which the heads take in turn.
      block: tokens in a block.
    """
    q_BTHK, k_BTGK, v_BTGP = (zero_padding(x, seq) for x in (q_BTHK, k_BTGK, v_BTGP))

    def run(qkv, bend, number, of):
        mask = masks[number]
        pieces = mask if isinstance(mask, Either) else (mask,)
        parts = [_part(*qkv, seq, piece, bend, block) for piece in pieces]
        if state is not None:
            k_BSGK, v_BSGP = state.key_BSGK[:, :, of], state.value_BSGP[:, :, of]
            past = state._replace(key_BSGK=k_BSGK, value_BSGP=v_BSGP)
            parts.append(slots(qkv[0], past, seq, mask, bend, block))
        return join(parts)[0]

    y_BTHP = by_head((q_BTHK, k_BTGK, v_BTGP), bend, len(masks), run).astype(v_BTGP.dtype)
    if state is None:
        return y_BTHP, cache.growing(k_BTGK, v_BTGP, seq)
    return y_BTHP, cache.append(state, k_BTGK, v_BTGP, seq)


def _part(q_BTHK, k_BTGK, v_BTGP, seq: Seq, mask, bend: Bend, block: int) -> Part:
    """Return the part of one mask among these tokens."""
    if isinstance(mask, Windows):
        return band(q_BTHK, k_BTGK, v_BTGP, seq, mask, bend, block)
    if isinstance(mask, Within):
        return attend_part(q_BTHK, k_BTGK, v_BTGP, seq, seq, mask, bend, block=block)
    end_BN = ends(seq, mask.stride)
    index_BNC = end_BN[:, :, None] - jnp.arange(mask.columns)[None, None, :]
    index_BS = index_BNC.reshape(len(end_BN), -1)
    k_seq = Seq(jnp.where(index_BS >= 0, take(seq.segment_BT, index_BS), 0), take(seq.position_BT, index_BS))
    k, v = take(k_BTGK, index_BS), take(v_BTGP, index_BS)
    return attend_part(q_BTHK, k, v, seq, k_seq, mask, bend, block=block)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class _Factorised(Mixer):
    """What strided and fixed share."""

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    order: ClassVar[str] = "T^1.5"  # where l grows as sqrt(T)

    stride: int = 128
    combine: str = "merged"

    def __post_init__(self):
        require(self.stride >= 1, "stride", self.stride, "a number of tokens, 1 or more")
        lookup(COMBINES, self.combine, "combine")
        enough = self.combine != "heads" or self.heads > 1
        require(enough, "combine", self.combine, "merged or layers, for there is one head only")
        super().__post_init__()

    def masks(self) -> tuple:
        """Return A(1), A(2) and both."""
        raise NotImplementedError

    def _used(self) -> tuple:
        numbers = COMBINES[self.combine]
        if self.combine == "layers":
            numbers = (numbers[self.layer % len(numbers)],)
        return tuple(self.masks()[number] for number in numbers)

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], masks=self._used(), state=state, bend=self.bend)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], masks=self._used(), bend=self.bend)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)


class Strided(_Factorised):
    """The last l + 1 tokens, and every l-th: O(T (l + T / l)) to train, a state that grows with the past.

    Attributes:
      stride: l in tokens.
      combine: a row of COMBINES: "merged" is one softmax over both sets, "heads" gives every other head
        the other set, "layers" every other layer.
    """

    small: ClassVar[dict] = {"stride": 10}

    def masks(self):
        return strided_masks(self.stride)


class Fixed(_Factorised):
    """A token's block of l, and the last c tokens of earlier blocks: O(T (l + T c / l)) to train.

    All heads take the same c tokens. A token that sees none under A(2) alone gives zero. The state
    grows with the past.

    Attributes:
      stride: l in tokens.
      columns: c, how many tokens at the end of a block all later ones see.
      combine: a row of COMBINES: "merged" is one softmax over both sets, "heads" gives every other head
        the other set, "layers" every other layer.
    """

    small: ClassVar[dict] = {"stride": 12, "columns": 3}

    columns: int = 32

    def __post_init__(self):
        require(1 <= self.columns <= self.stride, "columns", self.columns, "from 1 to stride")
        super().__post_init__()

    def masks(self):
        return fixed_masks(self.stride, self.columns)
