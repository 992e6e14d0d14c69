"""Kill a training with -9 at random moments, go on, and compare with one left alone.

    python tests/kill_and_resume.py --times 10

Prints a line for each kill; exit code 0 when every run ended with the same losses to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
STEPS = 60
SAME = ("step", "split", "loss", "learning_rate", "gradient_norm", "bits_per_byte")

# A user's own machine may have other devices; one CPU device is enough to show it.
PROGRAM = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from tiny import tiny_config
from fastformer.train.loop import train
config = tiny_config(Path({folder!r}))
with config.unlocked():
    config.train.steps, config.checkpoint.every, config.evaluate.every = {steps}, 5, 20
    config.model.dropout = 0.1
train(config, {workdir!r})
"""


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    """Start the training of ``workdir`` as a process of its own; the texts lie in ``folder``."""
    program = PROGRAM.format(
        root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), workdir=str(workdir), steps=STEPS
    )
    # No forced devices: the parent's tests may have asked for eight.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, workdir: Path) -> None:
    """Let the training of ``workdir`` end, and say what it printed if it did not end well."""
    process = start(folder, workdir)
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n{output}")


def losses(workdir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in SAME if key in line} for line in lines]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Wait until ``step`` has its line (0: just started), or the process has ended."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if step == 0 or (path.exists() and path.read_text().count('"train"') >= step):
            return
        time.sleep(0.005)


def kill_once(folder: Path, workdir: Path, rng: random.Random) -> str:
    """Kill a new training of ``workdir`` at a random step and go on to the end; return what was done."""
    step = rng.randrange(STEPS)
    process = start(folder, workdir)
    wait_for_step(process, workdir, step)
    time.sleep(rng.uniform(0, 0.05))
    process.kill()
    process.communicate()
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    finish(folder, workdir)
    return f"killed after step {step} or a little later, checkpoints {kept}"


def main(times: int, seed: int) -> bool:
    """Kill ``times`` trainings, each of them once; return whether all ended as the one left alone."""
    rng, good = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(folder, folder / "alone")
        expected = losses(folder / "alone")
        for index in range(times):
            done = kill_once(folder, folder / f"killed{index}", rng)
            same = losses(folder / f"killed{index}") == expected
            good += same
            print(f"{done}: {'the same losses' if same else 'DIFFERENT losses'}", flush=True)
    print(f"{good} of {times} the same to the bit ({len(expected)} lines of metrics.jsonl each)")
    return good == times


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    raise SystemExit(0 if main(arguments.times, arguments.seed) else 1)
