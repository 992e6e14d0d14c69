"""The table of sources: where text comes from, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastformer.core.errors import FieldError
from fastformer.data import stdlib
from fastformer.data.corpus import Corpus
from fastformer.data.digits import open_digits
from fastformer.data.doc_questions import open_questions
from fastformer.data.kjv import open_kjv
from fastformer.data.libreoffice import fetch, open_help
from fastformer.data.parallel import open_catalogues
from fastformer.data.prepared import open_prepared
from fastformer.data.prepared_records import (
    open_prepared_images,
    open_prepared_labelled,
    open_prepared_pairs,
    open_prepared_questions,
)
from fastformer.data.user_files import open_files


@dataclass(frozen=True)
class Source:
    """One row of the table: what a source is called, and what opens it.

    Attributes:
      form: how it is written in a config.
      opens: by kind, what a task asks for, from what stands after the colon and the directory of
        prepared data to a Corpus.
      fetch: downloads what ``opens`` needs, from and to the same; None where nothing can be.
    """

    form: str
    opens: Mapping[str, Callable[[str, Path], Corpus]]
    fetch: Callable[[str, Path], None] | None = None


def _open_python(name: str) -> Callable[[str, Path], Corpus]:
    def open_python(_: str, root: Path) -> Corpus:
        fingerprint = stdlib.fingerprint()

        def documents(split: str) -> Iterator[str]:
            from fastformer.data import builders  # TFDS takes a second to import; a warm cache needs none

            yield from builders.texts(builders.prepare(name, root / f"tfds-{fingerprint[:16]}"), split)

        return Corpus(f"{name} of {stdlib.TITLE}", f"{name} {fingerprint}", documents)

    return open_python


def _open_synthetic(_: str, root: Path) -> Corpus:
    return Corpus("made by the task", "synthetic", lambda split: iter(()))


SOURCES = {
    "python_code": Source("python_code", {"text": _open_python("python_code")}),
    "python_docs": Source("python_docs", {"text": _open_python("python_docs")}),
    "files:": Source("files: and a path or glob, as in files:books/*.txt", {"text": open_files}),
    "tfds:": Source(
        "tfds: and a data set's name, as in tfds:lm1b",
        {
            "text": open_prepared,
            "questions": open_prepared_questions,
            "pairs": open_prepared_pairs,
            "labelled": open_prepared_labelled,
            "images": open_prepared_images,
        },
    ),
    "kjv": Source("kjv", {"text": open_kjv}),
    "libreoffice_help:": Source(
        "libreoffice_help: and a language as Debian has it, as in libreoffice_help:de",
        {"pairs": open_help},
        fetch,
    ),
    "gettext:": Source(
        "gettext: and a glob of catalogues, as in gettext:locale/de/**/*.mo", {"pairs": open_catalogues}
    ),
    "synthetic": Source("synthetic", {"synthetic": _open_synthetic}),
    "python_questions": Source("python_questions", {"questions": open_questions}),
    "digits": Source("digits", {"images": open_digits}),
}


def split_source(source: str) -> tuple[str, str]:
    """Return the key of a row of SOURCES and its argument: ``"files:a"`` is ``("files:", "a")``."""
    name, colon, argument = source.partition(":")
    return name + colon, argument


def check_kind(source: str, kind: str) -> None:
    """Check that a source, written as in a config, opens to ``kind``.

    Raises:
      FieldError: it does not; the line names those that do.
    """
    if kind not in SOURCES[split_source(source)[0]].opens:
        able = ", ".join(key for key, row in SOURCES.items() if kind in row.opens)
        raise FieldError("config.data.source", f"{source} holds no {kind}; sources that do: {able}")


def open_source(source: str, kind: str, root: Path) -> Corpus:
    """Return the corpus that a source opens to.

    Raises:
      UserError: it is of another kind, or cannot be opened.
    """
    check_kind(source, kind)
    key, argument = split_source(source)
    return SOURCES[key].opens[kind](argument, root)
