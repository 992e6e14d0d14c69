"""A step on a mesh of eight devices is the step on one."""

from __future__ import annotations

import shutil

import jax
import kill_and_resume
import numpy as np
import pytest
from tiny import configured, tiny_config

from fastformer.core.config import set_key
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.train import loop
from fastformer.train.evaluate import make_evaluate
from fastformer.train.optimiser import make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import abstract_batch, jit_train_step, put_batch

MESHES = {"one device": (1, 1, 1), "2x2x2": (2, 2, 2)}


def one_step(folder, mesh, optimiser="adamw"):
    """Return the run, its lowered step, the state and metrics after it, and an evaluation of the weights."""
    config = tiny_config(folder)
    settings = {
        "data.tokeniser": "bpe",
        "data.vocabulary": "280",
        "model.dropout": "0.1",
        "model.kv_heads": "2",
        "optimiser.name": optimiser,
    }
    settings |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), map(str, mesh), strict=True))
    for key, value in settings.items():
        set_key(config, key, value)
    run = build_run(config, folder, jax.devices()[: int(np.prod(mesh))])
    tx, schedule = make_optimiser(config)
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        step = jit_train_step(run, tx, schedule, abstract)
        lowered = step.lower(abstract, abstract_batch(run)).as_text()
        batch = put_batch(run, next(run.data.train_iterator(config.train.batch, config.seed)))
        state, metrics = step(initial_state(run, tx, abstract), batch)
        evaluation = make_evaluate(run)(state.params, 16)
    return lowered, state, metrics, evaluation


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {name: one_step(folder, mesh) for name, mesh in MESHES.items()}


def test_the_mesh_changes_nothing(outcomes):
    (_, one, metrics, evaluation), (_, many, metrics_many, evaluation_many) = outcomes.values()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], metrics_many[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for (path, a), b in zip(paths(one).items(), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=path)
    np.testing.assert_allclose(evaluation.loss, evaluation_many.loss, rtol=1e-5)
    assert evaluation.rows == evaluation_many.rows > 0


def test_muon_moves_each_matrix_the_same_on_any_mesh(tmp_path, outcomes):
    """Its orthogonal updates need whole matrices, wherever their shards lie."""
    one, many = (one_step(tmp_path, mesh, "muon")[1].params for mesh in MESHES.values())
    for (path, a), b in zip(paths(one).items(), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=path)
    by_adamw = paths(outcomes["one device"][1].params)
    differs = {path for path, x in paths(one).items() if np.abs(x - by_adamw[path]).max() > 1e-4}
    assert differs == {path for path in by_adamw if path.endswith("weight")}  # AdamW has the rest


def test_weights_and_moments_lie_in_shards(outcomes):
    state = outcomes["2x2x2"][1]
    weights = paths({"params": state.params, "opt_state": state.opt_state})
    matrices = [path for path in weights if path.endswith(("weight", "embedding"))]
    moments = [path for path in matrices if path.startswith("opt_state")]
    assert len(moments) == 2 * (len(matrices) - len(moments)) > 0
    for path in matrices:
        whole = weights[path]
        assert whole.addressable_shards[0].data.size == whole.size // 4, path  # fsdp x tensor


def test_the_program_holds_the_constraints(outcomes):
    """Activations are constrained, not only weights (a wrong kind of mesh context drops them silently)."""
    count = outcomes["2x2x2"][0].count("sharding_constraint") + outcomes["2x2x2"][0].count("@Sharding")
    assert count >= 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh.data": "8", "train.batch": "12"}, "config.train.batch: 12 does not split over the 8 devices"),
        ({"mesh.data": "4", "mesh.tensor": "2"}, "config.sharding.V .*: 257 does not split"),
        ({"mesh.data": "3"}, "config.mesh: data 3 x fsdp 1 x tensor 1 x sequence 1 is not the 8"),
        ({"evaluate.batch": "4"}, "config.evaluate.batch: 4 does not split"),
        ({"mesh.data": "1", "mesh.tensor": "8", "sharding.V": "()"}, "config.model.heads: 2 does not split"),
    ],
)
def test_sizes_that_do_not_split(tmp_path, settings, message):
    config = tiny_config(tmp_path)
    for key, value in settings.items():
        set_key(config, key, value)
    with pytest.raises(UserError, match=message):
        build_run(config, tmp_path)


def test_it_goes_on_with_another_mesh(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    settings = {"checkpoint__every": 6}
    loop.train(configured(folder, **settings), tmp_path / "one", jax.devices()[:1])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("checkpoints/12", "result.json"):
        path = tmp_path / "two" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    other = settings | {"mesh__data": 1, "mesh__fsdp": 2, "checkpoint__keep": 5}
    loop.train(configured(folder, **other), tmp_path / "two", jax.devices()[:2])
    one, two = (kill_and_resume.losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) and one[:7] == two[:7]
    np.testing.assert_allclose([x["loss"] for x in two], [x["loss"] for x in one], rtol=1e-4)
    # It is finished, whatever the mesh.
    loop.train(configured(folder, **settings), tmp_path / "two", jax.devices()[:1])
