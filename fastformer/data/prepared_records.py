"""TFDS data sets that hold more than documents: questions, pairs, labelled texts, images.

Each stands prepared as array_record, as ``prepared.find`` has it. An example of train whose text or
image is held out too is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastformer.core.errors import UserError
from fastformer.data.corpus import Corpus
from fastformer.data.doc_questions import Question
from fastformer.data.prepared import FIELD, find

GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue, as ITU-R BT.601 weighs them


def open_prepared_questions(name: str, root: Path) -> Corpus:
    """Return the corpus of Questions of a data set built as SQuAD is: ``tfds:squad/v1.1``, ``squad/v2.0``.

    Of several answers the first is trained on, and any counts as right.
    """

    def question(example: dict[str, Any]) -> Question:
        answers = list(dict.fromkeys(map(_text, example["answers"]["text"])))
        start = int(example["answers"]["answer_start"][0]) if answers else -1
        asked, context = _text(example["question"]), _text(example["context"])
        if answers and not context.startswith(answers[0], start):
            raise UserError(f"{FIELD}: tfds:{name}: the answer {answers[0]!r} is not where it should be")
        return Question(asked, context, answers[0] if answers else "", start, tuple(answers[1:]))

    def text(q: Question) -> str:
        return f"{q.question}\n{q.context}"

    return _open(name, root, ("question", "context", "answers"), question, text, lambda q: [text(q)])


def open_prepared_pairs(name: str, root: Path) -> Corpus:
    """Return the corpus of pairs of a data set built for translation: ``tfds:ted_hrlr_translate/ru_to_en``.

    The config names source and target, as ``ru_to_en``, ``ru-en`` and ``ende`` do; else they are the two
    texts of an example by the alphabet.

    Raises:
      UserError: as ``find``, or an example has not two texts.
    """
    from fastformer.data import builders

    place = find(name, root).place
    sides = tuple(sorted(builders.features(place, "Text")))
    if len(sides) != 2:
        raise UserError(f"{FIELD}: tfds:{name} has {len(sides)} texts in an example; a pair has 2")
    spelt, *of = (re.sub(r"_to_|[-_]", "", name) for name in (place.parent.name, *sides))
    if spelt.endswith(of[1] + of[0]):
        sides = sides[::-1]

    def pair(example: dict[str, Any]) -> tuple[str, str]:
        return _text(example[sides[0]]).strip(), _text(example[sides[1]]).strip()

    return _open(name, root, sides, pair, "\n".join, lambda pair: pair)


def open_prepared_labelled(name: str, root: Path) -> Corpus:
    """Return the corpus of records ``(text, label)``, such as ``tfds:imdb_reviews/plain_text``."""

    def labelled(example: dict[str, Any]) -> tuple[str, int]:
        return _text(example["text"]), int(example["label"])

    return _open(name, root, ("text", "label"), labelled, lambda record: record[0], lambda record: record[:1])


def open_prepared_images(name: str, root: Path) -> Corpus:
    """Return the corpus of records ``(shades [pixels] uint8, label)``, grey, as of ``tfds:cifar10``."""

    def image(example: dict[str, Any]) -> tuple[np.ndarray, int]:
        pixels = np.asarray(example["image"], np.float64)
        grey = pixels[..., 0] if pixels.shape[-1] == 1 else pixels @ GREY
        return np.rint(grey).astype(np.uint8).ravel(), int(example["label"])

    return _open(name, root, ("image", "label"), image, None, lambda record: [record[0].tobytes()])


def _open(
    name: str,
    root: Path,
    fields: tuple[str, ...],
    read: Callable[[dict[str, Any]], Any],
    document: Callable[[Any], str] | None,
    keys: Callable[[Any], Sequence[str | bytes]],
) -> Corpus:
    """Return the corpus of what ``read`` makes of examples.

    Args:
      fields: that an example must have.
      document: of a record, for a tokeniser to be trained on; None where it has no text.
      keys: of a record; one of train of which any is one of what is held out is left out.
    """
    found = find(name, root)

    def examples(split: str) -> Iterator[Any]:
        from fastformer.data import builders  # TFDS takes a second to import

        for example in builders.examples(found.place, found.splits[split]):
            if missing := [field for field in fields if field not in example]:
                raise UserError(f"{FIELD}: tfds:{name} has no {missing[0]} (it has {', '.join(example)})")
            yield read(example)

    def records(split: str) -> Iterator[Any]:
        of = examples("heldout") if split == "train" else ()
        known = {_digest(key) for record in of for key in keys(record)}
        return (record for record in examples(split) if known.isdisjoint(map(_digest, keys(record))))

    def documents(split: str) -> Iterator[str]:
        return map(document, records(split)) if document else iter(())

    return Corpus(found.title, f"{' '.join(fields)} {found.fingerprint}", documents, records)


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace") if isinstance(key, str) else key).digest()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
