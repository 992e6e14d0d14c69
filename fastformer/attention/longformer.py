"""Longformer: dilated windows, and global tokens that have projections of their own.

Beltagy, Peters & Cohan 2020, 2004.05150, section 3.1.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.blocked import BLOCK
from fastformer.attention.mixer import Mixer
from fastformer.attention.parts import first_seen, first_tokens, grouped, join, scored, starts, take
from fastformer.attention.positions import rope
from fastformer.attention.scores import Bend, Mask, reference_attention
from fastformer.attention.windows import Windows, band
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm, zero_padding
from fastformer.core.seq import Seq


class Global(NamedTuple):
    """The second set of projections, with which global tokens look at all others."""

    q_BTHK: jax.Array
    k_BSGK: jax.Array
    v_BSGP: jax.Array


class _Around(NamedTuple):
    """The window, and the first tokens of the segment besides."""

    near: Windows
    tokens: int

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        first_BTS = Mask(causal=False).visible(q_seq, k_seq) & (k_seq.position_BT < self.tokens)[:, None]
        return self.near.visible(q_seq, k_seq) | first_BTS


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    everywhere: Global,
    *,
    seq: Seq,
    window: int,
    dilation: int,
    tokens: int,
    bend: Bend = Bend(),
) -> jax.Array:
    """Return attention under the dense masks of the two kinds of query, float32."""
    around = _Around(Windows(False, window * dilation, dilation), tokens)
    local_BTHP = reference_attention(q_BTHK, k_BSGK, v_BSGP, seq, seq, around, bend)
    global_BTHP = reference_attention(*everywhere, seq, seq, Mask(causal=False), bend)
    return jnp.where((seq.position_BT < tokens)[:, :, None, None], global_BTHP, local_BTHP)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    everywhere: Global,
    *,
    seq: Seq,
    window: int,
    dilation: int,
    tokens: int,
    bend: Bend = Bend(),
    block: int = BLOCK,
) -> tuple[jax.Array, None]:
    """Return ``(y_BTHP, None)``: windows in blocks, global keys gathered, global queries by sums.

    Args:
      everywhere: the projections of global tokens.
      window: W; a token sees itself and W - 1 on either side, ``dilation`` tokens apart.
      tokens: the first tokens of a segment, that see all and are seen by all.
      block: tokens in a block.
    """
    q_BTHK, k_BTGK, v_BTGP = (zero_padding(x, seq) for x in (q_BTHK, k_BTGK, v_BTGP))
    everywhere = Global(*(zero_padding(x, seq) for x in everywhere))
    mask = Windows(False, window * dilation, dilation)
    u_UBT = jnp.arange(tokens).reshape(-1, 1, 1)
    there_UBT = first_seen(seq, tokens)
    far_UBT = there_UBT & ~mask.near(seq.position_BT[None] - u_UBT)
    y_BTHP, _ = join(
        [
            band(q_BTHK, k_BTGK, v_BTGP, seq, mask, bend, block),
            first_tokens(q_BTHK, k_BTGK, v_BTGP, far_UBT, (seq, seq.position_BT), bend),
        ]
    )
    global_BTHP = _global_queries(*everywhere, there_UBT, seq, bend)
    y_BTHP = jnp.where((seq.position_BT < tokens)[:, :, None, None], global_BTHP, y_BTHP)
    return y_BTHP.astype(v_BTGP.dtype), None


def _global_queries(q_BTHK, k_BTGK, v_BTGP, there_UBT, seq: Seq, bend: Bend) -> jax.Array:
    """Return what the first tokens of each segment see of all of it, [B, T, H, P]; O(T U).

    Each key computes its score with the queries of its segment; sums over segments make the softmax.
    """
    batch, time, heads, width = q_BTHK.shape
    start_BT = starts(seq)
    row_B1 = jnp.arange(batch)[:, None]
    # Sums of a segment stand at its first token; those of padding are dropped.
    home = (row_B1 * time + jnp.where(seq.segment_BT > 0, start_BT, batch * time)).ravel()
    real_BT = (seq.segment_BT > 0)[:, :, None, None]

    def total(x: jax.Array) -> jax.Array:
        sums = jax.ops.segment_sum(x.reshape(batch * time, *x.shape[2:]), home, batch * time)
        return sums.reshape(x.shape)

    @jax.checkpoint
    def query(u: jax.Array) -> jax.Array:
        q_BTGMK = grouped(take(q_BTHK, start_BT + u), k_BTGK.shape[2])
        scores = jnp.einsum("BTGMK,BTGK->BTGM", q_BTGMK, k_BTGK, preferred_element_type=jnp.float32)
        scores = jnp.moveaxis(scores, 1, -1) / math.sqrt(width)
        scores = jnp.moveaxis(scored(scores, seq.position_BT - u, bend), -1, 1)
        flat = jax.lax.stop_gradient(scores).reshape(batch * time, *scores.shape[2:])
        top = jax.ops.segment_max(flat, home, batch * time).reshape(scores.shape)
        weights = jnp.where(real_BT, jnp.exp(jnp.where(real_BT, scores - take(top, start_BT), 0.0)), 0.0)
        values = total(weights[..., None] * v_BTGP[:, :, :, None].astype(jnp.float32))
        sums = total(weights)[..., None]
        return (values / jnp.where(sums > 0, sums, 1.0)).reshape(batch, time, heads, -1)

    def put(y_BTHP: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        u, there_BT = at
        mine = there_BT & (seq.position_BT == u)
        return jnp.where(mine[:, :, None, None], take(query(u), start_BT), y_BTHP), None

    start = jnp.zeros((batch, time, heads, v_BTGP.shape[-1]), jnp.float32)
    return jax.lax.scan(put, start, (jnp.arange(len(there_UBT)), there_UBT))[0]


class Longformer(Mixer):
    """Dilated windows and global tokens, the first of each segment: O(T (W + tokens)) to train.

    Attributes:
      window: W in tokens seen to one side, itself among them.
      dilation: tokens from one seen token to the next.
      global_tokens: how many first tokens see all and are seen by all.
    """

    order: ClassVar[str] = "T"
    bidirectional: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    small: ClassVar[dict] = {"window": 8, "global_tokens": 1}

    window: int = 257
    dilation: int = 1
    global_tokens: int = 1

    def __post_init__(self):
        for field in ("window", "dilation", "global_tokens"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "a number of tokens, 1 or more")
        super().__post_init__()

    def project(self, x_BTD, x_BSD, seqs, past):
        own, past = super().project(x_BTD, x_BSD, seqs, past)
        q = self.linear("global_query", x_BTD, "BTD,DHK->BTHK", self.heads, self.head_width)
        k = self.linear("global_key", x_BSD, "BSD,DGK->BSGK", self.groups, self.head_width)
        v = self.linear("global_value", x_BSD, "BSD,DGP->BSGP", self.groups, self.value_width)
        if self.conv_width:
            (q, k, v), _ = self.convolve((q, k, v), seqs[0], None, name="global_conv")
        if self.qk_norm:
            q, k = RMSNorm("K", name="global_query_norm")(q), RMSNorm("K", name="global_key_norm")(k)
        if self.positions == "rope":
            q, k = (rope(x, seqs[0].position_BT, self.rope_base) for x in (q, k))
        return (*own, Global(q, k, v)), past

    @property
    def _sizes(self) -> dict[str, int]:
        return {"window": self.window, "dilation": self.dilation, "tokens": self.global_tokens}

    def mix(self, qkv, seqs, state):
        return forward(*qkv, seq=seqs[0], bend=self.bend, **self._sizes)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0], bend=self.bend, **self._sizes)
