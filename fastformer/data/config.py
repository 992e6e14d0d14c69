"""The config section ``data``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fastformer.core.errors import lookup, require
from fastformer.data.sources import SOURCES, split_source
from fastformer.data.tokenisers import OF_RUN, TOKENISERS


@dataclass(frozen=True)
class DataConfig:
    """Which text, in which tokens, in rows of which length.

    Attributes:
      source: a row of SOURCES: ``python_code``, ``python_docs``, ``files:GLOB`` or ``tfds:NAME``.
      directory: holds what is prepared; "" is $FASTFORMER_DATA or ~/.cache/fastformer.
      tokeniser: a row of TOKENISERS, or ``run:DIR``, the one that is kept with the run in DIR.
      vocabulary: tokens of a bpe tokeniser in all, bytes and end of document included.
      length: T, tokens a row.
    """

    source: str
    directory: str
    tokeniser: str
    vocabulary: int
    length: int

    def __post_init__(self) -> None:
        key, argument = split_source(self.source)
        lookup(SOURCES, key, "source")
        require(bool(argument) == key.endswith(":"), "source", self.source, SOURCES[key].form)
        if not self.tokeniser.startswith(OF_RUN):
            lookup({**TOKENISERS, f"{OF_RUN}DIR": None}, self.tokeniser, "tokeniser")
        good = 257 <= self.vocabulary <= 2**24
        require(good, "vocabulary", self.vocabulary, "from 257 (256 bytes and end of document) to 2^24")
        require(1 <= self.length <= 2**30, "length", self.length, "a number of tokens, from 1 to 2^30")

    def root(self) -> Path:
        """Return the directory that holds what is prepared."""
        chosen = self.directory or os.environ.get("FASTFORMER_DATA") or "~/.cache/fastformer"
        return Path(chosen).expanduser()
