"""Checkpoints: what is kept, what is restored, and what happens when one is damaged."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tiny_config

from fastformer.core.config import set_key
from fastformer.core.errors import UserError, explain
from fastformer.core.mesh import use
from fastformer.train.checkpoint import Checkpoints, restore_params
from fastformer.train.optimiser import make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def made(folder):
    """Return ``(config, tx, abstract state, state)`` on one device."""
    config = tiny_config(folder)
    tx, _ = make_optimiser(config)
    run = build_run(config, folder, jax.devices()[:1])
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        return run, abstract, initial_state(run, tx, abstract)


def at(state, step):
    """Return the state as it might be at ``step``: every number differs from other steps'."""
    return jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state).replace(
        step=jnp.asarray(step, jnp.int32)
    )


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@contextlib.contextmanager
def saved(made, workdir, steps, keep=10, best=None):
    """Yield checkpoints of ``steps``, all on the disk."""
    with contextlib.closing(Checkpoints(workdir, keep)) as checkpoints:
        for step in steps:
            known = best if best is not None and best <= step else None
            checkpoints.save(at(made[2], step), {"next": step}, {"best": known}, known)
        checkpoints.wait()
        yield checkpoints


def test_all_of_the_state_comes_back(made, tmp_path):
    with saved(made, tmp_path, (3, 7)):
        pass
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        restored = checkpoints.restore_latest(made[1])
    assert (restored.step, restored.data, restored.progress) == (7, {"next": 7}, {"best": None})
    assert jax.tree.structure(restored.state) == jax.tree.structure(made[2])
    assert equal(restored.state, at(made[2], 7))


def test_no_checkpoint_at_all(made, tmp_path):
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        assert checkpoints.restore_latest(made[1]) is None


def test_newest_and_best_are_kept_even_over_a_restart(made, tmp_path):
    with saved(made, tmp_path, range(1, 6), keep=2, best=2) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        assert checkpoints.restore_latest(made[1]).step == 5
        checkpoints.save(at(made[2], 6), {}, {}, 2)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]


def test_saving_goes_on_while_the_state_changes(made, tmp_path, monkeypatch):
    """What is written is what was given, though its memory is taken over at once."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state), donate_argnums=0)
    state, progress, save = at(made[2], 1), {"seconds": 0}, ocp.CheckpointManager.save

    def late(manager, step, args):
        progress["seconds"] = 1  # as the loop may, before orbax gets to write it
        return save(manager, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "save", late)
    with contextlib.closing(Checkpoints(tmp_path, 10)) as checkpoints:
        checkpoints.save(state, {}, progress, None)
        for _ in range(50):
            state = step(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(made[1])
    assert equal(restored.state, at(made[2], 1)) and restored.progress == {"seconds": 0}


def flip(path):
    """Flip bits in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(b ^ 0x10 for b in content[middle : middle + 8])
    path.write_bytes(content)


