"""Text whose rows are changed by chance on their way to the model: tokens hidden, holes to fill in.

Each row has a random generator of its own. In training it depends on the batch too, and so is another
one in every epoch; no state of it needs to be kept for a run to go on as if it had not stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastformer.data.pipeline import TextData
from fastformer.data.rows import Batch, segments

MASK, PREFIX, SUFFIX, MIDDLE = range(4)  # numbers of the tokeniser's marks
MARKS = 3  # written around prefix, suffix and middle
MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens: written as the mark, as any token; the rest as they are


def generators(*seeds: int, indices: Sequence[int]) -> list[np.random.Generator]:
    """Return a random generator for each row; padding, whose index is -1, has one too."""
    return [np.random.default_rng([*seeds, int(index) + 1]) for index in indices]


def _of_batch(seed: int, indices: Sequence[int]) -> list[np.random.Generator]:
    return generators(seed, int(indices[0]), int(indices[-1]), indices=indices)


class MaskedText(TextData):
    """Some tokens of every row are hidden, as BERT does (Devlin et al. 2018, 1810.04805, section 3.1).

    Held-out rows hide the same tokens in every evaluation.
    """

    def __init__(self, *text, chosen: float):
        super().__init__(*text)
        self._chosen = chosen

    def changed(self, batch, indices, seed):
        rngs = generators(0, indices=indices) if seed is None else _of_batch(seed, indices)
        return self._hidden(batch, rngs)

    def _hidden(self, batch: Batch, rngs: Sequence[np.random.Generator]) -> Batch:
        tokens_BT = batch["tokens_BT"]
        fate_2BT = np.stack([rng.random((2, tokens_BT.shape[1])) for rng in rngs], axis=1)
        any_BT = np.stack([rng.integers(self.tokeniser.size - 1, size=tokens_BT.shape[1]) for rng in rngs])
        chosen_BT = (fate_2BT[0] < self._chosen) & (batch["segment_BT"] > 0)
        chosen_BT &= tokens_BT != self.tokeniser.eod
        how_BT = fate_2BT[1]
        kept_BT = np.where(how_BT < MASKED + RANDOM, any_BT, tokens_BT)
        hidden_BT = np.where(how_BT < MASKED, self.tokeniser.mark(MASK), kept_BT)
        return batch | {
            "tokens_BT": np.where(chosen_BT, hidden_BT, tokens_BT).astype(np.int32),
            "targets_BT": tokens_BT,
            "weights_BT": chosen_BT * batch["weights_BT"],
        }

    def yardsticks(self) -> dict[str, float]:
        """Return the accuracy of always guessing the commonest of the held-out tokens."""
        counts = np.bincount(self._heldout[self._heldout != self.tokeniser.eod])
        return {"commonest_token_accuracy": float(counts.max() / counts.sum())}


class InfilledText(TextData):
    """Some documents to train on have a middle part last (Bavarian et al. 2022, 2207.14255).

    ``prefix suffix middle``, each behind its mark, cut between tokens within what a row holds of a
    document, and the end of a document behind it (section 3 there); what is held out stays as it is.
    """

    def __init__(self, *text, fraction: float):
        super().__init__(*text)
        self._fraction = fraction

    def changed(self, batch, indices, seed):
        if seed is None:
            return batch
        rows = [self._infilled(*row) for row in zip(*self._parts(batch), _of_batch(seed, indices))]
        tokens_BT, targets_BT = (np.stack(part).astype(np.int32) for part in zip(*rows))
        real_BT = batch["segment_BT"] > 0
        described = segments(tokens_BT, real_BT, self.tokeniser.eod)
        return batch | {"tokens_BT": tokens_BT, "targets_BT": targets_BT} | described

    def _parts(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return batch["tokens_BT"], batch["targets_BT"], np.sum(batch["segment_BT"] > 0, axis=1)

    def _infilled(self, tokens_T, targets_T, size: int, rng) -> tuple[np.ndarray, np.ndarray]:
        whole = [*tokens_T[:size].tolist(), int(targets_T[size - 1])]
        new = infilled(whole, self.tokeniser, self._fraction, rng)
        tokens_T, targets_T = tokens_T.copy(), targets_T.copy()
        tokens_T[:size], targets_T[:size] = new[:-1], new[1:]
        return tokens_T, targets_T


def infilled(tokens: Sequence[int], tokeniser, fraction: float, rng: np.random.Generator) -> list[int]:
    """Return as many tokens, of which a ``fraction`` of the documents has its middle last, with an end.

    The marks, and the end of a document that went on in the next row, take the place of the last tokens.
    """
    starts = [place for place, token in enumerate(tokens) if token == tokeniser.eod]
    found: list[int] = []
    for first, after in zip([0, *starts], [*starts, len(tokens)]):
        piece = list(tokens[first:after])
        end = piece[:1] if piece[:1] == [tokeniser.eod] else []
        text = piece[len(end) :]
        fits = len(tokens) - len(found) - len(end) - MARKS - 1
        if min(len(text), fits) > 2 and rng.random() < fraction:
            text = text[:fits]
            a, b = sorted(rng.integers(len(text) + 1, size=2).tolist())
            text = [*asked(text[:a], text[b:], tokeniser), *text[a:b]]
            if after == len(tokens) or len(text) == fits + MARKS:
                text.append(tokeniser.eod)
        found += end + text
    return found[: len(tokens)]


def asked(prefix: Sequence[int], suffix: Sequence[int], tokeniser) -> list[int]:
    """Return what comes before a middle part that is to be filled in."""
    marks = (tokeniser.mark(number) for number in (PREFIX, SUFFIX, MIDDLE))
    first, second, third = marks
    return [first, *prefix, second, *suffix, third]
