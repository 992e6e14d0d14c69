"""TFDS builders of the running Python's own text, prepared as array_record and read without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from fastformer.core.errors import UserError
from fastformer.data import stdlib
from fastformer.data.splits import SPLITS, split_of


class _RunningPython(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Documents with a path and a text; a document's path decides its split."""

    VERSION = tfds.core.Version(stdlib.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        # dataset_info_from_configs would list this package's folder.
        features = tfds.features.FeaturesDict({"path": tfds.features.Text(), "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterable]:
        splits: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
        for path, text in self.documents():
            splits[split_of(path)].append((path, text))
        return {split: self._generate_examples(documents) for split, documents in splits.items()}

    def _generate_examples(self, documents: list[tuple[str, str]]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, (path, text) in enumerate(documents):
            yield key, {"path": path, "text": text.encode("utf-8", "replace").decode()}


class PythonCode(_RunningPython):
    """The standard library's sources without its tests."""

    documents = staticmethod(stdlib.code)


class PythonDocs(_RunningPython):
    """The topics of ``help()`` and the standard library's docstrings."""

    documents = staticmethod(stdlib.docs)


BUILDERS = {"python_code": PythonCode, "python_docs": PythonDocs}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, TFDS neither logs, prints nor draws progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def prepare(name: str, directory: Path) -> Path:
    """Return where the data set ``name`` stands below ``directory``; build it when it is not there yet."""
    place = directory / name / stdlib.VERSION
    if place.is_dir():
        return place
    building = tempfile.mkdtemp(prefix=".building-", dir=directory.parent)
    try:
        with quiet():
            BUILDERS[name](data_dir=building, file_format="array_record").download_and_prepare()
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(Path(building, name, stdlib.VERSION), place)
        except OSError:
            # Of two processes that build at once the second finds the place taken, by the same text.
            if not place.is_dir():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return place


@contextlib.contextmanager
def _read(place: Path) -> Iterator[tfds.core.DatasetBuilder]:
    """Yield the builder of a prepared data set; whatever TFDS raises within is told as one line."""
    try:
        with quiet():
            yield tfds.builder_from_directory(place)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"config.data.source: {place} is not as TFDS writes it ({reason}); prepare it anew"
        ) from error


def examples(place: Path, split: str) -> Iterator[dict[str, Any]]:
    """Yield every example of a prepared data set's split (TFDS syntax, ``train[:95%]`` too)."""
    with _read(place) as builder:
        source = builder.as_data_source(split=split)
    for index in range(len(source)):
        yield source[index]


def texts(place: Path, split: str, field: str = "text") -> Iterator[str]:
    """Yield ``field`` of every example of a prepared data set's split."""
    return (example[field].decode("utf-8", "replace") for example in examples(place, split))


def features(place: Path, kind: str) -> list[str]:
    """Return the names of the features of a prepared data set that are a ``kind``, as in tfds.features."""
    with _read(place) as builder:
        found = dict(builder.info.features)
    return [name for name, feature in found.items() if type(feature) is getattr(tfds.features, kind)]
