"""Sentence embeddings: texts that belong together have vectors of about one direction."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastformer.core.errors import UserError, require
from fastformer.data.doc_questions import Question
from fastformer.data.examples import Examples, Row, stack
from fastformer.data.pipeline import open_corpus
from fastformer.data.splits import SPLITS
from fastformer.models import Head
from fastformer.tasks.probe import sequence_row
from fastformer.tasks.squad import WORDS
from fastformer.tasks.task import Batch, Task, apply

OTHER = "other_"  # begins the names of what a batch holds of the second text


@dataclass(frozen=True)
class Similarity(Task):
    """Which answer belongs to a question, by the cosine of their vectors (Sentence-BERT, 1908.10084).

    A batch holds tokens_BT, segment_BT and position_BT of questions, the same of their answers under names
    that begin with other_, and weights_B (0: a row that fills up). A text's vector is the mean over its
    tokens at unit length. The loss picks a question's answer among those of the batch (1705.00652, eq. 4).

    Attributes:
      temperature: that cosines are divided by in the loss.
    """

    kind = "questions"
    models = ("encoder",)
    metric = "mean_reciprocal_rank"
    higher = True
    lossy = True
    asks = ("sentence",)

    name: str = "similarity"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "above 0")

    @property
    def head(self):
        return Head(0)

    def open(self, data, workdir, config):
        corpus, tokeniser, _ = open_corpus(data, self.kind, workdir)
        found = {split: answered(corpus.records(split)) for split in SPLITS}
        for split, some in found.items():
            if not some:
                raise UserError(f"config.data.source: {data.source} has no answer in its {split} split")

        def row(split: str, index: int) -> Row:
            texts = found[split][index]
            asked, other = (text_row(tokeniser.alone(text, data.length), data.length) for text in texts)
            return asked | {f"{OTHER}{k}": x for k, x in other.items()} | {"weights_": np.float32(1)}

        counts = {split: len(some) for split, some in found.items()}
        yardsticks = {f"shared_words_{name}": x for name, x in ranked(shared_words(found["heldout"])).items()}
        return Examples(corpus.title, counts, row, tokeniser.size, tokeniser, yardsticks)

    def loss(self, model, params, batch, rng=None):
        return self._nats(*self._vectors(model, params, batch, rng), batch["weights_B"])

    def totals(self, model, params, batch):
        asked_BD, other_BD = self._vectors(model, params, batch, None)
        nats, targets = self._nats(asked_BD, other_BD, batch["weights_B"])
        return {"nats": nats, "targets": targets, "asked_BD": asked_BD, "other_BD": other_BD}

    def quality(self, sums, data, limit, overlap):
        count = min(limit or data.counts["heldout"], data.counts["heldout"])
        asked_ND, other_ND = (np.asarray(sums[name], np.float64)[:count] for name in ("asked_BD", "other_BD"))
        cosine_NN = asked_ND @ other_ND.T
        own, all_others = np.trace(cosine_NN), np.sum(cosine_NN)
        return ranked(cosine_NN) | {
            "cosine_of_pairs": own / count,
            "cosine_of_others": (all_others - own) / max(count * (count - 1), 1),
        }

    def respond(self, complete, tokeniser, asked, model, params):
        texts = asked["sentence"]
        if len(texts) < 2:
            raise UserError("--sentence: one is compared with nothing; give two or more")
        rows = [tokeniser.alone(text, sys.maxsize) for text in texts]
        longest = max(map(len, rows))
        if longest > model.length:
            raise UserError(f"--sentence: one of {longest} tokens, but the model reads {model.length}")
        batch = stack([text_row(row, model.length) for row in rows])
        vector_BD = np.asarray(jax.jit(lambda params: unit(apply(model, params, batch, None)))(params))
        pairs = combinations(range(len(texts)), 2)
        return [f"{vector_BD[a] @ vector_BD[b]:.3f}  {texts[a]}  |  {texts[b]}" for a, b in pairs]

    def _vectors(self, model, params, batch: Batch, rng) -> tuple[jax.Array, jax.Array]:
        other = {name.removeprefix(OTHER): x for name, x in batch.items() if name.startswith(OTHER)}
        rngs = (None, None) if rng is None else jax.random.split(rng)
        return unit(apply(model, params, batch, rngs[0])), unit(apply(model, params, other, rngs[1]))

    def _nats(self, asked_BD, other_BD, weights_B) -> tuple[jax.Array, jax.Array]:
        scores_BB = jnp.einsum("BD,SD->BS", asked_BD, other_BD) / self.temperature
        scores_BB = jnp.where(weights_B[None] > 0, scores_BB, -1e9)
        nats_B = optax.softmax_cross_entropy_with_integer_labels(scores_BB, jnp.arange(len(scores_BB)))
        return jnp.sum(jnp.where(weights_B > 0, nats_B, 0.0)), jnp.sum(weights_B)


def text_row(tokens: Sequence[int], length: int) -> Row:
    """Return the row of one text."""
    return sequence_row(np.asarray(tokens), length)


def unit(x_BD: jax.Array) -> jax.Array:
    """Return the vectors at length one, and those of nothing as zeros."""
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1e-12)


def answered(questions: Sequence[Question]) -> list[tuple[str, str]]:
    """Return questions with their answers, those that have one, each pair once."""
    return list(dict.fromkeys((q.question, q.answer) for q in questions if q.answer))


def ranked(scores_NN: np.ndarray) -> dict[str, float]:
    """Return how often each row's own column is its highest, and the mean of one over its rank."""
    own_N1 = np.diagonal(scores_NN)[:, None]
    rank_N = 1 + np.sum(scores_NN > own_N1, axis=1)
    # Of equals half come before.
    rank_N = rank_N + (np.sum(scores_NN == own_N1, axis=1) - 1) / 2
    return {"found_first": float(np.mean(rank_N == 1)), "mean_reciprocal_rank": float(np.mean(1 / rank_N))}


def shared_words(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return how many words each question shares with each answer, the simple way to find it."""
    words = [[set(WORDS.findall(text.lower())) for text in side] for side in zip(*pairs)]
    return np.array([[len(asked & answer) for answer in words[1]] for asked in words[0]], np.float64)
