"""What tasks share that put a row into one of a few classes: the loss, the accuracy, the usual guess."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fastformer.tasks.next_token import accuracy, cross_entropy, scored
from fastformer.tasks.task import Task, apply


@dataclass(frozen=True)
class Classify(Task):
    """A batch holds tokens_BT, segment_BT, position_BT, label_B and weights_B (0: a row that fills up)."""

    models = ("encoder",)
    metric = "accuracy"
    higher = True

    def loss(self, model, params, batch, rng=None):
        return cross_entropy(apply(model, params, batch, rng), batch["label_B"], batch["weights_B"])

    def totals(self, model, params, batch):
        return scored(apply(model, params, batch, None), batch["label_B"], batch["weights_B"])

    def quality(self, sums, data, limit, overlap):
        return accuracy(sums)


def usual_guess(labels: Iterable[int]) -> dict[str, float]:
    """Return the accuracy of always guessing the commonest of the held-out labels."""
    counts = Counter(labels)
    return {"commonest_label_accuracy": max(counts.values()) / sum(counts.values())}
