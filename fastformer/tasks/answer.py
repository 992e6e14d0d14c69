"""Generative question answering: the answer is written, not found; as a translation of the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastformer.data.corpus import Corpus
from fastformer.data.doc_questions import Question
from fastformer.data.pair_rows import PairRows
from fastformer.data.pipeline import open_corpus
from fastformer.data.splits import spread
from fastformer.tasks.qa import matched, simple_answers
from fastformer.tasks.squad import measured
from fastformer.tasks.translate import SAMPLES, Translate, translations


@dataclass(frozen=True)
class Answer(Translate):
    """A batch holds what PairRows says; a source is question and context, no answer an empty target.

    Attributes:
      label_smoothing: as of Translate. sentences: held-out questions, evenly spread, that
        are answered; 0 is all.
    """

    kind = "questions"
    asks = ("question", "context")

    name: str = "answer"

    def open(self, data, workdir, config):
        corpus, tokeniser, _ = open_corpus(data, self.kind, workdir)
        joined = config.model.name == "decoder"
        chosen = spread(list(corpus.records("heldout")), self.sentences)
        rows = PairRows(_pairs(corpus), tokeniser, data.length, joined, simple_answers(chosen))
        rows.questions = chosen
        return rows

    def decoded(self, complete, data, limit):
        found = _answers(complete, data.tokeniser, data.questions)
        return measured(found, [q.answers for q in data.questions])

    def samples(self, complete, data, prompt):
        chosen = data.questions[:SAMPLES]
        found = _answers(complete, data.tokeniser, chosen)
        return [f"{q.question}\n=> {text}\n(reference: {q.answer})" for q, text in zip(chosen, found)]

    def respond(self, complete, tokeniser, asked, model, params):
        records = matched(asked["question"], asked["context"])
        return [text or "(no answer)" for text in _answers(complete, tokeniser, records)]

    def signatures(self, data):
        return {}


def _pairs(corpus: Corpus) -> Corpus:
    """Return questions as pairs of a source and a target."""

    def records(split: str):
        return ((_source(q), q.answer) for q in corpus.records(split))

    return Corpus(corpus.title, corpus.fingerprint, corpus.documents, records)


def _source(question: Question) -> str:
    return f"{question.question}\n{question.context}"


def _answers(complete, tokeniser, questions: Sequence[Question]) -> list[str]:
    return translations(complete, tokeniser, [_source(q) for q in questions])
