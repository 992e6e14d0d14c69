"""Any TFDS data set that stands prepared as array_record: ``tfds:lm1b``."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastformer.core.errors import MALFORMED, UserError
from fastformer.data.corpus import Corpus
from fastformer.data.splits import HELD_OUT, digest

FIELD = "config.data.source"
TEXT_FIELDS = ("text", "article", "content", "document", "story", "context", "sentence")


class Prepared(NamedTuple):
    """A data set that stands prepared.

    Attributes:
      splits: TFDS's names of our two. title: what it is, in a few words. fingerprint: of its files.
    """

    place: Path
    splits: dict[str, str]
    title: str
    fingerprint: str


def find(name: str, root: Path) -> Prepared:
    """Return the data set ``name`` or ``name/config``, to be read without TensorFlow.

    Held out is its split ``validation``, else ``test``, else the last 5 % of ``train``.

    Raises:
      UserError: it is not prepared, not as array_record, or has no split ``train``.
    """
    place = _find(name, root)
    info, sizes = _described(place / "dataset_info.json")
    if info.get("fileFormat") != "array_record":
        stored = info.get("fileFormat") or "tfrecord"
        raise UserError(f"{FIELD}: {place} is stored as {stored}; {_how(name, root)}")
    if not sizes.get("train"):
        raise UserError(f"{FIELD}: {place} has no split train (splits: {', '.join(sizes) or 'none'})")
    splits, held = _splits(sizes)
    state = hashlib.sha256(f"tfds {name}".encode())
    for file in sorted(place.iterdir()):
        state.update(f"{file.name} {file.stat().st_size}\n".encode())
    state.update((place / "dataset_info.json").read_bytes())
    title = f"tfds:{name} {info.get('version', '')} ({held} held out)"
    return Prepared(place, splits, title, state.hexdigest())


def open_prepared(name: str, root: Path) -> Corpus:
    """Return the corpus of a text, as ``find`` has it; documents of train that are held out are left out.

    Raises:
      UserError: it cannot be found, or has no text.
    """
    found = find(name, root)
    field = _text_field(found.place)

    def texts(split: str) -> Iterator[str]:
        from fastformer.data import builders  # TFDS takes a second to import; a warm cache needs none

        return builders.texts(found.place, found.splits[split], field)

    def documents(split: str) -> Iterator[str]:
        known = {digest(text) for text in texts("heldout")} if split == "train" else set()
        return (text for text in texts(split) if text and digest(text) not in known)

    return Corpus(found.title, f"{field} {found.fingerprint}", documents)


def _described(file: Path) -> tuple[dict, dict[str, int]]:
    """Return what TFDS wrote about a data set, and the number of examples of its splits."""
    try:
        info = json.loads(file.read_text())
        splits = info.get("splits", [])
        return info, {split["name"]: sum(map(int, split.get("shardLengths", []))) for split in splits}
    except (OSError, *MALFORMED) as error:
        reason = f"{type(error).__name__}: {error}"[:100]
        raise UserError(f"{FIELD}: {file} is not as TFDS writes it ({reason}); prepare it anew") from error


def _splits(sizes: dict[str, int]) -> tuple[dict[str, str], str]:
    """Return TFDS's names of our two splits, and what is held out in words."""
    for split in ("validation", "test"):
        if sizes.get(split):
            return {"train": "train", "heldout": split}, f"split {split}"
    cut = int(sizes["train"] * (1 - HELD_OUT))
    return {"train": f"train[:{cut}]", "heldout": f"train[{cut}:]"}, "the last 5 % of train"


def _find(name: str, root: Path) -> Path:
    """Return the folder of the newest prepared version of ``name``."""
    homes = [root, Path("~/tensorflow_datasets").expanduser()]
    if os.environ.get("TFDS_DATA_DIR"):
        homes.append(Path(os.environ["TFDS_DATA_DIR"]).expanduser())
    for home in homes:
        for depth in ("*", "*/*"):
            found = [file.parent for file in (home / name).glob(f"{depth}/dataset_info.json")]
            configs = sorted({place.parent.name for place in found})
            if depth == "*/*" and len(configs) > 1:
                known = ", ".join(f"tfds:{name}/{config}" for config in configs)
                raise UserError(f"{FIELD}: tfds:{name} is prepared in several configs; choose one of {known}")
            if found:
                return max(found, key=_version)
    places = " or ".join(map(str, homes))
    raise UserError(f"{FIELD}: tfds:{name} is not prepared in {places}; {_how(name, root)}")


def _version(place: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in place.name.split(".") if part.isdigit())


def _how(name: str, root: Path) -> str:
    return (
        "prepare it once, where TensorFlow may be installed: pip install tensorflow tensorflow-datasets && "
        f"tfds build {name} --file_format=array_record --data_dir={root}"
    )


def _text_field(place: Path) -> str:
    from fastformer.data import builders

    features = builders.features(place, "Text")
    if not features:
        raise UserError(f"{FIELD}: {place} has no feature that is plain text")
    return next((field for field in TEXT_FIELDS if field in features), features[0])
