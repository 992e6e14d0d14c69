"""Rows of T tokens cut from a stream, with segments and positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Batch = dict[str, np.ndarray]

PADDING = -1  # the index of a row that holds nothing


class Rows:
    """Row i holds T tokens of ``stream[i (T - overlap) :]``, and the token after each as its target.

    Every token of the stream but the very first is a target; with an overlap, the first ``overlap``
    targets of a row were targets of the row before and weigh 0, so that each is counted once.
    """

    def __init__(self, stream: np.ndarray, eod: int, length: int, overlap: int = 0):
        self.stream, self.eod, self.length, self.overlap = stream, eod, length, overlap
        self.stride = length - overlap
        self.targets = max(len(stream) - 1, 0)

    def __len__(self) -> int:
        return -(-max(self.targets - self.overlap, 0) // self.stride) or int(self.targets > 0)

    def scored(self, limit: int) -> int:
        """Return how many targets the first ``limit`` rows count; they are the stream's first but one."""
        return min(self.overlap + limit * self.stride, self.targets)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the rows of ``indices``, one below another; PADDING gives one of nothing but padding.

        ``tokens_BT``, ``targets_BT``, ``segment_BT`` and ``position_BT`` are int32, ``weights_BT`` is
        float32. Segments are numbered from 1 in each row and change at each end-of-document token,
        which starts a document and is the target of the last token before it. Padding is all 0.
        """
        row_B1 = np.asarray(indices, np.int64)[:, None]
        time_1T = np.arange(self.length, dtype=np.int32)[None]
        place_BT = row_B1 * self.stride + time_1T
        real_BT = (place_BT < self.targets) & (row_B1 != PADDING)
        place_BT = np.where(real_BT, place_BT, 0)
        tokens_BT = self.stream[place_BT].astype(np.int32) * real_BT
        counts_BT = real_BT & ((row_B1 == 0) | (time_1T >= self.overlap))
        return {
            "tokens_BT": tokens_BT,
            "targets_BT": self.stream[place_BT + 1].astype(np.int32) * real_BT,
            "weights_BT": counts_BT.astype(np.float32),
        } | segments(tokens_BT, real_BT, self.eod)


def segments(tokens_BT: np.ndarray, real_BT: np.ndarray, eod: int) -> Batch:
    """Return ``segment_BT`` and ``position_BT``, as ``Rows.batch`` has them.

    Args:
      real_BT: False where there is padding.
    """
    time_1T = np.arange(tokens_BT.shape[1], dtype=np.int32)[None]
    starts_BT = (tokens_BT == eod) & real_BT
    segment_BT = np.cumsum(starts_BT, axis=1, dtype=np.int32)
    start_BT = np.maximum.accumulate(np.where(starts_BT, time_1T, 0), axis=1)
    return {
        "segment_BT": (segment_BT + 1 - segment_BT[:, :1]) * real_BT,
        "position_BT": (time_1T - start_BT) * real_BT,
    }
