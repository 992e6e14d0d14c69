"""Multi-head latent attention: keys and values from one small vector a token (DeepSeek-V2, 2405.04434)."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention import cache
from fastformer.attention.cache import KVState
from fastformer.attention.implementations import attend
from fastformer.attention.mixer import Mixer
from fastformer.attention.positions import rope
from fastformer.attention.scores import Bend, Mask, masked_softmax, reference_attention
from fastformer.attention.softmax import seen, slot_scores, slot_values
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm, zero_padding
from fastformer.core.seq import Seq


def reference(
    q_BTHK: jax.Array,
    rotated_BSK: jax.Array,
    latent_BSR: jax.Array,
    key_up_RGK: jax.Array,
    value_up_RGP: jax.Array,
    *,
    seq: Seq,
    causal: bool = True,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return ``softmax(q [k_C, k_R]^T / sqrt(K)) v_C``, ``k_C, v_C = c W_UK, c W_UV``, float32 (eq. 9-19).

    Args:
      q_BTHK: without and then with rotary positions; K is the width of both together.
      rotated_BSK: the one key a token with rotary positions.
      latent_BSR: c, normalised.
      key_up_RGK, value_up_RGP: W_UK and W_UV of each head.
    """
    k_BSGK, v_BSGP = expand(rotated_BSK, latent_BSR, key_up_RGK, value_up_RGP)
    return reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, seq, Mask(causal), bend)


def expand(rotated_BSK, latent_BSR, key_up_RGK, value_up_RGP) -> tuple[jax.Array, jax.Array]:
    """Return the keys and values of every head, ``(k_BSGK, v_BSGP)``."""
    plain_BSGK = jnp.einsum("BSR,RGK->BSGK", latent_BSR, key_up_RGK.astype(latent_BSR.dtype))
    shape = (*plain_BSGK.shape[:3], rotated_BSK.shape[-1])
    rotated_BSGK = jnp.broadcast_to(rotated_BSK[:, :, None], shape)
    v_BSGP = jnp.einsum("BSR,RGP->BSGP", latent_BSR, value_up_RGP.astype(latent_BSR.dtype))
    return jnp.concatenate([plain_BSGK, rotated_BSGK], axis=-1), v_BSGP


def forward(
    q_BTHK: jax.Array,
    rotated_BTK: jax.Array,
    latent_BTR: jax.Array,
    key_up_RGK: jax.Array,
    value_up_RGP: jax.Array,
    *,
    seq: Seq,
    state: KVState | None = None,
    causal: bool = True,
    bend: Bend = Bend(),
    implementation: str = "auto",
) -> tuple[jax.Array, KVState | None]:
    """Return ``(y_BTHP, state)``: keys and values expanded; for one token a row, the latents as they are.

    Args:
      q_BTHK, …, value_up_RGP: as in ``reference``.
      causal: False lets every token see those after it (no state).
      implementation: a row of IMPLEMENTATIONS, or "auto".
    """
    ups = (key_up_RGK, value_up_RGP)
    rotated_BTK, latent_BTR = zero_padding(rotated_BTK, seq), zero_padding(latent_BTR, seq)
    if state is None:
        k_BTGK, v_BTGP = expand(rotated_BTK, latent_BTR, *ups)
        options = {"implementation": implementation}
        y_BTHP = attend(q_BTHK, k_BTGK, v_BTGP, (seq, seq), Mask(causal), bend, **options)
        grown = cache.growing(rotated_BTK[:, :, None], latent_BTR[:, :, None], seq)
        return y_BTHP, grown if causal else None
    keys, past, grown = seen(state, rotated_BTK[:, :, None], latent_BTR[:, :, None], seq)
    if q_BTHK.shape[1] == 1:
        return decode(q_BTHK, keys, *ups, seq=seq, bend=bend), grown
    clean = (zero_padding(x[:, :, 0], keys.seq) for x in keys[:2])
    k_BSGK, v_BSGP = expand(*clean, *ups)
    return attend(q_BTHK, k_BSGK, v_BSGP, (seq, keys.seq), Mask(True), bend, past=past), grown


