"""What every source opens to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Part of every cache key. Raise it when the same source gives other documents, splits or tokens.
LAYOUT = 1


@dataclass(frozen=True)
class Corpus:
    """Documents in two splits that share none.

    Attributes:
      title: what it is, in a few words.
      fingerprint: changes when any document of either split does.
      documents: from ``"train"`` or ``"heldout"`` to its documents, in an order that never changes.
    """

    title: str
    fingerprint: str
    documents: Callable[[str], Iterator[str]]
