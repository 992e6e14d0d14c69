"""Synthesizer: scores of one token or of positions alone, not of pairs (Tay et al. 2020, 2005.00743)."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.blocked import attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Bend, Mask, masked_softmax
from fastformer.attention.softmax import seen, slot_scores, slot_values
from fastformer.core.errors import lookup, require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

# What a part of the scores depends on.
PARTS = {"dense": "the query's token", "random": "the positions", "vanilla": "both tokens"}


class Dense(NamedTuple):
    """Scores ``hidden_t . table_s + bias_s``: the second layer of a perceptron with an output a position.

    Attributes:
      hidden_BTHR: of each token, after its ReLU.
      table_LGR, bias_LG: of each position.
    """

    hidden_BTHR: jax.Array
    table_LGR: jax.Array
    bias_LG: jax.Array


class Random(NamedTuple):
    """Scores ``rows_t . columns_s``, a matrix of low rank over positions.

    Attributes:
      rows_LHR, columns_LGR: of each position.
    """

    rows_LHR: jax.Array
    columns_LGR: jax.Array


class Scores(NamedTuple):
    """What is learned of the scores.

    Attributes:
      dense, random: None where the scores have no such part.
      weights: alpha of the dense, the random and the vanilla part; parts that are not there have 0.
    """

    dense: Dense | None
    random: Random | None
    weights: tuple[jax.Array | float, ...]


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    scores: Scores,
    *,
    seq: Seq,
    causal: bool = True,
) -> jax.Array:
    """Return ``softmax(sum_i alpha_i S_i) v``, each S_i a whole matrix, [B, T, H, P] float32 (section 3).

    Args:
      q_BTHK, k_BSGK: of the vanilla part, ``q k^T / sqrt(K)``; K is 0 without it.
    """
    heads, position_BT = q_BTHK.shape[2], seq.position_BT
    share = heads // v_BSGP.shape[2]
    clean = (jnp.repeat(zero_padding(x, seq), share, axis=2).astype(jnp.float32) for x in (k_BSGK, v_BSGP))
    k_BSHK, v_BSHP = clean
    dense, random, (alpha_dense, alpha_random, alpha_vanilla) = scores
    q_BTHK = zero_padding(q_BTHK, seq).astype(jnp.float32)
    pairs_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK) / math.sqrt(max(q_BTHK.shape[-1], 1))
    total_BHTS = alpha_vanilla * pairs_BHTS
    if dense is not None:
        table_LHR, bias_LH = (jnp.repeat(x, share, axis=1) for x in dense[1:])
        hidden_BTHR = zero_padding(dense.hidden_BTHR, seq)
        made_BHTS = jnp.einsum("BTHR,BSHR->BHTS", hidden_BTHR, table_LHR[position_BT])
        total_BHTS += alpha_dense * (made_BHTS + bias_LH[position_BT].swapaxes(1, 2)[:, :, None])
    if random is not None:
        columns_LHR = jnp.repeat(random.columns_LGR, share, axis=1)
        rows_BTHR, columns_BSHR = random.rows_LHR[position_BT], columns_LHR[position_BT]
        total_BHTS += alpha_random * jnp.einsum("BTHR,BSHR->BHTS", rows_BTHR, columns_BSHR)
    visible_BTS = Mask(causal).visible(seq, seq)[:, None]
    return jnp.einsum("BHTS,BSHP->BTHP", masked_softmax(total_BHTS, visible_BTS), v_BSHP)


def queries(q_BTHK: jax.Array, scores: Scores, seq: Seq) -> jax.Array:
    """Return queries whose products with ``keys``, divided by the root of their width, are the scores."""
    dense, random, (alpha_dense, alpha_random, alpha_vanilla) = scores
    parts = [q_BTHK.astype(jnp.float32) * (alpha_vanilla / math.sqrt(max(q_BTHK.shape[-1], 1)))]
    if dense is not None:
        ones_BTH1 = jnp.ones((*q_BTHK.shape[:3], 1))
        parts.append(alpha_dense * jnp.concatenate([dense.hidden_BTHR, ones_BTH1], axis=-1))
    if random is not None:
        parts.append(alpha_random * at(random.rows_LHR, seq))
    whole_BTHR = jnp.concatenate(parts, axis=-1)
    return (whole_BTHR * math.sqrt(whole_BTHR.shape[-1])).astype(q_BTHK.dtype)


def keys(k_BSGK: jax.Array, scores: Scores, seq: Seq) -> jax.Array:
    """Return the vanilla part's keys beside those that the positions have."""
    parts = [k_BSGK]
    if scores.dense is not None:
        parts += [at(scores.dense.table_LGR, seq), at(scores.dense.bias_LG[..., None], seq)]
    if scores.random is not None:
        parts.append(at(scores.random.columns_LGR, seq))
    return jnp.concatenate([part.astype(k_BSGK.dtype) for part in parts], axis=-1)


