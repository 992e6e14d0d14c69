"""Tokens and rows: nothing lost, every token counted once, the iterator exact, the cache never half."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from data_tools import make, message, write_books

from fastformer.core.errors import UserError
from fastformer.data import load_tokeniser, open_data, stdlib, stream, user_files
from fastformer.data.atomic import atomic
from fastformer.data.order import endless
from fastformer.data.rows import PADDING, Rows
from fastformer.data.tokenisers import BPETokeniser, ByteTokeniser

EOD = 256
NASTY = "a\tb  \n\n    def f(x):\r\n\treturn 3.14  # äöü 日本語 🙂\u200d\x00 <|eod|> \ufeff e\u0301 'it''s'\n"


@pytest.fixture
def books(tmp_path):
    return write_books(tmp_path / "books")


# Tokenisers ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bpe():
    texts = [text for name, text in stdlib.module_texts() if name.startswith("json/")]
    return BPETokeniser.train(texts, 600)


def test_bytes_are_bytes():
    tokeniser = ByteTokeniser()
    assert (tokeniser.size, tokeniser.eod) == (257, 256)
    assert tokeniser.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokeniser.decode([0xC3, 256, 0xA9, 0xFF]) == "é\ufffd"
    assert tokeniser.encode("\udcff") == [ord("?")]


def test_bpe_round_trips_any_text(rng, bpe):
    assert bpe.size == 600 and bpe.eod == 599
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    noise = "".join(map(chr, rng.integers(1, 0xD800, 2000)))
    for text in ("", NASTY, everything, noise, NASTY * 40000):
        tokens = bpe.encode(text)
        assert bpe.decode(tokens) == text
        assert bpe.eod not in tokens
        assert bpe.byte_lengths[tokens].sum() == len(text.encode())
    assert bpe.encode_all(["a b", "", NASTY]) == [bpe.encode("a b"), [], bpe.encode(NASTY)]


def test_bpe_joins_line_breaks_and_indents_and_keeps_digits_apart(bpe):
    assert len(bpe.encode("\n        ")) == 1
    assert len(bpe.encode("1234567890")) == 10
    assert not [token for token in bpe.token_bytes if sum(byte in b"0123456789" for byte in token) > 1]


def test_bpe_is_kept_with_the_run_and_trained_on_train_only(books, tmp_path):
    config = make(f"files:{books}/*.txt", tmp_path / "cache", "bpe", 400)
    workdir = tmp_path / "run"
    workdir.mkdir()
    data = open_data(config, workdir)
    kept = load_tokeniser(workdir)
    assert kept.fingerprint == data.tokeniser.fingerprint
    assert kept.encode(NASTY) == data.tokeniser.encode(NASTY)
    corpus = user_files.open_files(f"{books}/*.txt", tmp_path)
    assert BPETokeniser.train(corpus.documents("train"), 400).fingerprint == kept.fingerprint
    # The run's own tokeniser is used, whatever else is trained since.
    other = BPETokeniser.train(["other words " * 50], 280)
    other.save(workdir)
    assert open_data(config, workdir).tokeniser.fingerprint == other.fingerprint


def test_no_or_damaged_tokeniser_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="holds no tokeniser.json"):
        load_tokeniser(tmp_path)
    (tmp_path / "tokeniser.json").write_text('{"name": "bpe", "model": "{"}')
    with pytest.raises(UserError, match="cannot be read") as excinfo:
        load_tokeniser(tmp_path)
    message(excinfo)


# Rows ----------------------------------------------------------------------------------------


def toy_stream(lengths, seed=0):
    rng = np.random.default_rng(seed)
    parts = [np.concatenate([[EOD], rng.integers(0, 256, length)]) for length in lengths]
    return np.concatenate(parts).astype(np.uint16)


def one_row(rows, index):
    batch = rows.batch([index, PADDING])
    assert not any(array[1].any() for array in batch.values())
    return {name: array[0] for name, array in batch.items()}


@pytest.mark.parametrize("lengths", [[1], [7], [8], [15], [16], [3, 0, 9, 30, 1], [40, 1, 1, 1, 25]])
@pytest.mark.parametrize("length, overlap", [(8, 0), (8, 3), (8, 7), (1, 0), (5, 4), (64, 20)])
def test_every_token_but_the_first_is_a_counted_target_once(lengths, length, overlap):
    tokens = toy_stream(lengths)
    rows = Rows(tokens, EOD, length, overlap)
    counted = []
    for index in range(len(rows)):
        row = one_row(rows, index)
        assert all(array.shape == (length,) for array in row.values())
        start = index * (length - overlap)
        real = row["segment_BT"] > 0
        np.testing.assert_array_equal(row["tokens_BT"][real], tokens[start : start + length][: real.sum()])
        np.testing.assert_array_equal(row["targets_BT"][real], tokens[start + 1 : start + 1 + real.sum()])
        assert not row["weights_BT"][~real].any()
        counted += [start + 1 + place for place in np.flatnonzero(row["weights_BT"])]
        assert len(counted) == rows.scored(index + 1)
    assert counted == list(range(1, len(tokens)))


@pytest.mark.parametrize("overlap", [0, 5])
def test_segments_and_positions_restart_at_each_document(overlap):
    rows = Rows(toy_stream([3, 0, 9, 30, 1]), EOD, 16, overlap)
    for index in range(len(rows)):
        row = one_row(rows, index)
        segment = position = 0
        for place, token in enumerate(row["tokens_BT"]):
            if row["segment_BT"][place] == 0:
                assert (row["segment_BT"][place:] == 0).all()
                break
            fresh = place == 0 or token == EOD
            segment, position = (segment + 1, 0) if fresh else (segment, position + 1)
            assert (row["segment_BT"][place], row["position_BT"][place]) == (segment, position)


def test_types_of_a_batch(books, tmp_path):
    data = open_data(make(f"files:{books}/*.txt", tmp_path / "cache"), None)
    for batch in (next(data.train_iterator(4, 0)), next(data.heldout_batches(4))):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            "tokens_BT": ((4, 64), "int32"),
            "targets_BT": ((4, 64), "int32"),
            "weights_BT": ((4, 64), "float32"),
            "segment_BT": ((4, 64), "int32"),
            "position_BT": ((4, 64), "int32"),
        }


# Training's iterator -------------------------------------------------------------------------


@pytest.fixture
def text(books, tmp_path):
    return open_data(make(f"files:{books}/*.txt", tmp_path / "cache"), None)


def keys(batches):
    return [row.tobytes() for batch in batches for row in batch["targets_BT"]]


def test_state_resumes_exactly(text):
    iterator = text.train_iterator(8, seed=3)
    for _ in range(57):  # beyond one epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert len(json.dumps(state)) < 200
    expected = [next(iterator) for _ in range(60)]
    fresh = text.train_iterator(8, seed=3)
    next(fresh)
    fresh.set_state(state)
    for batch in expected:
        for name, array in next(fresh).items():
            np.testing.assert_array_equal(array, batch[name])


def test_two_processes_share_an_epoch_exactly(text):
    rows = Rows(text._train, EOD, 64)
    steps = len(rows) // 8
    alone = text.train_iterator(8, seed=1)
    parts = [text.train_iterator(8, 1, index, 2) for index in range(2)]
    epochs = []
    for _ in range(2):
        seen = []
        for _ in range(steps):
            together = keys(next(part) for part in parts)
            assert sorted(together) == sorted(keys([next(alone)]))
            seen += together
        counts = Counter(seen)
        every = Counter(keys([rows.batch(range(len(rows)))]))
        assert not counts - every and sum(counts.values()) == steps * 8
        epochs.append(seen)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_row_is_read_once_an_epoch_by_one_process_even_after_a_restart(processes):
    """They may go on from the state of another number of processes."""

    def start(index, count):
        return endless(24, lambda indices: {"row": np.asarray(indices)}, 8, 0, index, count)

    alone = start(0, 1)
    seen = [next(alone)["row"].tolist()]
    parts = [start(index, processes) for index in range(processes)]
    for part in parts:
        part.set_state(alone.get_state())
    for _ in range(5):
        rows = [next(part)["row"].tolist() for part in parts]
        assert all(len(mine) == 8 // processes for mine in rows)
        seen.append(sum(rows, []))
    epochs = [sorted(sum(seen[start : start + 3], [])) for start in (0, 3)]
    assert epochs == [list(range(24))] * 2 and seen[:3] != seen[3:]


def test_seeds_give_orders_that_share_no_epoch(text):
    steps = len(Rows(text._train, EOD, 64)) // 8
    zero, one = text.train_iterator(8, 0), text.train_iterator(8, 1)
    zeroth = [keys([next(zero)]) for _ in range(2 * steps)]
    first = [keys([next(one)]) for _ in range(steps)]
    assert first != zeroth[:steps] and first != zeroth[steps:]


@pytest.mark.parametrize(
    "batch, processes, expected", [(2000, 1, "fewer than one batch"), (3, 2, "splits over 2")]
)
def test_batches_that_cannot_be(batch, processes, expected, text):
    with pytest.raises(UserError, match=expected) as excinfo:
        text.train_iterator(batch, 0, 0, processes)
    message(excinfo)


# Held out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 20])
def test_held_out_batches_score_each_target_once(overlap, text, books, tmp_path):
    batches = list(text.heldout_batches(7, overlap))
    assert len(batches) == -(-text.heldout_rows(overlap) // 7)
    assert {batch["tokens_BT"].shape for batch in batches} == {(7, 64)}
    scored = np.concatenate([batch["targets_BT"][batch["weights_BT"] > 0] for batch in batches])
    assert len(scored) == text.heldout_targets
    documents = list(user_files.open_files(f"{books}/*.txt", tmp_path).documents("heldout"))
    assert bytes(scored[scored != EOD].astype(np.uint8)) == "".join(documents).encode()
    assert text.heldout_bytes == text.heldout_bytes_of(0, overlap) == len("".join(documents).encode())


@pytest.mark.parametrize("overlap, limit", [(0, 1), (0, 5), (20, 1), (20, 5), (20, 10**6)])
@pytest.mark.parametrize("tokeniser", ["bytes", "bpe"])
def test_bytes_of_a_part_are_those_of_its_scored_targets(tokeniser, overlap, limit, books, tmp_path):
    data = open_data(make(f"files:{books}/*.txt", tmp_path / "cache", tokeniser), None)
    batches = list(data.heldout_batches(4, overlap, limit))
    scored = np.concatenate([batch["targets_BT"][batch["weights_BT"] > 0] for batch in batches])
    assert data.heldout_bytes_of(limit, overlap) == len(data.tokeniser.to_bytes(scored.tolist()))
    assert sum(bool(row.any()) for batch in batches for row in batch["segment_BT"]) == min(
        limit, data.heldout_rows(overlap)
    )


def test_overlap_of_a_whole_row_is_a_users_mistake(text):
    with pytest.raises(UserError, match="config.evaluate.overlap: 64") as excinfo:
        text.heldout_rows(64)
    message(excinfo)


def test_yardsticks_are_of_the_held_out_bytes(books, tmp_path):
    raw = "".join(user_files.open_files(f"{books}/*.txt", tmp_path).documents("heldout")).encode()
    for tokeniser in ("bytes", "bpe"):
        data = open_data(make(f"files:{books}/*.txt", tmp_path / "cache", tokeniser), None)
        for _ in range(2):
            assert data.yardsticks() == {
                "gzip_bits_per_byte": 8 * len(gzip.compress(raw, 9)) / len(raw),
                "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
            }


# The cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncate", "empty", "other", "remove", "index"])
def test_a_damaged_cache_is_written_again(damage, books, tmp_path):
    config = make(f"files:{books}/*.txt", tmp_path / "cache")
    expected = list(open_data(config, None).heldout_batches(8))
    folder = next((tmp_path / "cache").glob("tokens-*"))
    target = folder / ("index.json" if damage == "index" else "heldout.npy")
    if damage == "remove":
        target.unlink()
    elif damage == "other":
        shutil.copy(folder / "train.npy", target)
    else:
        os.truncate(target, 0 if damage == "empty" else target.stat().st_size - 3)
    for old, new in zip(expected, open_data(config, None).heldout_batches(8), strict=True):
        np.testing.assert_array_equal(old["tokens_BT"], new["tokens_BT"])


def test_a_broken_off_preparation_leaves_nothing_behind(tmp_path):
    def broken():
        yield "one"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.store(tmp_path, {"train": broken()}, ByteTokeniser())
    assert list(tmp_path.iterdir()) == [] and stream.load(tmp_path, ["train"]) is None
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(ValueError, match="no"), atomic(target) as file:
        file.write(b"new")
        raise ValueError("no")
    assert target.read_text() == "old"


def test_a_changed_text_is_prepared_anew_and_refused_by_its_run(books, tmp_path):
    config = make(f"files:{books}/*.txt", tmp_path / "cache")
    workdir = tmp_path / "run"
    workdir.mkdir()
    before = open_data(config, workdir)
    open_data(config, workdir)
    path = sorted(books.glob("0*.txt"))[0]
    path.write_text(path.read_text() + "more\n")
    after = open_data(config, None)
    assert after.description != before.description
    with pytest.raises(UserError, match="choose another workdir") as excinfo:
        open_data(config, workdir)
    message(excinfo)


def test_large_vocabularies_take_uint32(tmp_path):
    class Wide(ByteTokeniser):
        size = 2**16 + 1

        def encode_all(self, texts):
            return [[ord(character) for character in text] for text in texts]

        byte_lengths = np.ones(2**16 + 1, np.int64)

    found = stream.store(tmp_path, {"train": ["ab", "\uffff"]}, Wide())["train"]
    assert found.tokens.dtype == np.uint32
    assert found.tokens.tolist() == [2**16, 97, 98, 2**16, 0xFFFF]
