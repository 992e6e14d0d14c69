"""Rows changed by chance: hidden tokens, middles last; drawn anew in training, the same when evaluated."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny import configured

from fastformer.core.errors import UserError
from fastformer.data import DataConfig, open_data
from fastformer.data.changed import MASK, MIDDLE, PREFIX, SUFFIX, InfilledText, MaskedText, infilled
from fastformer.data.tokenisers import BPETokeniser, ByteTokeniser
from fastformer.tasks.code import HOLE, Code, Function, hole
from fastformer.train import loop

DEVICES = jax.devices()[:1]


def opened(folder, of, **options):
    data = configured(folder, data__length=64).data.to_dict()
    return open_data(DataConfig(**data), None, lambda *text: of(*text, **options))


def whole_rows(data, batch=8, count=4):
    iterator = data.train_iterator(batch, 3)
    return [next(iterator) for _ in range(count)]


def test_marks_are_tokens_that_no_text_has():
    for tokeniser in (ByteTokeniser(), BPETokeniser.train(["some text of words"] * 5, 280)):
        marks = [tokeniser.mark(number) for number in (MASK, PREFIX, SUFFIX, MIDDLE)]
        assert len({*marks, tokeniser.eod}) == 5
        every = tokeniser.encode("".join(map(chr, [*range(0xD800), 0x10FFFF])) + "\udcff")
        assert not set(marks) & set(every)


def test_tokens_are_hidden_as_bert_does(tmp_path):
    data = opened(tmp_path, MaskedText, chosen=0.3)
    batches = whole_rows(data, count=20)
    tokens, targets, weights = (
        np.concatenate([batch[f"{name}_BT"] for batch in batches])
        for name in ("tokens", "targets", "weights")
    )
    chosen = weights > 0
    assert chosen.sum() / np.sum(targets != data.tokeniser.eod) == pytest.approx(0.3, abs=0.02)
    assert (
        np.array_equal(tokens[~chosen], targets[~chosen]) and not chosen[targets == data.tokeniser.eod].any()
    )
    marked = tokens[chosen] == data.tokeniser.mark(MASK)
    assert marked.mean() == pytest.approx(0.8, abs=0.03)
    assert (tokens[chosen] == targets[chosen]).mean() == pytest.approx(0.1, abs=0.03)
    plain = next(opened(tmp_path, lambda *text: open_text(*text)).train_iterator(8, 3))
    assert np.array_equal(plain["tokens_BT"], batches[0]["targets_BT"])


def open_text(*text):
    return MaskedText(*text, chosen=1e-9)


def test_what_is_hidden_is_new_in_an_epoch_and_the_same_when_evaluated(tmp_path):
    data = opened(tmp_path, MaskedText, chosen=0.3)
    again = whole_rows(data, count=60)
    by_row = {}
    for batch in again:
        for targets, weights in zip(batch["targets_BT"], batch["weights_BT"]):
            by_row.setdefault(targets.tobytes(), []).append(weights.tobytes())
    assert max(len(set(seen)) for seen in by_row.values()) > 1
    for one, two in zip(again, whole_rows(data, count=60)):
        assert all(np.array_equal(one[name], two[name]) for name in one)
    iterator = data.train_iterator(8, 3)
    for _ in range(5):
        next(iterator)
    kept = iterator.get_state()
    wanted = next(iterator)
    other = data.train_iterator(8, 3)
    other.set_state(kept)
    assert np.array_equal(next(other)["tokens_BT"], wanted["tokens_BT"])
    small, large = (list(data.heldout_batches(size)) for size in (2, 4))
    seen = [np.concatenate([batch["tokens_BT"] for batch in found])[:4] for found in (small, large)]
    assert np.array_equal(*seen)


def test_a_middle_comes_last_and_has_an_end(rng):
    tokeniser = ByteTokeniser()
    marks = [tokeniser.mark(number) for number in (PREFIX, SUFFIX, MIDDLE)]
    text = [*b"xy", tokeniser.eod, *b"abcdef", tokeniser.eod, *b"ghijklmnopqr"]
    orders = set()
    for _ in range(50):
        found = infilled(text, tokeniser, 1.0, rng)
        assert len(found) == len(text)  # what the marks and the last end take is cut from the end
        assert found[:2] == [*b"xy"] and found[2] == tokeniser.eod  # two tokens are too few
        ends = [place for place, token in enumerate(found) if token == tokeniser.eod]
        assert len(ends) == 3 and ends[-1] == len(found) - 1
        for first, after, whole in zip(ends, ends[1:], (b"abcdef", b"ghijk")):
            piece = found[first + 1 : after]
            first, second, third = (piece.index(mark) for mark in marks)
            assert first == 0 and first < second < third
            before, after, middle = piece[1:second], piece[second + 1 : third], piece[third + 1 :]
            assert bytes(before + middle + after) == whole
            orders.add(bytes(middle))
    assert len(orders) > 10
    assert infilled(text, tokeniser, 0.0, rng) == text


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_every_middle_has_an_end(fraction):
    tokeniser, rng = ByteTokeniser(), np.random.default_rng(1)
    mark = tokeniser.mark(MIDDLE)
    for _ in range(300):
        pieces = [[tokeniser.eod, *b"a" * int(rng.integers(1, 12))] for _ in range(rng.integers(1, 6))]
        text = sum(pieces, [])[int(rng.integers(2)) :]
        found = infilled(text, tokeniser, fraction, rng)
        assert len(found) == len(text)
        for place in np.flatnonzero(np.asarray(found) == mark):
            assert tokeniser.eod in found[place:]


def test_rows_with_holes_are_whole_rows(tmp_path):
    data = opened(tmp_path, InfilledText, fraction=0.5)
    marks, seen = [data.tokeniser.mark(number) for number in (PREFIX, SUFFIX, MIDDLE)], 0
    for batch in whole_rows(data):
        real = batch["segment_BT"] > 0
        assert np.array_equal(
            batch["tokens_BT"][:, 1:][real[:, 1:]], batch["targets_BT"][:, :-1][real[:, 1:]]
        )
        assert np.array_equal(
            np.diff(batch["segment_BT"])[real[:, 1:]],
            (batch["tokens_BT"] == data.tokeniser.eod)[:, 1:][real[:, 1:]],
        )
        seen += np.isin(batch["tokens_BT"], marks).sum()
    assert seen > 10
    for batch in data.heldout_batches(4):
        assert not np.isin(batch["tokens_BT"], marks).any()


def test_an_encoder_learns_to_tell_hidden_tokens(tmp_path):
    config = configured(
        tmp_path, task__name="mlm", model__name="encoder", model__bidirectional=True, train__steps=60,
        data__length=32, optimiser__learning_rate=1e-2, evaluate__every=0, checkpoint__every=1000,
        model__width=32,
    )  # fmt: skip
    loop.train(config, tmp_path / "run", DEVICES)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["quality"]["accuracy"] > 1.2 * result["yardsticks"]["commonest_token_accuracy"]
    assert result["quality"]["perplexity"] < 20 and "gzip_bits_per_byte" not in result["yardsticks"]


def test_a_hole_is_filled_in():
    tokeniser, rows = ByteTokeniser(), []

    def complete(prompts):
        rows.extend(prompts)
        return [list(b"MID") for _ in prompts]

    task = Code(infill=0.5)
    asked = {"prompt": [f"ab{HOLE}cd"]}
    assert task.respond(complete, tokeniser, asked, None, None) == ["abMIDcd"]
    marks = [tokeniser.mark(number) for number in (PREFIX, SUFFIX, MIDDLE)]
    assert rows[0] == [tokeniser.eod, marks[0], *b"ab", marks[1], *b"cd", marks[2]]
    for wrong, of in ((["a", f"a{HOLE}"], task), ([f"{HOLE}{HOLE}"], task), ([HOLE], Code())):
        with pytest.raises(UserError, match="--prompt: <hole> is for models trained with config.task.infill"):
            of.respond(complete, tokeniser, {"prompt": wrong}, None, None)
    lines = ["def f():\n", "    a = 1\n", "\n", "    b = 2\n", "    return b\n"]
    want = ("def f():\n    a = 1\n    ", "b = 2", "\n    return b\n")
    assert hole(Function(lines, 0, 1, 5, "    ")) == want


def test_a_hole_is_cut_where_tokens_are():
    """A line's end goes with the indent after it, a word with the space before it: the model writes both."""
    tokeniser, rows = ByteTokeniser(), []

    def complete(prompts):
        rows.extend(prompts)
        return [list(b"MID\n  ") for _ in prompts]

    def filled(prompt):
        return Code(infill=0.5).respond(complete, tokeniser, {"prompt": [prompt]}, None, None)

    marks = [tokeniser.mark(number) for number in (PREFIX, SUFFIX, MIDDLE)]
    assert filled("def f():\n  <hole>\n  return b\n") == ["def f():\n  MID\n  return b\n"]
    tokens = [marks[0], *b"def f():\n  ", marks[1], *b"return b\n", marks[2]]
    assert rows[-1] == [tokeniser.eod, *tokens]
    assert filled("return <hole> + b") == ["returnMID\n   + b"]
    assert rows[-1][1:] == [marks[0], *b"return", marks[1], *b" + b", marks[2]]
    assert filled("a = <hole>") == ["a = MID\n  "]
    assert rows[-1][1:] == [marks[0], *b"a = ", marks[1], marks[2]]
