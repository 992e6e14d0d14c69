"""Multi-query associative recall: what was this key's value? (Arora et al. 2023, 2312.04927, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastformer.core.errors import FieldError, require
from fastformer.tasks.next_token import Recalled
from fastformer.tasks.probe import Probe, token_row


@dataclass(frozen=True)
class Recall(Probe, Recalled):
    """``k1 v1 k2 v2 …``, then every key once more, among random tokens; its value is to follow.

    As Zoology makes it: keys are of the lower half of the vocabulary and values of the upper, none
    twice; a key comes again after a gap of two tokens times a number i that is drawn, without
    replacement, with probability proportional to ``i^(power - 1)``.

    Attributes:
      pairs: keys with a value in a row; four times as many tokens must fit.
      vocabulary: tokens, more than a row has.
      power: 0.01 as published; the smaller, the sooner a key comes again.
    """

    name: str = "recall"
    pairs: int = 8
    vocabulary: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pairs >= 1, "pairs", self.pairs, "1 or more")
        allowed = f"an even number above {2 * self.pairs + 1}, twice the pairs, for a key is no value"
        enough = self.vocabulary % 2 == 0 and self.vocabulary // 2 > self.pairs
        require(enough, "vocabulary", self.vocabulary, allowed)
        require(self.power > 0, "power", self.power, "above 0")

    @property
    def vocabulary_size(self) -> int:
        return self.vocabulary

    def counted(self, length):
        return self.pairs

    def make(self, rng, length):
        _check_length(self.pairs, self.vocabulary, length)
        n, half = self.pairs, self.vocabulary // 2
        keys = 1 + rng.choice(half - 1, n, replace=False)  # 0 is no key
        values = half + rng.choice(half, n, replace=False)
        tokens = np.zeros(length, np.int64)
        tokens[: 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
        slots = (length - 2 * n) // 2
        places = 2 * n + 2 * rng.choice(slots, n, replace=False, p=gap_probabilities(slots, self.power))
        tokens[places] = keys
        targets, counts = np.zeros(length, np.int64), np.zeros(length)
        targets[places], counts[places] = values, 1
        free = tokens == 0
        tokens[free] = rng.integers(self.vocabulary, size=int(free.sum()))
        return token_row(tokens, targets, counts, length)


def _check_length(pairs: int, vocabulary: int, length: int) -> None:
    if length % 2 or length < 4 * pairs:
        raise FieldError(
            "config.data.length",
            f"{length} is not allowed; it must be even and at least {4 * pairs}, 4 config.task.pairs",
        )
    if vocabulary <= length:
        raise FieldError(
            "config.task.vocabulary", f"{vocabulary} is not allowed; it must be above config.data.length"
        )


@lru_cache
def gap_probabilities(slots: int, power: float) -> np.ndarray:
    """Return the probability of each gap, ``[slots]``, shortest first."""
    weights = np.arange(1, slots + 1) ** (power - 1.0)
    return weights / weights.sum()
