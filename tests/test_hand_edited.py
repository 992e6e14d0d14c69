"""Files of a run that an editor or a crash changed: told in one line, or made anew, never a traceback."""

from __future__ import annotations

import json
import shutil

import jax
import pytest
import tiny

from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.report import folder as folders
from fastformer.report.run_report import read_metrics, read_result
from fastformer.train import loop, modes
from fastformer.train.logging import MetricsLog

DEVICES = jax.devices()[:1]
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    loop.train(tiny.configured(folder), workdir, DEVICES)
    return workdir


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"length": None}, "config.data.length: None is not of type int"),
        ("data", {"length": 10**30}, "config.data.length"),
        ("data", "length", "config.data.length: is missing"),
        ("evaluate", {"overlap": "a"}, "config.evaluate.overlap: 'a' is not of type int"),
        ("sharding", {"B": 5}, "config.sharding.B: 5 is not of type tuple"),
        ("sharding", {"B": ["data", "data"]}, "axes of the mesh, each once"),
        ("model", {"attention": [1]}, "config.model.attention"),
        ("model", {"attention": {}}, "config.model.attention.name: None is unknown"),
        ("model", {"rope_base": float("nan")}, "config.json cannot be read (it has NaN, which is no number)"),
        ("model", {"width": "x"}, "config.model.width: 'x' is not of type int"),
        ("task", "name", "config.task.name: None is unknown"),
        ("compress", "methods", "config.compress.methods: is missing"),
        ("compress", {"batches": "a"}, "config.compress.batches: 'a' is not of type int"),
        ("train", {"steps": None}, "config.train.steps: None is not of type int"),
    ],
)
def test_a_configuration_that_cannot_be(run, section, change, message):
    found = json.loads((run / "config.json").read_text())
    if isinstance(change, str):
        del found[section][change]
    else:
        found[section] |= change
    (run / "config.json").write_text(json.dumps(found))
    with pytest.raises(UserError) as error:
        modes.evaluate(modes.of_run(run, None, ()), run, {})
    assert message in str(error.value) and "\n" not in str(error.value)
    if section not in ("evaluate", "train"):
        with pytest.raises(UserError):
            modes.generate(modes.of_run(run, None, ()), run, {"prompt": ["a"]})


def test_a_configuration_of_brackets(run):
    (run / "config.json").write_text(DEEP)
    with pytest.raises(UserError, match="config.json cannot be read"):
        modes.of_run(run, None, ())


@pytest.mark.parametrize(
    "line",
    [
        '{"split": "train", "step": "x", "loss": 1}', '{"split": "train", "step": 3, "loss": "x"}',
        '{"split": [1], "step": 3, "loss": 1}', '{"step": 3, "loss": 1}', "[]", "{", DEEP,
        '{"split": "train", "step": 3, "loss": null}', "\ud800",
    ],
)  # fmt: skip
def test_a_line_of_metrics_that_is_none_is_left_out(run, line):
    before, path = read_metrics(run), run / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}", errors="replace")
    assert len(before) > 12 and read_metrics(run) == before
    MetricsLog(run, 12).close()
    assert read_metrics(run) == before and len(path.read_text().splitlines()) == len(before)


@pytest.mark.parametrize(
    "change",
    [
        {"quality": {"bits_per_byte": "x"}}, {"quality": {"bits_per_byte": None}}, {"quality": [1]},
        {"parameters": "x"}, {"yardsticks": [1]}, {"samples": [1]}, {"samples": 5}, {"step": "12"},
    ],
)  # fmt: skip
def test_a_result_that_is_none_is_made_again(run, change, folder, capsys):
    path = run / "result.json"
    right = json.loads(path.read_text())
    path.write_text(json.dumps(right | change))
    assert read_result(run) == {}
    if "yardsticks" in change:  # of the others the same is seen without it
        loop.train(tiny.configured(folder), run, DEVICES)
        assert read_result(run)["quality"] == right["quality"]
        assert "going on from step 12" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", DEEP, '{"step": 12}'])
def test_a_result_of_other_words_is_none(run, text):
    (run / "result.json").write_text(text)
    assert read_result(run) == {}


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_where_a_run_has_a_folder(name, folder, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=f"{name} is a file, and a run has a folder there"):
        loop.train(tiny.configured(folder), tmp_path, DEVICES)


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "result.json", "report.md"])
def test_a_folder_where_a_run_has_a_file(name, folder, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, and a run has a file there"):
        loop.train(tiny.configured(folder), tmp_path, DEVICES)


def test_without_its_checkpoints_a_run_starts_anew(run, folder, capsys):
    """As the line that tells of damaged ones advises."""
    right = json.loads((run / "result.json").read_text())
    shutil.rmtree(run / "checkpoints")
    loop.train(tiny.configured(folder), run, DEVICES)
    assert "from the start" in capsys.readouterr().out
    assert read_result(run)["quality"] == right["quality"]
    assert configuration.sha256(tiny.configured(folder)) == read_result(run)["config_sha256"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"arm": "low"}', b"[]", b"\xff", b"[" * 100_000,
        b'{"arm":[1],"seed":0,"config_sha256":"x","metrics":{}}',
        b'{"arm":"low","seed":0,"config_sha256":"x","metrics":{},"config":[1]}',
        b'{"arm":"low","seed":0,"config_sha256":"x","metrics":{"quality.bits_per_byte":"x"}}',
    ],
)  # fmt: skip
def test_a_line_of_an_experiment_that_is_no_result_is_told(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_bytes(line + b"\n")
    what = ": is no text in UTF-8" if line == b"\xff" else ", line 1: is not a result"
    with pytest.raises(UserError, match=f"results.jsonl{what}"):
        folders.read_rows(path)
