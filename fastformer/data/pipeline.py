"""A prepared text: batches to train on, held-out batches, and the yardsticks of its held-out bytes."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np

from fastformer.core.errors import UserError, require
from fastformer.data import stream
from fastformer.data.atomic import atomic, make_directory
from fastformer.data.config import DataConfig
from fastformer.data.corpus import LAYOUT, Corpus
from fastformer.data.order import check, endless
from fastformer.data.rows import PADDING, Batch, Rows
from fastformer.data.sources import open_source
from fastformer.data.splits import SPLITS
from fastformer.data.tokenisers import FILE, OF_RUN, BPETokeniser, ByteTokeniser, Tokeniser, load_tokeniser

RECORD = "data.json"  # in a run's workdir


class TextData:
    """The two splits of a text as tokens.

    Attributes:
      tokeniser: of its tokens.
      vocabulary: V, the tokeniser's size.
      description: one line: source, documents, bytes, tokens.
      heldout_bytes: UTF-8 bytes of the held-out documents.
      heldout_targets: tokens predicted in them, ends of documents included.
    """

    def __init__(
        self,
        config: DataConfig,
        tokeniser: Tokeniser,
        streams: dict[str, stream.Stream],
        title: str,
        folder: Path,
    ):
        self.tokeniser, self._folder, self._config = tokeniser, folder, config
        self._train, self._heldout = (streams[split].tokens for split in SPLITS)
        train, heldout = (streams[split].counts for split in SPLITS)
        self.heldout_bytes, self.heldout_targets = heldout.bytes, len(self._heldout) - 1
        self.vocabulary = tokeniser.size
        self.description = (
            f"{title}: {train.documents:,} + {heldout.documents:,} documents, "
            f"{train.bytes:,} + {heldout.bytes:,} bytes, "
            f"{train.tokens:,} + {heldout.tokens:,} tokens (train + held out), "
            f"vocabulary {tokeniser.size} ({config.tokeniser})"
        )

    def train_iterator(
        self, batch: int, seed: int, process_index: int = 0, process_count: int = 1
    ) -> grain.DatasetIterator[Batch]:
        """Return an endless iterator of batches ``[batch / process_count, T]``, in a new order every epoch.

        It is ``order.endless`` over rows.

        Raises:
          UserError: fewer rows than a batch, or a batch that does not split over the processes.
        """
        check(batch, seed, process_count)
        rows = Rows(self._train, self.tokeniser.eod, self._config.length)
        if rows.targets < batch * rows.length:
            raise UserError(
                f"config.data.source: {self._config.source} has {len(self._train):,} tokens to train on, "
                f"fewer than one batch of {batch} rows of {rows.length}; "
                "lower config.train.batch or config.data.length"
            )

        # A batch is cut from the stream at once: much faster than row by row.
        def make(indices: Sequence[int]) -> Batch:
            return self.changed(rows.batch(indices), indices, seed)

        return endless(len(rows), make, batch, seed, process_index, process_count)

    def changed(self, batch: Batch, indices: Sequence[int], seed: int | None) -> Batch:
        """Return the batch of the rows of ``indices`` as the model is to see it.

        Args:
          seed: of training; None for held-out rows.
        """
        return batch

    def heldout_rows(self, overlap: int = 0) -> int:
        """Return the number of held-out rows of which neighbours share ``overlap`` tokens.

        Raises:
          UserError: the overlap is not below the rows' length.
        """
        return len(self._heldout_rows(overlap))

    def heldout_batches(self, batch: int, overlap: int = 0, limit: int = 0) -> Iterator[Batch]:
        """Yield the first ``limit`` held-out rows (0: all) in order, ``[batch, T]``, the last padded."""
        rows, count = self._heldout_rows(overlap), self._limit(limit, overlap)
        for start in range(0, count, batch):
            chosen = range(start, min(start + batch, count))
            indices = [*chosen, *[PADDING] * (batch - len(chosen))]
            yield self.changed(rows.batch(indices), indices, None)

    def heldout_bytes_of(self, limit: int = 0, overlap: int = 0) -> int:
        """Return the bytes of the targets that the first ``limit`` held-out rows (0: all) count."""
        scored = self._heldout_rows(overlap).scored(self._limit(limit, overlap))
        return int(self.tokeniser.byte_lengths[self._heldout[1 : 1 + scored]].sum())

    def heldout_texts(self) -> list[str]:
        """Return the held-out documents."""
        starts = np.flatnonzero(self._heldout == self.tokeniser.eod)
        return [self.tokeniser.decode(part[1:].tolist()) for part in np.split(self._heldout, starts[1:])]

    def yardsticks(self) -> dict[str, float]:
        """Return the bits per byte of gzip -9 and xz -9 on the held-out documents, one after another."""
        path = self._folder / "yardsticks.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text())
        data = self.tokeniser.to_bytes(self._heldout.tolist())
        packed = {"gzip": gzip.compress(data, 9), "xz": lzma.compress(data, preset=9)}
        found = {f"{name}_bits_per_byte": 8 * len(pack) / len(data) for name, pack in packed.items()}
        with atomic(path) as file:
            file.write(json.dumps(found).encode())
        return found

    def _heldout_rows(self, overlap: int) -> Rows:
        length = self._config.length
        allowed = f"from 0 to {length - 1}, below config.data.length"
        require(0 <= overlap < length, "config.evaluate.overlap", overlap, allowed)
        return Rows(self._heldout, self.tokeniser.eod, length, overlap)

    def _limit(self, limit: int, overlap: int) -> int:
        rows = self.heldout_rows(overlap)
        return min(limit, rows) if limit else rows


def open_data(config: DataConfig, workdir: Path | None, of: Callable[..., TextData] = TextData) -> TextData:
    """Prepare the text of ``config``, or find it prepared, and keep tokeniser and record in ``workdir``.

    Args:
      of: what to make of it, a kind of TextData.

    Raises:
      UserError: the source is missing, empty or unreadable, or not what the run in ``workdir`` began with.
    """
    corpus, tokeniser, root = open_corpus(config, "text", workdir)
    folder = make_directory(root / f"tokens-{_key(corpus, tokeniser.fingerprint)}", "config.data.directory")
    streams = stream.load(folder, SPLITS)
    if streams is None:
        streams = stream.store(folder, {split: corpus.documents(split) for split in SPLITS}, tokeniser)
    for split in SPLITS:
        if not streams[split].counts.bytes:
            raise UserError(f"config.data.source: {config.source} has no text in its {split} split")
    return of(config, tokeniser, streams, corpus.title, folder)


def open_corpus(config: DataConfig, kind: str, workdir: Path | None) -> tuple[Corpus, Tokeniser, Path]:
    """Return the corpus of ``config``, the run's tokeniser and the directory of prepared data.

    Args:
      kind: of what the source is to open to, as in SOURCES.

    Raises:
      UserError: as ``open_data`` does.
    """
    root = make_directory(config.root(), "config.data.directory")
    corpus = open_source(config.source, kind, root)
    if workdir is not None:
        keep_record(corpus, workdir)
    return corpus, _tokeniser(config, corpus, root, workdir), root


def _key(corpus: Corpus, *parts: str) -> str:
    return hashlib.sha256("\n".join((str(LAYOUT), corpus.fingerprint, *parts)).encode()).hexdigest()[:24]


def keep_record(corpus: Corpus, workdir: Path) -> None:
    """Write which text the run is on, or check that it still is that one."""
    path = Path(workdir) / RECORD
    record = {"title": corpus.title, "fingerprint": f"{LAYOUT} {corpus.fingerprint}"}
    if not path.exists():
        with atomic(path) as file:
            file.write(json.dumps(record, indent=2).encode())
        return
    try:
        old = json.loads(path.read_text())
        title, fingerprint = old["title"], old["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--workdir: {path}, which says what text the run is on, cannot be read; restore or remove it "
            "(where the text is still the same)"
        ) from error
    if fingerprint != record["fingerprint"]:
        raise UserError(
            f"config.data.source: {corpus.title} is not the text that the run in {workdir} began with "
            f"({title}): it has changed since; choose another workdir"
        )


def _tokeniser(config: DataConfig, corpus: Corpus, root: Path, workdir: Path | None) -> Tokeniser:
    """Return the run's tokeniser: the one in ``workdir``, else the cached one, else a new one."""
    if workdir is not None and (Path(workdir) / FILE).exists():
        return load_tokeniser(workdir)
    tokeniser: Tokeniser = ByteTokeniser()
    if config.tokeniser.startswith(OF_RUN):
        tokeniser = load_tokeniser(Path(config.tokeniser.removeprefix(OF_RUN)))
    if config.tokeniser == "bpe":
        home = root / f"bpe-{_key(corpus, str(config.vocabulary))}"
        try:
            tokeniser = load_tokeniser(home)
        except UserError:
            make_directory(home, "config.data.directory")
            tokeniser = BPETokeniser.train(corpus.documents("train"), config.vocabulary)
            tokeniser.save(home)
    if workdir is not None:
        tokeniser.save(workdir)
    return tokeniser
