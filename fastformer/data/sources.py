"""The table of sources: where text comes from, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastformer.data import stdlib
from fastformer.data.corpus import Corpus
from fastformer.data.prepared import open_prepared
from fastformer.data.user_files import open_files


@dataclass(frozen=True)
class Source:
    """One row of the table: what a source is called, and what opens it.

    Attributes:
      form: how it is written in a config.
      open: from what stands after the colon and the directory of prepared data to a Corpus.
    """

    form: str
    open: Callable[[str, Path], Corpus]


def _open_python(name: str) -> Callable[[str, Path], Corpus]:
    def open_python(_: str, root: Path) -> Corpus:
        fingerprint = stdlib.fingerprint()

        def documents(split: str) -> Iterator[str]:
            from fastformer.data import builders  # TFDS takes a second to import; a warm cache needs none

            yield from builders.texts(builders.prepare(name, root / f"tfds-{fingerprint[:16]}"), split)

        return Corpus(f"{name} of {stdlib.TITLE}", f"{name} {fingerprint}", documents)

    return open_python


SOURCES = {
    "python_code": Source("python_code", _open_python("python_code")),
    "python_docs": Source("python_docs", _open_python("python_docs")),
    "files:": Source("files: and a path or glob, as in files:books/*.txt", open_files),
    "tfds:": Source("tfds: and a data set's name, as in tfds:lm1b", open_prepared),
}


def split_source(source: str) -> tuple[str, str]:
    """Return the key of a row of SOURCES and its argument: ``"files:a"`` is ``("files:", "a")``."""
    name, colon, argument = source.partition(":")
    return name + colon, argument
