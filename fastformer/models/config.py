"""The section config.model: what a model is made of, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax.core import FrozenDict

from fastformer.attention import DEFAULT, VARIANTS, check, make
from fastformer.attention.implementations import IMPLEMENTATIONS
from fastformer.attention.mixer import able
from fastformer.attention.positions import KINDS
from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import FieldError, lookup, require

NORMS = ("rms", "layer")
MLPS = ("swiglu", "gelu", "gelu_erf")
PLACEMENTS = ("pre", "post")
CROSS = "softmax"  # the mixer of cross-attention
REMAT = ("none", "full", "dots")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and kinds of a model; configs/base.py says what each field means.

    Raises:
      FieldError: a field, or two together, cannot be.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    norm: str
    mlp: str
    positions: str
    rope_base: float
    qk_norm: bool
    soft_cap: float
    short_conv: int
    output_gate: bool
    tied: bool
    dropout: float
    dtype: str
    implementation: str
    remat: tuple[str, ...]
    scan: bool
    loss_chunk: int
    pattern: tuple[str, ...]
    attention: Mapping[str, Any]
    bidirectional: bool = False
    encoder_layers: int = 0
    encoder_pattern: tuple[str, ...] = ()
    bias: bool = False
    norm_epsilon: float = 0.0
    norm_placement: str = "pre"
    embedding_norm: bool = False
    token_types: int = 0
    prefix_lm: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "width", "heads"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        # More is a slip of the hand, which would end as a lack of time or memory.
        for field, most in (
            ("layers", 10_000),
            ("encoder_layers", 10_000),
            ("width", 2**20),
            ("ff_width", 2**22),
        ):
            require(getattr(self, field) <= most, field, getattr(self, field), f"at most {most:,}")
        for field in (
            *("kv_heads", "head_width", "ff_width", "soft_cap", "encoder_layers", "loss_chunk"),
            *("norm_epsilon", "token_types"),
        ):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        for field, kinds in (
            *(("norm", NORMS), ("norm_placement", PLACEMENTS), ("mlp", MLPS)),
            *(("positions", KINDS), ("dtype", tuple(COMPUTE))),
        ):
            lookup(dict.fromkeys(kinds), getattr(self, field), field)
        lookup({"auto": 0, "reference": 0, **IMPLEMENTATIONS}, self.implementation, "implementation")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "a rate from 0 to below 1")
        good = -1 <= self.short_conv <= 2**10
        require(good, "short_conv", self.short_conv, "at most 1,024 tokens, 0 (none) or -1 (as published)")
        require(self.rope_base > 1, "rope_base", self.rope_base, "above 1")
        if not self.head_width and self.width % self.heads:
            raise FieldError("heads", f"{self.heads} does not divide config.model.width {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise FieldError("kv_heads", f"{self.kv_heads} does not divide config.model.heads {self.heads}")
        if self.positions == "rope" and self.key_width % 2:
            raise FieldError("positions", f"rope needs an even head width, and it is {self.key_width}")
        if self.positions == "sinusoidal" and self.width % 2:
            raise FieldError("positions", f"sinusoidal needs an even width, and it is {self.width}")
        require(isinstance(self.attention, Mapping), "attention", self.attention, "a section with a key name")
        object.__setattr__(self, "attention", FrozenDict(self.attention))
        self._check_attention()
        self._check_remat()

    def _check_attention(self) -> None:
        for field in ("pattern", "encoder_pattern"):
            for index, name in enumerate(getattr(self, field)):
                lookup(VARIANTS, name, f"{field}[{index}]")
        try:
            lookup(VARIANTS, self.attention.get("name"), "name")
            options = {k: v for k, v in self.attention.items() if k != "name"}
            check((*self.variants, *self.encoder_pattern), options)
        except FieldError as error:
            raise FieldError(f"attention.{error.field}", error.message) from error
        if self.prefix_lm:
            self._check_prefix()
        # The name that every configuration begins with gives way to a pattern.
        if self.attention["name"] not in (*self.variants, DEFAULT):
            raise FieldError(
                "attention.name",
                f"{self.attention['name']!r} is in no layer of config.model.pattern {self.pattern}; "
                "name one of those, or empty the pattern",
            )
        for index in range(len(self.variants)):
            self.mixer(index, detached=True)
        for index in range(self.encoder_layers):
            self.encoder_mixer(index, detached=True)

    def _check_prefix(self) -> None:
        for name in self.variants:
            if not VARIANTS[name].prefix_lm:
                raise FieldError("prefix_lm", f"{name} is not prefix_lm; {able('prefix_lm')}")
        row = IMPLEMENTATIONS.get(self.implementation)
        if row and not row.prefix:
            others = ", ".join(name for name, row in IMPLEMENTATIONS.items() if row.prefix)
            raise FieldError(
                "implementation",
                f"{self.implementation} has no mask with a prefix, which config.model.prefix_lm needs "
                f"(allowed: auto, reference, {others})",
            )

    def _check_remat(self) -> None:
        require(len(self.remat) >= 1, "remat", self.remat, "one policy, or several that layers repeat")
        for index, name in enumerate(self.remat):
            lookup(dict.fromkeys(REMAT), name, f"remat[{index}]")
        if self.scan and self.layers % self.period:
            raise FieldError(
                "scan",
                f"needs a whole number of repeats, and config.model.layers {self.layers} is no multiple of "
                f"the {self.period} layers after which pattern and remat repeat",
            )

    @property
    def period(self) -> int:
        """Return the number of layers after which mixers and policies repeat."""
        return math.lcm(len(self.variants), len(self.remat))

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the names of the mixers that the layers repeat."""
        return tuple(self.pattern) or (self.attention["name"],)

    @property
    def key_width(self) -> int:
        """Return K, which is P too."""
        return self.head_width or self.width // self.heads

    @property
    def hidden(self) -> int:
        """Return F; the default gives both MLPs the same number of weights (a multiple of 8)."""
        default = -(-8 * self.width // 3 // 8) * 8 if self.mlp == "swiglu" else 4 * self.width
        return self.ff_width or default

    def mixer(self, layer: int, length: int = 0, detached: bool = False) -> Any:
        """Return the mixer of a layer: a submodule of the module at work, or ``detached`` from any.

        Args:
          length: the most tokens of a row; 0 where no weights are made.

        Raises:
          FieldError: a bad field of the variant, or something it cannot do.
        """
        name = self.variants[layer % len(self.variants)]
        return self._make(name, layer, length, detached, self.bidirectional)

    def encoder_mixer(self, layer: int, length: int = 0, detached: bool = False) -> Any:
        """Return the mixer of a layer of an encoder, as ``mixer`` does; it sees in both directions."""
        names = self.encoder_pattern or self.variants
        return self._make(names[layer % len(names)], layer, length, detached, True)

    def cross_mixer(self, layer: int, length: int = 0) -> Any:
        """Return what a layer of a decoder looks at its source with: softmax without positions."""
        without = {"positions": "none", "short_conv": 0}
        return dataclasses.replace(self, **without)._make(CROSS, layer, length, False, False, "cross")

    def _make(
        self, name: str, layer: int, length: int, detached: bool, bidirectional: bool, module: str = "mixer"
    ) -> Any:
        fields = {
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_width": self.key_width,
            "positions": self.positions,
            "rope_base": self.rope_base,
            "qk_norm": self.qk_norm,
            "soft_cap": self.soft_cap,
            "short_conv": self.short_conv,
            "output_gate": self.output_gate,
            "bias": self.bias,
            "out_scale": (2 * self.layers) ** -0.5,
            "width": self.width,
            "length": length,
            "layer": layer,
            "bidirectional_mode": bidirectional,
            "implementation": self.implementation,
            "dtype": COMPUTE[self.dtype],
        }
        if detached:
            fields["parent"] = None
        try:
            return make(name, self.attention, fields, module_name=module)
        except FieldError as error:
            raise FieldError(f"attention.{error.field}", error.message) from error
