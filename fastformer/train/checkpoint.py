"""Checkpoints: written while training goes on, and checked array by array when read."""

from __future__ import annotations

import functools
import json
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fastformer.core.errors import UserError, require
from fastformer.core.mesh import use
from fastformer.train.manifest import check_fits, describe, digest
from fastformer.train.setup import Run
from fastformer.train.state import TrainState, abstract_params

FOLDER, ASIDE = "checkpoints", "checkpoints-damaged"
ITEMS = ("params", "average", "rest", "meta")  # weights stand apart, so that they can be read alone


@dataclass(frozen=True)
class CheckpointConfig:
    """Attributes: every, steps between checkpoints; keep, how many of the newest stay."""

    every: int
    keep: int

    def __post_init__(self) -> None:
        for field in ("every", "keep"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")


class Restored(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: of the checkpoint.
      state: TrainState on the mesh.
      data: state of the data iterator.
      progress: what the loop gave to ``save``.
    """

    step: int
    state: TrainState
    data: Any
    progress: dict[str, Any]


class Damaged(Exception):
    """A checkpoint that cannot be read or is not what was written; the text says why in a few words."""


@dataclass
class NewestAndBest:
    """An orbax preservation policy: the newest ``keep``, and the best.

    (orbax's own BestN forgets the metrics of earlier checkpoints when a run is started again.)
    """

    keep: int
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint, oldest first, whether it stays."""
        newest = {info.step for info in checkpoints[-self.keep :]}
        return [info.step in newest or info.step == self.best for info in checkpoints]


class Checkpoints:
    """The checkpoints of the run in ``workdir``."""

    def __init__(self, workdir: Path, keep: int, read_only: bool = False):
        _quieten()
        self._folder, self._aside = Path(workdir).absolute() / FOLDER, Path(workdir).absolute() / ASIDE
        self._policy = NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=ITEMS)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data: Any, progress: Mapping[str, Any], best: int | None) -> None:
        """Save the state of its step; returns when the arrays are copied, and writes them meanwhile.

        Args:
          data: of the data iterator, as JSON.
          progress: more to give back, as JSON.
          best: the step whose checkpoint is the best so far; it is kept.
        """
        self._policy.best, step = best, int(state.step)
        items = _items(state)
        body = {"arrays": describe(items), "data": data, "progress": progress, "best": best}
        body = json.loads(json.dumps(body))  # a copy: orbax writes it later, when the loop has gone on
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave({"body": body, "sha256": digest(body)}),
            ),
        )
        if not saved:
            raise RuntimeError(f"orbax did not save step {step}; it has {self.steps()}")

    def wait(self) -> None:
        """Wait until all that was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and end orbax's threads."""
        self._manager.close()

    def restore_latest(self, abstract: TrainState) -> Restored | None:
        """Return the newest checkpoint that is whole, on the mesh; None where there is none at all.

        Damaged ones that are newer are told on stderr and moved aside.

        Raises:
          UserError: all are damaged, or they are of another model.
        """
        damage: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            try:
                restored = self._restore(step, abstract)
            except Damaged as error:
                damage.append((step, str(error)))
                continue
            for bad, reason in damage:
                _tell(f"checkpoint {bad} is damaged ({reason}); going on from {step}")
                self._move_aside(bad)
            self._manager.reload()
            return restored
        if damage:
            raise self._all_damaged(damage)
        return None

    def _restore(self, step: int, abstract: TrainState) -> Restored:
        body = self._meta(step)
        wanted = _items(abstract)
        check_fits(body["arrays"], wanted, f"checkpoint {step} of {self._folder}")
        found = self._arrays(step, wanted, body["arrays"])
        state = TrainState(params=found["params"], average=found.get("average"), **found["rest"])
        self._policy.best = body["best"]
        return Restored(step, state, body["data"], body["progress"])

    def restore_params(self, abstract: Any) -> tuple[int, Any]:
        """Return ``(step, params)`` of the best checkpoint, or the newest if none is known as best.

        They are the average of the weights where the run keeps one. Damaged checkpoints are told on
        stderr, and left where they are: the run may be going on.

        Raises:
          UserError: there is none, all are damaged, or their weights do not fit the model.
        """
        if not self.steps():
            raise UserError(f"--workdir: {self._folder.parent} has no checkpoint yet; train first")
        damage: list[tuple[int, str]] = []
        for step in self._best_first():
            try:
                arrays = self._meta(step)["arrays"]
                item = "average" if any(path.startswith("average/") for path in arrays) else "params"
                weights = {path: entry for path, entry in arrays.items() if path.startswith(f"{item}/")}
                check_fits(weights, {item: abstract}, f"checkpoint {step} of {self._folder}")
                found = self._arrays(step, {item: abstract}, weights)[item]
            except Damaged as error:
                damage.append((step, str(error)))
                continue
            for bad, reason in damage:
                _tell(f"checkpoint {bad} is damaged ({reason}); using {step}")
            return step, found
        raise self._all_damaged(damage)

    def _best_first(self) -> list[int]:
        newest_first = self.steps()[::-1]
        for step in newest_first:
            try:
                best = self._meta(step)["best"]
            except Damaged:
                continue
            return sorted(newest_first, key=lambda s: (s != best, -s))
        return newest_first

    def _meta(self, step: int) -> dict[str, Any]:
        """Return what is written about a checkpoint, and checked by its digest."""
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            body, sha256 = restored["meta"]["body"], restored["meta"]["sha256"]
        except Exception as error:  # orbax raises whatever its readers raise
            raise Damaged(_reason(error)) from error
        if digest(body) != sha256:
            raise Damaged("its description is not what was written")
        return body

    def _arrays(self, step: int, abstract: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        """Return the items of a checkpoint, on the mesh, each array checked by its checksum."""
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:  # as above
            raise Damaged(_reason(error)) from error
        found = {name: restored[name] for name in abstract}
        for path, entry in describe(found).items():
            if entry != described[path]:
                raise Damaged(f"{path} is not what was written")
        return found

    def _move_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._aside / str(step)
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(exist_ok=True)
            (self._folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"moved {step}")

    def _all_damaged(self, damage: list[tuple[int, str]]) -> UserError:
        listed = ", ".join(f"{step} ({reason})" for step, reason in damage[:3])
        return UserError(
            f"--workdir: every checkpoint in {self._folder} is damaged: {listed}; "
            "restore one from a copy, or remove that folder to start anew"
        )


def restore_params(run: Run) -> Any:
    """Return the weights of the best checkpoint of a run, or of its newest; it says on stderr which.

    Raises:
      UserError: there is none that is whole and fits the model.
    """
    if not (run.workdir / FOLDER).is_dir():
        raise UserError(f"--workdir: {run.workdir} has no checkpoint yet; train first")
    with use(run.mesh, run.rules):
        checkpoints = Checkpoints(run.workdir, keep=1, read_only=True)
        try:
            step, params = checkpoints.restore_params(abstract_params(run))
        finally:
            checkpoints.close()
    _tell(f"weights of step {step} of {run.workdir}")
    return params


def _items(state: TrainState) -> dict[str, Any]:
    rest = {"step": state.step, "opt_state": state.opt_state, "rng": state.rng, "guard": state.guard}
    average = {} if state.average is None else {"average": state.average}
    return {"params": state.params, **average, "rest": rest}


@functools.cache
def _quieten() -> None:
    """Leave to this file to tell of damage, in one line; orbax and what is under it write pages."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Reads that were under way when another one failed end after orbax has closed its event loop.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def _reason(error: Exception) -> str:
    text = f"cannot be read: {type(error).__name__}: {error}".partition("\n")[0]
    return text if len(text) <= 100 else text[:97] + "..."


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
