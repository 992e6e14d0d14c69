"""The wrapper that all variants share: projections, heads, positions, norms and the output gate."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.positions import alibi_slopes, rope
from fastformer.attention.scores import Bend
from fastformer.core.alphabet import constrain
from fastformer.core.layers import Linear, RMSNorm, zero_padding
from fastformer.core.seq import Seq


class Context(NamedTuple):
    """What a cross-attention layer looks at: x_BSD and its Seq."""

    x_BSD: jax.Array
    seq: Seq


class Mixer(nn.Module):
    """A layer that mixes tokens over time: ``y_BTD, state = mixer(x_BTD, seq, state=None, context=None)``.

    A variant subclasses it, says below what it can do, adds its own fields, and defines ``mix``,
    ``refer`` and ``init_state``.

    Attributes:
      heads: H. kv_heads: G, a divisor of H; 0 is H.
      head_width: K = P; 0 is D / H.
      bidirectional_mode: every token sees those after it too; needs ``bidirectional``.
      positions: "rope" rotates queries and keys, "alibi" biases the scores; any other does nothing here.
      rope_base: of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020, 2010.04245, in RMS form).
      soft_cap: bound of the scores; 0 is off.
      output_gate: multiply by ``sigmoid(x W)`` before the output projection.
      out_scale: of the initial output projection.
      implementation: "auto" is the fast form; "reference" the paper's equation as written, in float32.
      dtype: of the products.
    """

    # What a variant can do.
    causal: ClassVar[bool] = False  # hides the future
    bidirectional: ClassVar[bool] = False  # sees it
    cross: ClassVar[bool] = False  # looks at another sequence
    streaming: ClassVar[bool] = False  # goes on from a state
    scores: ClassVar[bool] = False  # has scores that ALiBi and the soft cap can bend
    small: ClassVar[dict[str, Any]] = {}  # own fields at sizes for short sequences, as in tests

    heads: int
    kv_heads: int = 0
    head_width: int = 0
    bidirectional_mode: bool = False
    positions: str = "none"
    rope_base: float = 10000.0
    qk_norm: bool = False
    soft_cap: float = 0.0
    output_gate: bool = False
    out_scale: float = 1.0
    implementation: str = "auto"
    dtype: jnp.dtype = jnp.float32

    @property
    def groups(self) -> int:
        """Return G."""
        return self.kv_heads or self.heads

    @property
    def bend(self) -> Bend:
        """Return what happens to scores."""
        slopes = tuple(alibi_slopes(self.heads).tolist()) if self.positions == "alibi" else ()
        return Bend(self.soft_cap, slopes)

    def mix(self, x_BTD: jax.Array, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq], state: Any) -> tuple:
        """Return ``(y_BTHP, state)`` of the fast form; ``seqs`` are those of queries and of keys."""
        raise NotImplementedError

    def refer(self, x_BTD: jax.Array, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq]) -> jax.Array:
        """Return ``y_BTHP`` of the reference."""
        raise NotImplementedError

    def init_state(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> Any:
        """Return an empty state for ``capacity`` tokens a row; needs ``head_width``."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, seq: Seq, state: Any = None, context: Context | None = None
    ) -> tuple:
        """Return ``(y_BTD, state)``; y is zero at padding.

        Raises:
          ValueError: the variant cannot do what is asked (cross, streaming, bidirectional).
        """
        self._refuse(state, context)
        x_BTD = zero_padding(x_BTD, seq)
        kv_seq = seq if context is None else context.seq
        x_BSD = x_BTD if context is None else zero_padding(context.x_BSD, context.seq)
        width = x_BTD.shape[-1]
        head = self.head_width or width // self.heads

        def project(name: str, x: jax.Array, spec: str, heads: int) -> jax.Array:
            return Linear(spec, (width, heads, head), dtype=self.dtype, name=name)(x)

        q_BTHK = project("query", x_BTD, "BTD,DHK->BTHK", self.heads)
        k_BSGK = project("key", x_BSD, "BSD,DGK->BSGK", self.groups)
        v_BSGP = project("value", x_BSD, "BSD,DGP->BSGP", self.groups)
        if self.qk_norm:
            q_BTHK, k_BSGK = RMSNorm("K", name="query_norm")(q_BTHK), RMSNorm("K", name="key_norm")(k_BSGK)
        if self.positions == "rope":
            q_BTHK = rope(q_BTHK, seq.position_BT, self.rope_base)
            k_BSGK = rope(k_BSGK, kv_seq.position_BT, self.rope_base)
        qkv, seqs = (q_BTHK, k_BSGK, v_BSGP), (seq, kv_seq)
        if self.implementation == "reference":
            y_BTHP, state = self.refer(x_BTD, qkv, seqs).astype(self.dtype), None
        else:
            y_BTHP, state = self.mix(x_BTD, qkv, seqs, state)
        y_BTHP = constrain(zero_padding(y_BTHP, seq), "BTHP")
        if self.output_gate:
            y_BTHP = y_BTHP * jax.nn.sigmoid(project("gate", x_BTD, "BTD,DHP->BTHP", self.heads))
        out = Linear("BTHP,HPD->BTD", (self.heads, head, width), self.out_scale, self.dtype, name="out")
        return out(y_BTHP), state

    def _refuse(self, state: Any, context: Context | None) -> None:
        asked = {
            "bidirectional": self.bidirectional_mode and context is None,
            "causal": not self.bidirectional_mode and context is None,
            "cross": context is not None,
            "streaming": state is not None,
        }
        for ability, wanted in asked.items():
            if wanted and not getattr(self, ability):
                raise ValueError(f"{type(self).__name__} is not {ability}; {able(ability)}")
        if state is not None and (self.bidirectional_mode or context is not None):
            raise ValueError("only causal self-attention goes on from a state")
        if state is not None and self.implementation == "reference":
            raise ValueError("a reference sees the whole sequence; it does not go on from a state")


def able(ability: str) -> str:
    """Return ``"variants that are <ability>: …"``."""
    from fastformer.attention import VARIANTS  # the table imports the variants, which import this file

    names = [name for name, variant in VARIANTS.items() if getattr(variant, ability)]
    return f"variants that are {ability}: {', '.join(names) or 'none'}"
