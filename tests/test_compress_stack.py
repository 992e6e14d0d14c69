"""Methods on top of each other: in the order of the config, interrupted and gone on, stored and run."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import optax
import pytest
from compress_tools import DEVICES, configured, train

from fastformer import compress
from fastformer.compress import Compression, Method, store
from fastformer.compress.frame import METHODS
from fastformer.core.errors import FieldError, UserError
from fastformer.train import loop, modes
from fastformer.train.logging import MetricsLog

pytestmark = pytest.mark.usefixtures("compiled_once")


class Tracer(Method):
    """A method that leaves its name wherever a hook is called."""

    def __init__(self, name):
        self.name = name

    def on_model(self, model):
        return (*model, self.name)

    def on_loss(self, loss):
        return lambda *args: (*loss(*args), self.name)

    def on_optimiser(self, tx, model):
        return optax.chain(tx, optax.scale(2.0)) if self.name == "a" else optax.chain(tx, optax.scale(3.0))

    def on_export(self, model, params, calibration):
        return (*params, self.name)


def test_hooks_are_called_in_the_order_of_the_config():
    for order in ("ab", "ba"):
        compression = Compression(tuple((name, Tracer(name)) for name in order))
        assert compression.model(()) == compression.export(None, (), None) == tuple(order)
        assert compression.loss(lambda: ())() == tuple(order)
        tx = compression.optimiser(optax.identity(), None)
        assert tx.update(1.0, tx.init(1.0))[0] == 6.0
    assert not Compression() and Compression().model("as it is") == "as it is"


def test_a_mistake_of_a_hook_names_its_section():
    class Picky(Method):
        def on_model(self, model):
            raise FieldError("some", "thing")

    with pytest.raises(UserError, match=re.escape("config.compress.picky.some: thing")):
        Compression((("picky", Picky()),)).model(None)


def test_sections_are_checked_even_where_they_are_not_used(tmp_path):
    assert compress.build(configured(tmp_path)) == Compression()
    for key, value in (("quantise__format", "int3"), ("prune__scope", "all"), ("distil__dtype", "int8")):
        with pytest.raises(UserError, match=re.escape(f"config.compress.{key.replace('__', '.')}: ")):
            compress.build(configured(tmp_path, **{key: value}))
    config = configured(tmp_path)
    with config.unlocked():
        config.compress.prune.sparcity = 0.5
    with pytest.raises(UserError, match="prune.sparcity: no such key; did you mean sparsity?"):
        compress.build(config)


def test_three_methods_interrupted_and_gone_on(tmp_path, monkeypatch, capsys):
    small = {"train__steps": 8, "checkpoint__every": 8, "evaluate__every": 0, "model__dropout": 0.1}
    teacher = train(configured(tmp_path, **small | {"train__steps": 4}), tmp_path / "teacher")
    settings = {
        "distil__teacher": str(teacher), "distil__weight": 0.7, "prune__end": 6, "prune__every": 1,
        "quantise__start": 3, "quantise__rules": ("embedding=int4",), **small,
    }  # fmt: skip
    config = configured(tmp_path, "distil", "prune", "quantise", **settings)
    assert set(config.compress.methods) == set(METHODS) - {"linearise"}  # which has a test of its own
    straight = train(config, tmp_path / "straight")

    write = MetricsLog.write

    def interrupting(log, step, split, values):
        write(log, step, split, values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", interrupting)
    loop.train(config, tmp_path / "resumed", DEVICES)
    assert not (tmp_path / "resumed/weights.safetensors").exists()
    monkeypatch.undo()
    train(config, tmp_path / "resumed")
    files = [(workdir / "weights.safetensors").read_bytes() for workdir in (straight, tmp_path / "resumed")]
    assert files[0] == files[1]

    arrays = store.load(straight / "weights.safetensors")
    up = arrays["layer_0/mlp/up/weight/qvalue"]
    matrices = [x for name, x in arrays.items() if name.endswith("weight/qvalue")]
    zeros = np.mean(np.concatenate([np.ravel(x) for x in matrices]) == 0)
    assert up.dtype == np.int8 and 0.5 <= zeros < 0.56  # what rounds to zero besides
    assert not any("distil" in name for name in arrays)
    result = json.loads((straight / "result.json").read_text())
    capsys.readouterr()
    modes.evaluate(config, straight, ())
    found = json.loads(capsys.readouterr().out)["bits_per_byte"]
    # Other devices sum in another order, and an input half-way between two integers goes the other way.
    assert found == pytest.approx(result["quality"]["bits_per_byte"], rel=1e-4)
