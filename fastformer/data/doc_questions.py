"""Questions about Python's own functions, derived from their docstrings: nobody asked them.

A context is what several functions of a module say of themselves; a question names one of them, and
its answer is the first sentence of its docstring. One question in five names a function that the
context does not hold, and has no answer.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastformer.data import stdlib
from fastformer.data.corpus import Corpus
from fastformer.data.splits import SPLITS, split_of

TOGETHER, FEWEST = 4, 3  # functions in a context
LONGEST = 240  # characters of a docstring
UNANSWERABLE = 0.2
SENTENCE = re.compile(r"(?<=[.!?])\s+")


class Question(NamedTuple):
    """A question and where its answer stands; ``start`` is -1 where there is none.

    Attributes:
      start: characters of the context before the answer.
      others: answers that are as good, of other people.
    """

    question: str
    context: str
    answer: str
    start: int
    others: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Return all that are right."""
        return (self.answer, *self.others)


def open_questions(_: str, root: Path) -> Corpus:
    """Return the corpus whose records are Questions, split by module."""
    found: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for path, text in stdlib.module_texts():
        found[split_of(path)] += questions(path, text)

    def documents(split: str) -> Iterator[str]:
        return (f"{q.question}\n{q.context}" for q in found[split])

    title = f"questions derived from the docstrings of {stdlib.TITLE}"
    return Corpus(title, f"questions {stdlib.fingerprint()}", documents, lambda split: iter(found[split]))


def questions(path: str, text: str) -> Iterator[Question]:
    """Yield the questions about a module's functions; the same for the same path and text."""
    rng = random.Random(path)
    functions = _functions(text)
    for first in range(0, len(functions), TOGETHER):
        here = functions[first : first + TOGETHER]
        if len(here) < FEWEST:
            continue  # with one or two there is nothing to look for
        away = [name for name, _ in functions if name not in dict(here)]
        context = ""
        starts = {}
        for name, doc in here:
            starts[name] = len(context) + len(name) + 3
            context += f"{name}()\n{doc}\n"
        for name, doc in here:
            if away and rng.random() < UNANSWERABLE:
                yield Question(f"What does {rng.choice(away)} do?", context, "", -1)
            else:
                yield Question(f"What does {name} do?", context, SENTENCE.split(doc)[0], starts[name])


def _functions(text: str) -> list[tuple[str, str]]:
    """Return name and docstring, on one line and cut, of every documented function, each name once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(text)
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = " ".join((ast.get_docstring(node) or "").split())[:LONGEST]
            if doc:
                found.setdefault(node.name, doc)
    return list(found.items())
