"""Locality-sensitive hashing attention: only keys near the query are seen (Reformer, 2001.04451)."""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention import clusters
from fastformer.attention.blocked import BLOCK
from fastformer.attention.cache import KVState
from fastformer.attention.clusters import Chunks, Shared
from fastformer.attention.gating import unit
from fastformer.core.errors import require
from fastformer.core.seq import Seq


@functools.cache
def rotations(heads: int, width: int, rounds: int, buckets: int, seed: tuple[int, ...]) -> np.ndarray:
    """Return Gaussian matrices R, one a head and round, [H, N, K, buckets / 2] float32."""
    # RandomState's stream is frozen: a checkpoint finds the same rotations in every version of numpy.
    random = np.random.RandomState(list(seed))
    return random.standard_normal((heads, rounds, width, buckets // 2)).astype(np.float32)


def hashes(x_BTHK: jax.Array, rotation_HNKR: np.ndarray) -> jax.Array:
    """Return ``argmax([x R; -x R])``, the bucket of each head and round, [B, T, H, N] (section 2)."""
    x = jax.lax.stop_gradient(x_BTHK).astype(jnp.float32)
    turned = jnp.einsum("BTHK,HNKR->BTHNR", x, rotation_HNKR)
    return jnp.argmax(jnp.concatenate([turned, -turned], axis=-1), axis=-1).astype(jnp.int32)


def reference(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    bucket_BTHN: jax.Array,
    *,
    seq: Seq,
    chunk: int,
    causal: bool = True,
) -> jax.Array:
    """Return softmax attention to the keys that share a bucket with the query, float32 (eq. 2-3, 6)."""
    return clusters.reference(q_BTHK, k_BTHK, v_BTHP, bucket_BTHN, seq=seq, mask=Chunks(causal, chunk))


def forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHP: jax.Array,
    bucket_BTHN: jax.Array,
    *,
    seq: Seq,
    chunk: int,
    state: KVState | None = None,
    causal: bool = True,
    block: int = BLOCK,
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``: tokens sorted by bucket, each chunk seeing itself and the one before.

    Args:
      chunk: tokens of a bucket that see each other, m.
      causal: False lets every token see those after it, and the next chunk too (no state).
      block: tokens in a block of the sorted sequence.
    """
    options = {"seq": seq, "mask": Chunks(causal, chunk), "state": state, "block": block}
    y_BTHP, grown = clusters.forward(q_BTHK, k_BTHK, v_BTHP, bucket_BTHN, **options)
    return y_BTHP, grown if causal else None


init_state = clusters.init_state


class LSH(Shared):
    """Reformer's attention: queries and keys that fall into one bucket of a random rotation.

    Keys are the queries at unit length (times sqrt(K), which scores are divided by, as they are not in the
    paper), and a token sees itself only where it sees nobody else (section 2).
    Each bucket has chunks of its own, whose tokens see that bucket only (eq. 3); in the authors' code chunks
    run over borders of buckets, whose number grows with T. So a token sees the same whatever else stands in
    a row. A key that several rounds find counts several times, as in their code; eq. 6 divides by the number.

    Attributes:
      buckets: even. rounds: of hashing, joined in one softmax. chunk: tokens, m.
      seed: of the rotations, with ``layer``.
    """

    small: ClassVar[dict] = {"buckets": 2, "rounds": 2, "chunk": 8}

    buckets: int = 64
    rounds: int = 4
    chunk: int = 64
    seed: int = 0

    def __post_init__(self):
        even = self.buckets >= 2 and self.buckets % 2 == 0
        require(even, "buckets", self.buckets, "an even number, 2 or more")
        for field in ("rounds", "chunk"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        super().__post_init__()

    def clusters(self, x_BTHK, seq):
        sizes = (self.heads, self.head_width, self.rounds, self.buckets)
        k_BTHK = unit(x_BTHK) * math.sqrt(self.head_width)
        return x_BTHK, k_BTHK, hashes(k_BTHK, rotations(*sizes, (self.seed, self.layer)))

    def mix(self, qkv, seqs, state):
        options = {"chunk": self.chunk, "state": state, "causal": not self.bidirectional_mode}
        return forward(*qkv, seq=seqs[0], **options)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], chunk=self.chunk, causal=not self.bidirectional_mode)
