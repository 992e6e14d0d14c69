"""Questions about Python's own functions, derived from their docstrings: nobody asked them.

A context is what several functions of a module say of themselves; a question names one of them, and
its answer is the first sentence of its docstring. One question in five names a function that the
context does not hold, and has no answer. To be trained on, a module's functions are put together anew
several times, so that a name has other neighbours, and another place among them, each time. What a
held-out function says of itself is nowhere in what is trained on.
"""

from __future__ import annotations

import ast
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastformer.data import stdlib
from fastformer.data.corpus import Corpus
from fastformer.data.splits import SPLITS, split_of

TOGETHER, FEWEST = 4, 3  # functions in a context
LONGEST = 240  # characters of a docstring
UNANSWERABLE = 0.2
ROUNDS = {"train": 8, "heldout": 1}  # times that the functions of a module are put together
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
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    modules = {path: documented(text) for path, text in stdlib.module_texts()}
    heldout = [function for path in modules if split_of(path) == "heldout" for function in modules[path]]
    told = {doc for _, doc in heldout} | {(name, _first_sentence(doc)) for name, doc in heldout}
    for path, functions in modules.items():
        split = split_of(path)
        if split == "train":
            functions = [(n, doc) for n, doc in functions if not told & {doc, (n, _first_sentence(doc))}]
        found[split] += questions(path, functions, ROUNDS[split])
        texts[split] += [f"{q.question}\n{q.context}" for q in questions(path, functions)]

    def documents(split: str) -> Iterator[str]:
        return iter(texts[split])

    title = f"questions derived from the docstrings of {stdlib.TITLE}"
    fingerprint = f"questions {ROUNDS} apart {stdlib.fingerprint()}"
    return Corpus(title, fingerprint, documents, lambda split: iter(found[split]))


def questions(path: str, functions: Sequence[tuple[str, str]], rounds: int = 1) -> Iterator[Question]:
    """Yield the questions about a module's functions; the same for the same path and functions.

    Args:
      functions: their names and docstrings, as ``documented`` has them.
      rounds: times that the functions are put together; the first time as they stand in the module.
    """
    rng, functions = random.Random(path), list(functions)
    for _ in range(rounds):
        yield from _of_groups(functions, rng)
        rng.shuffle(functions)


def _of_groups(functions: list[tuple[str, str]], rng: random.Random) -> Iterator[Question]:
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
                yield Question(f"What does {name} do?", context, _first_sentence(doc), starts[name])


def _first_sentence(doc: str) -> str:
    return SENTENCE.split(doc)[0]


def documented(text: str) -> list[tuple[str, str]]:
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