def largest(folder):
    """Return the largest file of numbers: what describes them may be larger, and is not all read."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "weights flipped": lambda step: flip(largest(step / "params")),
    "moments flipped": lambda step: [flip(path) for path in (step / "rest").rglob("d/*")],
    "weights truncated": lambda step: truncate(largest(step / "params")),
    "weights deleted": lambda step: largest(step / "params").unlink(),
    "index deleted": lambda step: (step / "params" / "manifest.ocdbt").unlink(),
    "description flipped": lambda step: flip(step / "meta" / "metadata"),
    "description deleted": lambda step: (step / "meta" / "metadata").unlink(),
    "moments deleted": lambda step: shutil.rmtree(step / "rest"),
    "description empty": lambda step: (step / "meta" / "metadata").write_bytes(b""),
    "all files empty": lambda step: [p.write_bytes(b"") for p in step.rglob("*") if p.is_file()],
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(made, tmp_path, capfd, kind):
    with saved(made, tmp_path, (1, 2)):
        pass
    DAMAGE[kind](tmp_path / "checkpoints" / "2")
    capfd.readouterr()
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        restored = checkpoints.restore_latest(made[1])
        assert restored.step == 1 and equal(restored.state, at(made[2], 1))
        errors = capfd.readouterr().err
        assert errors.startswith("checkpoint 2 is damaged (") and errors.endswith("); going on from 1\n")
        assert errors.count("\n") == 1
        assert checkpoints.steps() == [1]
        assert (tmp_path / "checkpoints-damaged" / "2").is_dir()
        checkpoints.save(at(made[2], 2), {}, {}, None)  # the step can be reached again
        checkpoints.wait()
        assert checkpoints.restore_latest(made[1]).step == 2


def test_all_damaged_says_what_to_do_and_leaves_them(made, tmp_path):
    with saved(made, tmp_path, (1, 2)):
        pass
    for step in ("1", "2"):
        DAMAGE["weights flipped"](tmp_path / "checkpoints" / step)
    with contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        with pytest.raises(UserError, match="every checkpoint in .* is damaged: 2 .*remove that folder"):
            checkpoints.restore_latest(made[1])
        assert checkpoints.steps() == [1, 2]


def test_weights_alone_are_those_of_the_best(made, tmp_path, capfd):
    run = made[0]
    with saved(made, run.workdir, (1, 2, 3), best=2):
        pass
    assert equal(restore_params(run), at(made[2], 2).params)
    DAMAGE["weights flipped"](run.workdir / "checkpoints" / "2")
    capfd.readouterr()
    assert equal(restore_params(run), at(made[2], 3).params)
    assert "checkpoint 2 is damaged" in capfd.readouterr().err
    assert (run.workdir / "checkpoints" / "2").is_dir()


def test_weights_of_no_run(folder, tmp_path):
    run = build_run(tiny_config(folder), tmp_path, jax.devices()[:1])
    with pytest.raises(UserError, match="has no checkpoint yet"):
        restore_params(run)


def test_weights_of_another_model(made, folder, tmp_path):
    config = tiny_config(folder)
    set_key(config, "model.width", "32")
    run = build_run(config, tmp_path, jax.devices()[:1])
    with saved(made, tmp_path, (1,)):
        pass
    message = r"params/embedding is float32\[257, 16\] in the checkpoint and float32\[257, 32\]"
    with pytest.raises(UserError, match=message) as error:
        restore_params(run)
    assert "\n" not in str(error.value)


def test_weights_of_another_dtype(made, tmp_path):
    run, abstract, state = made
    other = state.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params))
    with saved((run, abstract, other), tmp_path, (1,)) as checkpoints:
        with pytest.raises(UserError, match=r"params/embedding is bfloat16\[257, 16\] in the checkpoint and"):
            checkpoints.restore_latest(abstract)
        assert checkpoints.steps() == [1]


def test_a_disk_that_is_full_leaves_the_checkpoint_before(made, tmp_path):
    """What is under orbax calls it RESOURCE_EXHAUSTED, as it does a lack of memory."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("only root may make a small disk")
    try:
        with saved(made, tmp_path, (1,)):
            pass
        space = os.statvfs(tmp_path)
        (tmp_path / "filler").write_bytes(bytes(space.f_bfree * space.f_frsize - 2**15))
        with pytest.raises(Exception) as error, saved(made, tmp_path, (2,)):
            pass
        code, told = explain(error.value)
        assert code == 1 and told.startswith("the disk is full; make room, and the same command")
        (tmp_path / "filler").unlink()
        with saved(made, tmp_path, (3,)) as checkpoints:
            assert checkpoints.steps() == [1, 3]
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_restored_on_another_mesh(made, folder, tmp_path):
    """What one device saved, eight go on with."""
    with saved(made, tmp_path, (4,)):
        pass
    config = tiny_config(folder)
    for axis in ("fsdp", "tensor", "sequence"):
        set_key(config, f"mesh.{axis}", "2")
    set_key(config, "sharding.V", "()")
    run = build_run(config, tmp_path)
    with use(run.mesh, run.rules), contextlib.closing(Checkpoints(tmp_path, 2)) as checkpoints:
        restored = checkpoints.restore_latest(abstract_state(run, make_optimiser(config)[0]))
    assert equal(restored.state, at(made[2], 4))
    assert len(restored.state.params["embedding"].sharding.device_set) == 8
