"""What starts processes: it starts them again when one dies, passes signals on, and tells mistakes once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_and_resume
import pytest
from tiny import tiny_config

from fastformer.core import distributed, launchers, slurm, supervisor
from fastformer.core.config import flatten
from fastformer.core.distributed import ALONE, DistributedConfig
from fastformer.core.errors import UserError

ROOT = Path(__file__).parent.parent
STEPS = 30
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def start(folder, workdir, launcher, *more):
    """Start a run of two processes with two devices each."""
    changed = tiny_config(folder)
    changed.train.steps, changed.checkpoint.every, changed.evaluate.every = STEPS, 5, 0
    changed.distributed.processes = 2
    flags = [f"--config.{key}={value}" for key, value in flatten(changed).items()]
    command = [sys.executable, "launch.py", "--config=configs/base.py", f"--workdir={workdir}", *flags]
    devices = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [*command, f"--launcher={launcher}", *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process):
    """Return the ids of a process's children, in the order in which they were started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def undisturbed(folder, compiled_once):
    """Return the workdir of a run as a job of submitit's local executor."""
    settings = "--config.distributed.slurm=cluster=local,timeout_min=30"
    process = start(folder, folder / "job", "slurm", settings)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert err.startswith("launcher: job ") and err.count("\n") == 1
    return folder / "job"


def test_a_job_of_two_tasks_trains_as_one_run(undisturbed):
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["step"] == STEPS and result["device"].startswith("4 x cpu")
    outputs = sorted(undisturbed.glob("slurm/*_log.out"))
    assert ["trained and evaluated" in path.read_text() for path in outputs] == [True, False]


def test_killed_then_stopped_then_ended_it_is_as_if_nothing_had_happened(folder, tmp_path, undisturbed):
    process = start(folder, tmp_path, "local")
    kill_and_resume.wait_for_step(process, tmp_path, 6)
    os.kill(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    line = process.stderr.readline()
    assert time.monotonic() - killed < 60
    assert line.startswith("launcher: process 1 of 2 was killed by SIGKILL (")
    assert "; starting all 2 again from step " in line and line.endswith(" (2 restarts left)\n")
    kill_and_resume.wait_for_step(process, tmp_path, 16)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0 and err == "" and out.count("; the same command goes on from there") == 1
    stopped = int(out.partition("stopped and saved at step ")[2].partition(";")[0])
    assert 16 <= stopped < STEPS and (tmp_path / "checkpoints" / str(stopped)).is_dir()
    process = start(folder, tmp_path, "local")
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0 and f"going on from step {stopped}" in out, err
    assert kill_and_resume.losses(tmp_path) == kill_and_resume.losses(undisturbed)


# With a program that only pretends to train

PRETEND = """
import sys, time
from pathlib import Path
if sys.argv[-1].endswith("index=0"):
    time.sleep(60)
folder = Path(sys.argv[1])
count = len(list(folder.glob("started-*")))
(folder / f"started-{count}").touch()
if count < int(sys.argv[2]):
    (folder / "checkpoints" / str(count)).mkdir(parents=True)
print("the reason", file=sys.stderr)
sys.exit(5)
"""


@pytest.mark.parametrize(("checkpoints", "starts"), [(0, 2), (2, 3)])
def test_it_gives_up_after_so_many_restarts_without_a_new_checkpoint(tmp_path, capfd, checkpoints, starts):
    options = DistributedConfig(**ALONE | {"processes": 2, "restarts": 1})
    command = [sys.executable, "-c", PRETEND, str(tmp_path), str(checkpoints)]
    assert supervisor.supervise(command, options, tmp_path) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == starts == len(list(tmp_path.glob("started-*")))
    assert lines[0].startswith("launcher: process 1 of 2 ended with exit code 5 (")
    assert "at last: the reason); starting all 2 again from " in lines[0]
    assert lines[-1].endswith("giving up")


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_mistake_is_told_once_and_not_tried_again(tmp_path, capfd, launcher):
    program = f"open({str(tmp_path / 'started')!r}, 'a').write('.'); print('launch.py: config.a: no', file=2)"
    program = program.replace("file=2", "file=__import__('sys').stderr") + "; raise SystemExit(2)"
    options = DistributedConfig(**ALONE | {"processes": 2, "slurm": ("cluster=local",)})
    assert launchers.LAUNCHERS[launcher]([sys.executable, "-c", program], options, tmp_path) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("launcher: job ")]
    assert told == ["launch.py: config.a: no"] and (tmp_path / "started").read_text() == ".."


def test_each_process_sees_its_share_of_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert supervisor.devices_of(1, 2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    assert supervisor.devices_of(1, 2) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 3, "slurm": ("nodes=2",)}, "config.distributed.processes: 3 .* of the 2 nodes"),
        ({"slurm": ("partition",)}, "config.distributed.slurm: 'partition' is not allowed"),
        ({"slurm": ("cluster=local", "a=b")}, "config.distributed.slurm: Parameter 'a' need"),
        ({"slurm": ("cluster=local", "nodes=a")}, "config.distributed.slurm: .nodes=a. is not allowed"),
        ({}, "config.distributed.slurm: Could not detect .srun."),
    ],
)
def test_jobs_that_cannot_be(tmp_path, settings, message):
    overrides = [(f"distributed.{key}", value) for key, value in settings.items()]
    with pytest.raises(UserError, match=message) as error:
        next(launchers.side_by_side("slurm", overrides)([(["true"], tmp_path)], ()))
    assert "\n" not in str(error.value)


def test_without_submitit_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="--launcher: slurm needs submitit .pip install submitit.$"):
        slurm.submit(["true"], DistributedConfig(**ALONE), tmp_path)


def test_the_launcher_chooses_the_coordinator(tmp_path):
    options = DistributedConfig(**ALONE | {"coordinator": "host:1"})
    with pytest.raises(UserError, match="config.distributed.coordinator: 'host:1' .* --launcher=local"):
        supervisor.supervise(["true"], options, tmp_path)


def test_a_process_that_fails_does_not_wait_for_the_others(tmp_path):
    """JAX's own end waits minutes for them."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import jax
jax.distributed.is_initialized = lambda: True
import atexit, time
atexit.register(time.sleep, 60)
from fastformer.core.distributed import leave
leave(2)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 2
    assert distributed.HEARTBEAT < 60


def test_a_closed_terminal_leaves_a_job(monkeypatch, tmp_path):
    before, seen = signal.getsignal(signal.SIGHUP), {}

    def submit_all(runs, options, asked):
        seen.update((number, signal.getsignal(number)) for number in (signal.SIGHUP, signal.SIGTERM))
        yield 0, 0

    monkeypatch.setattr(slurm, "submit_all", submit_all)
    assert slurm.submit(["true"], ALONE, tmp_path) == 0
    assert seen[signal.SIGHUP] is before
    assert seen[signal.SIGTERM] is not signal.getsignal(signal.SIGTERM)
