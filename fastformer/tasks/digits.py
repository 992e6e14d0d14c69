"""Images, pixel by pixel, into ten classes: handwritten digits, 64 tokens of 17 shades, or those of TFDS."""

from __future__ import annotations

from dataclasses import dataclass

from fastformer.core.errors import FieldError, UserError
from fastformer.data.examples import Examples
from fastformer.data.pipeline import keep_record
from fastformer.data.sources import open_source
from fastformer.data.splits import SPLITS
from fastformer.models import Head
from fastformer.tasks.classify import Classify, usual_guess
from fastformer.tasks.probe import label_row

DIGIT_SHADES, SHADES = 17, 256


@dataclass(frozen=True)
class Digits(Classify):
    """What is on it? Of ``tfds:cifar10``, in grey, Long Range Arena's image task (2011.04006, section 2.2.4);
    scikit-learn's digits are its small kin that needs no download.
    """

    kind = "images"

    name: str = "digits"

    @property
    def head(self) -> Head:
        return Head(10)

    def open(self, data, workdir, config):
        corpus = open_source(data.source, self.kind, data.root())
        images = {split: list(corpus.records(split)) for split in SPLITS}
        most = max(label for some in images.values() for _, label in some)
        if most >= self.head.size:
            raise UserError(f"config.data.source: {corpus.title} has a label {most}; there may be 0 to 9")
        pixels = max(len(image) for some in images.values() for image, _ in some)
        if data.length < pixels:
            raise FieldError("config.data.length", f"{data.length} is not allowed; an image has {pixels}")
        if workdir is not None:
            keep_record(corpus, workdir)
        shades = DIGIT_SHADES if data.source == "digits" else SHADES

        def row(split, index):
            return label_row(*images[split][index], data.length)

        counts = {split: len(found) for split, found in images.items()}
        yardsticks = usual_guess(label for _, label in images["heldout"])
        return Examples(corpus.title, counts, row, shades, yardsticks=yardsticks)
