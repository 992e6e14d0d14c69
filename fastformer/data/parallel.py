"""Sentences with their translations: their splits, and the catalogues that programs bring along."""

from __future__ import annotations

import glob
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastformer.core.errors import UserError
from fastformer.data.corpus import Corpus
from fastformer.data.splits import split_of
from fastformer.data.user_files import hold_out

FIELD = "config.data.source"
Pair = tuple[str, str]


class Record(NamedTuple):
    """A pair and the file that it stands in."""

    file: str
    source: str
    target: str


def corpus_of(
    title: str, fingerprint: str, records: Iterable[Record], heldout: set[str] | None = None
) -> Corpus:
    """Return the corpus of pairs, in which no sentence of train stands in the held-out split.

    Args:
      heldout: names of the files held out; None is decided by their names.

    Raises:
      UserError: one of the splits has no pair.
    """
    found = split_pairs(records, heldout)
    for split, pairs in found.items():
        if not pairs:
            raise UserError(f"{FIELD}: {title} has no pair in its {split} split")

    def documents(split: str) -> Iterator[str]:
        return (text for pair in found[split] for text in pair)

    return Corpus(title, f"apart {fingerprint}", documents, lambda split: iter(found[split]))


def split_pairs(records: Iterable[Record], heldout: set[str] | None = None) -> dict[str, list[Pair]]:
    """Return the pairs of each split: by file, each source once, and none of a sentence in both.

    A pair whose sides are the same, or one of them empty, is left out.
    """
    kept: dict[str, dict[str, str]] = {"train": {}, "heldout": {}}
    for file, source, target in records:
        split = split_of(file) if heldout is None else ("heldout" if file in heldout else "train")
        if source and target and source != target:
            kept[split].setdefault(source, target)
    known = {*kept["heldout"], *kept["heldout"].values()}
    found = {split: list(pairs.items()) for split, pairs in kept.items()}
    return found | {"train": [pair for pair in found["train"] if known.isdisjoint(pair)]}


def open_catalogues(pattern: str, root: Path) -> Corpus:
    """Return the corpus of pairs (message, translation) of all gettext catalogues (.mo) that match.

    Raises:
      UserError: fewer than two match, or one cannot be read.
    """
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.expanduser(pattern), recursive=True)))
    if len(paths) < 2:
        raise UserError(f"{FIELD}: {len(paths)} catalogue(s) match {pattern}; 2 or more are needed, to split")
    state = hashlib.sha256()
    records = []
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{FIELD}: {path} cannot be read: {error.strerror}") from error
        state.update(data)
        records += [Record(path, *pair) for pair in read_catalogue(data, path)]
    base = os.path.commonpath(paths)
    names = {path: os.path.relpath(path, base) for path in paths}
    chosen = hold_out(list(names.values()))
    heldout = {path for path, name in names.items() if name in chosen}
    return corpus_of(f"gettext:{pattern}, {len(paths)} catalogues", state.hexdigest(), records, heldout)


def read_catalogue(data: bytes, path: str) -> Iterator[Pair]:
    """Yield the singular messages of a .mo file and their translations, without the header.

    Raises:
      UserError: it is no catalogue in UTF-8.
    """
    try:
        order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}[data[:4]]
        count, sources, targets = struct.unpack_from(f"{order}3I", data, 8)
        for index in range(count):
            pair = []
            for table in (sources, targets):
                size, place = struct.unpack_from(f"{order}2I", data, table + 8 * index)
                if place + size > len(data):
                    raise struct.error("cut off")
                pair.append(data[place : place + size].decode("utf-8"))
            message = pair[0].rpartition("\x04")[2]  # what stands before is its context
            if message and "\0" not in message:
                yield message, pair[1]
    except (KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{FIELD}: {path} is no gettext catalogue (.mo) in UTF-8") from error
