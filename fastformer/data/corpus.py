"""What every source opens to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Part of every cache key. Raise it when every source gives other documents, splits or tokens; one that
# alone does changes its fingerprint.
LAYOUT = 1


@dataclass(frozen=True)
class Corpus:
    """Documents in two splits that share none.

    Attributes:
      title: what it is, in a few words.
      fingerprint: changes when any document of either split does.
      documents: from ``"train"`` or ``"heldout"`` to its documents, in an order that never changes; a
        tokeniser is trained on those of train.
      records: from a split to what a task reads where that is not documents: pairs of a sentence and its
        translation, images and their labels.
    """

    title: str
    fingerprint: str
    documents: Callable[[str], Iterator[str]]
    records: Callable[[str], Iterator[tuple[Any, ...]]] = lambda split: iter(())
