"""fastformer's command line: flags -> config -> one run. It only wires; README.md shows its uses."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastformer.core import config as configuration
from fastformer.core import distributed, large_pages, launchers, signals
from fastformer.core.errors import UserError, explain
from fastformer.core.flags import ASKED, FROM_CONFIG, lines_of, parse

ROOT = Path(__file__).resolve().parent


def run(argv: Sequence[str]) -> int:
    """Do what the flags say; return the exit code."""
    flags, overrides = parse(argv)
    try:
        launch = Path(os.path.relpath(ROOT / "launch.py"))
    except FileNotFoundError as error:
        raise UserError("the current directory is not there any more; go to one that is") from error
    if flags.experiment:
        from fastformer.report.experiment import run_experiment

        signals.end_program()
        start = launchers.side_by_side(flags.launcher, overrides) if flags.launcher else None
        return run_experiment(flags.experiment, flags.smoke, launch, start)
    mode, config = flags.mode or "train", None
    if flags.config:
        config = configuration.load(flags.config, overrides)
    elif mode in FROM_CONFIG or not flags.workdir:
        also = "" if mode in FROM_CONFIG else ", or --workdir=DIR of a run"
        raise UserError(f"--mode={mode}: needs --config=FILE, as in --config=configs/quickstart.py{also}")
    alone = mode != "train" or flags.workdir or overrides or ":" in flags.config
    then = () if alone else configuration.followers(flags.config)
    workdir = Path(flags.workdir or f"runs/{config.name}")
    try:
        workdir.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"--workdir: {workdir} cannot be reached: {error}") from error
    if flags.launcher:
        return launchers.launch(flags.launcher, [sys.executable, str(launch), *argv], config, workdir)
    # What follows imports JAX, which takes seconds: a mistake in a flag or key is answered before.
    from fastformer.train import modes

    signals.end_program()
    if config is not None:
        distributed.join(config)
    if mode in ("evaluate", "generate"):
        config = modes.of_run(workdir, config, () if flags.config else overrides)
    asked = {name: getattr(flags, name) for name in ASKED}
    asked |= {name: lines_of(getattr(flags, name) or []) for name in ("source", "sentence")}
    if then:
        modes.train_all([config, *then])
    else:
        modes.MODES[mode](config, workdir, {name: texts for name, texts in asked.items() if texts})
    return 0


def main() -> int:
    """Run, with the user's mistakes as one line on stderr and exit code 2."""
    signals.end_process()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a prompt may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="replace")
    try:
        return run(sys.argv[1:])
    except signals.Ended as ended:
        print(ended, file=sys.stderr)
        return signals.leave(0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there at exit
        print("launch.py: nobody reads what it prints any more; the same command goes on", file=sys.stderr)
        return 1
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        print(f"launch.py: {told[1]}", file=sys.stderr)
        return told[0]


if __name__ == "__main__":
    large_pages.start_again()
    distributed.leave(main())
