"""The training loop: open or resume, step, evaluate, save, stop when asked, sum up."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from fastformer import compress
from fastformer.compress.store import WEIGHTS
from fastformer.core import config as configuration
from fastformer.core.config import CONFIG, section
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.decode import GenerateConfig
from fastformer.train import deployed, result, setup
from fastformer.train.begin import begun
from fastformer.train.checkpoint import FOLDER, CheckpointConfig, Checkpoints, Restored
from fastformer.train.evaluate import (
    BrokenOff,
    EvaluateConfig,
    Evaluation,
    apart,
    check_samples,
    decoded,
    make_evaluate,
)
from fastformer.train.gauge import Trace, make_gauge
from fastformer.train.logging import EVENTS, METRICS, LogConfig, MetricsLog
from fastformer.train.optimiser import make_optimiser
from fastformer.train.precision import Plan
from fastformer.train.progress import ProgressLine, clock
from fastformer.train.session import BadSteps, Session
from fastformer.train.setup import Run
from fastformer.train.state import TrainState, abstract_state, initial_state
from fastformer.train.step import compile_all, part_read
from fastformer.train.stop import Stop
from fastformer.train.times import Times


def train(config: ConfigDict, workdir: Path | str, devices: list[jax.Device] | None = None) -> None:
    """Train the run of ``config`` in ``workdir``, from its last checkpoint if it has one, to its result.

    SIGTERM and SIGINT save the step under way first; it then returns, and the same call goes on. (Where
    there is nothing to save yet, they raise signals.Ended.)

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
    Plan(config)
    compress.build(config).check()
    workdir = setup.open_workdir(config, workdir)
    check_kinds(workdir)
    with setup.lock(workdir), Stop() as stop:
        if result.is_finished(config, workdir):
            result.say_finished(workdir)
            return
        if config.train.steps and deployed.is_imported(workdir):
            raise UserError(
                f"--workdir: {workdir} holds an imported model; train elsewhere with "
                f"config.train.init={workdir}"
            )
        setup.forget_text(workdir)
        run = setup.build_run(config, workdir, devices)
        check_samples(run)
        with use(run.mesh, run.rules):
            _train(run, run.compression.optimiser(tx, run.model), schedule, stop)


def check_kinds(workdir: Path) -> None:
    """Check that no file stands where a run keeps a folder, and no folder where it keeps a file.

    Raises:
      UserError: one does.
    """
    folders, files = (FOLDER, EVENTS), (CONFIG, setup.LOCK, METRICS, result.RESULT, result.REPORT, WEIGHTS)
    for name in (*folders, *files):
        path = workdir / name
        if path.exists() and path.is_dir() != (name in folders):
            found, kept = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
            raise UserError(f"--workdir: {path} is {found}, and a run has {kept} there; choose another")


def _train(run: Run, tx: Any, schedule: Any, stop: Stop) -> None:
    abstract, plan = abstract_state(run, tx), Plan(run.config)
    checkpoints = Checkpoints(run.workdir, run.config.checkpoint.keep)
    with contextlib.closing(checkpoints):
        restored = checkpoints.restore_latest(abstract)
        step = restored.step if restored else 0
        sha256 = configuration.sha256(setup.bound(run.config, run.workdir))
        _check_same_run(run, restored, sha256)
        with (
            contextlib.closing(MetricsLog(run.workdir, step)) as log,
            ProgressLine(run.config.train.steps, step) as line,
        ):
            line.say(f"{run.config.name} in {run.workdir}, {_origin(step)}")
            line.say(f"{run.data.description}; on {result.device(run.mesh)}")
            # Before the minutes of compiling: the text may be too short, another run's weights not there.
            iterator = _iterator(run, restored.data if restored else None)
            state = restored.state if restored else _first(run, tx, abstract, line)
            frozen, programs, gauge = deployed.frozen(run), {}, None
            if run.config.train.steps:
                programs = compile_all(run, tx, schedule, abstract, plan, frozen)
                gauge = make_gauge(run, tx, schedule, abstract, programs[plan.at(step)], frozen)
            session = Session(
                run=run,
                stop=stop,
                plan=plan,
                programs=programs,
                checkpoints=checkpoints,
                log=log,
                line=line,
                evaluate=make_evaluate(run, stop.agreed),
                iterator=iterator,
                state=state,
                step=step,
                best=_best(restored),
                times=Times(**restored.progress["times"]) if restored else Times(),
                gauge=gauge,
                trace=Trace(section(LogConfig, run.config, "log"), run.workdir),
                rollbacks=restored.progress["rollbacks"] if restored else [],
                first=step,
                config_sha256=sha256,
                owed=bool(restored and restored.progress.get("owed")),
            )
            # From here on nothing is left that a mistake in the configuration could stop.
            setup.keep_config(run.config, run.workdir)
            session.times.run += sum(program.seconds for program in session.programs.values())
            session.mark()
            with contextlib.closing(session.trace):
                if _reach_the_end(session, abstract):
                    _finish(session)


def _origin(step: int) -> str:
    return f"going on from step {step}" if step else "from the start"


def _first(run: Run, tx: Any, abstract: TrainState, line: ProgressLine) -> TrainState:
    """Return the state at step 0."""
    state = initial_state(run, tx, abstract)
    state, said = begun(run, state, abstract)
    if said:
        line.say(said)
    return state


