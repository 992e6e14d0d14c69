"""Floor 6: compression methods, each a set of four optional hooks, composed in the order of the config."""

from __future__ import annotations

from fastformer.compress.frame import Compression, Loss, Method, at, build
from fastformer.compress.method import within
from fastformer.compress.table import METHODS

__all__ = ["METHODS", "Compression", "Loss", "Method", "at", "build", "within"]
