"""Copying: a string of symbols, a mark, and the string again (Jelassi et al. 2024, 2402.01032, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastformer.core.errors import FieldError, require
from fastformer.tasks.next_token import Recalled
from fastformer.tasks.probe import Probe, token_row


@dataclass(frozen=True)
class Copy(Probe, Recalled):
    """The string is as long as a row allows, or, with ``shortest``, of any length from that on.

    Attributes:
      symbols: kinds of them; the mark is one more token.
      shortest: symbols of the shortest string; 0 is always the longest, half a row.
    """

    name: str = "copy"
    symbols: int = 26
    shortest: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.symbols >= 2, "symbols", self.symbols, "2 or more")
        require(self.shortest >= 0, "shortest", self.shortest, "0 or more")

    @property
    def vocabulary_size(self) -> int:
        return self.symbols + 1

    def counted(self, length):
        return length // 2

    def make(self, rng, length):
        longest = length // 2
        if longest < max(self.shortest, 1):
            raise FieldError(
                "config.data.length",
                f"{length} is not allowed; it must be at least {2 * max(self.shortest, 1)}, two strings",
            )
        size = int(rng.integers(self.shortest, longest + 1)) if self.shortest else longest
        text = rng.integers(self.symbols, size=size)
        whole = np.concatenate([text, [self.symbols], text])
        counts = np.arange(2 * size) >= size
        return token_row(whole[:-1], whole[1:], counts, length)
