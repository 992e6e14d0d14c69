"""What ``--mode`` names: each takes a configuration, a workdir and the prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from fastformer import models, tasks
from fastformer.core import config as configuration
from fastformer.core.config import section
from fastformer.core.errors import UserError
from fastformer.core.mesh import MeshConfig, make_mesh, rules, use
from fastformer.data import load_tokeniser
from fastformer.decode import GenerateConfig
from fastformer.decode import generate as continue_prompts
from fastformer.report.benchmark import run_benchmark
from fastformer.train import loop, setup
from fastformer.train.checkpoint import restore_params
from fastformer.train.evaluate import evaluate as measure


def train(config: ConfigDict, workdir: Path, prompts: Sequence[str]) -> None:
    """Train, or go on training, to the result."""
    loop.train(config, workdir)


def benchmark(config: ConfigDict, workdir: Path, prompts: Sequence[str]) -> None:
    """Time attention over lengths."""
    run_benchmark(config, workdir)


def evaluate(config: ConfigDict, workdir: Path, prompts: Sequence[str]) -> None:
    """Print the metrics of the run's best weights on all of the held-out split, as JSON."""
    run = setup.build_run(config, workdir)
    params = restore_params(run)
    print(json.dumps(measure(run, params) | run.data.yardsticks(), indent=2))


def generate(config: ConfigDict, workdir: Path, prompts: Sequence[str]) -> None:
    """Print each prompt with what follows it; the text that the run was trained on need not be there."""
    options = section(GenerateConfig, config, "generate")
    prompts = list(prompts) or [options.prompt]
    tokeniser = load_tokeniser(workdir)
    mesh, axis_rules = make_mesh(section(MeshConfig, config, "mesh")), rules(config.sharding)
    model = models.build(config, tokeniser.size, config.data.length)
    run = setup.Run(config, workdir, mesh, axis_rules, None, model, tasks.build(config))
    params = restore_params(run)
    with use(mesh, axis_rules):
        found = continue_prompts(model, params, tokeniser, prompts, options, config.data.length)
    for index, (prompt, text) in enumerate(zip(prompts, found)):
        if len(prompts) > 1:
            print(f"{'' if index == 0 else chr(10)}--- prompt {index + 1}")
        print(prompt + text)


MODES: dict[str, Callable[[ConfigDict, Path, Sequence[str]], None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
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
