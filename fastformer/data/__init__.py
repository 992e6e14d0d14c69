"""Floor 2: text in, batches of packed rows out. TFDS is read without TensorFlow, rows come by grain."""

from fastformer.data.config import DataConfig
from fastformer.data.pipeline import TextData, open_data
from fastformer.data.tokenisers import load_tokeniser

__all__ = ["DataConfig", "TextData", "load_tokeniser", "open_data"]
