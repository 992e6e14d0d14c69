"""Two processes, each with devices and data of its own, train as one does."""

from __future__ import annotations

import json

import jax
import kill_and_resume
import numpy as np
import pytest
import two_processes
from safetensors.numpy import load_file
from tiny import tiny_config

from fastformer.core import distributed
from fastformer.core.errors import UserError


def test_two_processes_train_as_one(tmp_path):
    """They save, evaluate, and write a result, log and weights as one process does."""
    tiny_config(tmp_path)
    two_processes.run(tmp_path, tmp_path / "one", 1, 8)
    outputs = two_processes.run(tmp_path, tmp_path / "two", 2, 8)
    # The first speaks for both.
    assert "trained and" in outputs[0] and "trained and" not in outputs[1]
    one, two = (kill_and_resume.losses(tmp_path / name) for name in ("one", "two"))
    assert [(line["step"], line["split"]) for line in one] == [(line["step"], line["split"]) for line in two]
    for a, b in zip(one, two):
        for name in a:
            if name != "split":
                np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{a['step']} {name}")
    weights = [load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two")]
    for path, x in weights[0].items():
        np.testing.assert_allclose(x, weights[1][path], rtol=1e-3, atol=1e-5, err_msg=path)
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["step"] == 8 and result["device"].startswith("4 x cpu")
    # Along tensor and time, in which rows are the same in both processes.
    two_processes.run(tmp_path, tmp_path / "across", 2, 4, mesh=(1, 1, 2, 2))
    across = kill_and_resume.losses(tmp_path / "across")
    losses, right = ([x["loss"] for x in lines if x["split"] == "train"][:2] for lines in (across, one))
    np.testing.assert_allclose(losses, right, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"processes": 2}, "config.distributed.coordinator: '' is not allowed; it must be host:port"),
        ({"coordinator": "host"}, "config.distributed.coordinator: 'host' is not allowed"),
        ({"coordinator": "h:1", "processes": 2, "index": 2}, "config.distributed.index: 2 .* from 0 to 1"),
        ({"processes": 0}, "config.distributed.processes: 0"),
        ({"coordinator": "auto"}, "config.distributed.coordinator: auto finds no cluster"),
    ],
)
def test_values_that_cannot_be(tmp_path, settings, message, monkeypatch):
    def initialize(**_):  # the real one may only be asked before JAX has looked for devices
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    config = tiny_config(tmp_path)
    config.distributed.update(settings)
    with pytest.raises(UserError, match=message):
        distributed.join(config)


def test_alone_nothing_is_joined(tmp_path):
    config = tiny_config(tmp_path)
    distributed.join(config)
    assert config.distributed.to_dict() == distributed.ALONE
