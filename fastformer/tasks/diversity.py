"""How much generated text repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float:
    """Return different n-grams of words over all (distinct-n: Li et al. 2016, 1510.03055, section 5.3)."""
    grams = [gram for text in texts for gram in _grams(text.split(), n)]
    return len(set(grams)) / max(len(grams), 1)


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Return the mean fraction of a text's n-grams that stood in it before (rep-n: 1908.04319, section 6)."""
    shares = []
    for text in texts:
        grams = _grams(text.split(), n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / max(len(shares), 1)


def diversity(texts: Sequence[str]) -> dict[str, float]:
    """Return distinct-1, distinct-2 and the repetition of 4-grams."""
    return {
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition_4": repetition(texts),
    }


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
