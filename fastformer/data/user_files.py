"""The user's own files: ``files:path/*.txt``, plain or .gz, UTF-8."""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from fastformer.core.errors import UserError
from fastformer.data.corpus import Corpus
from fastformer.data.splits import HELD_OUT, digest, fraction

FIELD = "config.data.source"


def open_files(pattern: str, root: Path) -> Corpus:
    """Return the corpus of all files that match, a document each; ``**`` matches folders of any depth.

    A file is held out by a hash of its path below the pattern's fixed part, at least one on each
    side. Of a single file the last 5 % is held out. Files of the same text count once.

    Raises:
      UserError: no file matches, all are empty, or one is not UTF-8 (with the offset of the byte).
    """
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in matches if os.path.isfile(path))
    if not paths:
        hint = f"; to read a folder, write files:{pattern.rstrip('/')}/**" if os.path.isdir(pattern) else ""
        raise UserError(f"{FIELD}: no file matches {pattern}{hint}")
    state = hashlib.sha256(b"files")
    names: dict[bytes, str] = {}
    base = _fixed_part(os.path.expanduser(pattern))
    for path in paths:
        text = read(path)
        key = digest(text)
        if text.strip() and key not in names:
            names[key] = os.path.relpath(path, base)
            state.update(names[key].encode("utf-8", "surrogateescape") + b"\0" + key)
    if not names:
        raise UserError(f"{FIELD}: {len(paths)} file(s) match {pattern}, and all are empty")
    kept = list(names.values())
    if len(kept) == 1:
        return _one_file(pattern, os.path.join(base, kept[0]), state.hexdigest())
    heldout = hold_out(kept)

    def documents(split: str) -> Iterator[str]:
        for name in kept:
            if (name in heldout) == (split == "heldout"):
                yield read(os.path.join(base, name))

    return Corpus(f"files:{pattern}, {len(kept)} files", state.hexdigest(), documents)


def _fixed_part(pattern: str) -> str:
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder or "."


def hold_out(names: list[str]) -> set[str]:
    """Return the names to hold out: about HELD_OUT of them, at least one, and never all."""
    ranked = sorted(names, key=lambda name: (fraction(name), name))
    below = sum(fraction(name) < HELD_OUT for name in names)
    return set(ranked[: min(max(below, 1), len(ranked) - 1)])


def _one_file(pattern: str, path: str, fingerprint: str) -> Corpus:
    text = read(path)
    cut = _cut(text)
    if not 0 < cut < len(text):
        raise UserError(f"{FIELD}: {path} is too short to hold a part of it out")

    def documents(split: str) -> Iterator[str]:
        yield text[cut:] if split == "heldout" else text[:cut]

    return Corpus(f"files:{pattern}, one file whose last 5 % is held out", fingerprint, documents)


def _cut(text: str) -> int:
    """Return where the last 5 % starts: after a line break where there is one in the last tenth."""
    middle = int(len(text) * (1 - HELD_OUT))
    after = text.find("\n", middle, len(text) - 1) + 1
    before = text.rfind("\n", int(len(text) * (1 - 2 * HELD_OUT)), middle) + 1
    return after or before or middle


def read(path: str) -> str:
    """Return the text of a file, unpacked when its name ends in .gz.

    Raises:
      UserError: it cannot be read or unpacked, or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{FIELD}: cannot read {path}: {error}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of its unpacked content" if path.endswith(".gz") else ""
        raise UserError(
            f"{FIELD}: {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}{unpacked} "
            f"({error.reason}); convert it, as in iconv -f latin1 -t utf8"
        ) from error
