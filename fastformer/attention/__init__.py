"""Floor 3: attention variants, one file a family, one table.

To add a variant: a file with ``reference``, ``forward``, ``init_state`` and a Mixer on them, and a
row below. The tests of all laws run over the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastformer.attention.additive import Additive
from fastformer.attention.aft import AFT
from fastformer.attention.based import Based
from fastformer.attention.bigbird import BigBird
from fastformer.attention.cosformer import Cosformer
from fastformer.attention.decay import GLA, HGRN2, Mamba2, Retention
from fastformer.attention.delta import Delta, DeltaProduct, GatedDelta, KimiDelta
from fastformer.attention.differential import Differential
from fastformer.attention.dilated import Dilated
from fastformer.attention.factorised import Fixed, Strided
from fastformer.attention.fnet import FNet
from fastformer.attention.forgetting import Forgetting
from fastformer.attention.hedgehog import Hedgehog
from fastformer.attention.hyena import Hyena
from fastformer.attention.latent import Latent
from fastformer.attention.linear import LinearAttention
from fastformer.attention.linformer import Linformer
from fastformer.attention.local import Local
from fastformer.attention.lolcats import Lolcats
from fastformer.attention.longformer import Longformer
from fastformer.attention.lsh import LSH
from fastformer.attention.luna import Luna
from fastformer.attention.mixer import Context, Mixer, able
from fastformer.attention.mlstm import MLSTM
from fastformer.attention.moba import MoBA
from fastformer.attention.native_sparse import NativeSparse
from fastformer.attention.nystrom import Nystrom
from fastformer.attention.performer import Performer
from fastformer.attention.random_features import RandomFeatures
from fastformer.attention.rg_lru import RGLRU
from fastformer.attention.routing import Routing
from fastformer.attention.rwkv import RWKV7
from fastformer.attention.sigmoid import Sigmoid
from fastformer.attention.sinkhorn import Sinkhorn
from fastformer.attention.sinks import Sinks
from fastformer.attention.softmax import Softmax
from fastformer.attention.synthesizer import Synthesizer
from fastformer.attention.topk import TopK
from fastformer.core.errors import FieldError, lookup, nearest

__all__ = ["Context", "Mixer", "VARIANTS", "check", "make", "own_fields"]

VARIANTS: dict[str, type[Mixer]] = {
    "softmax": Softmax,
    "latent": Latent,
    "differential": Differential,
    "sigmoid": Sigmoid,
    "forgetting": Forgetting,
    "synthesizer": Synthesizer,
    "local": Local,
    "sinks": Sinks,
    "dilated": Dilated,
    "longformer": Longformer,
    "strided": Strided,
    "fixed": Fixed,
    "topk": TopK,
    "moba": MoBA,
    "native_sparse": NativeSparse,
    "bigbird": BigBird,
    "lsh": LSH,
    "routing": Routing,
    "sinkhorn": Sinkhorn,
    "linear": LinearAttention,
    "performer": Performer,
    "random_features": RandomFeatures,
    "based": Based,
    "hedgehog": Hedgehog,
    "lolcats": Lolcats,
    "cosformer": Cosformer,
    "linformer": Linformer,
    "luna": Luna,
    "nystrom": Nystrom,
    "retention": Retention,
    "gla": GLA,
    "hgrn2": HGRN2,
    "mamba2": Mamba2,
    "delta": Delta,
    "gated_delta": GatedDelta,
    "kimi_delta": KimiDelta,
    "delta_product": DeltaProduct,
    "rwkv7": RWKV7,
    "rg_lru": RGLRU,
    "mlstm": MLSTM,
    "fnet": FNet,
    "aft": AFT,
    "additive": Additive,
    "hyena": Hyena,
}

DEFAULT = next(iter(VARIANTS))  # what a configuration begins with

_SHARED = {field.name for field in dataclasses.fields(Mixer)}


def own_fields(name: str) -> dict[str, Any]:
    """Return ``{field: default}`` of what a variant adds to the shared wrapper.

    Raises:
      FieldError: there is no such variant.
    """
    fields = dataclasses.fields(lookup(VARIANTS, name, "name"))
    return {field.name: field.default for field in fields if field.name not in _SHARED}


def check(names: tuple[str, ...], options: Mapping[str, Any]) -> None:
    """Check that every option is a field of a variant among ``names`` and has its type.

    Raises:
      FieldError: one is not; the line names the fields that exist.
    """
    known: dict[str, Any] = {}
    for name in names:
        known |= own_fields(name)
    for key, value in options.items():
        if key not in known:
            of = " and ".join(dict.fromkeys(names))
            others = [name for name in VARIANTS if key in own_fields(name)]
            hint = f"; {', '.join(others)} have it" if others else nearest(key, [*known, "name"])
            raise FieldError(key, f"no such key{hint} (keys of {of}: {', '.join(['name', *known])})")
        kind = type(known[key])
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            if not (kind is float and type(value) is int):
                raise FieldError(key, f"{value!r} is not of type {kind.__name__}")


def make(
    name: str, options: Mapping[str, Any], shared: Mapping[str, Any], module_name: str | None = None
) -> Mixer:
    """Return the mixer ``name`` with those ``options`` that are its own and the ``shared`` fields.

    Raises:
      FieldError: an unknown name, a bad value, or something the variant cannot do.
    """
    variant = lookup(VARIANTS, name, "name")
    ability = "bidirectional" if shared.get("bidirectional_mode") else "causal"
    if not getattr(variant, ability):
        raise FieldError("name", f"{name} is not {ability}; {able(ability)}")
    if not variant.scores and (shared.get("positions") == "alibi" or shared.get("soft_cap")):
        asked = "positions alibi" if shared.get("positions") == "alibi" else "soft_cap"
        able_names = ", ".join(key for key, row in VARIANTS.items() if row.scores)
        raise FieldError(
            "name", f"{name} has no scores that {asked} could bend; variants that have: {able_names}"
        )
    mine = {key: value for key, value in options.items() if key in own_fields(name)}
    return variant(**shared, **mine, name=module_name)
