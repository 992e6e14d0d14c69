"""The table of methods. To add one: a file with its class, a row here, its keys in configs/base.py."""

from __future__ import annotations

from fastformer.compress.distil import Distil
from fastformer.compress.linearise import Linearise
from fastformer.compress.method import Method
from fastformer.compress.prune import Prune
from fastformer.compress.quantise import Quantise

METHODS: dict[str, type[Method]] = {
    "quantise": Quantise,
    "prune": Prune,
    "distil": Distil,
    "linearise": Linearise,
}
