"""Our tokenisers as the library tokenizers has them."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fastformer.data.tokenisers import Tokeniser, WordPieceTokeniser, byte_characters

END = "<|endoftext|>"


def to_library(tokeniser: Tokeniser) -> tuple[str, str]:
    """Return the JSON of the same tokeniser there, and the name of its end of document."""
    state = tokeniser.state()
    if state["name"] == "bytes":
        made = tokenizers.Tokenizer(models.BPE({text: byte for byte, text in byte_characters().items()}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif state["name"] == "wordpiece":
        return state["model"], WordPieceTokeniser.END
    else:
        made = tokenizers.Tokenizer.from_str(state["model"])
    made.decoder = decoders.ByteLevel()
    if "eod" in state:
        return made.to_str(), made.id_to_token(state["eod"])
    made.add_special_tokens([END])
    return made.to_str(), END
