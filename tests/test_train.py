"""Training from the first step to the result: interrupted, refused, told apart."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import conftest  # noqa: F401  (its flags, in a process that is started here)
import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastformer.core import config as configuration
from fastformer.core.errors import UserError, explain
from fastformer.core.mesh import use
from fastformer.core.trees import count, paths
from fastformer.train import loop, session, setup
from fastformer.train.evaluate import evaluate
from fastformer.train.groups import decayed
from fastformer.train.logging import MetricsLog
from fastformer.train.optimiser import make_optimiser
from fastformer.train.state import abstract_params
from fastformer.train.step import CompiledStep

DEVICES = jax.devices()[:1]
pytestmark = pytest.mark.usefixtures("compiled_once")
RESULT_KEYS = (
    "name", "step", "quality", "parameters", "bytes_on_disk", "train_tokens_per_second",
    "decode_tokens_per_second", "state_bytes", "flops_per_token", "peak_memory_bytes", "wall_seconds",
    "config_sha256", "versions", "device", "commit",
)  # fmt: skip


def configured(folder, **settings):
    """Return the tiny configuration with dropout, and ``settings`` as in tiny.configured."""
    return tiny.configured(folder, **{"model__dropout": 0.1} | settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def straight(folder):
    """Return the workdir of a run that nothing interrupted."""
    loop.train(configured(folder), folder / "straight", DEVICES)
    return folder / "straight"


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_all_that_it_promises(folder, straight):
    config = configured(folder)
    result = json.loads((straight / "result.json").read_text())
    assert set(RESULT_KEYS) <= set(result)
    assert result["step"] == 12 and result["config_sha256"] == configuration.sha256(config)
    weights = load_file(straight / "weights.safetensors")
    assert (straight / "weights.safetensors").stat().st_size == result["bytes_on_disk"]
    assert sum(x.size for x in weights.values()) == result["parameters"]
    assert all(x.dtype == np.float32 for x in weights.values())
    for name in ("report.md", "config.json", "checkpoints/12"):
        assert (straight / name).exists(), name
    run = setup.build_run(config, straight, DEVICES)
    with use(run.mesh, run.rules):
        abstract = abstract_params(run)
    assert set(paths(abstract)) == set(weights) and count(abstract) == result["parameters"]
    tree = jax.tree.unflatten(jax.tree.structure(abstract), [weights[path] for path in paths(abstract)])
    assert evaluate(run, tree) == result["quality"]


def test_every_step_that_is_due_has_its_line(straight):
    train = [line for line in lines(straight) if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 13))
    assert set(train[0]) == {
        "step", "split", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "seconds",
        "utilisation", "data_wait", "memory_bytes",
    }  # fmt: skip
    heldout = [line for line in lines(straight) if line["split"] == "heldout"]
    assert [line["step"] for line in heldout] == [6, 12, 12]  # the last one again on all rows
    assert heldout[0]["rows"] == heldout[1]["rows"] < heldout[2]["rows"]
    assert np.mean([line["loss"] for line in train[-3:]]) < np.mean([line["loss"] for line in train[:3]])


def test_tensorboard_reads_the_same(straight):
    events = EventAccumulator(str(straight / "tensorboard")).Reload().Scalars("train/loss")
    wanted = [(line["step"], line["loss"]) for line in lines(straight) if line["split"] == "train"]
    assert [event.step for event in events] == [step for step, _ in wanted]
    np.testing.assert_allclose([event.value for event in events], [loss for _, loss in wanted], rtol=1e-6)


def test_asked_to_stop_it_saves_and_goes_on_as_if_nothing_had_happened(
    folder, straight, tmp_path, monkeypatch, capfd
):
    write = MetricsLog.write

    def interrupting(log, step, split, values):
        write(log, step, split, values)
        if (step, split) == (5, "train"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", interrupting)
    loop.train(configured(folder), tmp_path, DEVICES)
    assert not (tmp_path / "result.json").exists()
    stopped = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 5 <= stopped <= 5 + 1 + session.LOOKAHEAD
    assert f"saved at step {stopped}; the same command goes on" in capfd.readouterr().out
    monkeypatch.undo()
    with open(
        tmp_path / "metrics.jsonl", "a"
    ) as file:  # a later step that no checkpoint has, and a torn line
        file.write(json.dumps({"step": stopped + 1, "split": "train", "loss": 0.0}) + '\n{"step": 9, "spl')
    loop.train(configured(folder), tmp_path, DEVICES)
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)
    assert load_file(tmp_path / "weights.safetensors").keys()
    for path, x in load_file(straight / "weights.safetensors").items():
        assert np.array_equal(x, load_file(tmp_path / "weights.safetensors")[path]), path


class Slow:
    """A data iterator that takes its time."""

    def __init__(self, inner):
        self._inner = inner
        self.get_state, self.set_state = inner.get_state, inner.set_state

    def __next__(self):
        time.sleep(0.05)
        return next(self._inner)


def test_a_run_shows_what_it_waits_for(folder, straight, tmp_path, monkeypatch, capfd):
    iterator = loop._iterator
    monkeypatch.setattr(loop, "_iterator", lambda *args: Slow(iterator(*args)))
    monkeypatch.setattr(session, "KNOWN", 5)
    loop.train(configured(folder), tmp_path, DEVICES)
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)
    train = [line for line in lines(tmp_path) if line["split"] == "train"]
    assert sum(line["data_wait"] for line in train) >= 0.05 * 11  # the first batch is left out
    assert all(line["utilisation"] > 0 and line["memory_bytes"] > 0 for line in train)
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0.1 < result["data_wait_fraction"] < 1
    assert 0 < result["utilisation"] < 1 < result["ceiling"]["flops_per_second"]
    assert capfd.readouterr().out.count("of training's time went into waiting for data; ") == 1
    report = (tmp_path / "report.md").read_text()
    assert "%: data is too slow" in report
    assert "FLOP/s (products of 512 x 512 matrices in float32, at the start)" in report


def train_traced(config, workdir):
    """Train on one device, in a process of its own."""
    loop.train(config, workdir, DEVICES)


def test_a_trace_of_some_steps(folder, straight, tmp_path):
    config = configured(folder, log__trace_from=3, log__trace_steps=2)
    # In a process of its own: the profiler asks every backend, and libtpu, which compiles for TPUs that are
    # not there in other tests of a process, ends it then.
    training = multiprocessing.get_context("spawn").Process(target=train_traced, args=(config, tmp_path))
    training.start()
    training.join()
    assert training.exitcode == 0
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)
    (trace,) = (tmp_path / "tensorboard").glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert {dict(event.stats).get("step_num") for event in events if event.name == "train"} == {3, 4}


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_asked_to_stop_where_it_evaluates_it_saves_first(folder, straight, tmp_path, monkeypatch, when, step):
    make, ahead, called = loop.make_evaluate, loop._evaluate_if_due, []

    def interrupting(run, stop):
        inner = make(run, stop)

        def evaluate(params, limit):
            called.append(limit)
            if len(called) == step // 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(params, limit)

        return evaluate

    def early(s):
        if s.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return ahead(s)

    if when == "before":
        monkeypatch.setattr(loop, "_evaluate_if_due", early)
    else:
        monkeypatch.setattr(loop, "make_evaluate", interrupting)
    loop.train(configured(folder), tmp_path, DEVICES)
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / str(step)).is_dir() and not (tmp_path / "result.json").exists()
    assert [line["step"] for line in lines(tmp_path) if line["split"] == "heldout"] == [6][: step // 6 - 1]
    loop.train(configured(folder), tmp_path, DEVICES)
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)


def test_asked_to_stop_in_the_last_save_it_ends_well(folder, straight, tmp_path, monkeypatch, capfd):
    save = loop._save

    def interrupting(s, wait):
        save(s, wait)
        if s.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_save", interrupting)
    loop.train(configured(folder), tmp_path, DEVICES)
    monkeypatch.undo()
    assert "stopped at step 12, which is saved" in capfd.readouterr().out
    assert not (tmp_path / "result.json").exists()
    loop.train(configured(folder), tmp_path, DEVICES)
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)


def test_killed_inside_a_save_it_goes_on_to_the_same_losses(capfd):
    assert kill_and_resume.main(times=1, seed=random.randrange(2**32), inside=1)
    assert "1 of them killed inside a save" in capfd.readouterr().out


@pytest.mark.slow
def test_killed_fifty_times_it_goes_on_to_the_same_losses():
    assert kill_and_resume.main(times=50, seed=random.randrange(2**32))


def test_a_finished_run_says_so(folder, straight, capfd, monkeypatch):
    monkeypatch.setattr(setup, "build_run", lambda *_: pytest.fail("trained again"))
    (straight / "report.md").unlink()
    loop.train(configured(folder), straight, DEVICES)
    assert "is finished: step 12" in capfd.readouterr().out
    assert (straight / "report.md").exists()


def test_a_run_of_another_configuration_is_left_alone(folder, straight):
    config = configured(folder, train__steps=13)
    with pytest.raises(UserError, match=r"config.train.steps was 12 and is 13\); choose another --workdir"):
        loop.train(config, straight, DEVICES)


def test_a_run_that_never_began_does_not_bind_its_workdir(folder, tmp_path):
    bad = configured(folder, mesh__data=8)
    with pytest.raises(UserError, match="config.mesh"):
        loop.train(bad, tmp_path, DEVICES)
    setup.open_workdir(configured(folder), tmp_path)


def test_two_trainings_in_one_workdir(folder, tmp_path):
    with open(tmp_path / setup.LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being trained in by another process"):
            loop.train(configured(folder), tmp_path, DEVICES)


def test_the_lock_of_a_process_that_was_killed_holds_nobody(tmp_path):
    path = tmp_path / setup.LOCK
    code = f"import fcntl; f = open({str(path)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True)"
    code += "; input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(UserError, match="is being trained in by another process"), setup.lock(tmp_path):
        pass
    process.kill()
    process.communicate()
    with setup.lock(tmp_path):
        assert path.exists()


def test_a_full_disk_and_a_clock_that_jumps_lose_nothing(folder, straight, tmp_path, monkeypatch):
    sync = MetricsLog.sync

    def full(log):
        if json.loads(log._path.read_text().splitlines()[-1])["step"] >= 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log._path))
        sync(log)

    # By less than what orbax waits for: its own patience goes by the date.
    jumps = itertools.cycle([0.0, 90.0, -90.0, 5.0])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    monkeypatch.setattr(MetricsLog, "sync", full)
    with pytest.raises(OSError) as error:
        loop.train(configured(folder), tmp_path, DEVICES)
    code, told = explain(error.value)
    assert code == 1 and told.startswith("the disk is full; make room, and the same command then goes on")
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}
    monkeypatch.setattr(MetricsLog, "sync", sync)
    loop.train(configured(folder), tmp_path, DEVICES)
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(straight)
    train = [line for line in lines(tmp_path) if line["split"] == "train"]
    seconds = [line["seconds"] for line in train]
    assert seconds == sorted(seconds) and all(line["tokens_per_second"] > 0 for line in train)


def test_workdirs_that_cannot_be(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir: .* cannot be written"):
        loop.train(configured(folder), tmp_path / "file", DEVICES)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        loop.train(configured(folder), tmp_path, DEVICES)
    with pytest.raises(UserError, match="holds no run"):
        setup.read_config(tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__steps": 0}, "config.train.steps: 0 is not allowed"),
        ({"train__batch": -1}, "config.train.batch: -1 is not allowed"),
        ({"optimiser__learning_rate": 0.0}, "config.optimiser.learning_rate: 0.0 is not allowed"),
        (
            {"optimiser__warmup_steps": 13},
            "config.optimiser.warmup_steps: 13 is not .* config.train.steps, 12",
        ),
        ({"optimiser__final_fraction": 1.5}, "config.optimiser.final_fraction: 1.5"),
        ({"optimiser__b2": 1.0}, "config.optimiser.b2: 1.0"),
        ({"optimiser__clip": -1.0}, "config.optimiser.clip: -1.0"),
        ({"optimiser__name": "adam"}, "config.optimiser.name: 'adam' is unknown; did you mean adamw?"),
        ({"checkpoint__every": 0}, "config.checkpoint.every: 0"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep: 0"),
        ({"evaluate__every": -1}, "config.evaluate.every: -1"),
        ({"log__every": 0}, "config.log.every: 0"),
        ({"log__trace_from": 0}, "config.log.trace_from: 0"),
        ({"log__trace_steps": -1}, "config.log.trace_steps: -1"),
        ({"seed": -1}, "config.seed: -1"),
    ],
)
def test_values_that_cannot_be(folder, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        loop.train(configured(folder, **settings), tmp_path, DEVICES)
    assert "\n" not in str(error.value)


def test_a_key_that_nobody_knows(folder, tmp_path):
    config = configured(folder)
    with config.unlocked():
        config.trian = config.train
    with pytest.raises(UserError, match="config.trian: no such key; did you mean train?"):
        loop.train(config, tmp_path, DEVICES)


def test_training_that_diverges_says_so(folder, tmp_path, monkeypatch):
    metrics = {"loss": jnp.nan, "gradient_norm": 1.0, "taken": False, "streak": 3, "skipped": 3}
    broken = CompiledStep(lambda state, batch: (state, metrics), "float32", 0, seconds=0.0, memory_bytes=0)
    monkeypatch.setattr(loop, "compile_all", lambda *_: {"float32": broken})
    with pytest.raises(UserError, match="the loss of step 1 is nan"):
        loop.train(configured(folder, train__bad_steps=3), tmp_path, DEVICES)


def test_learning_rates(folder):
    _, schedule = make_optimiser(configured(folder, train__steps=20, optimiser__learning_rate=1.0))
    rates = [float(schedule(made)) for made in range(20)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])  # update s is made at schedule(s - 1)
    np.testing.assert_allclose(rates[11], (1 + 0.1) / 2, rtol=1e-6)  # half-way down the cosine
    np.testing.assert_allclose(rates[19], 0.1, rtol=1e-6)
    _, flat = make_optimiser(configured(folder, optimiser__warmup_steps=0))
    assert float(flat(0)) < 3e-3 and float(flat(11)) == pytest.approx(3e-4)
    _, all_of_it = make_optimiser(configured(folder, optimiser__warmup_steps=12))
    assert float(all_of_it(11)) == pytest.approx(3e-3)


def test_only_matrices_decay_and_gradients_are_clipped(folder):
    params = {"up": {"weight": np.ones((2, 2))}, "norm": {"scale": np.ones(2)}, "embedding": np.ones((3, 2))}
    params |= {"mixer": {"bias": np.ones((2, 2)), "gate": np.ones((2, 2)), "weight": np.ones(2)}}
    marked = [path for path, yes in paths(decayed(params)).items() if yes]
    assert sorted(marked) == ["embedding", "up/weight"]
    tx, _ = make_optimiser(configured(folder, optimiser__learning_rate=1.0, optimiser__warmup_steps=0))
    params = {"weight": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    assert np.all(np.asarray(updates["weight"]) < 0) and not np.any(np.asarray(updates["bias"]))
    gradients = jax.tree.map(lambda x: 100 * x, params)
    _, state = tx.update(gradients, tx.init(params), params)
    moments = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state[1].mu)])
    assert np.linalg.norm(moments / 0.1) == pytest.approx(1.0, rel=1e-5)
