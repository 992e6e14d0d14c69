"""ListOps, the long form: what digit does a nested list come to? (Tay et al. 2020, 2011.04006, 2.2.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastformer.core.errors import FieldError, require
from fastformer.data.examples import Row
from fastformer.models import Head
from fastformer.tasks.classify import Classify, usual_guess
from fastformer.tasks.probe import Probe, label_row

# MED is the median's whole part, SM the sum modulo 10.
OPERATORS = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: int(np.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
TOKENS = (*map(str, range(10)), *OPERATORS, "]")  # a digit is the token of its value
CLOSE = TOKENS.index("]")
TRIES = 100_000  # trees that may be thrown away for one; of those as published 7 % are kept
DIGIT = 0.75  # the probability that an argument is a digit and not a list


@dataclass(frozen=True)
class ListOps(Probe, Classify):
    """Trees by Long Range Arena's rules: kept if longer than ``shortest`` and shorter than ``longest``.

    Its pipeline loses the brackets to its tokeniser; here the closing one stays, without which a
    tree cannot be read. Brackets of pairs, which say nothing more, are not written.

    Attributes:
      shortest, longest: tokens, both excluded.
      depth: of the deepest tree. arguments: the most of one list.
    """

    name: str = "listops"
    train_rows: int = 96_000
    heldout_rows: int = 2_000
    shortest: int = 500
    longest: int = 2000
    depth: int = 10
    arguments: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shortest >= 0, "shortest", self.shortest, "0 or more")
        enough = self.longest > max(self.shortest + 1, 5)
        require(enough, "longest", self.longest, "6 or more and at least 2 above shortest")
        require(self.depth >= 2, "depth", self.depth, "2 or more")
        require(self.arguments >= 2, "arguments", self.arguments, "2 or more")

    @property
    def vocabulary_size(self) -> int:
        return len(TOKENS)

    @property
    def head(self) -> Head:
        return Head(10)

    def title(self) -> str:
        return "ListOps, made from the seed, closing brackets kept"

    def yardsticks(self, labels):
        return usual_guess(labels)

    def make(self, rng, length) -> Row:
        if length < self.longest - 1:
            raise FieldError(
                "config.data.length",
                f"{length} is not allowed; it must hold the longest tree, {self.longest - 1} tokens",
            )
        draw = random.Random(int(rng.integers(2**63)))  # far quicker than numpy for one number at a time
        for _ in range(TRIES):
            tree: list[int] = []
            value = self._grow(draw, tree, 1)
            if value is not None and self.shortest < len(tree) < self.longest:
                return label_row(np.asarray(tree), value, length)
        raise FieldError(
            "config.task.shortest",
            f"{self.shortest} is not allowed; of {TRIES:,} trees of depth {self.depth} (task.depth) with "
            f"up to {self.arguments} arguments none has more tokens and fewer than longest, {self.longest}",
        )

    def _grow(self, draw: random.Random, tree: list[int], depth: int) -> int | None:
        """Append a tree and return its value; None as soon as it is too long, which would be thrown away."""
        if len(tree) >= self.longest:
            return None
        if depth >= self.depth or draw.random() < DIGIT:
            tree.append(draw.randrange(10))
            return tree[-1]
        name = draw.choice(tuple(OPERATORS))
        tree.append(TOKENS.index(name))
        values = []
        for _ in range(draw.randint(2, self.arguments)):
            value = self._grow(draw, tree, depth + 1)
            if value is None:
                return None
            values.append(value)
        tree.append(CLOSE)
        return OPERATORS[name](values)


def spelt(tokens: Sequence[int]) -> str:
    """Return a tree as text, such as ``"[MAX 2 [MIN 4 7 ] ]"``."""
    return " ".join(TOKENS[token] for token in tokens)
