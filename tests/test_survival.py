"""Steps that are not taken, going back past bad batches, and precision that changes as training goes on."""

from __future__ import annotations

import json
import os
import signal

import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import configured

from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.train import guard as watching
from fastformer.train import loop
from fastformer.train.guard import LARGEST_SCALE, judge
from fastformer.train.logging import MetricsLog
from fastformer.train.optimiser import make_optimiser
from fastformer.train.precision import Plan
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import abstract_batch, jit_train_step, put_batch

DEVICES = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


# One step after another, by numbers


def watched(losses, scaled=False, spike=0.0, guard=None):
    """Return which steps were taken, and the guard after the last."""
    guard, taken, step = guard or watching.new(), [], jax.jit(judge, static_argnums=(3, 4))
    for loss in losses:
        good, guard = step(guard, jnp.float32(loss), jnp.float32(loss), scaled, spike)
        taken.append(bool(good))
    return taken, guard


def test_steps_that_are_not_finite_are_skipped_and_counted():
    taken, guard = watched([1.0, np.nan, np.inf, 1.0, np.nan])
    assert taken == [True, False, False, True, False]
    assert (int(guard.skipped), int(guard.streak), int(guard.taken)) == (3, 1, 2)
    assert np.isfinite(guard.mean) and np.isfinite(guard.variance)


def test_a_gradient_that_is_not_finite_is_enough():
    assert not judge(watching.new(), jnp.float32(1), jnp.float32(np.inf), False, 0.0)[0]


def test_the_scale_halves_doubles_and_stays_within_bounds(monkeypatch):
    monkeypatch.setattr(watching, "PATIENCE", 3)
    guard = watched([np.inf, 1.0, 1.0, np.inf], scaled=True)[1]
    assert float(guard.scale) == 2.0**14 and int(guard.streak) == 0 and int(guard.skipped) == 2
    guard = watched([1.0] * 3, scaled=True, guard=guard)[1]
    assert float(guard.scale) == 2.0**15
    guard = watched([1.0] * 60, scaled=True, guard=guard)[1]
    assert float(guard.scale) == LARGEST_SCALE
    guard = watched([np.inf] * 30, scaled=True, guard=guard)[1]
    assert float(guard.scale) == 1.0 and int(guard.streak) == 6  # 24 halvings might have mended it


def test_the_scale_stays_where_it_is_not_used():
    assert float(watched([np.inf, 1.0])[1].scale) == watching.FIRST_SCALE


def test_a_spike_is_skipped_once_the_loss_is_known(rng):
    usual = list(3.0 + 0.1 * rng.standard_normal(40))
    assert all(watched([*usual, 9.0])[0])  # not asked to look
    taken, guard = watched([*usual, 9.0, 3.0, 9.0], spike=6.0)
    assert taken == [True] * 40 + [False, True, False] and abs(float(guard.mean) - 3.0) < 0.1
    assert all(watched([9.0, 3.0, 9.0], spike=6.0)[0])
    steady = 8.0 + 2e-3 * rng.standard_normal(400)  # float32 squares would lose the deviation
    taken, guard = watched([*steady, 8.1], spike=6.0)
    assert taken == [True] * 400 + [False] and 1e-3 < float(guard.variance) ** 0.5 < 3e-3


# Runs


class Poisoned:
    """A data iterator some of whose batches make the loss NaN."""

    def __init__(self, inner, bad):
        self._inner, self._bad = inner, bad
        self.get_state, self.set_state = inner.get_state, inner.set_state

    def __next__(self):
        index = self._inner.get_state()["next_index"]
        batch = next(self._inner)
        if index in self._bad:
            batch = batch | {"weights_BT": batch["weights_BT"] * np.float32(np.nan)}
        return batch


@pytest.fixture
def poison(monkeypatch):
    iterator = loop._iterator
    return lambda *bad: monkeypatch.setattr(loop, "_iterator", lambda *a: Poisoned(iterator(*a), bad))


def trained(config, workdir):
    """Return the result of a run, and the lines of its metrics."""
    loop.train(config, workdir, DEVICES)
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}, kill_and_resume.losses(workdir)


def test_a_bad_batch_is_passed_over(folder, tmp_path, poison, capfd):
    poison(5)
    result, lines = trained(configured(folder), tmp_path)
    assert result["skipped_steps"] == 1 and result["rollbacks"] == []
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, *range(7, 13)]
    assert [line["step"] for line in lines if line["split"] == "skipped"] == [6]
    assert "step 6 is skipped: its loss is nan" in capfd.readouterr().out
    assert "steps skipped" in (tmp_path / "report.md").read_text()
    for x in load_file(tmp_path / "weights.safetensors").values():
        assert np.all(np.isfinite(x))


def test_after_several_it_goes_back_past_them_however_often_it_is_stopped(
    folder, tmp_path, poison, monkeypatch, capfd
):
    poison(6, 7, 8)
    config = configured(folder, train__bad_steps=3, model__dropout=0.1, checkpoint__keep=1)
    result, lines = trained(config, tmp_path / "alone")
    assert result["rollbacks"] == [{"from": 9, "to": 6}] and result["skipped_steps"] == 0
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    assert not any(line["split"] == "skipped" for line in lines)
    assert "3 steps in a row were skipped: going back from step 9 to 6" in capfd.readouterr().out
    assert "went back at step 9" in (tmp_path / "alone/report.md").read_text()
    write, stops = MetricsLog.write, [(7, "skipped"), (8, "skipped"), (7, "train")]

    def stopping(log, step, split, values):
        write(log, step, split, values)
        if stops and (step, split) == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stopping)
    for _ in range(4):
        again, other = trained(config, tmp_path / "stopped")
    assert not stops and again["rollbacks"] == result["rollbacks"]
    assert other == lines
    for path, x in load_file(tmp_path / "alone/weights.safetensors").items():
        np.testing.assert_array_equal(x, load_file(tmp_path / "stopped/weights.safetensors")[path], path)


