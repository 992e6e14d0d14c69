"""Models from elsewhere as runs, and runs as models elsewhere."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict
from safetensors.numpy import save

from fastformer import compress, interop, tasks
from fastformer.compress.store import WEIGHTS
from fastformer.compress.teacher import open_teacher
from fastformer.core.config import CONFIG
from fastformer.core.errors import FieldError, UserError
from fastformer.core.mesh import use
from fastformer.core.trees import paths
from fastformer.data.atomic import atomic, make_directory
from fastformer.data.tokenisers import OF_RUN
from fastformer.train import deployed, setup

ONCE = ("prune", "quantise")  # the methods that change weights which are not trained


def make(config: ConfigDict, workdir: Path, source: str) -> str:
    """Make a workdir of the model in ``source``, to be evaluated, sampled, taught from and begun with.

    Args:
      config: its section ``model`` becomes the model's; its compression methods round or prune what is
        stored, once, looking at its text where they do.

    Raises:
      UserError: the workdir is a run already, or ``interop.read`` cannot read the model.
    """
    if (workdir / CONFIG).exists():
        raise UserError(f"--workdir: {workdir} holds a run already; choose another")
    for name, _ in compress.build(config).methods:
        if name not in ONCE:
            raise UserError(
                f"config.compress.methods: {name} is part of training, and an import is not trained; "
                f"allowed here: {', '.join(ONCE)}"
            )
    found = interop.read(source, config)
    config = found.config.copy_and_resolve_references().unlock()
    config.data.tokeniser = f"{OF_RUN}{workdir}"
    task = tasks.build(config)
    if task.head is not None and task.head.size:
        raise UserError(
            f"config.task.name: {task.name} ends in a head, which no model from elsewhere brings along; "
            "import for another task, and train this one from there (config.train.init)"
        )
    config.lock()
    make_directory(workdir, "--workdir")
    found.tokeniser.save(workdir)
    weights = save(paths(found.params))
    if config.compress.methods:
        run = setup.build_run(config, workdir)
        with use(run.mesh, run.rules):
            weights = deployed.to_bytes(run, deployed.export(run, found.params))
    with atomic(workdir / WEIGHTS) as file:
        file.write(weights)
    setup.keep_config(config, workdir)
    count = sum(x.size for x in paths(found.params).values())
    return (
        f"{workdir}: {count:,} parameters in {len(weights):,} bytes, {found.tokeniser.size:,} tokens, "
        f"rows of {config.data.length} of the {found.longest:,} that it can hold; it goes where a finished "
        "run does: config.train.init, config.compress.distil.teacher, --mode=evaluate, generate and export"
    )


def export(workdir: Path, form: str, output: str) -> str:
    """Write the stored weights of a finished run in a format of others; integers become floats first.

    Raises:
      UserError: there is no finished run, or the format cannot hold it.
    """
    try:
        run = open_teacher(str(workdir), 0, "float32")
        if run.tokeniser is not None:
            run = open_teacher(str(workdir), run.tokeniser.size, "float32")
        folder = interop.write(
            form, output, run.model, lambda: run.weights(jnp.float32, lambda x, _: x), run.tokeniser
        )
    except FieldError as error:
        if error.field.startswith("--"):
            raise
        raise UserError(f"--workdir: {error.message}") from error
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; {size:,} bytes"
