"""Linear attention: a feature map in place of the softmax (Katharopoulos et al. 2020, 2006.16236)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.scores import Mask
from fastformer.core.errors import lookup
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

CHUNK = 64

# phi by name; each is positive, so that the normaliser is.
FEATURE_MAPS = {
    "elu_plus_one": lambda x: jax.nn.elu(x) + 1.0,  # 2006.16236, eq. 7
}


class LinearState(NamedTuple):
    """All that is left of the past; in bytes, 4 B G K (P + 1) + 4 B.

    Attributes:
      memory_BGKP: float32, the sum of ``phi(k) [v, 1]^T``: the last of the P + 1 columns sums phi(k) itself.
      segment_B: int32, the segment it belongs to; 0 is none.
    """

    memory_BGKP: jax.Array
    segment_B: jax.Array


def _features(x: jax.Array, feature_map: str, seq: Seq) -> jax.Array:
    phi = lookup(FEATURE_MAPS, feature_map, "feature_map")
    return zero_padding(phi(zero_padding(x, seq).astype(jnp.float32)), seq)


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    *,
    seq: Seq,
    feature_map: str = "elu_plus_one",
    causal: bool = True,
) -> jax.Array:
    """Return ``sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s)``, float32 (2006.16236, eq. 4, 8)."""
    share = q_BTHK.shape[2] // k_BSGK.shape[2]
    q_BTHK = _features(q_BTHK, feature_map, seq)
    k_BSHK = jnp.repeat(_features(k_BSGK, feature_map, seq), share, axis=2)
    v_BSHP = jnp.repeat(zero_padding(v_BSGP, seq).astype(jnp.float32), share, axis=2)
    visible_BTS = Mask(causal).visible(seq, seq)[:, None]
    similar_BHTS = jnp.where(visible_BTS, jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BSHK), 0.0)
    total_BHT = similar_BHTS.sum(axis=-1)
    weights_BHTS = similar_BHTS / jnp.where(total_BHT > 0, total_BHT, 1.0)[..., None]
    return jnp.einsum("BHTS,BSHP->BTHP", weights_BHTS, v_BSHP)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    state: LinearState | None = None,
    feature_map: str = "elu_plus_one",
    causal: bool = True,
    chunk: int = CHUNK,
) -> tuple[jax.Array, LinearState | None]:
    """Return ``(y_BTHP, state)`` in chunks: products within a chunk, a running memory between chunks.

    Args:
      causal: False adds what comes after, by the same sums over reversed time (no state).
      chunk: C, tokens in a chunk; the result does not depend on it.
    """
    batch, time, heads, width = q_BTHK.shape
    groups = k_BTGK.shape[2]
    q = _features(q_BTHK, feature_map, seq).reshape(batch, time, groups, heads // groups, width)
    k = _features(k_BTGK, feature_map, seq)
    v = zero_padding(v_BTGP, seq).astype(jnp.float32)
    v = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), jnp.float32)], axis=-1)
    if state is None:
        state = init_state(
            batch, 0, jnp.float32, kv_heads=groups, key_width=width, value_width=v_BTGP.shape[-1]
        )
    sums, end = _chunked_sums(q, k, v, seq.segment_BT, state, min(chunk, time))
    if not causal:
        turned = (jnp.flip(x, axis=1) for x in (q, k, v, seq.segment_BT))
        after, _ = _chunked_sums(*turned, state, min(chunk, time))
        # The token itself is in both sums.
        own = jnp.einsum("BTGMK,BTGK->BTGM", q, k)[..., None] * v[:, :, :, None]
        sums, end = sums + jnp.flip(after, axis=1) - own, None
    total = sums[..., -1:]
    y = sums[..., :-1] / jnp.where(total > 0, total, 1.0)
    return y.reshape(batch, time, heads, -1).astype(v_BTGP.dtype), end


def _chunked_sums(q, k, v, segment_BT, state: LinearState, chunk: int) -> tuple[jax.Array, LinearState]:
    """Return ``sum_{s <= t} (q_t . k_s) v_s`` within the segment, [B, T, G, M, P], and the end memory."""
    time = q.shape[1]

    def chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, -time % chunk)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])

    q, k, v, segment_BNC = chunks(q), chunks(k), chunks(v), chunks(segment_BT)
    last_BN = _last_segment(segment_BNC, state.segment_B)
    before_BN = jnp.concatenate([state.segment_B[:, None], last_BN[:, :-1]], axis=1)
    # What a chunk leaves: its tokens of the segment that it ends in.
    stays = (segment_BNC == last_BN[:, :, None])[..., None, None]
    added = jnp.einsum("BNCGK,BNCGP->NBGKP", jnp.where(stays, k, 0.0), v)
    kept = (last_BN == before_BN).T.astype(jnp.float32)

    def remember(memory: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep_B, new = step
        return memory * keep_B.reshape(-1, 1, 1, 1) + new, memory

    memory, memory_N = jax.lax.scan(remember, state.memory_BGKP, (kept, added))
    goes_on = (segment_BNC == before_BN[:, :, None])[..., None, None, None]
    past = jnp.einsum("BNCGMK,NBGKP->BNCGMP", jnp.where(goes_on, q, 0.0), memory_N)
    similar = jnp.einsum("BNCGMK,BNSGK->BNGMCS", q, k)
    order = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]
    visible = order & (segment_BNC[:, :, :, None] == segment_BNC[:, :, None, :])
    within = jnp.einsum("BNGMCS,BNSGP->BNCGMP", jnp.where(visible[:, :, None, None], similar, 0.0), v)
    sums = (past + within).reshape(q.shape[0], -1, *past.shape[3:])
    return sums[:, :time], LinearState(memory, last_BN[:, -1])


def _last_segment(segment_BNC: jax.Array, first_B: jax.Array) -> jax.Array:
    """Return the segment of the last real token up to the end of each chunk, [B, N]."""
    size = segment_BNC.shape[-1]
    flat = segment_BNC.reshape(len(first_B), -1)
    index = jnp.where(flat > 0, jnp.arange(flat.shape[1])[None, :], -1)
    last = jax.lax.cummax(index, axis=1)[:, size - 1 :: size]
    found = jnp.take_along_axis(flat, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, found, first_B[:, None])


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, key_width: int, value_width: int
) -> LinearState:
    """Return an empty memory: 4 B G K (P + 1) + 4 B bytes, whatever the capacity and dtype."""
    memory = jnp.zeros((batch, kv_heads, key_width, value_width + 1), jnp.float32)
    return LinearState(memory, jnp.zeros((batch,), jnp.int32))


class LinearAttention(Mixer):
    """Kernel attention: O(T) to train, a state of constant size.

    Attributes:
      feature_map: phi, a row of FEATURE_MAPS.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    order: ClassVar[str] = "T"

    feature_map: str = "elu_plus_one"

    def __post_init__(self):
        lookup(FEATURE_MAPS, self.feature_map, "feature_map")
        super().__post_init__()

    def mix(self, qkv, seqs, state):
        causal = not self.bidirectional_mode
        return forward(*qkv, seq=seqs[0], state=state, feature_map=self.feature_map, causal=causal)

    def refer(self, qkv, seqs):
        causal = not self.bidirectional_mode
        return reference(*qkv, seq=seqs[0], feature_map=self.feature_map, causal=causal)

    def empty(self, batch, capacity, dtype):
        widths = {"key_width": self.head_width, "value_width": self.value_width}
        return init_state(batch, capacity, jnp.float32, kv_heads=self.groups, **widths)
