"""The induction head: what came after this token before? (Fu et al. 2022, 2212.14052, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastformer.core.errors import FieldError, require
from fastformer.tasks.next_token import Recalled
from fastformer.tasks.probe import Probe, token_row


@dataclass(frozen=True)
class Induction(Probe, Recalled):
    """Random symbols, a special token once among them and once at the end; what followed it is to follow.

    Attributes:
      symbols: kinds of them; the special token is one more.
    """

    name: str = "induction"
    symbols: int = 19

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.symbols >= 2, "symbols", self.symbols, "2 or more")

    @property
    def vocabulary_size(self) -> int:
        return self.symbols + 1

    def counted(self, length):
        return 1

    def make(self, rng, length):
        if length < 3:
            raise FieldError("config.data.length", f"{length} is not allowed; it must be at least 3")
        tokens = rng.integers(self.symbols, size=length)
        place = int(rng.integers(length - 2))
        tokens[[place, -1]] = self.symbols
        last = np.arange(length) == length - 1
        return token_row(tokens, np.where(last, tokens[place + 1], 0), last, length)
