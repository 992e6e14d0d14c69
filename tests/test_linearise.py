"""Linearisation: what moves in which phase, what is stored, and what cannot take a softmax's place."""

from __future__ import annotations

import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compress_tools import (
    DEVICES,
    LENGTH,
    VOCABULARY,
    batch,
    configured,
    logits,
    plain_place,
    train,
)
from safetensors.numpy import load_file

from fastformer import compress, models, tasks
from fastformer.compress import transfer
from fastformer.compress.adapters import KEY, adapted
from fastformer.compress.linearise import Linearise
from fastformer.compress.record import Recorder
from fastformer.core.errors import UserError
from fastformer.core.seq import whole
from fastformer.core.trees import paths
from fastformer.data.tokenisers import load_tokeniser
from fastformer.train import loop, modes, setup
from fastformer.train.checkpoint import restore_params
from fastformer.train.logging import MetricsLog

pytestmark = pytest.mark.usefixtures("compiled_once")

SHORT = {"evaluate__every": 0, "optimiser__warmup_steps": 1}
HYBRID = {"model__attention__name": "lolcats", "model__attention__window": 4}
TRANSFER = 6  # updates
NEW = ("query_map", "key_map", "mixing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("linearise")


@pytest.fixture(scope="module")
def teacher(folder, compiled_once):
    return train(configured(folder, train__steps=2, **SHORT), folder / "teacher")


def student(folder, teacher, **settings):
    """Return the configuration of a hybrid student."""
    of = {"linearise__teacher": str(teacher), "linearise__transfer": TRANSFER, "linearise__rank": 2}
    return configured(folder, "linearise", **SHORT, **HYBRID | of | settings)


def built(config):
    """Return ``(compression, model with adapters, model)``; no weights are made."""
    compression, model = compress.build(config), models.build(config, VOCABULARY, LENGTH)
    return compression, compression.model(model), model


def drawn(model, key):
    """Return initial weights, within a compiled function: one by one, their programs would take longer."""
    return nn.unbox(model.init(key, jnp.zeros((2, LENGTH), jnp.int32), whole(2, LENGTH))["params"])


@pytest.fixture(scope="module")
def runs(folder, teacher):
    """Return ``(config, workdir of a whole run, of one that went on, its weights when it stopped)``."""
    config = student(folder, teacher, checkpoint__every=100, optimiser__schedule="constant")
    write = MetricsLog.write

    def interrupting(log, step, split, values):
        write(log, step, split, values)
        if step == TRANSFER - 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupting)
        loop.train(config, folder / "resumed", DEVICES)
    assert not (folder / "resumed/weights.safetensors").exists()
    between = restore_params(setup.build_run(config, folder / "resumed", DEVICES))
    train(config, folder / "resumed")
    return config, train(config, folder / "straight"), folder / "resumed", paths(between)


def test_what_is_new_learns_first_alone(runs, teacher):
    old, between = load_file(teacher / "weights.safetensors"), runs[3]
    own = {path: np.asarray(x) for path, x in between.items() if not path.startswith(f"{KEY}/")}
    assert {path for path in own if path not in old} == {f"layer_0/mixer/{n}" for n in NEW}
    for path, x in old.items():
        np.testing.assert_array_equal(own[path], x, err_msg=path)
    assert all(np.all(np.asarray(x) == 0) for path, x in between.items() if path.endswith("/up"))
    assert np.abs(own["layer_0/mixer/query_map"] - np.eye(8)).max() > 1e-3


def test_then_the_projections_alone(runs, teacher):
    old, new = (load_file(folder / "weights.safetensors") for folder in (teacher, runs[1]))
    assert set(new) == set(old) | {f"layer_0/mixer/{name}" for name in NEW}
    moved = {path for path in old if np.any(old[path] != new[path])}
    projections = ("query", "key", "value", "out")
    assert moved == {f"layer_0/mixer/{name}/weight" for name in projections}
    for path in moved:
        change = (new[path] - old[path]).reshape(16, 16)
        assert np.linalg.matrix_rank(change, tol=1e-5 * np.abs(change).max()) <= 2


def test_the_transfer_loss_falls_and_the_tasks_loss_follows(runs):
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 12
    first, then = losses[:TRANSFER], losses[TRANSFER:]
    assert 0 < first[-1] < 0.9 * first[0]
    assert min(then) > 2 and max(first) < 1


def test_an_interrupted_run_goes_on_to_the_same(runs):
    files = [(workdir / "weights.safetensors").read_bytes() for workdir in runs[1:3]]
    assert files[0] == files[1]