def _check_same_run(run: Run, restored: Restored | None, sha256: str) -> None:
    if restored and restored.progress["config_sha256"] != sha256:
        raise UserError(
            f"--workdir: checkpoint {restored.step} in {run.workdir} is of another configuration than "
            "config.json there; choose another --workdir"
        )


def _iterator(run: Run, state: Any) -> Any:
    iterator = run.data.train_iterator(run.config.train.batch, run.config.seed, *part_read(run))
    if state is not None:
        iterator.set_state(state)
    return iterator


def _best(restored: Restored | None) -> tuple[int, float] | None:
    return tuple(restored.progress["best"]) if restored and restored.progress["best"] else None


def _reach_the_end(s: Session, abstract: TrainState) -> bool:
    """Train to the last step; return False if asked to stop before."""
    s.stop.at_once = False
    _evaluate_if_due(s)
    if s.owed and _stopped(s):
        return False
    while s.step < s.run.config.train.steps:
        try:
            if not _advance(s):
                return False
        except BadSteps as bad:
            _go_back(s, abstract, bad)
    s.stop.at_once = True  # all that is left can be done again from the last checkpoint
    return not _stopped(s)


def _stopped(s: Session) -> bool:
    """Return, and say, whether a signal came since the step was saved."""
    asked = s.stop.agreed()
    if asked:
        s.line.say(f"stopped at step {s.step}, which is saved; the same command goes on from there")
    return asked


def _advance(s: Session) -> bool:
    """Make one more step, and what is due after it; return False if asked to stop."""
    config = s.run.config
    s.advance()
    last = s.step == config.train.steps
    every = config.evaluate.every
    s.owed = bool(every) and (last or s.step % every == 0)
    better = _evaluate_if_due(s)
    stopping = s.stop.agreed()
    if better or last or stopping or s.step % config.checkpoint.every == 0:
        s.look(all_of_them=True)
        # What a run goes back to must come before the bad steps.
        if not s.streak or last:
            _save(s, wait=last or stopping)
    if stopping:
        where = "from its last checkpoint" if s.streak else "from there"
        saved = " among skipped steps" if s.streak else " and saved"
        s.line.say(f"stopped{saved} at step {s.step}; the same command goes on {where}")
    return not stopping


def _go_back(s: Session, abstract: TrainState, bad: BadSteps) -> None:
    """Go on from the last good checkpoint, with the data that comes after the bad batches.

    Raises:
      UserError: there is none, or the run went back often enough.
    """
    again = len(s.rollbacks) >= s.run.config.train.rollbacks
    s.checkpoints.wait()
    restored = None if again else s.checkpoints.restore_latest(abstract)
    if restored is None:
        raise UserError(
            f"config.optimiser.learning_rate: the loss of step {bad.step} is {bad.loss}, its gradient norm "
            f"{bad.norm}, and {s.streak} steps in a row were skipped: training diverged"
            + (f" after going back {len(s.rollbacks)} times (config.train.rollbacks)" if again else "")
            + "; lower it, warm up longer (config.optimiser.warmup_steps) or clip (config.optimiser.clip)"
        )
    s.line.say(f"{s.streak} steps in a row were skipped: going back from step {bad.step} to {restored.step}")
    s.rollbacks.append({"from": bad.step, "to": restored.step})
    s.pending.clear()
    s.iterator.set_state(bad.data)
    s.log.rewind(restored.step)
    s.state, s.step, s.best, s.last, s.streak = restored.state, restored.step, _best(restored), None, 0
    s.mark()


def _evaluate_if_due(s: Session) -> bool:
    """Make the evaluation that is owed, and return whether this is the best so far.

    Asked to stop it breaks off, for there may not be the time, and is made when the run goes on.
    """
    if not s.owed:
        return False
    try:
        better = _evaluate(s)
    except BrokenOff:
        return False
    s.owed = False
    return better


def _evaluate(s: Session) -> bool:
    """Evaluate; return whether this is the best so far."""
    with s.pause():
        found = s.evaluate(s.state.weights, s.run.config.evaluate.rows)
        s.last = s.step, found
        _write_heldout(s, found)
        metric = found.quality[s.run.task.metric]
        better = s.best is None or (metric > s.best[1] if s.run.task.higher else metric < s.best[1])
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
        progress = {"best": s.best, "times": vars(s.times), "config_sha256": s.config_sha256}
        progress |= {"rollbacks": s.rollbacks, "owed": s.owed}
        s.checkpoints.save(s.state, s.iterator.get_state(), progress, s.best[0] if s.best else None)
        if wait:
            s.checkpoints.wait()


def _finish(s: Session) -> None:
    """Evaluate the last weights on all held-out rows, and write what the run came to."""
    with s.pause():
        weights = deployed.export(s.run, s.state.weights)
        known = s.last is not None and s.last[0] == s.step and not s.run.config.evaluate.rows
        known = known and weights is s.state.weights
        found = s.last[1] if known else s.evaluate(weights, 0)
        if not known:
            _write_heldout(s, found)
        quality = found.quality | apart(s.run, weights) | decoded(s.run, weights)
    s.say_waiting()
    program = s.program if s.programs else None
    written = result.write_result(s.run, s.state, weights, program, quality, s.times, s.gauge, s.rollbacks)
    s.line.say(f"trained and evaluated in {clock(s.times.run)}; {written}")
