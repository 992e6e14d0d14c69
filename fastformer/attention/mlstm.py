"""mLSTM: a matrix memory with an exponential input gate, and the sum of its keys to divide by.

Beck et al. 2024, xLSTM, 2405.04517, eqs. 19 to 27. With F = f~ or log sigmoid(f~), whose exponential is
the forget gate,

    C_t = exp(F_t) C_{t-1} + exp(i~_t) k_t v_t^T,    n_t = exp(F_t) n_{t-1} + exp(i~_t) k_t,
    y_t = C_t^T q_t / max(|n_t^T q_t|, 1).

The exponentials may be anything, so both sums are kept times exp(-m_t) with m_t = max(F_t + m_{t-1}, i~_t)
(eq. 15). Here all m come first, from one associative scan; what is left is attention with decays
F_t + m_{t-1} - m_t and inputs exp(i~_t - m_t), neither ever above 1, in chunks. An m of at least 0 serves
as well, since the divisor is at least 1, and keeps exp(-m) finite too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fastformer.attention.gating import Expanded
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, grouped, recur
from fastformer.attention.segments import starts
from fastformer.core.errors import lookup, require
from fastformer.core.layers import Linear, zero_padding
from fastformer.core.seq import Seq

EPSILON = 1e-6  # added to the divisor, and to the norm's variance, as in the authors' code

FORGET: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": jax.nn.log_sigmoid,
    "exp": lambda gate: gate,
}


class MLSTMState(NamedTuple):
    """All that is left of the past; in bytes, 4 B G K (P + 1) + 4 B G + 4 B.

    Attributes:
      memory: C, and n as the last of its P + 1 columns, both times exp(-m).
      level_BG: m, float32.
    """

    memory: Memory
    level_BG: jax.Array


def reference(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    input_BTG: jax.Array,
    log_forget_BTG: jax.Array,
    *,
    seq: Seq,
) -> jax.Array:
    """Return the stabilised recurrence token by token, [B, T, H, P] float32 (eqs. 15 to 27).

    Args:
      input_BTG: i~. log_forget_BTG: F.
    """
    groups, keys = k_BTGK.shape[2:]
    q_BTGMK = grouped(q_BTHK, groups) * keys**-0.5
    parts = (q_BTGMK, k_BTGK, v_BTGP, input_BTG, log_forget_BTG)
    parts = [zero_padding(part.astype(jnp.float32), seq) for part in parts]
    fresh_BT, _ = starts(seq, jnp.zeros_like(seq.segment_BT[:, 0]))

    def step(carry: tuple, token: tuple) -> tuple:
        memory_BGKP, norm_BGK, level_BG = carry
        (q, k, v, write, log_keep), fresh, real = token
        memory_BGKP = jnp.where(fresh[:, None, None, None], 0.0, memory_BGKP)
        norm_BGK = jnp.where(fresh[:, None, None], 0.0, norm_BGK)
        before_BG = jnp.where(fresh[:, None], 0.0, level_BG)
        # The result does not depend on it, nor has it a gradient.
        new_BG = jax.lax.stop_gradient(jnp.maximum(log_keep + before_BG, write))
        keep, write = (jnp.exp(x - new_BG)[..., None] for x in (log_keep + before_BG, write))
        new = (
            memory_BGKP * keep[..., None] + (k * write)[..., None] * v[:, :, None],
            norm_BGK * keep + k * write,
            new_BG,
        )
        divisor = jnp.abs(jnp.einsum("BGMK,BGK->BGM", q, new[1]))
        divisor = jnp.maximum(divisor, jnp.exp(-new_BG)[:, :, None]) + EPSILON
        y = jnp.einsum("BGMK,BGKP->BGMP", q, new[0]) / divisor[..., None]
        written = real.reshape(-1, 1)
        kept = [jnp.where(written.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(new, carry)]
        return tuple(kept), y

    start = init_state(len(k_BTGK), 0, jnp.float32, heads=groups, widths=(keys, v_BTGP.shape[-1]))
    memory_BGKP = start.memory.memory_BGKP
    carry = (memory_BGKP[..., :-1], memory_BGKP[..., -1], start.level_BG)
    turned = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (parts, fresh_BT, seq.segment_BT > 0))
    _, y_TBGMP = jax.lax.scan(step, carry, turned)
    return jnp.moveaxis(y_TBGMP, 0, 1).reshape(*q_BTHK.shape[:3], -1)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    input_BTG: jax.Array,
    log_forget_BTG: jax.Array,
    *,
    seq: Seq,
    state: MLSTMState | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, MLSTMState]:
    """Return ``(y_BTHP, state)``, in chunks; arguments as in ``reference``.

    Args:
      chunk: C, tokens in a chunk, on which the result does not depend; None is a good size.
    """
    groups, keys = k_BTGK.shape[2:]
    past = None if state is None else state.memory
    if state is None:
        state = init_state(len(k_BTGK), 0, jnp.float32, heads=groups, widths=(keys, v_BTGP.shape[-1]))
    write, log_keep = (zero_padding(x.astype(jnp.float32), seq) for x in (input_BTG, log_forget_BTG))
    fresh_BTG = starts(seq, state.memory.segment_B)[0][..., None]
    level = levels(write, log_keep, fresh_BTG, state.level_BG)
    # The result does not depend on it: its gradient is zero, and dear to find.
    level = jax.lax.stop_gradient(jnp.concatenate([state.level_BG[:, None], level], axis=1))
    before_BTG, level_BTG = level[:, :-1], level[:, 1:]
    q = q_BTHK.astype(jnp.float32) * keys**-0.5
    k = k_BTGK.astype(jnp.float32) * jnp.exp(write - level_BTG)[..., None]
    v = jnp.pad(v_BTGP.astype(jnp.float32), [(0, 0)] * 3 + [(0, 1)], constant_values=1.0)
    # Nothing of before a segment is seen in it: there its decay is nothing to lose precision over.
    log_keep = jnp.where(fresh_BTG, 0.0, log_keep + (before_BTG - level_BTG))
    y, memory = recur(Tokens(grouped(q, groups), k, v, log_keep[..., None]), seq, past, chunk)
    least_BTH = jnp.repeat(jnp.exp(-level_BTG), q.shape[2] // groups, axis=2)
    divisor = jnp.maximum(jnp.abs(y[..., -1]), least_BTH) + EPSILON
    y_BTHP = y[..., :-1] / divisor[..., None]
    return y_BTHP.astype(v_BTGP.dtype), MLSTMState(memory, level_BTG[:, -1])


def levels(
    input_BTG: jax.Array, log_forget_BTG: jax.Array, fresh_BTG: jax.Array, first_BG: jax.Array
) -> jax.Array:
    """Return ``m_t = max(F_t + m_{t-1}, i~_t, 0)``, [B, T, G], with m before a segment's start -inf."""
    add = jnp.where(fresh_BTG, -jnp.inf, log_forget_BTG)
    least = jnp.maximum(input_BTG, 0.0)

    def join(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return a[0] + b[0], jnp.maximum(a[1] + b[0], b[1])

    add, least = jax.lax.associative_scan(join, jax.lax.stop_gradient((add, least)), axis=1)
    return jnp.maximum(add + first_BG[:, None], least)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, widths: tuple[int, int]
) -> MLSTMState:
    """Return an empty state, 4 B G K (P + 1) + 4 B G + 4 B bytes; ``widths`` are (K, P), ``heads`` G."""
    memory = empty_memory(batch, heads, widths[0], widths[1] + 1)
    return MLSTMState(memory, jnp.zeros((batch, heads), jnp.float32))