def test_each_branch_alone_is_in_the_result(runs, capsys):
    config, workdir, *_ = runs
    quality = json.loads((workdir / "result.json").read_text())["quality"]
    parts = [quality[f"bits_per_byte_{name}_alone"] for name in ("window", "linear")]
    assert len({quality["bits_per_byte"], *parts}) == 3 and all(0 < part < 20 for part in parts)
    assert "held-out bits per byte window alone" in (workdir / "report.md").read_text()
    capsys.readouterr()
    modes.evaluate(config, workdir, ())
    found = json.loads(capsys.readouterr().out)
    for name, value in quality.items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_merged_weights_do_what_adapters_do(folder, teacher):
    of = {"linearise__teacher": str(teacher), "linearise__rank": 2}
    compression, model, plain = built(configured(folder, "linearise", **of))

    @jax.jit
    def both(key):
        params = drawn(model, key)
        params[KEY] = jax.tree.map(lambda x: x + 0.1, params[KEY])
        merged = compression.export(model, params, None)
        without = {name: x for name, x in params.items() if name != KEY}
        return params, merged, logits(model, params), logits(plain, merged), logits(plain, without)

    params, merged, unmerged, same, other = both(jax.random.key(0))
    assert set(paths(merged)) == set(paths(params)) - {f"{KEY}/{path}" for path in paths(params[KEY])}
    np.testing.assert_allclose(same, unmerged, rtol=1e-5, atol=1e-5)
    assert np.abs(same - other).max() > 1e-2
    # Of the output, by hand: two axes are read there, and one elsewhere.
    down, up = (np.asarray(params[KEY]["layer_0"]["mixer"]["out"][part]) for part in ("down", "up"))
    wanted = params["layer_0"]["mixer"]["out"]["weight"] + 8.0 * (down.reshape(16, 2) @ up).reshape(2, 8, 16)
    np.testing.assert_allclose(merged["layer_0"]["mixer"]["out"]["weight"], wanted, rtol=1e-5, atol=1e-6)


def test_the_error_is_that_of_attention_alone(folder):
    """A window over all of a row is the softmax; what a mixer reads is the teacher's, not the student's."""
    plain = built(configured(folder, model__layers=2))[1]
    pattern = {"model__layers": 2, "model__pattern": ("lolcats", "softmax")}
    students = [built(configured(folder, **pattern, model__attention__window=w))[1] for w in (16, 2)]

    @jax.jit
    def errors(key):
        weights, seq = drawn(plain, key), whole(4, 16)
        told = transfer.of_teacher(plain, weights, batch())
        assert [(x.x_BTD.shape, x.y_BTHP.shape) for x in told] == [((4, 16, 16), (4, 16, 2, 8))] * 2
        found = []
        for model in students:
            params = drawn(model, jax.random.fold_in(key, 1))
            for layer in ("layer_0", "layer_1"):
                params[layer]["mixer"] |= weights[layer]["mixer"]
            found.append(transfer.error(model, params, told, seq))
        # By hand: of two layers one errs, by a half everywhere.
        params["layer_0"]["mixer"]["value"] = {"weight": jnp.zeros((16, 2, 8))}
        far = [told[0]._replace(y_BTHP=jnp.full((4, 16, 2, 8), 0.5)), told[1]]
        return *found, transfer.error(model, params, far, seq)

    all_of_it, two, half = errors(jax.random.key(0))
    np.testing.assert_allclose(all_of_it, 0, atol=1e-10)
    assert np.all(two[:, :2] < 1e-10) and float(two[:, 2:].min()) > 1e-8
    np.testing.assert_allclose(half, 0.5**2 / 2, rtol=1e-5)


def test_without_adapters_all_weights_learn_the_task(folder, teacher):
    compression, model, _ = built(student(folder, teacher, linearise__rank=0, linearise__transfer=0))
    assert compression.frozen(model, load_tokeniser(teacher), plain_place) == {}
    loss = compression.loss(tasks.Text().loss)
    gradients = jax.jit(lambda key: jax.grad(lambda p: loss(model, p, batch(), None)[0])(drawn(model, key)))(
        jax.random.key(0)
    )
    assert KEY not in gradients and all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"linearise__teacher": ""}, "compress.linearise.teacher: '' is not allowed; it must be the workdir"),
        ({"linearise__teacher": "nowhere"}, "compress.linearise.teacher: nowhere holds no config.json"),
        ({"linearise__transfer": -1}, "compress.linearise.transfer: -1 is not allowed"),
        ({"linearise__rank": -1}, "compress.linearise.rank: -1 is not allowed"),
        ({"linearise__alpha": 0.0}, "compress.linearise.alpha: 0.0 is not allowed"),
        ({"model__attention__name": "local"}, "compress.linearise.transfer: 6 updates would train nothing"),
        ({"model__pattern": ("lolcats", "rg_lru"), "model__layers": 2}, "model.pattern: rg_lru has no query"),
        (
            {"model__attention__name": "retention", "model__attention__window": None},
            r"model.attention.name: the value projection of retention has shape \(16, 2, 16\); that of",
        ),
        ({"model__scan": True}, "model.scan: linearise goes layer by layer; set it False"),
        ({"model__width": 32}, "compress.linearise.teacher: .* embedding has 16 D and this model 32"),
        ({"data__tokeniser": "bpe", "data__vocabulary": 300}, ".*linearise.teacher: .* another tokeniser"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes(folder, teacher, tmp_path, settings, message):
    config = student(folder, teacher, **{k: v for k, v in settings.items() if v is not None})
    if settings.get("model__attention__window", 0) is None:
        with config.unlocked():
            del config.model.attention["window"]
    with pytest.raises(UserError, match=f"^config.(compress.)?{message}") as error:
        loop.train(config, tmp_path, DEVICES)
    assert "\n" not in str(error.value)


def test_a_recorded_model_has_no_step(folder, teacher):
    compression, model, _ = built(student(folder, teacher))
    assert isinstance(compression.methods[0][1], Linearise) and adapted(Recorder(model)).step is None