def decode(q_B1HK, state: KVState, key_up_RGK, value_up_RGP, *, seq: Seq, bend: Bend) -> jax.Array:
    """Return the attention of one token a row over the latents, W_UK and W_UV absorbed (section 2.1.2)."""
    batch, _, heads, width = q_B1HK.shape
    plain, (_, groups, _) = key_up_RGK.shape[-1], key_up_RGK.shape
    q_BGMK = q_B1HK.reshape(batch, groups, heads // groups, width)
    q_BGMR = jnp.einsum("BGMK,RGK->BGMR", q_BGMK[..., :plain], key_up_RGK.astype(q_BGMK.dtype))
    q_B1HR = jnp.concatenate([q_BGMK[..., plain:], q_BGMR], axis=-1).reshape(batch, 1, heads, -1)
    # One key of rotary part and latent serves all heads; the scale is that of the expanded key.
    both = state._replace(key_BSGK=jnp.concatenate(state[:2], axis=-1))
    scale = math.sqrt(q_B1HR.shape[-1] / width)
    scores = slot_scores(q_B1HR * jnp.asarray(scale, q_B1HR.dtype), both, seq, bend)
    visible = Mask(True).visible(seq, state.seq)[:, :, None]
    y_B1HR = slot_values(masked_softmax(scores, visible), state)
    y_BGMR = y_B1HR.reshape(batch, groups, heads // groups, -1)
    y_BGMP = jnp.einsum("BGMR,RGP->BGMP", y_BGMR, value_up_RGP.astype(y_BGMR.dtype))
    return y_BGMP.reshape(batch, 1, heads, -1)


def init_state(batch: int, capacity: int, dtype: jnp.dtype, *, rope_width: int, kv_rank: int) -> KVState:
    """Return an empty cache: B capacity (rope_width + R) elements and indices, whatever H and K."""
    return cache.empty(batch, capacity, 1, (rope_width, kv_rank), dtype)


class Latent(Mixer):
    """Exact attention with a small cache: one latent vector and one rotary key a token.

    Keys have ``head_width`` features from the latent and ``rope_width`` with rotary positions, which need
    ``positions`` "rope". Fewer ``kv_heads`` than heads share keys and values, which the paper does not do.
    A short convolution, where asked for, is over the queries, the rotary key and the latent.

    Attributes:
      kv_rank: R, width of the latent; 0 is 4 K (section 2.1.4).
      rope_width: of the rotary key, even; 0 is K / 2 (section 2.1.4).
      query_rank: width of the queries' latent, 1536 in DeepSeek-V2; 0 projects queries at once, as its Lite.
    """

    causal: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    kernels: ClassVar[bool] = True
    small: ClassVar[dict] = {"kv_rank": 12, "rope_width": 4, "query_rank": 16}

    kv_rank: int = 0
    rope_width: int = 0
    query_rank: int = 0

    def __post_init__(self):
        for field in ("kv_rank", "query_rank"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "a width, or 0")
        even = self.rope_width >= 0 and self.rope_width % 2 == 0
        require(even, "rope_width", self.rope_width, "an even width, or 0")
        require(not self.qk_norm, "qk_norm", self.qk_norm, "off: the latents are normalised instead")
        super().__post_init__()

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the widths of the rotary key and of the latent."""
        return self.rope_width or max(2, self.head_width // 4 * 2), self.kv_rank or 4 * self.head_width

    def project(self, x_BTD, x_BSD, seqs, past):
        rope_width, rank = self.sizes
        width, x_BTR, spec = self.head_width + rope_width, x_BTD, "BTD,DHK->BTHK"
        if self.query_rank:
            x_BTR = self.linear("query_down", x_BTD, "BTD,DR->BTR", self.query_rank)
            x_BTR, spec = RMSNorm("R", name="query_norm")(x_BTR), "BTR,RHK->BTHK"
        q_BTHK = self.linear("query", x_BTR, spec, self.heads, width)
        latent_BSR = self.linear("latent", x_BSD, "BSD,DR->BSR", rank)
        rotated_BSK = self.linear("key", x_BSD, "BSD,DK->BSK", rope_width)
        if self.conv_width:
            parts = (q_BTHK, rotated_BSK[:, :, None], latent_BSR[:, :, None])
            (q_BTHK, rotated, latent), past = self.convolve(parts, seqs[0], past)
            rotated_BSK, latent_BSR = rotated[:, :, 0], latent[:, :, 0]
        latent_BSR = RMSNorm("R", name="latent_norm")(latent_BSR)
        if self.positions == "rope":
            turned = rope(q_BTHK[..., self.head_width :], seqs[0].position_BT, self.rope_base)
            q_BTHK = jnp.concatenate([q_BTHK[..., : self.head_width], turned], axis=-1)
            rotated_BSK = rope(rotated_BSK[:, :, None], seqs[1].position_BT, self.rope_base)[:, :, 0]
        return (q_BTHK, rotated_BSK, latent_BSR), past

    def past_features(self):
        rope_width, rank = self.sizes
        features = self.heads * (self.head_width + rope_width) + rope_width + rank
        return max(self.conv_width - 1, 0), features

    def gates(self, x_BTD, seq):
        _, rank = self.sizes
        init = nn.initializers.normal(rank**-0.5)
        wide = (("key_up", "RGK", self.head_width), ("value_up", "RGP", self.value_width))
        return tuple(
            self.param(name, nn.with_logical_partitioning(init, tuple(letters)), (rank, self.groups, size))
            for name, letters, size in wide
        )

    def mix(self, qkv, seqs, state):
        options = {"causal": not self.bidirectional_mode, "implementation": self.implementation}
        return forward(*qkv, seq=seqs[0], state=state, bend=self.bend, **options)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], causal=not self.bidirectional_mode, bend=self.bend)

    def empty(self, batch, capacity, dtype):
        rope_width, rank = self.sizes
        return init_state(batch, capacity, dtype, rope_width=rope_width, kv_rank=rank)
