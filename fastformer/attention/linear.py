"""Linear attention: a feature map in place of the softmax (Katharopoulos et al. 2020, 2006.16236)."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, grouped, recur
from fastformer.attention.scores import Mask
from fastformer.core.errors import lookup
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

LEAST = 1e-30  # of a total that is divided by, to have a gradient

# phi by name; each is positive, so that the normaliser is (in float32 down to x = -87).
FEATURE_MAPS = {
    # elu(x) + 1 (2006.16236, eq. 7), where elu's exp(x) - 1 would leave nothing of exp(x) below -17.
    "elu_plus_one": lambda x: jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0))),
}


def _features(x: jax.Array, feature_map: str, seq: Seq) -> jax.Array:
    phi = lookup(FEATURE_MAPS, feature_map, "feature_map")
    return phi(zero_padding(x, seq).astype(jnp.float32))


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
    q_BTHR, k_BSGR = (_features(x, feature_map, seq) for x in (q_BTHK, k_BSGK))
    return dense_average(q_BTHR, k_BSGR, v_BSGP, seq, causal=causal)


def dense_average(
    q_BTHR: jax.Array,
    k_BSGR: jax.Array,
    v_BSGP: jax.Array,
    seq: Seq,
    *,
    causal: bool = True,
    floor: float = 0.0,
    weights_BTSG: jax.Array | None = None,
) -> jax.Array:
    """Return the values averaged by the products of features, by a dense mask, [B, T, H, P] float32.

    Args:
      q_BTHR, k_BSGR: features of queries and keys.
      floor: the least that an average is divided by.
      weights_BTSG: of each key at each query besides.
    """
    share = q_BTHR.shape[2] // k_BSGR.shape[2]
    k_BSHR = jnp.repeat(zero_padding(k_BSGR, seq), share, axis=2)
    v_BSHP = jnp.repeat(zero_padding(v_BSGP, seq).astype(jnp.float32), share, axis=2)
    visible_BTS = Mask(causal).visible(seq, seq)[:, None]
    similar_BHTS = jnp.einsum("BTHR,BSHR->BHTS", zero_padding(q_BTHR, seq), k_BSHR)
    if weights_BTSG is not None:
        similar_BHTS *= jnp.repeat(weights_BTSG, share, axis=3).transpose(0, 3, 1, 2)
    similar_BHTS = jnp.where(visible_BTS, similar_BHTS, 0.0)
    sums_BTHP = jnp.einsum("BHTS,BSHP->BTHP", similar_BHTS, v_BSHP)
    return divided(sums_BTHP, similar_BHTS.sum(axis=-1).swapaxes(1, 2)[..., None], floor)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    *,
    seq: Seq,
    state: Memory | None = None,
    feature_map: str = "elu_plus_one",
    causal: bool = True,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)`` in chunks: products within a chunk, a running memory between chunks.

    Args:
      causal: False adds what comes after, by the same sums over reversed time (no state).
      chunk: C, tokens in a chunk; the result does not depend on it.
    """
    q_BTHR, k_BTGR = (_features(x, feature_map, seq) for x in (q_BTHK, k_BTGK))
    return average(q_BTHR, k_BTGR, v_BTGP, seq, state, causal=causal, chunk=chunk)


def average(
    q_BTHR: jax.Array,
    k_BTGR: jax.Array,
    v_BTGP: jax.Array,
    seq: Seq,
    state: Memory | None = None,
    *,
    causal: bool = True,
    chunk: int | None = None,
    floor: float = 0.0,
    log_decay_BTG: jax.Array | None = None,
) -> tuple[jax.Array, Memory | None]:
    """Return ``(y_BTHP, state)``, values averaged by the products of features: what kernel variants share.

    Args:
      q_BTHR, k_BTGR: features of queries and keys, float32.
      causal: False adds what comes after (no state, no decay).
      chunk: C, tokens in a chunk; the result does not depend on it.
      floor: the least that an average is divided by; 0 where no feature is negative.
      log_decay_BTG: the log, 0 or less, of what a token leaves of the memory before it.
    """
    ones_BTG1 = jnp.ones((*v_BTGP.shape[:3], 1), jnp.float32)
    v_BTGP, dtype = jnp.concatenate([v_BTGP.astype(jnp.float32), ones_BTG1], axis=-1), v_BTGP.dtype
    log = None if log_decay_BTG is None else log_decay_BTG[..., None]
    tokens = Tokens(grouped(q_BTHR, k_BTGR.shape[2]), k_BTGR, v_BTGP, log)
    sums, end = recur(tokens, seq, state, chunk)
    if not causal:
        turned, turned_seq = jax.tree.map(lambda x: jnp.flip(x, axis=1), (tokens, seq))
        after, _ = recur(turned, turned_seq, None, chunk)
        # The token itself is in both sums.
        own = jnp.einsum("BTGMR,BTGR->BTGM", tokens.q_BTGMK, k_BTGR)[..., None] * v_BTGP[:, :, :, None]
        sums, end = sums + jnp.flip(after, axis=1) - zero_padding(own.reshape(sums.shape), seq), None
    return divided(sums[..., :-1], sums[..., -1:], floor).astype(dtype), end


def divided(sums: jax.Array, total: jax.Array, floor: float = 0.0) -> jax.Array:
    """Return ``sums / total``, or over ``floor`` where that is more; zero where both are.

    Totals below LEAST have no gradient: it holds 1 / total, which might overflow.
    """
    if floor:
        return sums / jnp.maximum(total, floor)
    # A quotient's gradient holds 1 / total² as well; taken at a total of one it cannot overflow.
    scale = jax.lax.stop_gradient(jnp.where(total > 0, total, 1.0))
    good = total >= LEAST
    sums = jnp.where(good, sums, jax.lax.stop_gradient(sums))
    return (sums / scale) / jnp.where(good, total / scale, 1.0)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, kv_heads: int, features: int, value_width: int
) -> Memory:
    """Return an empty memory: 4 B G R (P + 1) + 4 B bytes, whatever the capacity and dtype."""
    return empty_memory(batch, kv_heads, features, value_width + 1)


class Kernel(Mixer):
    """What the variants of this family share: O(T) to train, a state of constant size."""

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    order: ClassVar[str] = "T"

    @property
    def rank(self) -> int:
        """Return R, what a feature map makes of K."""
        return self.head_width

    @property
    def exact_columns(self):
        return {"memory_BGKP": 1}

    def empty(self, batch, capacity, dtype):
        sizes = {"features": self.rank, "value_width": self.value_width}
        return init_state(batch, capacity, jnp.float32, kv_heads=self.groups, **sizes)


class LinearAttention(Kernel):
    """Kernel attention with a feature map without parameters.

    Attributes:
      feature_map: phi, a row of FEATURE_MAPS.
    """

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