def at(table: jax.Array, seq: Seq) -> jax.Array:
    """Return the rows of the tokens' positions; past the end, the last."""
    return jnp.take(table, seq.position_BT, axis=0, mode="clip")


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    scores: Scores,
    *,
    seq: Seq,
    state: KVState | None = None,
    causal: bool = True,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)`` in blocks, or against the slots of a state when T = 1.

    Every part is a product of what belongs to the query and what belongs to the key, or to its position, so
    that their sum is one product and no matrix over positions is made.

    Args:
      causal: False lets every token see those after it (no state).
    """
    q_BTHR = queries(q_BTHK, scores, seq)
    there, past, grown = seen(state, k_BTGK, v_BTGP, seq)
    there = there._replace(key_BSGK=keys(there.key_BSGK, scores, there.seq))
    if state is not None and q_BTHR.shape[1] == 1:
        visible = Mask(True).visible(seq, there.seq)[:, :, None]
        weights = masked_softmax(slot_scores(q_BTHR, there, seq, Bend()), visible)
        return slot_values(weights, there), grown
    y_BTHP, _ = attend_part(q_BTHR, *there[:2], seq, there.seq, Mask(causal), past=past)
    return y_BTHP.astype(v_BTGP.dtype), grown if causal else None


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> KVState:
    """Return an empty cache of ``capacity`` tokens; B capacity G (K + P) elements and indices."""
    return cache.empty(batch, capacity, kv_heads, (key_width, value_width), dtype)


class Synthesizer(Mixer):
    """Softmax attention whose scores need no pairs of tokens, O(T²) to train, a state of values alone.

    The random part is the factorised one, for a matrix over positions would have ``length``² weights. Heads
    that share keys and values share what belongs to key positions. A stream past ``length``, which training
    refuses, takes the last position's weights.

    Attributes:
      parts: of the scores, rows of PARTS joined by "+": "dense", "random+vanilla", …; several are weighted
        by learned alphas whose sum is one.
      rank: R of the random part, k = 8 in the paper.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    small: ClassVar[dict] = {"parts": "dense+random+vanilla", "rank": 4}

    parts: str = "dense"
    rank: int = 8

    def __post_init__(self):
        for part in self._parts:
            lookup(PARTS, part, "parts")
        once = len(set(self._parts)) == len(self._parts)
        require(once, "parts", self.parts, "parts that differ")
        require(self.rank >= 1, "rank", self.rank, "1 or more")
        vanilla = "vanilla" in self._parts
        require(vanilla or not self.qk_norm, "qk_norm", self.qk_norm, "off where no part is vanilla")
        super().__post_init__()

    @property
    def _parts(self) -> tuple[str, ...]:
        return tuple(self.parts.split("+"))

    @property
    def _key_width(self) -> int:
        return self.head_width if "vanilla" in self._parts else 0

    def project(self, x_BTD, x_BSD, seqs, past):
        if "vanilla" in self._parts:
            return super().project(x_BTD, x_BSD, seqs, past)
        v_BSGP = self.linear("value", x_BSD, "BSD,DGP->BSGP", self.groups, self.value_width)
        if self.conv_width:
            (v_BSGP,), past = self.convolve((v_BSGP,), seqs[0], past)
        none = (jnp.zeros((*x_BTD.shape[:2], heads, 0), v_BSGP.dtype) for heads in (self.heads, self.groups))
        return (*none, v_BSGP), past

    def past_features(self):
        features = (self.heads + self.groups) * self._key_width + self.groups * self.value_width
        return max(self.conv_width - 1, 0), features

    def gates(self, x_BTD, seq):
        dense = self._dense(x_BTD) if "dense" in self._parts else None
        random = self._random() if "random" in self._parts else None
        shares = jnp.ones((1,))
        if len(self._parts) > 1:
            init = nn.with_logical_partitioning(nn.initializers.zeros, ("R",))
            shares = jax.nn.softmax(self.param("mixture", init, (len(self._parts),)))
        share_of = dict(zip(self._parts, shares))
        return (Scores(dense, random, tuple(share_of.get(part, 0.0) for part in PARTS)),)

    def _dense(self, x_BTD: jax.Array) -> Dense:
        # In float32: a rounding that turns a sign turns a gradient on or off.
        hidden_BTHR = self.linear("hidden", x_BTD, "BTD,DHR->BTHR", self.heads, self.head_width, exact=True)
        bias_HR = self._table("hidden_bias", "HR", (self.heads, self.head_width), 0.0)
        hidden_BTHR = jax.nn.relu(hidden_BTHR + bias_HR[None, None])
        # The scores have variance one at first: half of a hidden unit's square is left by the ReLU.
        deviation = math.sqrt(2.0 / self.head_width)
        table = self._table("dense", "TGR", (self.length, self.groups, self.head_width), deviation)
        return Dense(hidden_BTHR, table, self._table("dense_bias", "TG", (self.length, self.groups), 0.0))

    def _random(self) -> Random:
        deviation = self.rank**-0.25
        rows = self._table("random_rows", "THR", (self.length, self.heads, self.rank), deviation)
        columns = self._table("random_columns", "TGR", (self.length, self.groups, self.rank), deviation)
        return Random(rows, columns)

    def _table(self, name: str, letters: str, shape: tuple[int, ...], deviation: float) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(deviation), tuple(letters))
        return self.param(name, init, shape)

    def mix(self, qkv, seqs, state):
        if state is None:
            self._within(seqs[0])
        return forward(*qkv, seq=seqs[0], state=state, causal=not self.bidirectional_mode)

    def refer(self, qkv, seqs):
        self._within(seqs[0])
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode)

    def _within(self, seq: Seq) -> None:
        time = seq.segment_BT.shape[1]
        require(self.length >= time, "length", self.length, f"{time}, the tokens of a row, or more")

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self._key_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, kv_heads=self.groups, **widths)
