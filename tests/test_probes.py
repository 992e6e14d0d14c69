"""Probes: their rules, their splits, and that a model which can, learns them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs import base
from fastformer import tasks
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.seq import Seq
from fastformer.data import DataConfig
from fastformer.data.examples import stack, synthetic
from fastformer.decode.token_by_token import TokenByToken
from fastformer.tasks.listops import CLOSE, OPERATORS, TOKENS, ListOps, spelt
from fastformer.tasks.next_token import NextToken
from fastformer.tasks.recall import gap_probabilities
from fastformer.train import loop, modes, setup
from fastformer.train.evaluate import make_evaluate

DEVICES = jax.devices()[:1]


def configured(folder, task, model="decoder", length=32, **settings):
    """Return a small configuration of a task; ``task__pairs=2`` sets config.task.pairs."""
    c = base.get_config()
    c.name, c.task.name, c.model.name = task, task, model
    c.data.source = "digits" if task == "digits" else "synthetic"
    c.data.directory, c.data.length = str(folder / "prepared"), length
    c.model.layers, c.model.width, c.model.heads, c.model.ff_width = 2, 32, 2, 32
    c.model.bidirectional = model == "encoder"
    c.train.steps, c.train.batch = 4, 8
    c.optimiser.warmup_steps = 1
    c.evaluate.every, c.checkpoint.every = 0, 1000
    c.lock()
    for key, value in settings.items():
        configuration.set_key(c, key.replace("__", "."), value)
    return c


def opened(config):
    task = tasks.build(config)
    data = DataConfig(**config.data.to_dict())
    return task, task.open(data, None, config)


def rows(data, split, count):
    return [data._row(split, index) for index in range(count)]


def test_recall_is_made_by_zoologys_rule(tmp_path):
    task, data = opened(configured(tmp_path, "recall", task__pairs=4, task__vocabulary=100))
    for row in rows(data, "train", 50):
        keys, values = row["tokens_T"][:8:2], row["tokens_T"][1:8:2]
        assert len(set(keys)) == len(set(values)) == 4
        assert keys.min() >= 1 and keys.max() < 50 and values.min() >= 50 and values.max() < 100
        bound = dict(zip(keys, values))
        at = np.flatnonzero(row["weights_T"])
        assert len(at) == 4 and at.min() >= 8 and np.all(at % 2 == 0)
        assert sorted(row["tokens_T"][at]) == sorted(keys)
        assert [bound[key] for key in row["tokens_T"][at]] == row["targets_T"][at].tolist()


def test_gaps_follow_the_power_law():
    p = gap_probabilities(100, 0.01)
    assert p.sum() == pytest.approx(1) and p[0] / p[9] == pytest.approx(10**0.99)


def test_copy_and_induction_ask_for_what_stood_there(tmp_path):
    _, data = opened(configured(tmp_path, "copy", length=11, task__shortest=2))
    lengths = set()
    for row in rows(data, "train", 40):
        size = int((row["segment_T"] > 0).sum()) // 2
        lengths.add(size)
        assert row["tokens_T"][size] == 26 and np.flatnonzero(row["weights_T"]).tolist() == [
            *range(size, 2 * size)
        ]
        assert np.array_equal(row["targets_T"][size : 2 * size], row["tokens_T"][:size])
    assert lengths == {2, 3, 4, 5}
    _, data = opened(configured(tmp_path, "induction", length=12))
    for row in rows(data, "train", 40):
        first, last = np.flatnonzero(row["tokens_T"] == 19)
        assert last == 11 and np.flatnonzero(row["weights_T"]).tolist() == [11]
        assert row["targets_T"][11] == row["tokens_T"][first + 1]


def value_of(tokens):
    """Return the value of a tree as text, read by a parser of its own."""
    stack = [[]]
    for word in spelt(tokens).split():
        if word == "]":
            operator, *values = stack.pop()
            folded = {"[MAX": max, "[MIN": min, "[SM": lambda v: sum(v) % 10}
            middle = sorted(values)
            median = (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) // 2
            stack[-1].append(median if operator == "[MED" else folded[operator](values))
        elif word.startswith("["):
            stack.append([word])
        else:
            stack[-1].append(int(word))
    return stack[0][0]


def test_listops_trees_have_their_value_and_length(tmp_path):
    sizes = {"task__shortest": 10, "task__longest": 60, "task__heldout_rows": 50, "length": 64}
    _, data = opened(configured(tmp_path, "listops", "encoder", **sizes))
    labels, words = [], set()
    for row in rows(data, "train", 100):
        size = int((row["segment_T"] > 0).sum())
        tokens = row["tokens_T"][:size]
        assert 10 < size < 60 and value_of(tokens) == row["label_"]
        depth = np.cumsum([t in range(10, 10 + len(OPERATORS)) for t in tokens]) - np.cumsum(tokens == CLOSE)
        assert depth[-1] == 0 and depth[:-1].min() == 1  # one tree
        labels.append(int(row["label_"]))
        words |= set(tokens.tolist())
    assert words == set(range(len(TOKENS))) and len(set(labels)) == 10
    assert 0.1 <= data.yardsticks()["commonest_label_accuracy"] < 0.5


def test_published_trees_are_as_long_as_published(tmp_path):
    task = ListOps(heldout_rows=1)
    lengths = [int(task.make(np.random.default_rng(i), 2048)["segment_T"].sum()) for i in range(25)]
    assert min(lengths) > 500 and max(lengths) < 2000 and 800 < np.mean(lengths) < 1400


def test_splits_share_no_row_and_a_row_is_always_the_same(tmp_path):
    config = configured(tmp_path, "copy", length=4, task__symbols=4, task__heldout_rows=6)
    (_, data), (_, again) = opened(config), opened(config)
    heldout = [bytes(row["tokens_T"]) for row in rows(data, "heldout", 6)]
    train = [bytes(row["tokens_T"]) for row in rows(data, "train", 200)]
    assert len(set(heldout)) == 6 and not set(heldout) & set(train) and len(set(train)) == 10
    assert train == [bytes(row["tokens_T"]) for row in rows(again, "train", 200)]
    other = configured(tmp_path, "copy", length=4, task__symbols=4, task__heldout_rows=6, seed=1)
    assert train != [bytes(row["tokens_T"]) for row in rows(opened(other)[1], "train", 200)]
    with pytest.raises(UserError, match="so few different rows"):
        row = synthetic(lambda rng: {"tokens_T": rng.integers(2, size=1)}, 0, {"train": 1, "heldout": 2})
        row("train", 0)


def test_batches_are_rows_and_the_last_is_filled_up(tmp_path):
    config = configured(tmp_path, "listops", "encoder", 64, task__shortest=5, task__longest=20)
    configuration.set_key(config, "task.heldout_rows", 5)
    _, data = opened(config)
    batches = list(data.heldout_batches(4))
    assert [batch["weights_B"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batches[0]["tokens_BT"].shape == (4, 64) and batches[0]["label_B"].shape == (4,)
    assert len(list(data.heldout_batches(4, limit=3))) == 1
    iterator = data.train_iterator(6, 0)
    first, state = next(iterator), iterator.get_state()
    second = next(iterator)
    iterator.set_state(state)
    np.testing.assert_array_equal(next(iterator)["tokens_BT"], second["tokens_BT"])
    halves = [next(data.train_iterator(6, 0, index, 2))["tokens_BT"] for index in range(2)]
    assert {bytes(row) for half in halves for row in half} == {bytes(row) for row in first["tokens_BT"]}


@pytest.mark.parametrize(
    "task, model, settings, message",
    [
        ("recall", "decoder", {"task__pairs": 9}, "config.data.length: 32 .* at least 36"),
        ("recall", "decoder", {"task__vocabulary": 33}, "config.task.vocabulary: 33"),
        (
            "recall",
            "decoder",
            {"task__vocabulary": 32},
            "config.task.vocabulary: 32 .* above config.data",
        ),
        ("recall", "decoder", {"task__pears": 2}, "config.task.pears: no such key; did you mean pairs?"),
        ("recall", "encoder", {}, "config.model.name: the task recall trains no encoder"),
        ("recall", "decoder", {"data__source": "python_code"}, "python_code holds no synthetic"),
        ("listops", "encoder", {}, "config.data.length: 32 .* longest tree, 1999 tokens"),
        (
            "listops",
            "encoder",
            {"length": 2048, "task__depth": 3},
            "config.task.shortest: 500 is not allowed; of .* depth 3 .* up to 10 arguments none has more",
        ),
        ("digits", "encoder", {}, "config.data.length: 32 is not allowed; an image has 64"),
        ("copy", "decoder", {"task__shortest": 17}, "config.data.length: 32 .* at least 34"),
        ("induction", "decoder", {"length": 2}, "config.data.length: 2"),
        (
            "copy",
            "decoder",
            {"model__bidirectional": True},
            "config.model.bidirectional: a decoder",
        ),
        ("copy", "decoder", {"evaluate__overlap": 4}, "config.evaluate.overlap: 4"),
        ("copy", "decoder", {"task__train_rows": 7}, "config.train.batch: 8 is more than the 7 rows"),
        (
            "listops",
            "encoder",
            {"model__attention__name": "delta", "task__longest": 20, "task__shortest": 4},
            "config.model.attention.name: delta is not bidirectional; variants that are bidirectional",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, task, model, settings, message):
    with pytest.raises(UserError, match=message) as error:
        config = configured(tmp_path, task, model, **settings)
        run = setup.build_run(config, tmp_path / "run", DEVICES)
        run.data.train_iterator(config.train.batch, 0)
        make_evaluate(run)(None, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings", [{}, {"model__bidirectional": False, "model__attention__name": "linear"}]
)
def test_an_encoder_sees_no_padding_and_may_be_causal(tmp_path, settings):
    sizes = {"task__shortest": 5, "task__longest": 20, "length": 20}
    run = setup.build_run(configured(tmp_path, "listops", "encoder", **sizes, **settings), tmp_path, DEVICES)
    batch = next(run.data.heldout_batches(4))
    seq = Seq(batch["segment_BT"], batch["position_BT"])
    params = jax.jit(run.model.init)(jax.random.key(0), batch["tokens_BT"], seq)["params"]
    score = jax.jit(lambda batch: run.task.loss(run.model, params, batch)[0])
    padded = {name: np.pad(x, [(0, 0), (0, 5)][: x.ndim]) for name, x in batch.items()}
    padded["tokens_BT"][:, -5:] = 7
    assert float(score(padded)) == pytest.approx(float(score(batch)), rel=1e-5)
    changed = batch | {"tokens_BT": batch["tokens_BT"].copy()}
    changed["tokens_BT"][:, 4] = (changed["tokens_BT"][:, 4] + 1) % 10
    assert float(score(changed)) != pytest.approx(float(score(batch)), rel=1e-5)


@pytest.mark.parametrize("task", ["recall", "copy", "induction"])
@pytest.mark.parametrize("chunk", [0, 3])
def test_only_what_counts_gets_logits(tmp_path, task, chunk):
    """The loss and its gradient are those of all logits, which are never made."""
    settings = {"task__pairs": 3, "task__vocabulary": 100} if task == "recall" else {}
    config = configured(tmp_path, task, model__loss_chunk=chunk, **settings)
    run = setup.build_run(config, tmp_path, DEVICES)
    batch = next(run.data.heldout_batches(4))
    seq = Seq(batch["segment_BT"], batch["position_BT"])
    params = jax.jit(run.model.init)(jax.random.key(0), batch["tokens_BT"], seq)["params"]

    def pull(loss):
        return jax.value_and_grad(lambda params: loss(run.task, run.model, params, batch)[0])(params)

    got, want = pull(type(run.task).loss), pull(NextToken.loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)
    few = jax.make_jaxpr(lambda params: run.task.loss(run.model, params, batch))(params)
    assert f"[4,32,{run.data.vocabulary}]" not in str(few)
    through_state = TokenByToken(run.model)
    with use(run.mesh, run.rules):
        slow = run.task.loss(through_state, params, batch)[0]
    assert float(slow) == pytest.approx(float(got[0]), rel=1e-5)


def accuracy(config, workdir):
    loop.train(config, workdir, DEVICES)
    return json.loads((workdir / "result.json").read_text())


def test_softmax_solves_recall(tmp_path, capsys):
    """A tiny form in seconds: full attention behind a short convolution looks every key up."""
    settings = {"task__pairs": 4, "task__vocabulary": 64, "model__short_conv": 3, "train__batch": 64}
    settings |= {"train__steps": 250, "optimiser__learning_rate": 1e-2, "task__heldout_rows": 200}
    config = configured(tmp_path, "recall", length=16, model__layers=1, model__positions="none", **settings)
    result = accuracy(config, tmp_path / "run")
    assert result["quality"]["accuracy"] > 0.99 and result["samples"] == []
    assert "held-out accuracy" in (tmp_path / "run/report.md").read_text()
    capsys.readouterr()
    modes.evaluate(config, tmp_path / "run", {})
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["quality"]["accuracy"]
    with pytest.raises(UserError, match="--mode=generate: the task recall generates nothing"):
        modes.generate(config, tmp_path / "run", {"prompt": ["x"]})


def test_digits_are_told_apart(tmp_path):
    pytest.importorskip("sklearn")
    settings = {
        "train__steps": 120,
        "train__batch": 32,
        "optimiser__learning_rate": 1e-2,
        "model__layers": 1,
        "model__positions": "learned",
    }
    config = configured(tmp_path, "digits", "encoder", 64, **settings)
    result = accuracy(config, tmp_path / "run")
    assert result["yardsticks"]["commonest_label_accuracy"] < 0.12
    assert result["quality"]["accuracy"] > 0.3
    assert result["decode_tokens_per_second"] is None and result["state_bytes"] is None
    report = (tmp_path / "run/report.md").read_text()
    assert "commonest label accuracy" in report and "decoding" not in report and "not run" not in report


def test_a_batch_puts_b_before_the_letters():
    assert set(stack([{"label_": np.int32(1), "tokens_T": np.zeros(2)}])) == {"label_B", "tokens_BT"}
