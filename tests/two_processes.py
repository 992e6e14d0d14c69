"""Train a run in several processes on this machine, as on several machines; each with devices of its own.

    python tests/two_processes.py FOLDER WORKDIR PROCESSES STEPS

Prints what each process printed; exit code 0 when all ended well.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEVICES = 4  # over all processes
TIMEOUT = 600  # seconds

PROGRAM = """
import sys; sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from tiny import tiny_config
from fastformer.core import distributed
from fastformer.train.loop import train
config = tiny_config(Path({folder!r}))
with config.unlocked():
    config.train.steps = {steps}
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor, config.mesh.sequence = {mesh}
    if config.mesh.tensor > 1:
        config.sharding.V = ()
    config.distributed.update(coordinator={coordinator!r}, processes={processes}, index={index})
distributed.join(config)
train(config, {workdir!r})
"""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    folder: Path, workdir: Path, processes: int, steps: int, mesh: tuple[int, ...] = (2, 2, 1, 1)
) -> list[str]:
    """Train to ``steps``; return what each process printed.

    Args:
      mesh: devices along data, fsdp, tensor and sequence.

    Raises:
      SystemExit: one did not end well.
    """
    coordinator = f"127.0.0.1:{free_port()}" if processes > 1 else ""
    flags = (
        f"--xla_force_host_platform_device_count={DEVICES // processes} --xla_backend_optimization_level=0"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = []
    for index in range(processes):
        program = PROGRAM.format(
            root=str(ROOT),
            tests=str(ROOT / "tests"),
            folder=str(folder),
            workdir=str(workdir),
            steps=steps,
            mesh=mesh,
            coordinator=coordinator,
            processes=processes,
            index=index,
        )
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", program], env=environment, **output))
    outputs = []
    try:
        for process in started:
            outputs.append(process.communicate(timeout=TIMEOUT)[0])
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs):
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}:\n{output}")
    return outputs


if __name__ == "__main__":
    print("\n---\n".join(run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
