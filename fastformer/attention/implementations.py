"""Who computes exact attention: a maintained kernel of the platform where one serves, blocked XLA elsewhere.

The mask is one of indices, causal or a window, within segments: tokens of a segment stand side by side,
so that distances of indices are distances of positions, and no mask of T x S is ever made.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention import blocked, splash
from fastformer.attention.ring import Part, Shifted, ring, with_halo
from fastformer.attention.scores import Bend, Mask
from fastformer.attention.splash import LANES
from fastformer.attention.time_shards import TimeShards, by_shard, time_shards
from fastformer.core.errors import lookup
from fastformer.core.mesh import layout, platform
from fastformer.core.seq import Seq


class Case(NamedTuple):
    """What is known of a call before it runs.

    Attributes:
      q, k, v: shapes [B, T, H, K], [B, S, G, K] and [B, S, G, P], where time is split of a shard.
      past: as in blocked.attend.
      split: time is split over devices.
    """

    platform: str
    dtype: jnp.dtype
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: Mask
    bend: Bend
    past: int | None
    split: bool = False


class Implementation(NamedTuple):
    """A row of the table.

    Attributes:
      refuse: why it cannot serve a case; "" when it can.
      run: ``(q, k, v, q_seq, k_seq, case) -> y_BTHP``; of a split case on one device, and the keys are those
        that a window reaches, ``past`` of them before the queries.
      part: ``case -> ring.Part``, attention to some of the keys on one device; None where it is not known.
      prefix: it can serve masks with a prefix.
    """

    refuse: Callable[[Case], str]
    run: Callable[..., jax.Array]
    part: Callable[[Case], Part] | None = None
    prefix: bool = False


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

    Rows whose time is split over devices are attended to by ring.ring, or with a window by what their
    neighbours hand over.

    Args:
      seqs: of queries and of keys.
      past: as in blocked.attend.
      implementation: "auto", or the row of IMPLEMENTATIONS to try before the others; a warning says
        why it could not serve.
    """
    split = time_shards(*q_BTHK.shape[:2])
    if split and not past:
        options = {"past": past, "implementation": implementation, "split": split}
        return attend_split(q_BTHK, k_BSGK, v_BSGP, seqs, mask, bend, **options)[0].astype(v_BSGP.dtype)
    shapes = (q_BTHK.shape, k_BSGK.shape, v_BSGP.shape)
    case = Case(platform(), jnp.dtype(v_BSGP.dtype), *shapes, mask, bend, past)
    name = choose(case, implementation)
    return IMPLEMENTATIONS[name].run(q_BTHK, k_BSGK, v_BSGP, *seqs, case)


