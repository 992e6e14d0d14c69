"""Every attention variant under every method: pruned, rounded and taught in one run, stored and run again."""

from __future__ import annotations

import json

import pytest
from compress_tools import DEVICES, configured, train
from tiny import use_variant

from fastformer.attention import VARIANTS
from fastformer.core.errors import UserError
from fastformer.train import loop, modes

STACK = ("distil", "prune", "quantise")
PROMPT = "the model"  # at the end of training and afterwards, so that it is compiled once
SHORT = {
    "train__steps": 2, "optimiser__warmup_steps": 1, "evaluate__every": 0, "evaluate__rows": 2,
    "prune__pattern": "2:4", "quantise__rules": ("embedding=int8",), "generate__tokens": 4,
    "generate__prompt": PROMPT,
}  # fmt: skip


def run_config(folder, name: str, *methods: str):
    """Return the configuration of a short run with a variant, an encoder where it is no decoder."""
    config = configured(folder, *methods, **SHORT)
    return config, use_variant(config, name)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory, compiled_once):
    """Teachers of both kinds, by whether they decode."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    for name in ("softmax", "bigbird"):
        config, decodes = run_config(folder, name)
        found[decodes] = str(train(config, folder / name))
    return folder, found


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_taught_pruned_and_rounded(name, teachers, tmp_path, capsys):
    folder, found = teachers
    config, decodes = run_config(folder, name, *STACK)
    config.compress.distil.teacher = found[decodes]
    workdir = train(config, tmp_path)
    result = json.loads((workdir / "result.json").read_text())
    assert 0 < result["bytes_on_disk"] < 3 * result["parameters"], "weights are stored as floats"
    capsys.readouterr()
    modes.evaluate(config, workdir, {})
    again = json.loads(capsys.readouterr().out)
    for metric, value in result["quality"].items():
        assert again[metric] == pytest.approx(value, rel=1e-3), "what is stored is what was measured"
    if decodes:
        modes.generate(config, workdir, {"prompt": [PROMPT]})
        assert capsys.readouterr().out.startswith(PROMPT)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("fnet", "relations", 1.0, "relations: it reads the blocks of a decoder"),
        ("rg_lru", "relations", 1.0, "relations: the last layer, rg_lru, has no query projection"),
        ("linear", "teacher", "", "teacher: '' is not allowed; it must be the workdir of a finished run"),
    ],
)
def test_what_cannot_be_combined_says_so(name, field, value, message, teachers, tmp_path):
    folder, found = teachers
    config, decodes = run_config(folder, name, "distil")
    config.compress.distil.teacher = found[decodes]
    config.compress.distil[field] = value
    with pytest.raises(UserError, match=f"config.compress.distil.{message}"):
        loop.train(config, tmp_path, DEVICES)
