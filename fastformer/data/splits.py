"""Which documents are held out: decided by a document's name alone, the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

SPLITS = ("train", "heldout")
HELD_OUT = 0.05  # of the names
# Chosen so that also in bytes 5 % of python_code and of python_docs are held out (CPython 3.11), in files
# of all sizes that gzip packs about as well as the rest.
SALT = "15:"


def fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on ``name`` only; below HELD_OUT it is held out."""
    state = hashlib.sha256((SALT + name).encode("utf-8", "surrogateescape"))
    return int.from_bytes(state.digest()[:4], "big") / 2**32


def split_of(name: str) -> str:
    """Return ``"train"`` or ``"heldout"``."""
    return "heldout" if fraction(name) < HELD_OUT else "train"


def digest(text: str) -> bytes:
    """Return 16 bytes that two different texts do not share."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()[:16]


def unique(named_texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the ``(name, text)`` pairs whose text is not blank and stood in no earlier pair."""
    seen: set[bytes] = set()
    for name, text in named_texts:
        key = digest(text)
        if text.strip() and key not in seen:
            seen.add(key)
            yield name, text


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return ``number`` of the items, evenly spread over all; 0, or more than there are, is all of them."""
    number = min(number, len(items)) or len(items)
    return [items[index * len(items) // number] for index in range(number)]
