"""The training loop: open or resume, step, evaluate, save, stop when asked, sum up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fastformer import compress
from fastformer.core import config as configuration
from fastformer.core.config import section
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.decode import GenerateConfig
from fastformer.train import deployed, result, setup
from fastformer.train.checkpoint import CheckpointConfig, Checkpoints, Restored
from fastformer.train.evaluate import EvaluateConfig, Evaluation, make_evaluate
from fastformer.train.logging import LogConfig, MetricsLog
from fastformer.train.optimiser import make_optimiser
from fastformer.train.progress import ProgressLine, clock
from fastformer.train.session import Session, Times
from fastformer.train.setup import Run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import compile_train_step, put_batch
from fastformer.train.stop import Stop, Stopped


def train(config: ConfigDict, workdir: Path | str, devices: list[jax.Device] | None = None) -> None:
    """Train the run of ``config`` in ``workdir``, from its last checkpoint if it has one, to its result.

    SIGTERM and SIGINT save the step under way first; it then returns, and the same call goes on.

    Args:
      devices: to train on (default: all).

    Raises:
      UserError: the configuration, the text or the workdir cannot be, or training diverged.
    """
    for name, owner in (
        ("train", setup.TrainConfig),
        ("evaluate", EvaluateConfig),
        ("checkpoint", CheckpointConfig),
        ("log", LogConfig),
        ("generate", GenerateConfig),
    ):
        section(owner, config, name)
    tx, schedule = make_optimiser(config)
    compress.build(config).check()
    workdir = setup.open_workdir(config, workdir)
    with setup.lock(workdir), Stop() as stop:
        try:
            if result.is_finished(config, workdir):
                result.say_finished(workdir)
                return
            setup.forget_text(workdir)
            run = setup.build_run(config, workdir, devices)
            setup.keep_config(config, workdir)
            with use(run.mesh, run.rules):
                _train(run, run.compression.optimiser(tx, run.model), schedule, stop)
        except Stopped:
            print("stopped, with nothing left to save; the same command goes on", flush=True)


def _train(run: Run, tx: Any, schedule: Any, stop: Stop) -> None:
    abstract = abstract_state(run, tx)
    checkpoints = Checkpoints(run.workdir, run.config.checkpoint.keep)
    with contextlib.closing(checkpoints):
        restored = checkpoints.restore_latest(abstract)
        step = restored.step if restored else 0
        _check_same_run(run, restored)
        with (
            contextlib.closing(MetricsLog(run.workdir, step)) as log,
            ProgressLine(run.config.train.steps, step) as line,
        ):
            line.say(f"{run.config.name} in {run.workdir}, {_origin(step)}")
            line.say(f"{run.data.description}; on {result.device(run.mesh)}")
            session = Session(
                run=run,
                stop=stop,
                step_fn=compile_train_step(run, tx, schedule, abstract, deployed.frozen(run)),
                checkpoints=checkpoints,
                log=log,
                line=line,
                evaluate=make_evaluate(run),
                iterator=_iterator(run, restored.data if restored else None),
                state=restored.state if restored else initial_state(run, tx, abstract),
                step=step,
                best=tuple(restored.progress["best"]) if restored and restored.progress["best"] else None,
                times=Times(**restored.progress["times"]) if restored else Times(),
            )
            session.times.run += session.step_fn.seconds
            session.marked = step, session.times.stepping
            if _reach_the_end(session):
                _finish(session)


def _origin(step: int) -> str:
    return f"going on from step {step}" if step else "from the start"


def _check_same_run(run: Run, restored: Restored | None) -> None:
    if restored and restored.progress["config_sha256"] != configuration.sha256(run.config):
        raise UserError(
            f"--workdir: checkpoint {restored.step} in {run.workdir} is of another configuration than "
            "config.json there; choose another --workdir"
        )


def _iterator(run: Run, state: Any) -> Any:
    iterator = run.data.train_iterator(
        run.config.train.batch, run.config.seed, jax.process_index(), jax.process_count()
    )
    if state is not None:
        iterator.set_state(state)
    return iterator


def _reach_the_end(s: Session) -> bool:
    """Train to the last step; return False if asked to stop before."""
    config = s.run.config
    s.stop.at_once = False
    while s.step < config.train.steps:
        s.state, metrics = s.step_fn.call(s.state, put_batch(s.run, next(s.iterator)))
        s.step += 1
        s.pending.append((s.step, metrics))
        s.look()
        last = s.step == config.train.steps
        every = config.evaluate.every
        better = _evaluate(s) if every and (last or s.step % every == 0) else False
        stopping = s.stop.agreed()
        if better or last or stopping or s.step % config.checkpoint.every == 0:
            _save(s, wait=last or stopping)
        if stopping:
            s.line.say(f"stopped and saved at step {s.step}; the same command goes on from there")
            return False
    s.stop.at_once = True  # all that is left can be done again from the last checkpoint
    return True


def _evaluate(s: Session) -> bool:
    """Evaluate; return whether this is the best so far."""
    with s.pause():
        found = s.evaluate(s.state.params, s.run.config.evaluate.rows)
        s.last = s.step, found
        _write_heldout(s, found)
        metric = found.quality[s.run.task.metric]
        better = s.best is None or metric < s.best[1]
        if better:
            s.best = s.step, metric
    return better


def _write_heldout(s: Session, found: Evaluation) -> None:
    s.log.write(s.step, "heldout", {"loss": found.loss, **found.quality, "rows": found.rows})
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.quality.items())
    s.line.say(f"step {s.step}: held-out {numbers} ({found.rows} rows)")


def _save(s: Session, wait: bool) -> None:
    with s.pause():
        s.log.sync()
        sha256 = configuration.sha256(s.run.config)
        progress = {"best": s.best, "times": vars(s.times), "config_sha256": sha256}
        s.checkpoints.save(s.state, s.iterator.get_state(), progress, s.best[0] if s.best else None)
        if wait:
            s.checkpoints.wait()


def _finish(s: Session) -> None:
    """Evaluate the last weights on all held-out rows, and write what the run came to."""
    with s.pause():
        weights = deployed.export(s.run, s.state.params)
        known = s.last is not None and s.last[0] == s.step and not s.run.config.evaluate.rows
        known = known and weights is s.state.params
        found = s.last[1] if known else s.evaluate(weights, 0)
        if not known:
            _write_heldout(s, found)
    written = result.write_result(
        s.run, s.state, weights, s.step_fn, found.quality, {"run": s.times.run, "stepping": s.times.stepping}
    )
    s.line.say(f"done in {clock(s.times.run)}; {written}")
