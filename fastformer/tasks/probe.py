"""What tasks share whose rows are made from a seed: how many, how long, from what."""

from __future__ import annotations

import abc
from dataclasses import dataclass

import numpy as np

from fastformer.core.errors import require
from fastformer.data.examples import Examples, Row, synthetic
from fastformer.tasks.task import Task


@dataclass(frozen=True)
class Probe(Task, abc.ABC):
    """Rows are drawn by number, so that the whole split never lies in memory.

    Attributes:
      train_rows, heldout_rows: in each split, which have no row in common.
    """

    kind = "synthetic"

    train_rows: int = 100_000
    heldout_rows: int = 1_000

    def __post_init__(self) -> None:
        # Held-out rows lie in memory; rows of train are only numbered, for a shuffle of 31 bits.
        for field, most in (("train_rows", 2**31 - 1), ("heldout_rows", 10**6)):
            value = getattr(self, field)
            require(1 <= value <= most, field, value, f"from 1 to {most:,}")

    @property
    @abc.abstractmethod
    def vocabulary_size(self) -> int:
        """Return V."""

    @abc.abstractmethod
    def make(self, rng: np.random.Generator, length: int) -> Row:
        """Return a row of ``length`` tokens, drawn from ``rng``.

        Raises:
          UserError: there is none of that length.
        """

    def yardsticks(self, labels: list[int]) -> dict[str, float]:
        """Return what a model must be better than, from the held-out labels, which may be none."""
        return {}

    def open(self, data, workdir, config):
        counts = {"train": self.train_rows, "heldout": self.heldout_rows}
        row = synthetic(lambda rng: self.make(rng, data.length), config.seed, counts)
        rows = (row("heldout", index) for index in range(self.heldout_rows))
        yardsticks = self.yardsticks([int(found["label_"]) for found in rows if "label_" in found])
        return Examples(self.title(), counts, row, self.vocabulary_size, yardsticks=yardsticks)

    def title(self) -> str:
        """Return what the rows are, in a few words."""
        return f"{self.name}, made from the seed"


def token_row(tokens: np.ndarray, targets: np.ndarray, counts: np.ndarray, length: int) -> Row:
    """Return a row of one segment, padded to ``length``; a target counts where ``counts``."""
    return sequence_row(tokens, length) | {
        "targets_T": padded(targets, length),
        "weights_T": padded(counts, length).astype(np.float32),
    }


def label_row(tokens: np.ndarray, label: int, length: int) -> Row:
    """Return a row of one segment with a label, padded to ``length``."""
    return sequence_row(tokens, length) | {"label_": np.int32(label), "weights_": np.float32(1)}


def sequence_row(tokens: np.ndarray, length: int) -> Row:
    """Return tokens, segment and position of one segment, padded to ``length``."""
    size = len(tokens)
    return {
        "tokens_T": padded(tokens, length),
        "segment_T": padded(np.ones(size), length),
        "position_T": padded(np.arange(size), length),
    }


def padded(values: np.ndarray, length: int) -> np.ndarray:
    """Return ``values`` as int32 with zeros after them."""
    row = np.zeros(length, np.int32)
    row[: len(values)] = values
    return row
