"""Pairs of sentences in rows: packed, so that none of a row is wasted on padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fastformer.data.corpus import Corpus
from fastformer.data.examples import Examples, Row
from fastformer.data.parallel import Pair
from fastformer.data.splits import SPLITS
from fastformer.data.tokenisers import Tokeniser

Tokens = list[int]


class PairRows(Examples):
    """Rows of several pairs each; every pair is a segment.

    A source is written as a document with its end, ``eod s1 … sn eod``. With ``joined``, what follows
    in the same segment is the target, ``t1 … tm eod``, whose tokens alone count, and ``last_BT`` is the
    position of the last token that each may see where sources see all of themselves. Else sources and
    targets stand in rows of their own (``source_tokens_BS`` …), the target as ``eod t1 … tm``.

    Attributes:
      texts: the held-out pairs, all of them.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokeniser: Tokeniser,
        length: int,
        joined: bool,
        yardsticks: Mapping[str, float],
    ):
        self.texts: list[Pair] = list(corpus.records("heldout"))
        packed, left_out, pairs, used = {}, {}, {}, {}
        for split in SPLITS:
            tokens = [_ends(pair, tokeniser.eod) for pair in _encoded(corpus.records(split), tokeniser)]
            fit = [pair for pair in tokens if _size(pair, joined) <= length]
            sizes = [_sizes(pair, joined) for pair in fit]
            packed[split] = pack(sizes, length)
            used[split] = sum(map(sum, sizes)) / max(len(packed[split]) * length * (1 if joined else 2), 1)
            pairs[split], left_out[split] = fit, len(tokens) - len(fit)

        def row(split: str, index: int) -> Row:
            chosen = [pairs[split][number] for number in packed[split][index]]
            return joined_row(chosen, length) if joined else parted_row(chosen, length)

        counts = {split: len(packed[split]) for split in SPLITS}
        super().__init__(corpus.title, counts, row, tokeniser.size, tokeniser, yardsticks)
        numbers = " + ".join(f"{len(pairs[split]):,}" for split in SPLITS)
        too_long = " + ".join(str(left_out[split]) for split in SPLITS)
        padding = " + ".join(f"{100 * (1 - used[split]):.1f}" for split in SPLITS)
        self.description += (
            f", {numbers} pairs; {too_long} are longer than a row and in none; {padding} % padding"
        )


def _encoded(pairs: Iterable[Pair], tokeniser: Tokeniser) -> Iterable[tuple[Tokens, Tokens]]:
    sides = list(zip(*pairs)) or [(), ()]
    return zip(*(tokeniser.encode_all(side) for side in sides))


def _ends(pair: tuple[Tokens, Tokens], eod: int) -> tuple[Tokens, Tokens]:
    """Return the source between two ends, and the target between two ends."""
    return [eod, *pair[0], eod], [eod, *pair[1], eod]


def _sizes(pair: tuple[Tokens, Tokens], joined: bool) -> tuple[int, ...]:
    """Return the tokens that a pair takes in each row: the last token of a target is only ever predicted."""
    source, target = map(len, pair)
    return (source + target - 2,) if joined else (source, target - 1)


def _size(pair: tuple[Tokens, Tokens], joined: bool) -> int:
    return max(_sizes(pair, joined))


def pack(sizes: Sequence[tuple[int, ...]], length: int) -> list[list[int]]:
    """Return rows of indices, in order, each as full as ``length`` allows in every part of it."""
    rows: list[list[int]] = []
    used: tuple[int, ...] = ()
    for index, size in enumerate(sizes):
        grown = tuple(a + b for a, b in zip(used, size))
        if rows and max(grown) <= length:
            rows[-1].append(index)
            used = grown
        else:
            rows.append([index])
            used = size
    return rows


def parted_row(pairs: Sequence[tuple[Tokens, Tokens]], length: int) -> Row:
    """Return sources and targets in rows of their own, the segment of a pair the same in both."""
    sources = _row([source for source, _ in pairs], length)
    targets = _row([target[:-1] for _, target in pairs], length)
    row = {f"{name}_T": x for name, x in targets.items()}
    row |= {f"source_{name}_S": x for name, x in sources.items()}
    after = _row([target[1:] for _, target in pairs], length)["tokens"]
    return row | {"targets_T": after, "weights_T": (targets["segment"] > 0).astype(np.float32)}


def joined_row(pairs: Sequence[tuple[Tokens, Tokens]], length: int) -> Row:
    """Return each source with its target behind it; a token counts when the next is the target's."""
    whole = [source + target[1:] for source, target in pairs]
    row = {f"{name}_T": x for name, x in _row([tokens[:-1] for tokens in whole], length).items()}
    ends = [len(source) for source, _ in pairs]
    seen = [[end - 1] * end + [*range(end, len(tokens) - 1)] for end, tokens in zip(ends, whole)]
    row["last_T"] = _row(seen, length)["tokens"]
    counts = [[0] * (len(source) - 1) + [1] * (len(target) - 1) for source, target in pairs]
    after = _row([tokens[1:] for tokens in whole], length)["tokens"]
    return row | {"targets_T": after, "weights_T": _row(counts, length)["tokens"].astype(np.float32)}


def _row(parts: Sequence[Sequence[int]], length: int) -> dict[str, np.ndarray]:
    """Return tokens, segments from 1 and positions from 0 of parts side by side, padded with 0."""
    found = {name: np.zeros(length, np.int32) for name in ("tokens", "segment", "position")}
    place = 0
    for number, part in enumerate(parts, start=1):
        here = slice(place, place + len(part))
        found["tokens"][here], found["segment"][here] = part, number
        found["position"][here] = np.arange(len(part))
        place += len(part)
    return found
