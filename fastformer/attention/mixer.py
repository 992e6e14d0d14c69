"""The wrapper that all variants share: projections, heads, positions, norms and the output gate."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.positions import alibi_slopes, rope
from fastformer.attention.scores import Bend
from fastformer.attention.short_conv import Past, ShortConv, empty_past
from fastformer.core.alphabet import constrain
from fastformer.core.errors import require
from fastformer.core.layers import Linear, RMSNorm, zero_padding
from fastformer.core.seq import Seq

# By what twice the tokens multiply the time.
ORDERS = {"T": 2.0, "T log T": 2.2, "T log^2 T": 2.4, "T^1.5": 2.83, "T^2": 4.0}


class Context(NamedTuple):
    """What a cross-attention layer looks at: x_BSD and its Seq."""

    x_BSD: jax.Array
    seq: Seq


class Convolved(NamedTuple):
    """The state of a mixer with a short convolution: that of the mixer, and the newest tokens.

    Attributes:
      mixer: what the variant's ``empty`` makes.
      past: what the convolution still sees.
    """

    mixer: Any
    past: Past


class Mixer(nn.Module):
    """A layer that mixes tokens over time: ``y_BTD, state = mixer(x_BTD, seq, state=None, context=None)``.

    A variant subclasses it, says below what it can do, adds its own fields, and defines ``mix``,
    ``refer`` and, where it streams, ``empty``. Where its paper needs more it redefines ``project``,
    ``gates``, ``finish`` or ``value_width``.

    Attributes:
      heads: H. kv_heads: G, a divisor of H; 0 is H.
      head_width: K.
      bidirectional_mode: every token sees those after it too; needs ``bidirectional``.
      positions: "rope" rotates queries and keys (of variants that are ``rotary``: others know order by
        themselves), "alibi" biases the scores; any other does nothing here.
      rope_base: of the rotary frequencies.
      qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020, 2010.04245, in RMS form).
      soft_cap: bound of the scores; 0 is off.
      short_conv: tokens that a convolution of q, k and v spans, the token and those before it, in either
        direction of attention; 0 is off, -1 as published.
      output_gate: multiply by ``sigmoid(x W)`` before the output projection.
      bias: of the linear maps, but those that make decays and strengths.
      out_scale: of the initial output projection.
      width: D, for states that keep tokens as they came; 0 is H K.
      length: the most tokens of a row, for variants that have weights per position.
      layer: index in the stack, for variants that depend on it.
      implementation: "auto" is the fast form; "reference" the paper's equation as written, in float32; any
        other is a kernel that variants with ``kernels`` try first.
      dtype: of the products.
    """

    # What a variant can do.
    causal: ClassVar[bool] = False  # hides the future
    bidirectional: ClassVar[bool] = False  # sees it
    cross: ClassVar[bool] = False  # looks at another sequence
    streaming: ClassVar[bool] = False  # goes on from a state
    prefix_lm: ClassVar[bool] = False  # lets the tokens of a prefix see all of it, where it is causal
    scores: ClassVar[bool] = False  # has scores that ALiBi and the soft cap can bend
    rotary: ClassVar[bool] = True  # its queries and keys are rotated where positions are "rope"
    exact_keys: ClassVar[bool] = False  # projects keys in float32, for they become decays
    convolution: ClassVar[int] = 0  # short_conv as published
    context_parallel: ClassVar[bool] = False  # rows may be split over devices in time
    kernels: ClassVar[bool] = False  # has rows of attention/implementations.py to choose from
    branches: ClassVar[tuple[str, ...]] = ()  # values of its field ``branch`` that leave one part alone
    order: ClassVar[str] = "T^2"  # how training time grows: a row of ORDERS
    small: ClassVar[dict[str, Any]] = {}  # own fields at sizes for short sequences, as in tests

    heads: int
    head_width: int
    kv_heads: int = 0
    bidirectional_mode: bool = False
    positions: str = "none"
    rope_base: float = 10000.0
    qk_norm: bool = False
    soft_cap: float = 0.0
    short_conv: int = -1
    output_gate: bool = False
    bias: bool = False
    out_scale: float = 1.0
    width: int = 0
    length: int = 0
    layer: int = 0
    implementation: str = "auto"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for field in ("heads", "head_width"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        shared = self.kv_heads == 0 or self.kv_heads > 0 and self.heads % self.kv_heads == 0
        require(shared, "kv_heads", self.kv_heads, f"a divisor of the {self.heads} heads, or 0 for as many")
        require(self.soft_cap >= 0, "soft_cap", self.soft_cap, "above 0, or 0 for none")
        require(self.short_conv >= -1, "short_conv", self.short_conv, "tokens, 0 (none) or -1 (as published)")
        super().__post_init__()

    @property
    def groups(self) -> int:
        """Return G."""
        return self.kv_heads or self.heads

    @property
    def value_width(self) -> int:
        """Return P."""
        return self.head_width

    @property
    def exact_columns(self) -> dict[str, int]:
        """Return by the name of a state's array how many of its last columns may never be rounded."""
        return {}

    @property
    def bend(self) -> Bend:
        """Return what happens to scores."""
        slopes = tuple(alibi_slopes(self.heads).tolist()) if self.positions == "alibi" else ()
        return Bend(self.soft_cap, slopes)

    @property
    def conv_width(self) -> int:
        """Return the tokens that the short convolution spans, 0 without one."""
        return self.convolution if self.short_conv < 0 else self.short_conv

    # What a variant defines.

    def mix(self, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq], state: Any) -> tuple[jax.Array, Any]:
        """Return ``(y_BTHP, state)`` of the fast form.

        Args:
          qkv: queries, keys and values, then what ``gates`` returned.
          seqs: of queries and of keys, one and the same object but in cross-attention.
        """
        raise NotImplementedError

    def refer(self, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq]) -> jax.Array:
        """Return ``y_BTHP`` of the reference."""
        raise NotImplementedError

    def empty(self, batch: int, capacity: int, dtype: jnp.dtype) -> Any:
        """Return an empty state of the variant for ``capacity`` tokens a row."""
        raise NotImplementedError

    # What it may redefine.

    def gates(self, x_BTD: jax.Array, seq: Seq) -> tuple[jax.Array, ...]:
        """Return what the variant computes from x besides q, k and v; submodules may be made."""
        return ()

    def project(
        self, x_BTD: jax.Array, x_BSD: jax.Array, seqs: tuple[Seq, Seq], past: Past | None
    ) -> tuple[tuple[jax.Array, ...], Past | None]:
        """Return ``(q_BTHK, k_BSGK, v_BSGP)`` and what the next call needs of these tokens."""
        q_BTHK = self.linear("query", x_BTD, "BTD,DHK->BTHK", self.heads, self.head_width)
        keys = (self.groups, self.head_width)
        k_BSGK = self.linear("key", x_BSD, "BSD,DGK->BSGK", *keys, exact=self.exact_keys)
        v_BSGP = self.linear("value", x_BSD, "BSD,DGP->BSGP", self.groups, self.value_width)
        if self.conv_width:
            (q_BTHK, k_BSGK, v_BSGP), past = self.convolve((q_BTHK, k_BSGK, v_BSGP), seqs[0], past)
        if self.qk_norm:
            q_BTHK, k_BSGK = RMSNorm("K", name="query_norm")(q_BTHK), RMSNorm("K", name="key_norm")(k_BSGK)
        if self.positions == "rope" and self.rotary:
            q_BTHK = rope(q_BTHK, seqs[0].position_BT, self.rope_base)
            k_BSGK = rope(k_BSGK, seqs[1].position_BT, self.rope_base)
        return (q_BTHK, k_BSGK, v_BSGP), past

    def finish(self, y_BTHP: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return ``y_BTD``, zero where ``y_BTHP`` is: the output gate and the output projection."""
        heads, value, width = *y_BTHP.shape[2:], x_BTD.shape[-1]
        if self.output_gate:
            y_BTHP = y_BTHP * jax.nn.sigmoid(self.linear("gate", x_BTD, "BTD,DHP->BTHP", heads, value))
        shape = (heads, value, width)
        return Linear("BTHP,HPD->BTD", shape, self.out_scale, self.dtype, self.bias, name="out")(y_BTHP)

    def past_features(self) -> tuple[int, int]:
        """Return how many tokens of the past ``project`` needs, and how many features of each."""
        features = self.heads * self.head_width + self.groups * (self.head_width + self.value_width)
        return max(self.conv_width - 1, 0), features

    # What they share.

    def linear(
        self, name: str, x_BTD: jax.Array, spec: str, *sizes: int, exact: bool = False
    ) -> jax.Array:
        """Return a projection of the model's width by ``spec``; ``sizes`` are the weight's other axes.

        Args:
          exact: in float32 whatever the dtype, as what becomes a decay or a strength must be.
        """
        dtype = jnp.float32 if exact else self.dtype
        bias = self.bias and not exact
        return Linear(spec, (x_BTD.shape[-1], *sizes), dtype=dtype, bias=bias, name=name)(x_BTD)

    def convolve(
        self,
        parts: tuple[jax.Array, ...],
        seq: Seq,
        past: Past | None,
        bias: bool = False,
        name: str = "conv",
    ) -> tuple[tuple[jax.Array, ...], Past]:
        """Return the parts [B, T, heads, width] after one short convolution over all their features."""
        flat = [part.reshape(*part.shape[:2], -1) for part in parts]
        conv = ShortConv(self.conv_width, bias, name=name)
        y_BTR, past = conv(jnp.concatenate(flat, axis=-1), seq, past)
        cuts = np.cumsum([part.shape[-1] for part in flat])[:-1].tolist()
        split = jnp.split(y_BTR, cuts, axis=-1)
        return tuple(new.reshape(old.shape) for new, old in zip(split, parts)), past

    def init_state(self, batch: int, capacity: int, dtype: jnp.dtype | None = None) -> Any:
        """Return the layer's empty state for ``capacity`` tokens a row, in ``dtype`` or the layer's."""
        state = self.empty(batch, capacity, dtype or self.dtype)
        tokens, features = self.past_features()
        return Convolved(state, empty_past(batch, tokens, features, dtype or self.dtype)) if tokens else state

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, seq: Seq, state: Any = None, context: Context | None = None
    ) -> tuple[jax.Array, Any]:
        """Return ``(y_BTD, state)``; y is zero at padding.

        Raises:
          ValueError: the variant cannot do what is asked (cross, streaming, bidirectional, prefix_lm).
        """
        self._refuse(seq, state, context)
        x_BTD = zero_padding(x_BTD, seq)
        seqs = (seq, seq if context is None else context.seq)
        x_BSD = x_BTD if context is None else zero_padding(context.x_BSD, context.seq)
        carries = bool(self.past_features()[0])
        inner, past = state if carries and state is not None else (state, None)
        qkv, past = self.project(x_BTD, x_BSD, seqs, past)
        qkv = (*qkv, *self.gates(x_BTD, seq))
        if not self.kernels and self.implementation not in ("auto", "xla", "reference"):
            warnings.warn(f"{type(self).__name__} has no {self.implementation}; xla serves", stacklevel=2)
        if self.implementation == "reference":
            y_BTHP, state = self.refer(qkv, seqs).astype(self.dtype), None
        else:
            y_BTHP, inner = self.mix(qkv, seqs, inner)
            state = Convolved(inner, past) if carries else inner
        y_BTHP = constrain(zero_padding(y_BTHP, seq), "BTHP")
        y_BTD = self.finish(y_BTHP, x_BTD)
        return zero_padding(y_BTD, seq) if self.bias else y_BTD, state

    def _refuse(self, seq: Seq, state: Any, context: Context | None) -> None:
        asked = {
            "bidirectional": self.bidirectional_mode and context is None,
            "causal": not self.bidirectional_mode and context is None,
            "cross": context is not None,
            "streaming": state is not None,
            "prefix_lm": seq.last_BT is not None,
        }
        for ability, wanted in asked.items():
            if wanted and not getattr(self, ability):
                raise ValueError(f"{type(self).__name__} is not {ability}; {able(ability)}")
        if self.conv_width and context is not None:
            raise ValueError("a short convolution needs self-attention; set short_conv 0")
        if state is not None and (self.bidirectional_mode or context is not None):
            raise ValueError("only causal self-attention goes on from a state")
        if state is not None and self.implementation == "reference":
            raise ValueError("a reference sees the whole sequence; it does not go on from a state")


def able(ability: str) -> str:
    """Return ``"variants that are <ability>: …"``."""
    from fastformer.attention import VARIANTS  # the table imports the variants, which import this file

    names = [name for name, variant in VARIANTS.items() if getattr(variant, ability)]
    return f"variants that are {ability}: {', '.join(names) or 'none'}"
