"""Floor 5: generation from the states of a model."""

from fastformer.decode.generate import check_rows, complete, decode_tokens_per_second, generate
from fastformer.decode.sample import sample
from fastformer.decode.steps import GenerateConfig
from fastformer.decode.stored import stored
from fastformer.decode.token_by_token import TokenByToken

__all__ = [
    "GenerateConfig",
    "TokenByToken",
    "check_rows",
    "complete",
    "decode_tokens_per_second",
    "generate",
    "sample",
    "stored",
]
