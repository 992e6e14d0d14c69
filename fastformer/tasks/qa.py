"""Extractive question answering: where in the context does the answer begin and end?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastformer.core.errors import UserError, require
from fastformer.core.wrapped import bare
from fastformer.data.doc_questions import Question
from fastformer.data.examples import stack
from fastformer.data.pipeline import open_corpus
from fastformer.data.question_rows import QuestionRows, answer, whole_row
from fastformer.models import Head
from fastformer.tasks.squad import measured, most_similar_sentence
from fastformer.tasks.task import Batch, Task, apply

NEVER = -1e9  # the score of what cannot be chosen


@dataclass(frozen=True)
class QA(Task):
    """A batch holds what QuestionRows says; the scores of begin and end are as BERT's (1810.04805, 4.2).

    No answer is the span of the row's first token alone, as in section 4.3 there.

    Attributes:
      longest: tokens of the longest answer given.
    """

    kind = "questions"
    models = ("encoder",)
    metric = "f1"
    higher = True
    asks = ("question", "context")

    name: str = "qa"
    longest: int = 64

    def __post_init__(self) -> None:
        require(self.longest >= 1, "longest", self.longest, "1 or more")

    @property
    def head(self):
        return Head(2, pooled=False)

    def open(self, data, workdir, config):
        corpus, tokeniser, _ = open_corpus(data, self.kind, workdir)
        return QuestionRows(corpus, tokeniser, data.length, simple_answers(list(corpus.records("heldout"))))

    def loss(self, model, params, batch, rng=None):
        return _cross_entropy(_scores(model, params, batch, rng), batch)

    def totals(self, model, params, batch):
        scores_BTR = _scores(model, params, batch, None)
        nats, targets = _cross_entropy(scores_BTR, batch)
        return {"nats": nats, "targets": targets, "span_B2": best_span(scores_BTR, self.longest)}

    def quality(self, sums, data, limit, overlap):
        wanted = [q.answers for q in data.questions[: limit or None]]
        spans = sums["span_B2"][: len(wanted)]
        found = measured(data.answers(spans), wanted)
        return found | {"nats_per_question": sums["nats"] / max(sums["targets"], 1)}

    def respond(self, complete, tokeniser, asked, model, params):
        records = matched(asked["question"], asked["context"])
        batch = stack([whole_row(record, tokeniser, model.length) for record in records])
        spans = jax.jit(lambda params: self.totals(model, params, batch)["span_B2"])(params)
        found = (
            answer(record, span, tokeniser, model.length)
            for record, span in zip(records, np.asarray(spans).tolist())
        )
        return [text or "(no answer)" for text in found]


def simple_answers(questions: Sequence[Question]) -> dict[str, float]:
    """Return what a model must be better than: simple guesses at held-out questions, measured."""
    guesses = {
        "most_similar_sentence": [most_similar_sentence(q.question, q.context) for q in questions],
        "never_an_answer": [""] * len(questions),
    }
    return {
        f"{name}_{metric}": value
        for name, found in guesses.items()
        for metric, value in measured(found, [q.answers for q in questions]).items()
    }


def matched(questions: Sequence[str], contexts: Sequence[str]) -> list[Question]:
    """Return each question with its context, or all with the only one.

    Raises:
      UserError: neither one context nor as many as there are questions.
    """
    if len(contexts) not in (1, len(questions)):
        raise UserError(f"--context: {len(contexts)} for {len(questions)} questions; give one or one each")
    contexts = list(contexts) * (len(questions) if len(contexts) == 1 else 1)
    return [Question(q, c, "", -1) for q, c in zip(questions, contexts)]


def _scores(model: nn.Module, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Return the scores where a span may begin or end: in the context, or at the first token."""
    kinds = max(bare(model).config.token_types, 1)
    types_BT = jnp.minimum(batch["types_BT"], kinds - 1)
    scores_BTR = apply(model, params, batch, rng, types_BT=types_BT)
    first_T = jnp.arange(scores_BTR.shape[1]) == 0
    allowed_BT = (batch["context_BT"] > 0) | first_T[None]
    return jnp.where(allowed_BT[..., None], scores_BTR, NEVER)


def _cross_entropy(scores_BTR: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the summed nats of begin and end, halved, and the questions that count."""
    nats_B2 = optax.softmax_cross_entropy_with_integer_labels(
        jnp.swapaxes(scores_BTR, 1, 2), batch["span_B2"]
    )
    weights_B = batch["weights_B"]
    return jnp.sum(jnp.mean(nats_B2, axis=1) * weights_B), jnp.sum(weights_B)


def best_span(scores_BTR: jax.Array, longest: int) -> jax.Array:
    """Return the first and last token of the likeliest span of up to ``longest`` tokens, [B, 2]."""
    time = scores_BTR.shape[1]
    at = jnp.arange(time)
    length_TT = at[None, :] - at[:, None] + 1
    none_TT = (at[:, None] == 0) & (at[None, :] > 0)  # the first token is no answer's beginning
    good_TT = (length_TT >= 1) & (length_TT <= longest) & ~none_TT
    pairs_BTT = scores_BTR[:, :, None, 0] + scores_BTR[:, None, :, 1]
    best_B = jnp.argmax(jnp.where(good_TT[None], pairs_BTT, 4 * NEVER).reshape(-1, time * time), axis=1)
    return jnp.stack([best_B // time, best_B % time], axis=1).astype(jnp.int32)
