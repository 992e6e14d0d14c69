"""Kill a training with -9 at random moments, every other time inside a save, and go on to the same end.

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


def wait_for_save(process: subprocess.Popen, workdir: Path) -> None:
    """Wait until a checkpoint is being written, or the process has ended."""
    while process.poll() is None and not torn(workdir):
        time.sleep(0.0005)


def torn(workdir: Path) -> list[str]:
    """Return the names of checkpoints that are not whole."""
    return [path.name for path in (workdir / "checkpoints").glob("*") if not path.name.isdigit()]


def kill_once(folder: Path, workdir: Path, rng: random.Random, inside: bool = False) -> str:
    """Kill a new training of ``workdir`` at a random step and go on to the end; return what was done.

    Args:
      inside: kill it while it writes a checkpoint.
    """
    step = rng.randrange(STEPS - 5 if inside else STEPS)
    process = start(folder, workdir)
    wait_for_step(process, workdir, step)
    if inside:
        wait_for_save(process, workdir)
    time.sleep(rng.uniform(0, 0.01 if inside else 0.05))
    process.kill()
    process.communicate()
    left = torn(workdir)
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    finish(folder, workdir)
    where = f", inside a save ({left[0]})" if left else ""
    return f"killed after step {step} or a little later{where}, checkpoints {kept}"


def main(times: int, seed: int, inside: int = 2) -> bool:
    """Kill ``times`` trainings, each of them once; return whether all ended as the one left alone.

    Args:
      inside: every so many-th is killed inside a save.
    """
    rng, good, within = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finish(folder, folder / "alone")
        expected = losses(folder / "alone")
        for index in range(times):
            done = kill_once(folder, folder / f"killed{index}", rng, (index + 1) % inside == 0)
            same = losses(folder / f"killed{index}") == expected
            good, within = good + same, within + ("inside a save" in done)
            print(f"{done}: {'the same losses' if same else 'DIFFERENT losses'}", flush=True)
    lines = f"{len(expected)} lines of metrics.jsonl each"
    print(f"{good} of {times} the same to the bit, {within} of them killed inside a save ({lines})")
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
