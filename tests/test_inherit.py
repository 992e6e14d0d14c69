"""A run that begins with another's weights: what is cut is what does nothing, and what cannot be is told."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_tools import DEVICES, LENGTH, batch, configured, initial, train
from flax.traverse_util import flatten_dict

from fastformer import models, tasks
from fastformer.compress.inherit import even_layers, inherit
from fastformer.compress.method import Calibration
from fastformer.compress.numerics import replace_leaves
from fastformer.compress.sites import sites
from fastformer.core.errors import FieldError, UserError
from fastformer.core.seq import whole
from fastformer.train import loop

CALIBRATION = Calibration(lambda: (batch(seed=seed) for seed in range(2)), tasks.Text().loss)
LARGE = {
    "model__layers": 3, "model__heads": 4, "model__head_width": 8, "model__width": 16, "model__ff_width": 24,
}  # fmt: skip


def built(folder, **settings):
    model = models.build(configured(folder, **LARGE | settings), 257, LENGTH)
    return model, initial(model)


def inherited(folder, weights, other, by_change=False, **settings):
    """Return ``(model, what it inherits)``."""
    model, params = built(folder, **settings)
    letters = {path: ("V", "D") if site.table else tuple(site.letters) for path, site in sites(other).items()}
    letters |= {path: ("D",) for path in flatten_dict(weights, sep="/") if path not in letters}
    return model, inherit(params, model, other, weights, letters, CALIBRATION, by_change)


def silenced(weights, wanted):
    """Return the weights with zeros where ``wanted(path)`` says: an index into the array."""

    def one(path, leaf):
        at = wanted(path)
        return leaf if at is None else leaf.at[at].set(0)

    return replace_leaves(weights, one)


def logits(model, params):
    x = batch()
    return model.apply({"params": params}, x["tokens_BT"], whole(4, LENGTH))[0]


def same(one, other):
    np.testing.assert_allclose(logits(*one), logits(*other), rtol=1e-4, atol=1e-5)


def test_of_one_size_all_is_taken(tmp_path):
    other, weights = built(tmp_path)
    model, found = inherited(tmp_path, weights, other)
    assert found.cut == found.fresh == () and found.layers == (0, 1, 2)
    jax.tree.map(np.testing.assert_array_equal, found.params, weights)


def test_neurons_that_do_nothing_are_cut(tmp_path):
    other, weights = built(tmp_path)
    dead = np.array([[1, 2, 5, 7, 8, 11, 12, 13, 17, 20, 21, 23], np.arange(12), np.arange(0, 24, 2)])
    weights = silenced(
        weights,
        lambda path: np.s_[:, dead[int(path[6])]] if path.endswith("mlp/up/weight") else None,
    )
    model, found = inherited(tmp_path, weights, other, model__ff_width=12)
    assert len(found.cut) == 9
    same((model, found.params), (other, weights))


@pytest.mark.parametrize("settings", [{}, {"model__kv_heads": 2}])
def test_heads_that_do_nothing_are_cut(tmp_path, settings):
    other, weights = built(tmp_path, **settings)
    heads = np.array([0, 3])  # one of each group, where there are two
    weights = silenced(
        weights,
        lambda path: np.s_[heads] if path.endswith("mixer/out/weight") else None,
    )
    if not settings:
        # What a head gives to the output is what counts, not what is made of it.
        value = lambda path: np.s_[:, heads] if path.endswith("mixer/value/weight") else None  # noqa: E731
        weights = silenced(weights, value)
        model, found = inherited(tmp_path, weights, other, model__heads=2)
        same((model, found.params), (other, weights))
    else:
        model, found = inherited(tmp_path, weights, other, model__heads=2, **settings)
        assert {path.split("/")[-2] for path in found.cut} == {"query", "out"}
        with pytest.raises(FieldError, match="grouped heads are cut within their groups"):
            inherited(tmp_path, weights, other, model__heads=2, model__kv_heads=1)


@pytest.mark.parametrize("groups", [2, 1])
def test_key_and_value_heads_are_merged_into_their_mean(tmp_path, groups):
    other, weights = built(tmp_path)
    model, found = inherited(tmp_path, weights, other, model__kv_heads=groups)
    assert found.cut == found.fresh == () and len(found.merged) == 2 * 3
    for path in found.merged:
        old, new = (flatten_dict(tree, sep="/")[path] for tree in (weights, found.params))
        assert new.shape == (16, groups, 8) and path.split("/")[2] in ("key", "value")
        for group, heads in enumerate(np.split(np.arange(4), groups)):
            np.testing.assert_allclose(new[:, group], sum(old[:, h] for h in heads) / len(heads), rtol=1e-6)
    # Heads that are alike are none the worse for it.
    alike = replace_leaves(
        weights, lambda path, x: jnp.repeat(x[:, :1], 4, 1) if {"key", "value"} & {*path.split("/")} else x
    )
    same((model, inherited(tmp_path, alike, other, model__kv_heads=groups)[1].params), (other, alike))


def test_channels_that_are_small_are_cut(tmp_path):
    other, weights = built(tmp_path)
    small = np.array([0, 1, 6, 9, 10, 11, 14, 15])
    weights = silenced(weights, lambda path: np.s_[:, small] if path == "embedding" else None)
    weights = silenced(weights, lambda path: np.s_[small] if path.endswith("_norm/scale") else None)
    _, found = inherited(tmp_path, weights, other, model__width=8)
    kept = np.setdiff1d(np.arange(16), small)
    np.testing.assert_array_equal(found.params["embedding"], weights["embedding"][:, kept])
    np.testing.assert_array_equal(
        found.params["layer_1"]["mlp"]["down"]["weight"], weights["layer_1"]["mlp"]["down"]["weight"][:, kept]
    )


def test_layers_that_do_nothing_are_left_out(tmp_path):
    other, weights = built(tmp_path)
    idle = ("layer_1/mixer/out/weight", "layer_1/mlp/down/weight")
    weights = silenced(weights, lambda path: np.s_[:] if path in idle else None)
    model, found = inherited(tmp_path, weights, other, True, model__layers=2)
    assert found.layers == (0, 2)
    same((model, found.params), (other, weights))


def test_layers_at_even_distances():
    assert (
        even_layers(3, 6) == (1, 3, 5) and even_layers(2, 5) == (2, 4) and even_layers(4, 4) == (0, 1, 2, 3)
    )


def test_what_the_other_does_not_have_is_new(tmp_path):
    other, weights = built(tmp_path)
    model, found = inherited(tmp_path, weights, other, model__attention__name="hedgehog")
    assert "layer_0/mixer/query/weight" not in found.fresh
    assert found.fresh and all("mixer" in path for path in found.fresh)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__layers": 4}, "it has 3 layers, and this model has 4"),
        ({"model__ff_width": 32}, "has 24 F and this model 32"),
        ({"model__head_width": 4}, "has 8 K and this model 4"),
        ({"model__heads": 6, "model__kv_heads": 2}, "it has 3 key/value heads, and they do not merge into 2"),
    ],
)
def test_what_cannot_be_inherited(tmp_path, settings, message):
    six = {"model__heads": 6, "model__kv_heads": 3} if "model__kv_heads" in settings else {}
    other, weights = built(tmp_path, **six)
    with pytest.raises(FieldError, match=message):
        inherited(tmp_path, weights, other, **settings)


def test_a_run_begins_with_another(tmp_path, capsys):
    short = {"train__steps": 2, "optimiser__warmup_steps": 1, "evaluate__every": 0}
    train(configured(tmp_path, model__layers=2, model__ff_width=32, **short), tmp_path / "large")
    small = configured(tmp_path, train__init=str(tmp_path / "large"), optimiser__learning_rate=1e-9, **short)
    train(small, tmp_path / "small")
    out = capsys.readouterr().out
    assert f"begins with {tmp_path / 'large'}, its layers 1; 3 arrays cut down" in out
    losses = {}
    for name in ("large", "small"):
        losses[name] = json.loads((tmp_path / name / "result.json").read_text())["quality"]["bits_per_byte"]
    train(configured(tmp_path, optimiser__learning_rate=1e-9, **short), tmp_path / "fresh")
    fresh = json.loads((tmp_path / "fresh" / "result.json").read_text())["quality"]["bits_per_byte"]
    assert losses["large"] < fresh and losses["small"] < fresh
    for value, message in (("nowhere", "there is no such folder"), (str(tmp_path / "small"), "1 layers")):
        config = configured(tmp_path, train__init=value, model__layers=2, **short)
        with pytest.raises(UserError, match=f"config.train.init: .*{message}"):
            loop.train(config, tmp_path / "bad", DEVICES)
    assert jnp.isfinite(fresh)


def test_a_run_of_no_steps_compresses_what_it_begins_with(tmp_path, capsys):
    none = {"optimiser__warmup_steps": 0, "evaluate__every": 0}
    with pytest.raises(UserError, match="config.train.steps: 0 is not allowed; it must be 1 or more"):
        loop.train(configured(tmp_path, train__steps=0, **none), tmp_path / "alone", DEVICES)
    first = train(configured(tmp_path, train__steps=1, **none), tmp_path / "first")
    config = configured(tmp_path, "prune", train__steps=0, train__init=str(first), **none)
    for said in ("trained and evaluated", "is finished: step 0, held-out"):
        train(config, tmp_path / "pruned")
        assert said in capsys.readouterr().out
    found = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "pruned")}
    assert found["pruned"]["step"] == 0 and "train_tokens_per_second" not in found["pruned"]
    assert found["pruned"]["bytes_on_disk"] < found["first"]["bytes_on_disk"]
    before, after = (run["quality"]["bits_per_byte"] for run in found.values())
    assert before != after and abs(before - after) < 0.5
    assert "not trained further" in (tmp_path / "pruned" / "report.md").read_text()
