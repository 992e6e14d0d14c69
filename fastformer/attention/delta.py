"""Delta rules: a token overwrites what the memory holds under its key, instead of adding to it."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention.gating import Expanded, unit
from fastformer.attention.recurrence import CHUNK, Memory, Tokens, empty_memory, grouped, loop, recur
from fastformer.core.errors import require
from fastformer.core.layers import RMSNorm
from fastformer.core.seq import Seq


def overwriting(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    beta_BTG: jax.Array,
    log_BTGK: jax.Array | None = None,
) -> Tokens:
    """Return the tokens of ``M_t = (I - beta k k^T) diag(exp(log)) M_{t-1} + beta k v^T``, ``y = M^T q``.

    Keys are brought to length one, queries to 1 / sqrt(K). Without ``log`` it is DeltaNet (Yang et
    al. 2024, 2406.06484, eq. 2), with one decay a head Gated DeltaNet (Yang et al. 2024, 2412.06464, eq. 10),
    with one a channel Kimi Delta Attention (Kimi Team 2025, 2510.26692, eq. 1).
    """
    q_BTHK = unit(q_BTHK) * q_BTHK.shape[-1] ** -0.5
    k_BTGK = unit(k_BTGK)
    read_BTGK = k_BTGK if log_BTGK is None else k_BTGK * jnp.exp(log_BTGK)
    strength = beta_BTG.astype(jnp.float32)[..., None]
    return Tokens(grouped(q_BTHK, k_BTGK.shape[2]), k_BTGK * strength, v_BTGP, log_BTGK, read_BTGK)


def reference(q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK=None, *, seq: Seq) -> jax.Array:
    """Return the delta rule token by token, [B, T, H, P] float32.

    Args:
      beta_BTG: the strength of writing. log_BTGK: of the decays, None for none; K may be 1.
    """
    return loop(overwriting(q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK), seq)


def forward(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    beta_BTG: jax.Array,
    log_BTGK: jax.Array | None = None,
    *,
    seq: Seq,
    state: Memory | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, Memory]:
    """Return ``(y_BTHP, state)`` of the delta rule in chunks, by the WY form."""
    y_BTHP, state = recur(overwriting(q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK), seq, state, chunk)
    return y_BTHP.astype(v_BTGP.dtype), state


def init_state(batch: int, capacity: int, dtype: jnp.dtype, *, heads: int, widths: tuple[int, int]) -> Memory:
    """Return an empty memory, 4 B G K P + 4 B bytes; ``widths`` are (K, P), ``heads`` G."""
    return empty_memory(batch, heads, *widths)


class Delta(Expanded):
    """DeltaNet: SiLU'd queries and keys of length one (Yang et al. 2024, 2406.06484, section 3.4).

    Attributes:
      value_expand: P / K.
      norm_gate: multiply the normed heads by a gate, which the authors' DeltaNet does not do, and the rules
        with a decay do.
      negative: strengths are in [0, 2], eigenvalues of the memory's transition in [-1, 1] in place of
        [0, 1] (Grazzi et al. 2024, 2411.12537).
    """

    convolution: ClassVar[int] = 4

    norm_gate: bool = False
    negative: bool = False

    def gates(self, x_BTD, seq):
        return (self.strength(x_BTD, self.groups),)

    def strength(self, x_BTD: jax.Array, heads: int) -> jax.Array:
        """Return beta [B, T, heads], float32."""
        beta = jax.nn.sigmoid(self.linear("strength", x_BTD, "BTD,DG->BTG", heads, exact=True))
        return 2.0 * beta if self.negative else beta

    def tokens(self, q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK=None):
        if not self.conv_width:  # its SiLU is the activation
            q_BTHK, k_BTGK = jax.nn.silu(q_BTHK), jax.nn.silu(k_BTGK)
        return overwriting(q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK)

    def finish(self, y_BTHP, x_BTD):
        normed = self.normed if self.norm_gate else lambda y, _: RMSNorm("P", name="head_norm")(y)
        return super().finish(normed(y_BTHP, x_BTD), x_BTD)


class GatedDelta(Delta):
    """Gated DeltaNet: the delta rule after Mamba-2's decay (Yang et al. 2024, 2412.06464, eq. 10).

    Queries have at least as many heads as values here: Qwen3-Next's fewer (16 of queries and keys to 32 of
    values) cannot be said, and its weights come in with queries and keys repeated.

    Attributes:
      value_expand: P / K; 2 as published, 1 in Qwen3-Next.
      norm_gate, negative: as in delta.
    """

    # Heads of 6 with wide values are ill-conditioned near a segment's start: bfloat16 says nothing there.
    small: ClassVar[dict] = {"value_expand": 1.0}

    value_expand: float = 2.0
    norm_gate: bool = True

    def gates(self, x_BTD, seq):
        log_BTG, _ = self.decay(self.linear("step", x_BTD, "BTD,DG->BTG", self.groups, exact=True), "G")
        return self.strength(x_BTD, self.groups), log_BTG[..., None]


class KimiDelta(Delta):
    """Kimi Delta Attention: a decay a channel before the delta rule (Kimi Team 2025, 2510.26692, eq. 1).

    Attributes:
      value_expand, norm_gate, negative: as in delta; this gate is a sigmoid of low rank.
      gate_rank: of the weights of decay and output gate; 0 is K.
    """

    norm_gate: bool = True
    gate_rank: int = 0

    def __post_init__(self):
        require(self.gate_rank >= 0, "gate_rank", self.gate_rank, "0 or more")
        super().__post_init__()

    def gates(self, x_BTD, seq):
        rank = self.gate_rank or self.head_width
        step_BTGK = self.low_rank("step", x_BTD, rank, (self.groups, self.head_width))
        return self.strength(x_BTD, self.groups), self.decay(step_BTGK, "GK")[0]

    def normed(self, y_BTHP, x_BTD):
        rank = self.gate_rank or self.head_width
        opened = jax.nn.sigmoid(self.low_rank("open", x_BTD, rank, y_BTHP.shape[2:]))
        return RMSNorm("P", name="head_norm")(y_BTHP) * opened


class DeltaProduct(Delta):
    """DeltaProduct: several delta rules a token (Siems et al. 2025, 2502.10297, eq. 5).

    Attributes:
      value_expand, norm_gate: as in delta.
      negative: as in delta; the products reach further with it.
      steps: n_h, rules a token, each with its own key, value and strength.
      gated: decay the memory before the first, as gated_delta does.
    """

    norm_gate: bool = True
    negative: bool = True
    steps: int = 2
    gated: bool = False

    def __post_init__(self):
        require(self.steps >= 1, "steps", self.steps, "1 or more")
        super().__post_init__()

    def project(self, x_BTD, x_BSD, seqs, past):
        q_BTHK = self.linear("query", x_BTD, "BTD,DHK->BTHK", self.heads, self.head_width)
        k_BTGK = self.linear("key", x_BTD, "BTD,DGK->BTGK", self.groups * self.steps, self.head_width)
        v_BTGP = self.linear("value", x_BTD, "BTD,DGP->BTGP", self.groups * self.steps, self.value_width)
        if self.conv_width:
            (q_BTHK, k_BTGK, v_BTGP), past = self.convolve((q_BTHK, k_BTGK, v_BTGP), seqs[0], past)
        if self.qk_norm:
            q_BTHK, k_BTGK = RMSNorm("K", name="query_norm")(q_BTHK), RMSNorm("K", name="key_norm")(k_BTGK)
        return (q_BTHK, k_BTGK, v_BTGP), past

    def past_features(self):
        tokens, features = super().past_features()
        return tokens, features + (self.steps - 1) * self.groups * (self.head_width + self.value_width)

    def gates(self, x_BTD, seq):
        beta = self.strength(x_BTD, self.groups * self.steps)
        if not self.gated:
            return (beta,)
        log_BTG, _ = self.decay(self.linear("step", x_BTD, "BTD,DG->BTG", self.groups, exact=True), "G")
        return beta, log_BTG[..., None]

    def tokens(self, q_BTHK, k_BTGK, v_BTGP, beta_BTG, log_BTGK=None):
        """Return the rules one after another, as tokens of their own, of which the last gives the output."""

        def spread(x: jax.Array) -> jax.Array:
            x = x.reshape(*x.shape[:2], self.steps, self.groups, *x.shape[3:])
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        def first(x: jax.Array) -> jax.Array:
            return jnp.pad(x[:, :, None], [(0, 0), (0, 0), (0, self.steps - 1), (0, 0), (0, 0)])

        q_BTHK = jnp.repeat(q_BTHK, self.steps, axis=1)
        if log_BTGK is not None:
            log_BTGK = first(log_BTGK).reshape(len(log_BTGK), -1, *log_BTGK.shape[2:])
        return super().tokens(q_BTHK, spread(k_BTGK), spread(v_BTGP), spread(beta_BTG), log_BTGK)

    def mix(self, qkv, seqs, state):
        tokens = self.tokens(*qkv)
        y_BTHP, state = recur(tokens, self._rules(seqs[0]), state, CHUNK)
        return y_BTHP[:, self.steps - 1 :: self.steps].astype(self.dtype), state

    def refer(self, qkv, seqs):
        return loop(self.tokens(*qkv), self._rules(seqs[0]))[:, self.steps - 1 :: self.steps]

    def _rules(self, seq: Seq) -> Seq:
        return jax.tree.map(lambda x: jnp.repeat(x, self.steps, axis=1), seq)
