"""Pruning: how many zeros when, which ones, and that they stay."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import optax
import pytest
from compress_tools import DEVICES, configured, made, train
from flax.traverse_util import flatten_dict
from safetensors.numpy import load as read_plain

from fastformer.compress import store
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.train import modes, setup
from fastformer.train.optimiser import make_optimiser
from fastformer.train.state import abstract_state

UP, DOWN, OUT = (f"layer_0/{name}/weight" for name in ("mlp/up", "mlp/down", "mixer/out"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prune")


def zeros(params):
    return {path: float(np.mean(np.asarray(x) == 0)) for path, x in paths(params).items()}


def steps(config, count, tx):
    """Return the weights after each of ``count`` updates by random gradients."""
    compression, model, _, params = made(config)
    tx = compression.optimiser(tx, model)
    state, found = tx.init(params), []

    @jax.jit
    def update(params, state, key):
        gradients = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(count):
        params, state = update(params, state, jax.random.key(step))
        found.append(params)
    return found


def all_of(params):
    """Return all pruned weights in one row."""
    names = ("query", "key", "value", "out", "up", "gate", "down")
    flat = [x for path, x in paths(params).items() if path.split("/")[-2:-1] and path.split("/")[-2] in names]
    return np.concatenate([np.ravel(x) for x in flat])


def test_the_schedule_is_cubic_and_what_is_zero_stays(folder):
    config = configured(folder, "prune", prune__sparsity=0.2, prune__start=2, prune__end=8, prune__every=3)
    found = steps(config, 11, optax.adam(0.5))  # moments that would bring pruned weights back
    rates = [np.mean(all_of(params) == 0) for params in found]  # after updates 1, 2, …
    half_way, end = 0.2 * (1 - 0.5**3), 0.2
    np.testing.assert_allclose(rates[:4], [0, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(rates[4:7], [half_way] * 3, atol=1e-3)
    np.testing.assert_allclose(rates[7:], [end] * 4, atol=1e-3)
    for before, after in zip(found, found[1:]):
        assert not np.any(all_of(after)[all_of(before) == 0])
    moved = all_of(found[-1]) != all_of(found[-2])
    np.testing.assert_array_equal(moved, all_of(found[-1]) != 0)  # the others go on


def test_the_smallest_go_of_all_matrices_or_of_each(folder):
    rate = 0.25
    for scope in ("global", "matrix"):
        config = configured(folder, "prune", prune__sparsity=rate, prune__scope=scope)
        _, _, _, before = made(config)
        (after,) = steps(config, 1, optax.sgd(0.0))
        rates = {path: value for path, value in zeros(after).items() if path in (UP, DOWN, OUT)}
        if scope == "matrix":
            np.testing.assert_allclose(list(rates.values()), rate, atol=1e-2)
            for path in rates:
                kept = np.asarray(paths(after)[path]) != 0
                weights = np.abs(paths(before)[path])
                assert weights[kept].min() > weights[~kept].max()
        else:
            assert rates[DOWN] > 1.2 * rates[UP]  # it begins smaller
            kept, weights = all_of(after) != 0, np.abs(all_of(before))
            assert weights[kept].min() > weights[~kept].max()
        untouched = [path for path, value in zeros(after).items() if path not in zeros(before) or value == 0]
        assert {"embedding", "layer_0/mixer_norm/scale", "norm/scale"} <= set(untouched)


def test_two_of_every_four_inputs(folder):
    _, _, _, before = made(configured(folder, "prune", prune__pattern="2:4"))
    (after,) = steps(configured(folder, "prune", prune__pattern="2:4"), 1, optax.sgd(0.0))
    flat, was = paths(after), paths(before)
    for path, inputs in ((UP, 16), (OUT, 16), ("layer_0/mixer/query/weight", 16)):
        groups = np.asarray(flat[path]).reshape(inputs // 4, 4, -1)  # inputs come first here
        assert np.all((groups != 0).sum(axis=1) == 2), path
        old = np.abs(np.asarray(was[path]).reshape(inputs // 4, 4, -1))
        np.testing.assert_allclose(
            np.abs(groups).sum(axis=1), np.sort(old, axis=1)[:, 2:].sum(axis=1), rtol=1e-6
        )


def test_masks_are_laid_out_as_their_weights(folder, tmp_path):
    config = configured(folder, "prune", mesh__data=2, mesh__fsdp=2, mesh__tensor=2, sharding__V=())
    run = setup.build_run(config, tmp_path, jax.devices())
    tx = run.compression.optimiser(make_optimiser(config)[0], run.model)
    with use(run.mesh, run.rules):
        state = abstract_state(run, tx)
    masks, params = flatten_dict(state.opt_state.masks, sep="/"), paths(state.params)
    assert masks and all(masks[path].sharding == params[path].sharding for path in masks)
    assert any(not sharding.is_fully_replicated for sharding in (x.sharding for x in masks.values()))


@pytest.mark.parametrize(
    "methods, settings, message",
    [
        ("prune", {"prune__sparsity": 1.5}, "prune.sparsity: 1.5 is not allowed; it must be above 0"),
        ("prune", {"prune__pattern": "4:2"}, "prune.pattern: '4:2' is not allowed"),
        ("prune", {"prune__pattern": "half"}, "prune.pattern: 'half' is not allowed"),
        ("prune", {"prune__pattern": "3:5"}, "prune.pattern: 3:5 does not divide the 16 inputs of layer_0/"),
        ("prune", {"prune__scope": "layer"}, "prune.scope: 'layer' is unknown"),
        ("prune", {"prune__matrices": ("mlp",)}, "prune.matrices[0]: 'mlp' matches no matrix"),
        ("prune", {"prune__start": 5, "prune__end": 3}, "prune.end: 3 is not allowed"),
        (
            "prune",
            {"prune__score": "wanda", "prune__matrices": ("embedding",)},
            "prune.matrices: wanda has no inputs to know embedding by",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) and ":" in x else "",
)
def test_mistakes(folder, tmp_path, methods, settings, message):
    with pytest.raises(UserError, match=re.escape(f"config.compress.{message}")) as error:
        setup.build_run(configured(folder, methods, **settings), tmp_path, DEVICES)
    assert "\n" not in str(error.value)


def test_a_pruned_run_stores_no_zeros(folder, tmp_path, capsys):
    settings = {"prune__sparsity": 0.75, "prune__start": 4, "prune__end": 8, "prune__every": 2}
    config = configured(folder, "prune", **settings)
    train(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    path = tmp_path / "weights.safetensors"
    tensors, arrays = read_plain(path.read_bytes()), store.load(path)
    names = [name for name in tensors if name.endswith("/bitmap")]
    assert len(names) >= 5
    kept = sum(tensors[name.removesuffix("/bitmap")].size for name in names)
    whole = sum(arrays[name.removesuffix("/bitmap")].size for name in names)
    assert 0.2 < kept / whole < 0.3
    assert path.stat().st_size == result["bytes_on_disk"] < 4 * result["parameters"]
    capsys.readouterr()
    modes.evaluate(config, tmp_path, ())
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] == pytest.approx(result["quality"]["bits_per_byte"], rel=1e-6)
