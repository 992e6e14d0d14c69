"""SQuAD's measures of an answer (Rajpurkar et al. 2016, 1606.05250, section 6.1; 2018, 1806.03822)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
WORDS = re.compile(r"[a-z0-9]+")


def normalised(text: str) -> str:
    """Return lower case without punctuation and articles, words with one space between."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def exact_match(found: str, wanted: str) -> float:
    """Return 1 where two answers are the same once normalised, else 0."""
    return float(normalised(found) == normalised(wanted))


def f1(found: str, wanted: str) -> float:
    """Return the harmonic mean of precision and recall over words; no answer is right only as none."""
    a, b = normalised(found).split(), normalised(wanted).split()
    if not a or not b:
        return float(a == b)
    same = sum((Counter(a) & Counter(b)).values())
    return 2 * same / (len(a) + len(b))


def measured(found: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the mean of both over answers, in percent as SQuAD has it.

    Args:
      wanted: of each question the answers that people gave; the one that fits best counts.
    """
    pairs = list(zip(found, wanted, strict=True))
    best = {
        "exact_match": [max(exact_match(text, one) for one in good) for text, good in pairs],
        "f1": [max(f1(text, one) for one in good) for text, good in pairs],
    }
    return {name: 100 * sum(values) / len(pairs) for name, values in best.items()}


def most_similar_sentence(question: str, context: str) -> str:
    """Return the sentence that shares most words with a question, the first of equals; the baseline."""
    asked = set(WORDS.findall(question.lower()))
    sentences = [s for line in context.splitlines() for s in re.split(r"(?<=[.!?])\s+", line) if " " in s]
    return max(sentences, key=lambda s: len(asked & set(WORDS.findall(s.lower()))), default="")
