"""Masked-language modelling: which tokens were hidden? (Devlin et al. 2018, 1810.04805, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fastformer.core.errors import require
from fastformer.data import open_data
from fastformer.data.changed import MaskedText
from fastformer.tasks.next_token import accuracy, cross_entropy, perplexity, scored
from fastformer.tasks.task import Task, apply


@dataclass(frozen=True)
class MLM(Task):
    """A batch holds what a batch of text does, but targets_BT are the row's own tokens, before some of
    them were hidden; weights_BT is 1 where one was.

    Attributes:
      chosen: fraction of the tokens that are to be told; ends of documents never are.
    """

    models = ("encoder",)
    metric = "accuracy"
    higher = True
    lossy = True

    name: str = "mlm"
    chosen: float = 0.15

    def __post_init__(self) -> None:
        require(0 < self.chosen < 1, "chosen", self.chosen, "between 0 and 1")

    def open(self, data, workdir, config):
        return open_data(data, workdir, partial(MaskedText, chosen=self.chosen))

    def loss(self, model, params, batch, rng=None):
        return cross_entropy(apply(model, params, batch, rng), batch["targets_BT"], batch["weights_BT"])

    def totals(self, model, params, batch):
        return scored(apply(model, params, batch, None), batch["targets_BT"], batch["weights_BT"])

    def quality(self, sums, data, limit, overlap):
        return accuracy(sums) | {"perplexity": perplexity(sums["nats"], sums["targets"])["perplexity"]}
