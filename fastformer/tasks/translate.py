"""Machine translation: an encoder and a decoder, or a decoder that reads the source as its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from fastformer.core.errors import require
from fastformer.core.seq import Seq
from fastformer.data.pair_rows import PairRows
from fastformer.data.pipeline import open_corpus
from fastformer.data.splits import spread
from fastformer.models import Source
from fastformer.tasks.next_token import cross_entropy, perplexity
from fastformer.tasks.task import Task, apply

SAMPLES = 3
HAN, KANA = ("\u4e00", "\u9fff"), ("\u3040", "\u30ff")


@dataclass(frozen=True)
class Translate(Task):
    """A batch holds what PairRows says: source and target apart for an encoder_decoder, else joined.

    Attributes:
      label_smoothing: this much of the target's probability is spread over the vocabulary in training
        (Szegedy et al. 2015, 1512.00567, section 7).
      sentences: held-out pairs, evenly spread, that are translated for BLEU and chrF; 0 is all.
    """

    kind = "pairs"
    models = ("encoder_decoder", "decoder")
    metric = "nats_per_token"
    sources = True
    asks = ("source",)

    name: str = "translate"
    label_smoothing: float = 0.1
    sentences: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "from 0 to below 1")
        require(self.sentences >= 0, "sentences", self.sentences, "0 (all) or more")

    def open(self, data, workdir, config):
        corpus, tokeniser, _ = open_corpus(data, self.kind, workdir)
        copied = scores(*zip(*spread(list(corpus.records("heldout")), self.sentences)))
        yardsticks = {f"copied_source_{name}": value for name, value in copied.items()}
        return PairRows(corpus, tokeniser, data.length, config.model.name == "decoder", yardsticks)

    def loss(self, model, params, batch, rng=None):
        source = {}
        if "source_tokens_BS" in batch:
            seq = Seq(batch["source_segment_BS"], batch["source_position_BS"])
            source["source"] = Source(batch["source_tokens_BS"], seq)
        logits_BTV = apply(model, params, batch, rng, **source)
        nats, targets = cross_entropy(logits_BTV, batch["targets_BT"], batch["weights_BT"])
        if rng is not None and self.label_smoothing:
            spread_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.mean(logits_BTV, axis=-1)
            spread = jnp.sum(spread_BT * batch["weights_BT"])
            nats = (1 - self.label_smoothing) * nats + self.label_smoothing * spread
        return nats, targets

    def quality(self, sums, data, limit, overlap):
        return perplexity(sums["nats"], sums["targets"])

    def decoded(self, complete, data, limit):
        pairs = spread(data.texts, self.sentences)
        found = translations(complete, data.tokeniser, [source for source, _ in pairs])
        return scores(found, [target for _, target in pairs])

    def samples(self, complete, data, prompt):
        pairs = data.texts[:SAMPLES]
        found = translations(complete, data.tokeniser, [source for source, _ in pairs])
        return [f"{source}\n=> {text}\n(reference: {target})" for (source, target), text in zip(pairs, found)]

    def respond(self, complete, tokeniser, asked, model, params):
        return translations(complete, tokeniser, asked["source"])

    def signatures(self, data):
        metrics = _metrics(_segmented([target for _, target in data.texts]))
        return {name: str(metric.get_signature()) for name, metric in metrics.items()}


def translations(complete: Any, tokeniser: Any, sources: Sequence[str]) -> list[str]:
    """Return the translation of each sentence, one line each."""
    rows = [[tokeniser.eod, *tokeniser.encode(source), tokeniser.eod] for source in sources]
    return [" ".join(tokeniser.decode(ids).split()) for ids in complete(rows)]


@cache
def _metrics(segmented: str) -> dict[str, Any]:
    from sacrebleu.metrics import BLEU, CHRF  # takes half a second

    return {"bleu": BLEU(tokenize=segmented), "chrf": CHRF()}


def _segmented(texts: Sequence[str]) -> str:
    """Return how sacreBLEU is to part texts into words: what has no spaces between them, by character."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    han, kana = (sum(a <= letter <= b for letter in letters) for a, b in (HAN, KANA))
    if 2 * (han + kana) <= len(letters):
        return "13a"
    return "char" if kana > han / 10 else "zh"


def scores(found: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Return sacreBLEU (Post 2018, 1804.08771) and chrF (Popović 2015, W15-3049) of a corpus."""
    metrics = _metrics(_segmented(wanted))
    return {name: metric.corpus_score(list(found), [list(wanted)]).score for name, metric in metrics.items()}
