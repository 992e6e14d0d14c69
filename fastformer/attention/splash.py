"""Exact attention by JAX's Pallas kernel for TPUs, splash attention, on one device's rows and heads."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.attention.ring import Part
from fastformer.attention.scores import Mask
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

LANES = 128  # of a TPU's vector registers: what the kernel's blocks and head widths are multiples of


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    seqs: tuple[Seq, Seq],
    mask: Mask,
    soft_cap: float,
    past: int = 0,
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v``, [B, T, H, P] in the dtype of ``v``.

    Args:
      past: the first ``past`` keys are the tokens just before the first query.
    """
    q, k, v = _heads_first((q_BTHK, k_BSGK, v_BSGP), seqs)
    kernel = _kernel(q.shape[1], (q.shape[2], k.shape[2], past), mask, soft_cap)
    y_BHTP = jax.vmap(kernel)(q, k, v, _segments(seqs))
    return _time_first(y_BHTP, v_BSGP.shape[-1]).astype(v_BSGP.dtype)


def part(soft_cap: float) -> Part:
    """Return the kernel as attention to some of the keys."""
    return Part(functools.partial(_forward, soft_cap), functools.partial(_gradients, soft_cap))


def _forward(soft_cap: float, q_BTHK, k_BSGK, v_BSGP, seqs: tuple[Seq, Seq], mask: Mask):
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import DEFAULT_MASK_VALUE

    q, k, v = _heads_first((q_BTHK, k_BSGK, v_BSGP), seqs)
    kernel = _kernel(q.shape[1], (q.shape[2], k.shape[2], 0), mask, soft_cap, logs=True)
    y_BHTP, (log_BHT,) = jax.vmap(kernel)(q, k, v, _segments(seqs))
    # Where nothing is seen the kernel returns an average of all values, and about its mask's value.
    log_BHT = jnp.where(log_BHT > DEFAULT_MASK_VALUE / 2, log_BHT, -jnp.inf)
    return _time_first(y_BHTP, v_BSGP.shape[-1]).astype(jnp.float32), log_BHT.swapaxes(1, 2)


def _gradients(soft_cap: float, qkv, seqs: tuple[Seq, Seq], mask: Mask, found, cotangents):
    """The log's cotangent is left out: who wants the log of a row takes blocked XLA."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    (q_BTHK, k_BSGK, v_BSGP), (y_BTHP, log_BTH) = qkv, found
    q, k, v = _heads_first(qkv, seqs)
    kernel = _kernel(q.shape[1], (q.shape[2], k.shape[2], 0), mask, soft_cap)
    y, dy = (_lanes(x).swapaxes(1, 2) for x in (y_BTHP, cotangents[0]))
    log_BHT = jnp.where(log_BTH > -jnp.inf, log_BTH, 0.0).swapaxes(1, 2)

    def back(q, k, v, segments, y, log, dy):
        # The kernel's own backward pass, whose public form takes no log of more keys than its own.
        saved = (q, k, v, segments, None, y, log, kernel.dq_mask_info, kernel.dkv_mask_info)
        return splash._splash_attention_bwd(**kernel.kwargs, res=saved, do=dy)[3:6]

    dq, dk, dv = jax.vmap(back)(q, k, v, _segments(seqs), y, log_BHT, dy.astype(v.dtype))
    dq *= 1.0 / math.sqrt(q_BTHK.shape[-1])
    widths = (q_BTHK.shape[-1], q_BTHK.shape[-1], v_BSGP.shape[-1])
    dq, dk, dv = (_time_first(x.astype(jnp.float32), width) for x, width in zip((dq, dk, dv), widths))
    dk, dv = (x.reshape(*k_BSGK.shape[:3], -1, x.shape[-1]).sum(axis=3) for x in (dk, dv))
    return tuple(zero_padding(x, seq) for x, seq in ((dq, seqs[0]), (dk, seqs[1]), (dv, seqs[1])))


def _heads_first(qkv, seqs: tuple[Seq, Seq]) -> list[jax.Array]:
    """Return scaled queries, keys and values, as many as queries have heads, [B, H, T, lanes]; clean."""
    q_BTHK, k_BSGK, v_BSGP = (zero_padding(x, seq) for x, seq in zip(qkv, (seqs[0], seqs[1], seqs[1])))
    share = q_BTHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHP = (jnp.repeat(x, share, axis=2) for x in (k_BSGK, v_BSGP))
    q_BTHK *= jnp.asarray(1.0 / math.sqrt(q_BTHK.shape[-1]), q_BTHK.dtype)
    return [_lanes(x).swapaxes(1, 2) for x in (q_BTHK, k_BSHK, v_BSHP)]


def _lanes(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _time_first(x_BHTP: jax.Array, width: int) -> jax.Array:
    return x_BHTP.swapaxes(1, 2)[..., :width]


def _segments(seqs: tuple[Seq, Seq]) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(seqs[0].segment_BT, seqs[1].segment_BT)


def _kernel(heads: int, sizes: tuple[int, int, int], mask: Mask, soft_cap: float, logs: bool = False) -> Any:
    """Return the kernel for ``sizes``: queries, keys, and how many of those stand before the queries.

    Args:
      logs: it returns the log of the total weight too, and has no gradient.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, keys, past = sizes
    reach = mask.window - 1 if mask.window else None
    one = masks.LocalMask((time, keys), (reach, 0 if mask.causal else reach), offset=past)
    if reach is None and not mask.causal:
        one = masks.FullMask((time, keys))
    block = max(size for size in (512, 256, 128) if time % size == 0 and keys % size == 0)
    block_sizes = {f"block_{name}": block for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")}
    block_sizes |= {f"block_{name}": block for name in ("kv_dkv_compute", "q_dq", "kv_dq")}
    return splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(**block_sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap or None,
        save_residuals=logs,
    )
