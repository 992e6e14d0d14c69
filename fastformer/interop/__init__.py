"""Floor 5: models of other projects in, ours out: Hugging Face directories, GGUF, StableHLO."""

from fastformer.interop.imported import Imported, read
from fastformer.interop.written import FORMATS, write

__all__ = ["FORMATS", "Imported", "read", "write"]