def test_it_does_not_go_back_for_ever(folder, tmp_path, poison):
    poison(*range(5, 40))
    with pytest.raises(UserError, match="after going back 2 times .config.train.rollbacks."):
        trained(configured(folder, train__bad_steps=2, train__rollbacks=2), tmp_path)


def test_with_nothing_to_go_back_to_it_says_so(folder, tmp_path, poison):
    poison(*range(20))
    with pytest.raises(UserError, match="the loss of step 5 is nan, .* training diverged; lower it"):
        trained(configured(folder), tmp_path)


# Precision


def one_step(folder, mesh, dtype, bad_row=None, steps=1):
    """Return the state and metrics after a step in ``dtype``, and the text of its program."""
    settings = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    config = configured(folder, model__dtype=dtype, sharding__V=(), **settings)
    run = build_run(config, folder, jax.devices()[: int(np.prod(mesh))])
    tx, schedule = make_optimiser(config)
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        step = jit_train_step(run, tx, schedule, abstract)
        text = step.lower(abstract, abstract_batch(run)).as_text()
        batch = dict(next(run.data.train_iterator(config.train.batch, config.seed)))
        if bad_row is not None:
            batch["weights_BT"][bad_row] = np.inf
        state = initial_state(run, tx, abstract)
        before = jax.device_get(state.params)
        for _ in range(steps):
            state, metrics = step(state, put_batch(run, batch))
    return before, state, metrics, text


@pytest.fixture(scope="module")
def in_float32(folder):
    return one_step(folder, (1, 1, 1), "float32")


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 0.01), ("float16", 0.002), ("fp8", 0.05)])
def test_each_policy_steps_as_float32_does(folder, in_float32, dtype, rtol):
    _, state, metrics, text = one_step(folder, (1, 1, 1), dtype)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(metrics[name], in_float32[2][name], rtol=rtol, err_msg=name)
    assert bool(metrics["taken"]) and all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    kinds = {"bfloat16": "xbf16", "float16": "xf16", "fp8": "xf8E4M3FN"}
    found = {name for name, kind in kinds.items() if kind in text}
    assert found == {dtype} | ({"bfloat16"} if dtype == "fp8" else set())
    assert dtype != "fp8" or "xf8E5M2" in text


def test_float16_steps_alike_on_any_mesh(folder):
    _, one, metrics, _ = one_step(folder, (1, 1, 1), "float16")
    _, many, metrics_many, _ = one_step(folder, (2, 2, 2), "float16")
    np.testing.assert_allclose(metrics["loss"], metrics_many["loss"], rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], metrics_many["gradient_norm"], rtol=5e-3)
    assert float(one.guard.scale) == float(many.guard.scale) == float(metrics["loss_scale"])


def test_what_one_device_cannot_take_none_takes(folder):
    before, state, metrics, _ = one_step(folder, (4, 2, 1), "float16", bad_row=3)
    assert not bool(metrics["taken"]) and float(state.guard.scale) == watching.FIRST_SCALE / 2
    for (path, a), b in zip(paths(before).items(), jax.tree.leaves(state.params), strict=True):
        for shard in b.addressable_shards:
            np.testing.assert_array_equal(shard.data, a[shard.index], err_msg=path)
    assert int(state.step) == 1 and int(state.guard.skipped) == 1


def test_which_step_is_made_in_which_precision(folder):
    def plan(*phases, cycles=1):
        config = configured(folder, train__precision=phases, train__precision_cycles=cycles)
        made = Plan(config)
        return made.names, "".join(made.at(step)[0] for step in range(13))

    assert plan() == (("float32",), "f" * 13)
    assert plan(("bfloat16", 3), ("float32", 1))[1] == "b" * 9 + "f" * 4
    names, steps = plan(("bfloat16", 1), ("float32", 1), cycles=3)
    assert names == ("bfloat16", "float32") and steps == "bbff" * 3 + "f"


def test_precision_changes_without_compiling_again(folder, tmp_path, monkeypatch):
    compiled = []
    make = loop.compile_all

    def watch(*args):
        compiled.append(make(*args))
        return compiled[-1]

    monkeypatch.setattr(loop, "compile_all", watch)
    phases = (("bfloat16", 1), ("float32", 1))
    settings = {"train__precision": phases, "train__precision_cycles": 3, "checkpoint__every": 2}
    _, lines = trained(configured(folder, **settings), tmp_path)
    assert list(compiled[0]) == ["bfloat16", "float32"]
    _, plain = trained(configured(folder, train__precision=phases[:1]), tmp_path / "plain")
    losses = [[line["loss"] for line in x if line["split"] == "train"] for x in (lines, plain)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2]
    np.testing.assert_allclose(*losses, rtol=0.02)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__precision": (("bfloat", 1),)}, r"config.train.precision\[0\]: 'bfloat' is unknown"),
        ({"train__precision": (("float32", 0),)}, r"config.train.precision\[0\]: 0 is not allowed"),
        ({"train__precision_cycles": 0}, "config.train.precision_cycles: 0"),
        ({"train__bad_steps": 0}, "config.train.bad_steps: 0"),
        ({"train__spike": -1.0}, "config.train.spike: -1.0"),
    ],
)
def test_values_that_cannot_be(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        loop.train(configured(folder, **settings), tmp_path, DEVICES)
