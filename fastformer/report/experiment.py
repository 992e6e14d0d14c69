"""Run what an experiment folder lacks, then rewrite its README and check its claims."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from fastformer.core import config as configuration
from fastformer.core.signals import ENDING, asking
from fastformer.core.supervisor import passing_on
from fastformer.report import summary
from fastformer.report.claims import FAILS
from fastformer.report.folder import Experiment, append_row, current, read, read_rows, row_of
from fastformer.report.run_report import read_result

Start = Callable[[Sequence[tuple[Sequence[str], Path]], Sequence[int]], Iterator[tuple[int, int]]]
RUNS = Path("runs")
RESULTS = "results.jsonl"
DONE, FAILED, USER_MISTAKE, CLAIM_FAILED = 0, 1, 2, 3


def run_experiment(folder: str, smoke: bool, launch: Path, start: Start | None = None) -> int:
    """Run every arm and seed without a result, each as a process of its own; return the exit code.

    A full run appends to ``folder/results.jsonl`` and rewrites the README's results and picture. A
    smoke run makes one short run an arm, writes all of it under ``runs/smoke/<name>`` and does not
    enforce claims. Signals go on to the run under way, which saves first; the same command goes on.

    Args:
      folder: such as ``experiments/mixers``.
      launch: the program that makes one run, ``launch.py``.
      start: what starts all of them at once; default is one after another, here.

    Returns:
      0 done or stopped, 3 a claim fails; when a run failed 1, or 2 if by the user's mistake.

    Raises:
      UserError: there is no such experiment, or its folder is not in order.
    """
    experiment = read(folder)
    where, runs = experiment.path, RUNS / experiment.name
    if smoke:
        experiment = experiment.in_smoke()
        where = runs = RUNS / "smoke" / experiment.name
        shutil.rmtree(where, ignore_errors=True)
    rows = read_rows(where / RESULTS)
    missing = _missing(experiment, rows)
    codes, child, planned = [], _Child(), [_plan(experiment, *key, runs, launch) for key in missing]
    with passing_on(child.signal, ENDING if start else asking()) as child.asked:
        for index, code, last_line in _ends(planned, start, child, experiment.name):
            arm, seed, config, (_, workdir) = planned[index]
            result = read_result(workdir)
            if child.asked:
                break
            if code == DONE and result.get("config_sha256") != configuration.sha256(config):
                code, last_line = FAILED, f"it left no result of this configuration in {workdir}"
            if code == DONE:
                append_row(where / RESULTS, row_of(arm, config, result))
            else:
                what = f"{experiment.name}: arm {arm}, seed {seed} failed with exit code {code}: {last_line}"
                print(what, file=sys.stderr)
            codes.append(code)
    rows = read_rows(where / RESULTS)
    summary.write(experiment, rows, where)
    if child.asked:
        print(f"{experiment.name}: stopped; the same command goes on from here")
        return DONE
    print(f"{experiment.name}: {where / summary.README} shows the results")
    return _verdict(experiment, rows, smoke, [code for code in codes if code != DONE])


class _Planned(NamedTuple):
    """A run to be made: of which arm and seed, its configuration, and its command and workdir."""

    arm: str
    seed: int
    config: ConfigDict
    run: tuple[Sequence[str], Path]


def _plan(experiment: Experiment, arm: str, seed: int, runs: Path, launch: Path) -> _Planned:
    workdir, config = runs / f"{arm}-{seed}", experiment.config(arm, seed)
    flags = [f"--config={experiment.config_argument(arm)}", f"--workdir={workdir}"]
    flags += [f"--config.{key}={value}" for key, value in experiment.flags(seed)]
    return _Planned(arm, seed, config, ([sys.executable, str(launch), *flags], workdir))


def _ends(
    planned: Sequence[_Planned], start: Start | None, child: _Child, name: str
) -> Iterator[tuple[int, int, str]]:
    """Make all runs; yield index, exit code and the last line of stderr of each as it ends."""
    if start is not None:
        for one in planned:
            _set_aside(one.run[1], configuration.sha256(one.config))
        for index, code in start([one.run for one in planned], child.asked):
            yield index, code, f"{planned[index].run[1]} holds what it wrote"
        return
    for index, one in enumerate(planned):
        print(f"{name}: run {index + 1} of {len(planned)}: arm {one.arm}, seed {one.seed}", flush=True)
        _set_aside(one.run[1], configuration.sha256(one.config))
        yield index, *child.run(one.run[0])


def _missing(experiment: Experiment, rows: list[dict]) -> list[tuple[str, int]]:
    # Seeds outside, so that an experiment cut short has all arms of its first seeds.
    wanted = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    here = current(rows, experiment)
    return [key for key in wanted if key not in here]


def _set_aside(workdir: Path, sha256: str) -> None:
    """Rename a workdir that holds a run of another configuration, for this one needs its place."""
    try:
        found = configuration.sha256(configuration.from_json((workdir / "config.json").read_text()))
    except (OSError, ValueError, TypeError, AttributeError):
        return  # nothing there, or nothing that can be read: the run itself says what to do
    if found != sha256:
        workdir.rename(workdir.with_name(f"{workdir.name}.until-{time.strftime('%Y%m%dT%H%M%S')}"))


def _verdict(experiment: Experiment, rows: list[dict], smoke: bool, failures: list[int]) -> int:
    verdicts = [] if smoke else summary.verdicts(experiment, current(rows, experiment))
    for verdict in verdicts:
        stream = sys.stderr if verdict.outcome == FAILS else sys.stdout
        print(f"{experiment.name}: claim {verdict}", file=stream)
    if smoke:
        print("smoke: so short a form says nothing about the claims, which are not checked")
    if failures:
        return USER_MISTAKE if set(failures) == {USER_MISTAKE} else FAILED
    return CLAIM_FAILED if any(verdict.outcome == FAILS for verdict in verdicts) else DONE


@dataclass
class _Child:
    """The run under way. It has a process group of its own, so that it gets each signal once, from here."""

    asked: Sequence[int] = ()
    process: subprocess.Popen | None = field(default=None)

    def run(self, command: list[str]) -> tuple[int, str]:
        """Run a command; return its exit code and the last line of its stderr, which is shown too."""
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, errors="replace", process_group=0
        )
        if self.asked:  # the signal came while the process started
            self.process.send_signal(signal.SIGTERM)
        last = [""]
        copier = threading.Thread(target=_copy, args=(self.process.stderr, last), daemon=True)
        copier.start()
        code = self.process.wait()
        copier.join(timeout=5)  # a worker that outlives the run may hold the pipe open
        return code, last[0]

    def signal(self, number: int) -> None:
        """Send a signal to the run under way."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)


def _copy(stream: object, last: list[str]) -> None:
    for line in stream:
        sys.stderr.write(line)
        sys.stderr.flush()
        if line.strip():
            last[0] = line.strip()
