"""Texts into classes, such as reviews into good and bad (Tay et al. 2020, 2011.04006, section 2.2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastformer.core.errors import UserError, require
from fastformer.data.examples import Examples
from fastformer.data.pipeline import open_corpus
from fastformer.data.splits import SPLITS
from fastformer.models import Head
from fastformer.tasks.classify import Classify, usual_guess
from fastformer.tasks.probe import label_row


@dataclass(frozen=True)
class Reviews(Classify):
    """Of ``tfds:imdb_reviews`` in bytes, Long Range Arena's text task; a text is cut to what a row holds.

    Attributes:
      classes: labels are 0 to one less.
    """

    kind = "labelled"
    lossy = True

    name: str = "reviews"
    classes: int = 2

    def __post_init__(self) -> None:
        require(self.classes >= 2, "classes", self.classes, "2 or more")

    @property
    def head(self) -> Head:
        return Head(self.classes)

    def open(self, data, workdir, config):
        corpus, tokeniser, _ = open_corpus(data, self.kind, workdir)
        texts = {split: list(corpus.records(split)) for split in SPLITS}
        most = max(label for some in texts.values() for _, label in some)
        if most >= self.classes:
            raise UserError(f"config.task.classes: {self.classes} is not allowed; there is a label {most}")

        def row(split, index):
            text, label = texts[split][index]
            tokens = tokeniser.alone(text, data.length)
            return label_row(np.asarray(tokens), label, data.length)

        counts = {split: len(some) for split, some in texts.items()}
        yardsticks = usual_guess(label for _, label in texts["heldout"])
        return Examples(corpus.title, counts, row, tokeniser.size, tokeniser, yardsticks)
