"""A split as one flat array of tokens on disk, in a cache that is never half written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastformer.data.atomic import atomic
from fastformer.data.tokenisers import Tokeniser

INDEX = "index.json"
BLOCK_CHARACTERS = 2**20  # about as many are tokenised at once, on all cores


@dataclass(frozen=True)
class Counts:
    """What a stream was made from: documents, their UTF-8 bytes, and the tokens of the stream."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class Stream:
    """The documents of a split one after another, each as ``[eod] + tokens``.

    Attributes:
      tokens: uint16 or uint32, memory-mapped.
      counts: what it was made from.
    """

    tokens: np.ndarray
    counts: Counts


def write(path: Path, documents: Iterable[str], tokeniser: Tokeniser) -> Counts:
    """Write the stream of ``documents`` to an .npy file, a block of them in memory at a time."""
    dtype = np.dtype(np.uint16 if tokeniser.size <= 2**16 else np.uint32)
    number = size = length = 0
    with atomic(path) as file:
        _header(file, dtype, 0)
        start = file.tell()
        for texts in _blocks(documents):
            for encoded in tokeniser.encode_all(texts):
                tokens = np.array([tokeniser.eod, *encoded], dtype)
                file.write(tokens.tobytes())
                number, length = number + 1, length + len(tokens)
                size += int(tokeniser.byte_lengths[tokens].sum())
        file.seek(0)
        _header(file, dtype, length)
        if file.tell() != start:  # numpy pads the header so that the length may grow in place
            raise RuntimeError(f"numpy wrote a header of {file.tell()} bytes over one of {start}")
    return Counts(number, size, length)


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    characters = 0
    for text in documents:
        block.append(text)
        characters += len(text)
        if characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _header(file: Any, dtype: np.dtype, length: int) -> None:
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, fields)


def load(folder: Path, splits: Iterable[str]) -> dict[str, Stream] | None:
    """Return the streams kept in ``folder``, or None when one is missing or not of the length it had."""
    try:
        index = json.loads((folder / INDEX).read_text())
        streams = {}
        for split in splits:
            found = Stream(np.load(folder / f"{split}.npy", mmap_mode="r"), Counts(**index[split]))
            if len(found.tokens) != found.counts.tokens:
                return None
            streams[split] = found
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    return streams


def store(folder: Path, splits: dict[str, Iterable[str]], tokeniser: Tokeniser) -> dict[str, Stream]:
    """Write the streams of ``splits`` to ``folder`` and return them.

    The index comes last and is what makes the folder valid. Two processes that write at once write
    the same bytes, and each file takes its place at once, so neither harms the other.
    """
    index = {}
    for split, documents in splits.items():
        index[split] = asdict(write(folder / f"{split}.npy", documents, tokeniser))
    with atomic(folder / INDEX) as file:
        file.write(json.dumps(index).encode())
    streams = load(folder, splits)
    if streams is None:
        raise OSError(f"{folder}: what was just written there cannot be read back")
    return streams