class MLSTM(Expanded):
    """mLSTM (Beck et al. 2024, xLSTM, 2405.04517, eqs. 19 to 27), its heads normed and gated.

    The layer is that of xLSTM 7B (Beck et al. 2025, 2503.13427, section 2), without the paper's expansion
    of the model's width, the convolution (``short_conv``) and the skip around it; the gates look at the
    layer's input as in the equations, where the paper's code shows them q, k and v. The norm undoes what
    multiplies a whole head, so that the input gate's bias acts through the norm's epsilon alone; it starts
    at -10 as in xLSTM 7B, where it does.

    Attributes:
      value_expand: P / K; 1 in the paper, 2 in xLSTM 7B.
      forget: gate, "sigmoid" or "exp": eq. 26 allows both, the authors train the former.
      gate_cap: bound c of the gates' logarithms, c tanh(gate / c), 15 in xLSTM 7B; 0 is off.
    """

    small: ClassVar[dict[str, Any]] = {"value_expand": 2.0, "gate_cap": 15.0}

    forget: str = "sigmoid"
    gate_cap: float = 0.0

    def __post_init__(self):
        require(self.gate_cap >= 0, "gate_cap", self.gate_cap, "0 or more")
        lookup(FORGET, self.forget, "forget")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        write = self._gate("input_gate", x_BTD, jax.nn.initializers.constant(-10.0))
        forget = self._gate("forget_gate", x_BTD, _spread)
        return write, FORGET[self.forget](forget)

    def _gate(self, name: str, x_BTD: jax.Array, bias: jax.nn.initializers.Initializer) -> jax.Array:
        # In float32: an exponent's absolute error is the gate's relative one. Weights start at zero.
        gate = Linear("BTD,DG->BTG", (x_BTD.shape[-1], self.groups), 0.0, name=name)(x_BTD)
        gate += self.vector(f"{name}_bias", "G", (self.groups,), bias)
        return self.gate_cap * jnp.tanh(gate / self.gate_cap) if self.gate_cap else gate

    def mix(self, qkv, seqs, state):
        # Rounded before the norm, what of a gradient the norm must cancel would not.
        q_BTHK, k_BTGK, v_BTGP, *gates = qkv
        return forward(q_BTHK, k_BTGK, v_BTGP.astype(jnp.float32), *gates, seq=seqs[0], state=state)

    def refer(self, qkv, seqs):
        return reference(*qkv, seq=seqs[0])

    @property
    def exact_columns(self):
        return {"memory_BGKP": 1}

    def empty(self, batch, capacity, dtype):
        widths = (self.head_width, self.value_width)
        return init_state(batch, capacity, dtype, heads=self.groups, widths=widths)

    def finish(self, y_BTHP, x_BTD):
        shape = y_BTHP.shape[2:]
        y = y_BTHP.astype(jnp.float32)
        y -= y.mean(axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + EPSILON)
        y *= self.vector("norm_scale", "HP", shape, jax.nn.initializers.ones)
        gate_BTHP = self.linear("open", x_BTD, "BTD,DHP->BTHP", *shape).astype(jnp.float32)
        return super().finish(y * jax.nn.sigmoid(gate_BTHP), x_BTD)


def _spread(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return biases from 3 to 6 over the heads, as in the authors' code: all remember, some for longer."""
    return jnp.linspace(3.0, 6.0, *shape, dtype=dtype)
