"""What ``--mode`` names: each takes a configuration, a workdir and what is asked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fastformer import compress, models, tasks
from fastformer.core import config as configuration
from fastformer.core.config import section
from fastformer.core.errors import UserError
from fastformer.core.mesh import MeshConfig, make_mesh, rules, use
from fastformer.data import DataConfig, load_tokeniser
from fastformer.data.atomic import make_directory
from fastformer.data.sources import SOURCES, split_source
from fastformer.decode import GenerateConfig
from fastformer.report import comparison
from fastformer.report.benchmark import run_benchmark
from fastformer.train import ahead, deployed, imports, loop, result, setup
from fastformer.train.evaluate import EvaluateConfig, completer
from fastformer.train.evaluate import evaluate as measure

Asked = Mapping[str, Sequence[str]]  # by flag, what --mode=generate is to answer


def train(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Train, or go on training, to the result."""
    loop.train(config, workdir)


def train_all(configs: Sequence[ConfigDict]) -> None:
    """Train one run after another, each in ``runs/<its name>``, and compare them, unless asked to stop."""
    runs = {config.name: Path(f"runs/{config.name}") for config in configs}
    for config in configs:
        loop.train(config, runs[config.name])
        if jax.process_count() > 1:  # the first of them writes the result
            multihost_utils.sync_global_devices(f"trained {config.name}")
        if not result.is_finished(config, runs[config.name]):
            return
    if jax.process_index() == 0:
        print(comparison.write(runs))


def benchmark(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Time attention over lengths."""
    run_benchmark(config, workdir)


def evaluate(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Print the metrics of the run's weights, best or as stored, on all of the held-out split, as JSON."""
    section(EvaluateConfig, config, "evaluate")
    run = setup.build_run(config, workdir)
    params = deployed.restore(run)
    rows = run.data.heldout_rows(config.evaluate.overlap)
    print(f"evaluating all {rows:,} held-out rows", file=sys.stderr, flush=True)
    print(json.dumps(measure(run, params) | run.data.yardsticks(), indent=2))


def generate(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Print what the task makes of what is asked; the data that the run was trained on need not be there."""
    options = section(GenerateConfig, config, "generate")
    section(DataConfig, config, "data")
    task = tasks.build(config)
    if not asked and task.asks == ("prompt",):
        asked = {"prompt": [options.prompt]}
    task.check_asked(asked)
    tokeniser = load_tokeniser(workdir)
    mesh, axis_rules = make_mesh(section(MeshConfig, config, "mesh")), rules(config.sharding)
    compression = compress.build(config)
    model = compression.model(models.build(config, tokeniser.size, config.data.length, task.head))
    run = setup.Run(config, workdir, mesh, axis_rules, None, model, task, compression)
    params = deployed.restore(run)
    with use(mesh, axis_rules):
        found = task.respond(completer(run, params, tokeniser), tokeniser, asked, model, params)
    for index, text in enumerate(found):
        if task.asks == ("prompt",) and len(found) > 1:
            print(f"{'' if index == 0 else chr(10)}--- prompt {index + 1}")
        print(text)


def prepare(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Fetch what the data needs, where that is known how, and prepare it; print what it holds."""
    options, task = section(DataConfig, config, "data"), tasks.build(config)
    key, argument = split_source(options.source)
    if SOURCES[key].fetch:
        SOURCES[key].fetch(argument, make_directory(options.root(), "config.data.directory"))
    print(task.open(options, None, config).description)


def compile_ahead(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Print what the train step needs on a TPU topology, as a table and as JSON."""
    if len(asked.get("topology", ())) != 1:
        raise UserError("--mode=compile: needs one --topology, as --topology=v5e:16x16")
    found = ahead.compile_for(config, asked["topology"][0])
    print(f"{ahead.describe(found)}\n\n{json.dumps(found)}")


def import_(config: ConfigDict, workdir: Path, asked: Asked) -> None:
    """Make the run in ``workdir`` that a model from elsewhere is."""
    if len(asked.get("weights", ())) != 1:
        raise UserError("--mode=import: needs one --weights: a .gguf, a directory or the name of a model")
    print(imports.make(config, workdir, asked["weights"][0]))


def export(config: ConfigDict | None, workdir: Path, asked: Asked) -> None:
    """Write the run's deployed weights in a format of others."""
    for name in ("format", "output"):
        if len(asked.get(name, ())) != 1:
            raise UserError(f"--mode=export: needs one --{name}")
    print(imports.export(workdir, asked["format"][0], asked["output"][0]))


MODES: dict[str, Callable[[ConfigDict, Path, Asked], None]] = {
    "train": train,
    "prepare": prepare,
    "evaluate": evaluate,
    "generate": generate,
    "compile": compile_ahead,
    "import": import_,
    "export": export,
    "benchmark": benchmark,
}


def of_run(workdir: Path, given: ConfigDict | None, overrides: Sequence[tuple[str, str]]) -> ConfigDict:
    """Return the configuration of the run in ``workdir``, with overrides of how it is evaluated or sampled.

    Args:
      given: by ``--config``, if it was: its run must be this one but for those sections.

    Raises:
      UserError: there is no run, an override would change what was trained, or the run is another.
    """
    kept = setup.read_config(workdir)
    if given is None:
        given = setup.read_config(workdir)
        for key, text in overrides:
            configuration.set_key(given, key, text)
    free = ("evaluate.", "generate.", "mesh.", "sharding.", "distributed.", "data.directory")
    for key, old, new in configuration.differences(kept, given):
        if not key.startswith(free):
            raise UserError(
                f"config.{key}: the run in {workdir} has {old!r}, not {new!r}; only evaluate, generate, mesh "
                "and sharding may differ from training"
            )
    return given
