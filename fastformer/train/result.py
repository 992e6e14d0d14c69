"""What a run came to: result.json, the weights to deploy, the report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fastformer.compress.method import bare
from fastformer.compress.store import WEIGHTS
from fastformer.core import config as configuration
from fastformer.core.trees import count
from fastformer.data.atomic import atomic
from fastformer.decode import decode_tokens_per_second, stored
from fastformer.report.cost import state_bytes
from fastformer.report.run_report import REPORT, RESULT, read_result, write_report
from fastformer.train import deployed
from fastformer.train.checkpoint import FOLDER
from fastformer.train.evaluate import completer
from fastformer.train.gauge import Gauge
from fastformer.train.setup import Run
from fastformer.train.state import TrainState, abstract_params
from fastformer.train.step import CompiledStep, peak_memory_bytes
from fastformer.train.times import Times

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def is_finished(config: ConfigDict, workdir: Path) -> bool:
    """Return whether the run has its result and its last checkpoint; one that never trains has none."""
    return (
        (not config.train.steps or (workdir / FOLDER / str(config.train.steps)).is_dir())
        and (workdir / WEIGHTS).exists()
        and read_result(workdir).get("step") == config.train.steps
    )


def say_finished(workdir: Path) -> None:
    """Print what a finished run came to, and write its report if that is missing."""
    found = read_result(workdir)
    if not (workdir / REPORT).exists():
        write_report(workdir)
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found["quality"].items())
    print(
        f"{workdir} is finished: step {found['step']}, held-out {numbers}; see {workdir / REPORT}", flush=True
    )


def write_result(
    run: Run,
    state: TrainState,
    weights: Any,
    step_fn: CompiledStep | None,
    quality: Mapping[str, float],
    times: Times,
    gauge: Gauge | None,
    rollbacks: Sequence[Mapping[str, int]] = (),
) -> Path:
    """Write the last weights as safetensors, then ``result.json``, then the report; return the report's path.

    Args:
      weights: of ``state``, as deployed.
      step_fn: that made ``state``; none where nothing was trained.
      quality: of the last weights on the whole held-out split.
      times: seconds that it took.
      gauge: what its speed is measured against; none where nothing was trained.
      rollbacks: from which step the run went back to which.
    """
    config, step = run.config, int(state.step)
    decodes, decoder = hasattr(run.model, "init_state"), stored(run.model, config.generate.state)
    samples = run.task.samples(completer(run, weights, run.data.tokeniser), run.data, config.generate.prompt)
    packed = deployed.to_bytes(run, weights)
    found = {
        "name": config.name,
        "step": step,
        "weights": "last",  # of the two kinds that are kept, last and best, these are measured here
        "quality": dict(quality),
        "signatures": run.task.signatures(run.data),
        "yardsticks": run.data.yardsticks(),
        "samples": samples,
        "parameters": count(abstract_params(dataclasses.replace(run, model=bare(run.model)))),
        "bytes_on_disk": len(packed),
        "decode_tokens_per_second": decode_tokens_per_second(decoder, weights) if decodes else None,
        "state_bytes": state_bytes(decoder, config.data.length) if decodes else None,
        **(_of_training(run, step_fn, gauge, times, step) if step_fn else {}),
        "wall_seconds": times.run,
        "skipped_steps": int(state.guard.skipped),
        "rollbacks": list(rollbacks),
        "config_sha256": configuration.sha256(config),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": device(run.mesh),
        "commit": commit(),
        "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
    if jax.process_index() == 0:
        for name, content in ((WEIGHTS, packed), (RESULT, (json.dumps(found, indent=2) + "\n").encode())):
            with atomic(run.workdir / name) as file:
                file.write(content)
        write_report(run.workdir)
    return run.workdir / REPORT


def _of_training(run: Run, step_fn: CompiledStep, gauge: Gauge, times: Times, steps: int) -> dict[str, Any]:
    """Return what the steps took; nothing of it is known of a run that made none."""
    tokens = run.config.train.batch * run.config.data.length
    pace = steps / max(times.stepping, 1e-9)
    return {
        "train_tokens_per_second": pace * tokens,
        "flops_per_token": None if step_fn.flops is None else step_fn.flops // tokens,
        "utilisation": gauge.utilisation(pace),
        "ceiling": {"flops_per_second": gauge.ceiling, "origin": gauge.origin},
        "data_wait_fraction": times.waiting / max(times.stepping, 1e-9),
        "peak_memory_bytes": peak_memory_bytes(run.mesh, step_fn),
    }


def device(mesh: Mesh) -> str:
    """Return such as ``"8 x NVIDIA H100"`` or ``"1 x cpu (x86_64, 2 cores)"``."""
    first = mesh.devices.flat[0]
    cores = f" ({platform.machine()}, {os.cpu_count()} cores)" if first.platform == "cpu" else ""
    return f"{mesh.size} x {first.device_kind}{cores}"


def commit() -> str | None:
    """Return the commit that this code is at, ``-dirty`` when a tracked Python file was changed since.

    None outside of git. Other files do not count: an experiment writes its own results while it runs.
    """

    def git(*words: str) -> subprocess.CompletedProcess:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=30)

    try:
        head = git("rev-parse", "HEAD")
        changed = git("diff", "--quiet", "HEAD", "--", ":(top,glob)**/*.py")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + "-dirty" * (changed.returncode == 1) if head.returncode == 0 else None