def attend_split(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGP: jax.Array,
    seqs: tuple[Seq, Seq],
    mask: Mask,
    bend: Bend,
    *,
    split: TimeShards,
    past: int | None = 0,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array | None]:
    """Return ``(y_BTHP, log_BTH)`` of rows whose time is split, as attend_part has them.

    With a window only blocked XLA knows the log; it is None of the others.

    Args:
      past: None in cross-attention: each device sees all of the keys; 0 otherwise.
    """
    heads, groups, time = "H", "G", "." if past is None else "T"
    if bend.slopes and layout("H", q_BTHK.shape[2:3])[0]:
        heads = groups = "."  # slopes are known of all heads, before a device knows which it has
    elif layout("H", q_BTHK.shape[2:3]) != layout("G", k_BSGK.shape[2:3]):
        groups = "H"  # query heads of a device would share keys that are not there
        k_BSGK, v_BSGP = (jnp.repeat(x, q_BTHK.shape[2] // x.shape[2], axis=2) for x in (k_BSGK, v_BSGP))
    no_log = []
    of_tokens, kind = jax.tree.flatten(seqs)

    def local(q, k, v, *of_tokens):
        (seq, k_seq), before = jax.tree.unflatten(kind, of_tokens), past
        if mask.window:
            multiple = LANES if platform() == "tpu" else 1
            k, v, k_seq, before = with_halo(split, mask, k, v, k_seq, multiple)
        shapes = (q.shape, k.shape, v.shape)
        case = Case(platform(), jnp.dtype(v.dtype), *shapes, mask, bend, before, split=True)
        name = choose(case, implementation)
        if not mask.window and past == 0:
            return ring(IMPLEMENTATIONS[name].part(case), split, mask, q, k, v, seq)
        if name == "xla":
            shifted = Shifted(mask, before) if before else mask
            return blocked.attend_part(q, k, v, seq, k_seq, shifted, bend, past=past)
        no_log.append(name)
        return IMPLEMENTATIONS[name].run(q, k, v, seq, k_seq, case), jnp.zeros(q.shape[:3])

    of_keys = (f"B{time}{groups}K", f"B{time}{groups}P")
    of_seqs = (spelt for seq, spelt in zip(seqs, ("BT", f"B{time}")) for _ in jax.tree.leaves(seq))
    letters, args = (f"BT{heads}K", *of_keys, *of_seqs), (q_BTHK, k_BSGK, v_BSGP, *of_tokens)
    y_BTHP, log_BTH = by_shard(local, letters, (f"BT{heads}P", f"BT{heads}"), args)
    return y_BTHP, None if no_log else log_BTH


def choose(case: Case, implementation: str = "auto") -> str:
    """Return the row that serves: the one asked for if it can, else the first of the table that can."""
    if implementation != "auto":
        reason = _refusal(lookup(IMPLEMENTATIONS, implementation, "implementation"), case)
        if not reason:
            return implementation
        warnings.warn(f"implementation {implementation} cannot serve: {reason}", stacklevel=2)
    return next(name for name, row in IMPLEMENTATIONS.items() if not _refusal(row, case))


def _refusal(row: Implementation, case: Case) -> str:
    return "it has no mask with a prefix" if case.mask.prefix and not row.prefix else row.refuse(case)


# Blocked XLA: everywhere.


def _run_xla(q_BTHK, k_BSGK, v_BSGP, q_seq: Seq, k_seq: Seq, case: Case) -> jax.Array:
    return blocked.attend(q_BTHK, k_BSGK, v_BSGP, q_seq, k_seq, case.mask, case.bend, past=case.past)


def _part_xla(case: Case) -> Part:
    return Part(functools.partial(_some_xla, case.bend), functools.partial(_some_xla_back, case.bend))


def _some_xla(bend: Bend, q, k, v, seqs, mask: Mask):
    return blocked.attend_part(q, k, v, *seqs, mask, bend, past=_past(mask))


def _some_xla_back(bend: Bend, qkv, seqs, mask: Mask, found, cotangents):
    return blocked.part_gradients(qkv, seqs, mask, bend, found, cotangents, past=_past(mask))


def _past(mask: Mask) -> int | None:
    """Return 0 for a shard's own keys; None for those of another, whose indices are not its own."""
    return 0 if mask.causal else None


# cuDNN's flash attention on GPU.


def _refuse_cudnn(case: Case) -> str:
    width = case.q[-1]
    if case.platform not in ("gpu", "cuda"):
        return f"cuDNN runs on NVIDIA GPUs, and this is {case.platform}"
    if case.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention takes bfloat16 or float16, not {case.dtype}"
    if width % 8 or width > 128 or case.v[-1] != width:
        return f"cuDNN's flash attention takes head widths of 8, 16, … 128, not {width} and {case.v[-1]}"
    if case.split:
        return "cuDNN's flash attention here is of rows that are whole in time"
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
    if case.past != 0 and not (case.split and case.mask.window):
        return "the Pallas kernels here are self-attention of whole sequences"
    return ""


def _run_pallas(q_BTHK, k_BSGK, v_BSGP, q_seq: Seq, k_seq: Seq, case: Case) -> jax.Array:
    def local(q, k, v, q_segment, q_position, k_segment, k_position):
        seqs = (Seq(q_segment, q_position), Seq(k_segment, k_position))
        return (splash.attend(q, k, v, seqs, case.mask, case.bend.soft_cap, case.past),)

    of_tokens = (*q_seq[:2], *k_seq[:2])
    args = (q_BTHK, k_BSGK, v_BSGP, *of_tokens)
    if case.split or jax.sharding.get_abstract_mesh().empty:
        return local(*args)[0]
    if layout("H", case.q[2:3]) != layout("G", case.k[2:3]):  # each head with keys of its own
        k_BSHK, v_BSHP = (jnp.repeat(x, case.q[2] // case.k[2], axis=2) for x in (k_BSGK, v_BSGP))
        args, kv = (q_BTHK, k_BSHK, v_BSHP, *of_tokens), ("B.HK", "B.HP")
    else:
        kv = ("B.GK", "B.GP")
    # A Pallas call cannot be split by the compiler: each device gets its own rows and heads.
    return by_shard(local, ("B.HK", *kv, "B.", "B.", "B.", "B."), ("B.HP",), args)[0]


IMPLEMENTATIONS: dict[str, Implementation] = {
    "cudnn": Implementation(_refuse_cudnn, _run_cudnn),
    "pallas": Implementation(_refuse_pallas, _run_pallas, lambda case: splash.part(case.bend.soft_cap)),
    "xla": Implementation(lambda case: "", _run_xla, _part_xla, prefix=True),
}
