"""Questions in rows: ``eod question eod context``, with the tokens that an answer begins and ends at."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from fastformer.core.errors import UserError
from fastformer.data.corpus import Corpus
from fastformer.data.doc_questions import Question
from fastformer.data.examples import Examples, Row
from fastformer.data.splits import SPLITS
from fastformer.data.tokenisers import Tokeniser

WORD = re.compile(r"\w+")
SOME = 200  # questions of a split that padding and lost answers are counted in


class QuestionRows(Examples):
    """Rows of one question each; a context is cut to what fits.

    A row's ``span_2`` holds the first and last token of the answer, both 0 (the row's first token) where
    there is none, or none within the cut; ``context_T`` is 1 where an answer may stand. ``types_T`` is 0 in
    the question, 1 in the context (1810.04805, section 3) and 2 in those of its words that the question has
    too (Chen et al. 2017, 1704.00051, section 3.2, exact match, in lower case).

    Attributes:
      questions: the held-out ones.

    Raises:
      UserError: no answer is within a row.
    """

    def __init__(self, corpus: Corpus, tokeniser: Tokeniser, length: int, yardsticks: Mapping[str, float]):
        found = {split: list(corpus.records(split)) for split in SPLITS}
        self.questions: list[Question] = found["heldout"]
        self._length = length

        def row(split: str, index: int) -> Row:
            return question_row(found[split][index], tokeniser, length)

        counts = {split: len(some) for split, some in found.items()}
        super().__init__(corpus.title, counts, row, tokeniser.size, tokeniser, yardsticks)
        some = {split: found[split][:SOME] for split in SPLITS}
        real = sum(len(_tokens(question, tokeniser, length)[0]) for question in some["heldout"])
        share = 1 - real / max(len(some["heldout"]) * length, 1)
        self.description += f"; {100 * share:.1f} % padding in the first {len(some['heldout'])} held out"
        cut = [_lost(some[split], tokeniser, length) for split in SPLITS]
        of = " + ".join(str(len(some[split])) for split in SPLITS)
        self.description += f"; {cut[0]} + {cut[1]} of the first {of} lose their answer, cut to a row"

    def answers(self, spans: np.ndarray) -> list[str]:
        """Return the text of the spans ``[rows, 2]`` that were found for the first held-out questions."""
        return [
            answer(question, span, self.tokeniser, self._length)
            for question, span in zip(self.questions, spans.tolist())
        ]


def _tokens(question: Question, tokeniser: Tokeniser, length: int) -> tuple[list[int], int]:
    """Return the tokens of a row, and where the context begins in them."""
    asked = [tokeniser.eod, *tokeniser.encode(question.question), tokeniser.eod]
    return (asked + tokeniser.encode(question.context))[:length], min(len(asked), length)


def _lost(questions: Sequence[Question], tokeniser: Tokeniser, length: int) -> int:
    """Return how many questions have their answer beyond the cut."""
    answered = [question for question in questions if question.start >= 0]
    spans = (_span(question, *_tokens(question, tokeniser, length), tokeniser) for question in answered)
    lost = sum(span == (0, 0) for span in spans)
    if answered and lost == len(answered):
        raise UserError(
            f"config.data.length: a row of {length} tokens holds no answer of the first {len(questions)} "
            "questions; give a larger one"
        )
    return lost


def whole_row(question: Question, tokeniser: Tokeniser, length: int) -> Row:
    """Return the row of a question whose context may not be cut.

    Raises:
      UserError: it would be.
    """
    size = len(_tokens(question, tokeniser, sys.maxsize)[0])
    if size > length:
        raise UserError(
            f"--context: {size} tokens with its question, but the model reads {length} (config.data.length)"
        )
    return question_row(question, tokeniser, length)


def question_row(question: Question, tokeniser: Tokeniser, length: int) -> Row:
    """Return the row of a question."""
    tokens, begin = _tokens(question, tokeniser, length)
    row = {f"{name}_T": np.zeros(length, np.int32) for name in ("tokens", "segment", "position", "context")}
    size = len(tokens)
    row["tokens_T"][:size], row["segment_T"][:size] = tokens, 1
    row["position_T"][:size] = np.arange(size)
    row["context_T"][begin:size] = 1
    row["types_T"] = row["context_T"].copy()
    row["types_T"][begin:size] += _asked(question, tokens[begin:], tokeniser)
    row["span_2"] = np.asarray(_span(question, tokens, begin, tokeniser), np.int32)
    return row | {"weights_": np.float32(1)}


def _asked(question: Question, tokens: Sequence[int], tokeniser: Tokeniser) -> np.ndarray:
    """Return 1 for the tokens of the context that are part of a word of the question."""
    words = {word.lower() for word in WORD.findall(question.question)}
    sizes = tokeniser.byte_lengths[np.asarray(tokens, np.int64)]
    same = np.zeros(len(question.context.encode()) + 1, np.int32)  # bytes; the first is before all
    for found in WORD.finditer(question.context):
        if found.group().lower() in words:
            first, last = (len(question.context[:end].encode()) for end in found.span())
            same[first + 1 : last + 1] = 1
    before = np.cumsum(same)
    ends = np.minimum(np.cumsum(sizes), len(before) - 1)
    return (before[ends] > before[np.maximum(ends - sizes, 0)]).astype(np.int32)


def _span(question: Question, tokens: Sequence[int], begin: int, tokeniser: Tokeniser) -> tuple[int, int]:
    if question.start < 0:
        return 0, 0
    first = len(question.context[: question.start].encode())
    last = first + len(question.answer.encode()) - 1
    ends = np.cumsum(tokeniser.byte_lengths[np.asarray(tokens[begin:], np.int64)])
    span = np.searchsorted(ends, [first, last], side="right")
    return (0, 0) if span[1] >= len(ends) else (begin + int(span[0]), begin + int(span[1]))


def answer(question: Question, span: Sequence[int], tokeniser: Tokeniser, length: int) -> str:
    """Return the text of a span of a question's row."""
    tokens, begin = _tokens(question, tokeniser, length)
    return tokeniser.decode(tokens[span[0] : span[1] + 1]).strip() if span[0] >= begin else ""
