"""Who computes exact attention: a maintained kernel of the platform where one serves, blocked XLA elsewhere.

The mask is one of indices, causal or a window, within segments: tokens of a segment stand side by side,
so that distances of indices are distances of positions, and no mask of T x S is ever made.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fastformer.attention import blocked
from fastformer.attention.scores import Bend, Mask
from fastformer.core.errors import lookup
from fastformer.core.layers import zero_padding
from fastformer.core.mesh import platform
from fastformer.core.seq import Seq

LANES = 128  # of a TPU's vector registers: what the kernels' blocks and head widths are multiples of


class Case(NamedTuple):
    """What is known of a call before it runs.

    Attributes:
      q, k, v: shapes [B, T, H, K], [B, S, G, K] and [B, S, G, P].
      past: as in blocked.attend.
    """

    platform: str
    dtype: jnp.dtype
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: Mask
    bend: Bend
    past: int | None


class Implementation(NamedTuple):
    """A row of the table.

    Attributes:
      refuse: why it cannot serve a case; "" when it can.
      run: ``(q, k, v, q_seq, k_seq, case) -> y_BTHP``.
    """

    refuse: Callable[[Case], str]
    run: Callable[..., jax.Array]


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    seqs: tuple[Seq, Seq],
    mask: Mask = Mask(),
    bend: Bend = Bend(),
    *,
    past: int | None = 0,
    implementation: str = "auto",
) -> jax.Array:
    """Return ``softmax(q k^T / sqrt(K)) v``, [B, T, H, P] in the dtype of ``v``, by the first that serves.

    Args:
      seqs: of queries and of keys.
      past: as in blocked.attend.
      implementation: "auto", or the row of IMPLEMENTATIONS to try before the others; a warning says
        why it could not serve.
    """
    shapes = (q_BTHK.shape, k_BSGK.shape, v_BSGP.shape)
    case = Case(platform(), jnp.dtype(v_BSGP.dtype), *shapes, mask, bend, past)
    name = choose(case, implementation)
    return IMPLEMENTATIONS[name].run(q_BTHK, k_BSGK, v_BSGP, *seqs, case)


def choose(case: Case, implementation: str = "auto") -> str:
    """Return the row that serves: the one asked for if it can, else the first of the table that can."""
    if implementation != "auto":
        reason = lookup(IMPLEMENTATIONS, implementation, "implementation").refuse(case)
        if not reason:
            return implementation
        warnings.warn(f"implementation {implementation} cannot serve: {reason}", stacklevel=2)
    return next(name for name, row in IMPLEMENTATIONS.items() if not row.refuse(case))


# Blocked XLA: everywhere.


def _run_xla(q_BTHK, k_BSGK, v_BSGP, q_seq: Seq, k_seq: Seq, case: Case) -> jax.Array:
    return blocked.attend(q_BTHK, k_BSGK, v_BSGP, q_seq, k_seq, case.mask, case.bend, past=case.past)


# cuDNN's flash attention on GPU.


def _refuse_cudnn(case: Case) -> str:
    width = case.q[-1]
    if case.platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs, and this is {case.platform}"
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16 or float16, not {case.dtype}"
    if width % 8 or width > 128 or case.v[-1] != width:
        return f"cuDNN's flash attention takes head widths of 8, 16, … 128, not {width} and {case.v[-1]}"
    if case.bend != Bend():
        return "cuDNN's flash attention here has no soft cap and no ALiBi"
    if case.past != 0 or case.q[1] != case.k[1]:
        return "cuDNN's flash attention here is self-attention of whole sequences"
    if not case.mask.causal and case.mask.window:
        return "cuDNN's windows are causal"
    return ""


def _run_cudnn(q_BTHK, k_BSGK, v_BSGP, q_seq: Seq, k_seq: Seq, case: Case) -> jax.Array:
    """Rows that are one segment, padded at its end or not, go to cuDNN, which knows none; others to XLA."""
    first_B1 = q_seq.segment_BT[:, :1]
    real_BT = q_seq.segment_BT > 0
    length_B = real_BT.sum(axis=1, dtype=jnp.int32)
    in_front_BT = jnp.arange(real_BT.shape[1])[None, :] < length_B[:, None]
    one_segment = jnp.all((q_seq.segment_BT == first_B1) == in_front_BT) & jnp.all(length_B > 0)

    def kernel(q, k, v):
        options = {"is_causal": case.mask.causal, "implementation": "cudnn"}
        if case.mask.window:
            options["local_window_size"] = (case.mask.window - 1, 0)
        lengths = {"query_seq_lengths": length_B, "key_value_seq_lengths": length_B}
        return jax.nn.dot_product_attention(q, k, v, **options, **lengths).astype(v.dtype)

    def others(q, k, v):
        return _run_xla(q, k, v, q_seq, k_seq, case)

    return jax.lax.cond(one_segment, kernel, others, q_BTHK, k_BSGK, v_BSGP)


# Pallas splash attention on TPU.


def _refuse_pallas(case: Case) -> str:
    if case.platform != "tpu":
        return f"the Pallas kernels run on TPUs, and this is {case.platform}"
    if case.q[1] % LANES or case.k[1] % LANES:
        return f"the Pallas kernels take lengths that {LANES} divides, not {case.q[1]} and {case.k[1]}"
    if case.bend.slopes:
        return "the Pallas kernels have no ALiBi"
    if case.past != 0:
        return "the Pallas kernels here are self-attention of whole sequences"
    return ""


def _run_pallas(q_BTHK, k_BSGK, v_BSGP, q_seq: Seq, k_seq: Seq, case: Case) -> jax.Array:
    share = case.q[2] // case.k[2]
    scale = 1.0 / math.sqrt(case.q[-1])
    k_BSHK, v_BSHP = (jnp.repeat(zero_padding(x, k_seq), share, axis=2) for x in (k_BSGK, v_BSGP))
    q_BTHK = zero_padding(q_BTHK, q_seq) * jnp.asarray(scale, q_BTHK.dtype)
    q_BHTK, k_BHSK, v_BHSP = (_lanes(x).transpose(0, 2, 1, 3) for x in (q_BTHK, k_BSHK, v_BSHP))
    heads, batch = nn.logical_to_mesh_axes(("H",)), nn.logical_to_mesh_axes(("B",))
    by_head, by_row = PartitionSpec(*batch, *heads, None, None), PartitionSpec(*batch, None)

    def local(q, k, v, q_segment, k_segment):
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        kernel = _splash(q.shape[1], q.shape[2], k.shape[2], case.mask, case.bend.soft_cap)
        return jax.vmap(kernel)(q, k, v, SegmentIds(q_segment, k_segment))

    args = (q_BHTK, k_BHSK, v_BHSP, q_seq.segment_BT, k_seq.segment_BT)
    if not jax.sharding.get_abstract_mesh().empty:
        # A Pallas call cannot be split by the compiler: each device gets its own rows and heads.
        specs = (by_head, by_head, by_head, by_row, by_row)
        local = jax.shard_map(local, in_specs=specs, out_specs=by_head, check_vma=False)
    y_BHTP = local(*args)
    return y_BHTP.transpose(0, 2, 1, 3)[..., : case.v[-1]].astype(case.dtype)


def _lanes(x: jax.Array) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])


def _splash(heads: int, time: int, keys: int, mask: Mask, soft_cap: float) -> Callable[..., jax.Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    reach = mask.window - 1 if mask.window else None
    one = masks.LocalMask((time, keys), (reach, 0 if mask.causal else reach), offset=0)
    if reach is None and not mask.causal:
        one = masks.FullMask((time, keys))
    block = max(size for size in (512, 256, 128) if time % size == 0 and keys % size == 0)
    sizes = {f"block_{name}": block for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv")}
    sizes |= {f"block_{name}": block for name in ("kv_dkv_compute", "q_dq", "kv_dq")}
    return splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=soft_cap or None,
    )


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation(_refuse_cudnn, _run_cudnn),
    "pallas": Implementation(_refuse_pallas, _run_pallas),
    "xla": Implementation(lambda case: "", _run_xla),
}
