"""Attention within clusters of tokens: sorted by cluster, what a token may see stands right before it.

A token has a cluster for each head and round; tokens of one segment and cluster form a group. Sorted by
group, with the group in place of the segment and the rank in it in place of the position, a group is a
sequence to which windows apply. Nothing depends on what else stands in a row.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention import cache
from fastformer.attention.blocked import BLOCK, attend_part
from fastformer.attention.cache import KVState
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import Part, dense, join
from fastformer.attention.positions import rope
from fastformer.attention.scores import Mask
from fastformer.core.alphabet import constrain
from fastformer.core.layers import RMSNorm, zero_padding
from fastformer.core.seq import Seq

ALONE = -1e5  # the score of a token with itself where it sees others: it counts when there are none


class Chunks(NamedTuple):
    """Keys of the query's own chunk of ranks and of its neighbours, but not the query itself.

    Attributes:
      causal: keys after the query are hidden.
      size: ranks in a chunk.
    """

    causal: bool
    size: int

    @property
    def window(self) -> int:
        """Return the reach in ranks."""
        return 2 * self.size

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S] of query and key tokens."""
        q_BT, k_BS = q_seq.position_BT, k_seq.position_BT
        near = jnp.abs(q_BT[:, :, None] // self.size - k_BS[:, None, :] // self.size) <= 1
        return Mask(self.causal).visible(q_seq, k_seq) & near & (q_BT[:, :, None] != k_BS[:, None, :])

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        return Mask(self.causal, self.window).blocks(first_q, first_k, size)


class Sorted(NamedTuple):
    """Tokens of sheets (a row, a head, a round) by group.

    Attributes:
      order_AS: index of each token in the row, sorted. back_AS: undoes it.
      seq: group (0 is padding) and rank of the sorted tokens.
    """

    order_AS: jax.Array
    back_AS: jax.Array
    seq: Seq

    def unsorted(self) -> Seq:
        """Return group and rank of the tokens in the order of the row."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, self.back_AS, axis=1), self.seq)


def by_group(cluster_AS: jax.Array, seq: Seq) -> Sorted:
    """Return the tokens of each sheet sorted by segment, cluster and position; ``seq`` is that of sheets."""
    padding = jnp.where(seq.segment_BT > 0, 0, 1)
    order_AS = jnp.lexsort((seq.position_BT, cluster_AS, seq.segment_BT, padding), axis=-1)
    segment, cluster = (jnp.take_along_axis(x, order_AS, axis=1) for x in (seq.segment_BT, cluster_AS))
    index = jnp.arange(order_AS.shape[1])[None, :]
    new = (segment[:, 1:] != segment[:, :-1]) | (cluster[:, 1:] != cluster[:, :-1])
    new = jnp.pad(new, [(0, 0), (1, 0)], constant_values=True)
    start_AS = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    groups = Seq(jnp.where(segment > 0, start_AS + 1, 0), index - start_AS)
    return Sorted(order_AS, jnp.argsort(order_AS, axis=1), groups)


def reference(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    cluster_BTHN: jax.Array,
    *,
    seq: Seq,
    mask: Any,
) -> jax.Array:
    """Return the softmax over all that the rounds see, a key seen in n rounds n times; float32.

    A token that sees nobody sees itself.

    Args:
      mask: who sees whom by the ranks in a group.
    """
    q_BTHK, k_BTHK, v_BTHP = (zero_padding(x, seq).astype(jnp.float32) for x in (q_BTHK, k_BTHK, v_BTHP))
    distance_BTS = seq.position_BT[:, :, None] - seq.position_BT[:, None, :]
    together_BTS = Mask(False).visible(seq, seq)
    times_BHTS = 0.0
    for cluster_BTH in jnp.moveaxis(cluster_BTHN, -1, 0):
        cluster_BHT = cluster_BTH.swapaxes(1, 2)
        same_BHTS = (cluster_BHT[..., :, None] == cluster_BHT[..., None, :]) & together_BTS[:, None]
        rank_BHT = jnp.sum(same_BHTS & (distance_BTS > 0)[:, None], axis=-1)
        rank = rank_BHT.reshape(-1, rank_BHT.shape[-1])
        flat = Seq(jnp.ones_like(rank), rank)
        times_BHTS += (same_BHTS & mask.visible(flat, flat).reshape(same_BHTS.shape)).astype(jnp.float32)
    scores_BHTS = jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK) / math.sqrt(q_BTHK.shape[-1])
    seen = times_BHTS > 0
    itself = (together_BTS & (distance_BTS == 0))[:, None]
    scores_BHTS = jnp.where(
        seen, scores_BHTS + jnp.log(jnp.where(seen, times_BHTS, 1.0)), jnp.where(itself, ALONE, -jnp.inf)
    )
    real_B1T1 = (seq.segment_BT > 0)[:, None, :, None]
    weights_BHTS = jax.nn.softmax(jnp.where(real_B1T1, scores_BHTS, 0.0), axis=-1)
    return jnp.einsum("BHTS,BSHP->BTHP", weights_BHTS, v_BTHP)


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    cluster_BTHN: jax.Array,
    *,
    seq: Seq,
    mask: Any,
    state: KVState | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, KVState]:
    """Return ``(y_BTHP, state)``: windows over tokens sorted by group, the rounds joined.

    Args:
      mask: as in ``reference``; its ``blocks`` say how far it reaches.
      block: tokens in a block.
    """
    # Clusters ride with the keys, which are float32, so that a state finds them again.
    k_BTHK = jnp.concatenate([k_BTHK.astype(jnp.float32), cluster_BTHN.astype(jnp.float32)], axis=-1)
    new = (zero_padding(k_BTHK, seq), zero_padding(v_BTHP, seq), seq)
    keys = cache.growing(*new) if state is None else cache.joined(state, *new)
    grown = keys if state is None else cache.append(state, *new)
    (batch, time, heads, _), rounds = q_BTHK.shape, cluster_BTHN.shape[-1]
    slots = keys.segment_BS.shape[1]

    def sheets(x_BSHK: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.moveaxis(x_BSHK, 2, 1)[:, :, None], rounds, axis=2)
        return x.reshape(-1, x.shape[3], 1, x.shape[4])

    k_BSHK, v_BSHP = (zero_padding(x, keys.seq) for x in keys[:2])
    width = k_BSHK.shape[-1] - rounds
    cluster_ASN = jnp.moveaxis(k_BSHK[..., width:], (2, 3), (1, 2)).reshape(-1, slots).astype(jnp.int32)
    every = jax.tree.map(lambda x: jnp.repeat(x, heads * rounds, axis=0), keys.seq)
    groups = by_group(cluster_ASN, every)
    k_BSHK = k_BSHK[..., :width].astype(q_BTHK.dtype)
    q, k, v = (sheets(x) for x in (zero_padding(q_BTHK, seq), k_BSHK, v_BSHP))
    if time == 1:
        y, log = _one(q, k, v, groups, mask)
    else:
        q = jnp.pad(q, [(0, 0), (slots - time, 0), (0, 0), (0, 0)])
        q, k, v = (jnp.take_along_axis(x, groups.order_AS[..., None, None], axis=1) for x in (q, k, v))
        y, log = attend_part(q, k, v, groups.seq, groups.seq, mask, block=block)
        y = jnp.take_along_axis(y, groups.back_AS[..., None, None], axis=1)[:, slots - time :]
        log = jnp.take_along_axis(log, groups.back_AS[..., None], axis=1)[:, slots - time :]
    y = jnp.moveaxis(y.reshape(batch, heads, rounds, time, -1), (2, 3), (0, 2))
    log = jnp.moveaxis(log.reshape(batch, heads, rounds, time), (2, 3), (0, 2))
    alone = (new[1].astype(jnp.float32), jnp.full(new[1].shape[:3], ALONE))
    y_BTHP, _ = join([*zip(y, log), alone])
    return y_BTHP.astype(v_BTHP.dtype), grown


def _one(q: jax.Array, k: jax.Array, v: jax.Array, groups: Sorted, mask: Any) -> Part:
    """Return the part of one query a sheet, which is the last of the tokens."""
    seq = groups.unsorted()
    visible = mask.visible(jax.tree.map(lambda x: x[:, -1:], seq), seq)
    return dense(q, k, v, visible, visible)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, key_width: int, value_width: int, rounds: int
) -> KVState:
    """Return an empty cache: B capacity H (K + N) float32 and B capacity H P elements, and indices."""
    state = cache.empty(batch, capacity, heads, (key_width + rounds, 0), jnp.float32)
    return state._replace(value_BSGP=jnp.zeros((batch, capacity, heads, value_width), dtype))


class Shared(Mixer):
    """Attention whose queries and keys are one projection of H heads, sorted into clusters.

    Clusters are of the projection before rotary positions, in float32, so that they do not change with the
    dtype. Fewer ``kv_heads`` than heads share values, which the papers do not do.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    order: ClassVar[str] = "T log T"
    rounds = 1  # N, clusters that a token has in each head

    def clusters(self, x_BTHK: jax.Array, seq: Seq) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and the cluster of each head and round [B, T, H, N], before positions."""
        raise NotImplementedError

    def project(self, x_BTD, x_BSD, seqs, past):
        seq, share = seqs[0], self.heads // self.groups
        x_BTHK = self.linear("query", x_BTD, "BTD,DHK->BTHK", self.heads, self.head_width, exact=True)
        v_BTGP = self.linear("value", x_BTD, "BTD,DGP->BTGP", self.groups, self.value_width)
        if self.conv_width:
            (x_BTHK, v_BTGP), past = self.convolve((x_BTHK, v_BTGP), seq, past)
        if self.qk_norm:
            x_BTHK = RMSNorm("K", name="query_norm")(x_BTHK)
        *qk, cluster_BTHN = self.clusters(x_BTHK, seq)
        if self.positions == "rope":
            qk = [rope(x, seq.position_BT, self.rope_base) for x in qk]
        q_BTHK, k_BTHK = qk
        v_BTHP = constrain(jnp.repeat(v_BTGP, share, axis=2), "BTHP")
        return (q_BTHK.astype(self.dtype), k_BTHK, v_BTHP, cluster_BTHN), past

    def past_features(self):
        features = self.heads * self.head_width + self.groups * self.value_width
        return max(self.conv_width - 1, 0), features

    @property
    def exact_columns(self):
        return {"key_BSGK": self.rounds}

    def empty(self, batch, capacity, dtype):
        sizes = {"heads": self.heads, "key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, dtype, rounds=self.rounds, **sizes)
