"""Every experiment folder is in order; and the machinery, with a program that only pretends to train."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from tiny import tiny_config

from fastformer.core import config as configuration
from fastformer.core import launchers
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.report import experiment, folder, summary
from fastformer.report.run_report import read_result
from fastformer.train import loop, setup
from fastformer.train.optimiser import make_optimiser
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import compile_train_step, put_batch

ROOT = Path(__file__).parent.parent
TAUGHT = ("distil", "linearise")
FOLDERS = sorted(file.parent for file in (ROOT / "experiments").glob("*/config.py"))
ARMS = [
    pytest.param(path, arm, id=f"{path.name}-{arm}") for path in FOLDERS for arm in folder.read(path).arms
]


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_a_folder_is_in_order(path):
    found = folder.read(path)
    assert f"--experiment=experiments/{path.name}" in found.about["Command"]
    float(found.about["Minutes"].split()[0])
    assert found.claims, "an experiment says what it expects"
    configs = [found.config(arm, seed) for arm in found.arms for seed in found.seeds]
    assert len({configuration.sha256(c) for c in configs}) == len(configs), "two arms are the same run"
    smoke = found.in_smoke()
    assert len(smoke.seeds) == 1 and smoke.config(next(iter(smoke.arms)), smoke.seeds[0]).train.steps <= 50


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_the_readme_shows_the_results(path):
    text = (path / summary.README).read_text()
    rows = folder.read_rows(path / experiment.RESULTS)
    section = summary.section(folder.read(path), rows)
    advice = f"{path.name}/README.md is stale: python launch.py --experiment=experiments/{path.name} mends it"
    assert summary.replace(text, section, path / summary.README) == text, advice
    assert (path / summary.PICTURE).is_file() == (summary.PICTURE in section)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("data")).data


def shrunk(found, arm, data):
    """Return an arm's smoke form for two steps on the tiny text."""
    config = found.config(arm, found.seeds[0])
    config.data.directory = data.directory
    if config.data.source != "synthetic":
        config.data.source = data.source
    settings = {"train.steps": 2, "train.batch": 2, "evaluate.rows": 2, "evaluate.every": 2}
    for key, value in settings.items():
        configuration.set_key(config, key, value)
    return config


@pytest.mark.parametrize("path, arm", ARMS)
def test_an_arm_trains_for_two_steps(path, arm, data, tmp_path):
    found = folder.read(path).in_smoke()
    config = shrunk(found, arm, data)
    taught = next((config.compress[name] for name in config.compress.methods if name in TAUGHT), None)
    if taught:  # the first arm teaches
        taught.teacher = str(tmp_path / "teacher")
        loop.train(shrunk(found, next(iter(found.arms)), data), tmp_path / "teacher", jax.devices()[:1])
        loop.train(config, tmp_path / "run", jax.devices()[:1])
        assert 0 < read_result(tmp_path / "run")["quality"]["bits_per_byte"] < 20
        return
    run = setup.build_run(config, tmp_path, jax.devices()[:1])
    tx, schedule = make_optimiser(config)
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        step_fn = compile_train_step(run, tx, schedule, abstract)
        state, batches = initial_state(run, tx, abstract), run.data.train_iterator(2, 0)
        for _ in range(2):
            state, metrics = step_fn.call(state, put_batch(run, next(batches)))
            assert 0 < metrics["loss"] < 20 and metrics["gradient_norm"] > 0


@pytest.mark.parametrize("path", FOLDERS, ids=lambda path: path.name)
def test_a_result_has_every_metric_that_the_folder_shows(path, data, tmp_path):
    found = folder.read(path).in_smoke()
    arm = next(iter(found.arms))
    config = shrunk(found, arm, data)
    loop.train(config, tmp_path / "run", devices=jax.devices()[:1])
    row = folder.row_of(arm, config, read_result(tmp_path / "run"))
    # What a branch does alone only hybrids have: test_linearise.py.
    quality = [metric for metric in found.quality if not metric.endswith("_alone")]
    for metric in (*quality, *summary.COLUMNS, *(claim.metric for claim in found.claims)):
        # Two steps may well teach nothing that an accuracy shows.
        assert row["metrics"][metric] >= 0 and (row["metrics"][metric] > 0 or "accuracy" in metric), metric
    shown = (tmp_path / "run/report.md").read_text()
    assert all(metric.removeprefix("quality.").replace("_", " ") in shown for metric in quality)


CONFIG = '''
"""Is more better?

Question: is a higher learning rate better?
Command: python launch.py --experiment=experiments/rates
Hardware: none
Minutes: 0
Expectation: high is better, for it is
  more.
Source: a guess.
"""
from configs import base

ARMS = {"low": "a low rate", "high": "a high rate"}
SEEDS = (0, 1)
SMOKE = {"train.steps": 3}
CLAIMS = [{"text": "high is better", "metric": "quality.bits_per_byte", "lower": "high", "higher": "low"}]


def get_config(arm):
    c = base.get_config()
    c.name = arm
    c.optimiser.learning_rate = {"low": 1e-3, "high": 1e-2}[arm]
    return c
'''

# Writes what a run writes. Each run is noted in ran.txt; a file named after a workdir says how it fails.
LAUNCH = """
import json, signal, sys, time
from pathlib import Path
from fastformer.core import config as configuration

flags = [arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:]]
workdir = Path(next(value for key, value in flags if key == "workdir"))
config = configuration.load(
    next(value for key, value in flags if key == "config"),
    [(key.removeprefix("config."), value) for key, value in flags if key.startswith("config.")],
)
workdir.mkdir(parents=True, exist_ok=True)
kept = workdir / "config.json"
if kept.exists() and kept.read_text() != configuration.to_json(config):
    sys.exit("--workdir: holds a run of another configuration")
kept.write_text(configuration.to_json(config))
with open("ran.txt", "a") as file:
    file.write(f"{workdir} {config.train.steps}\\n")
failure = Path(f"fail-{workdir.name}")
if failure.exists():
    text = failure.read_text()
    while text == "meet" and Path("ran.txt").read_text().count("\\n") < 4:
        time.sleep(0.1)
    if text == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
        print("waiting", flush=True)
        time.sleep(60)
    if text != "meet":
        print("Traceback: one", "the reason", "", sep="\\n", file=sys.stderr)
        sys.exit(int(text))
quality = {"bits_per_byte": 2.0 - config.optimiser.learning_rate + config.seed / 1000}
numbers = dict.fromkeys(("parameters", "state_bytes", "flops_per_token", "train_tokens_per_second"), 100)
origin = {"commit": "c0ffee", "versions": {"jax": "1"}, "device": "abacus"}
result = {"step": 1, "quality": quality, "decode_tokens_per_second": 9.5, **numbers, **origin}
result["config_sha256"] = configuration.sha256(config)
(workdir / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return an empty project with one experiment, whose launch.py pretends; it is the working directory."""
    (tmp_path / "experiments/rates").mkdir(parents=True)
    (tmp_path / "experiments/rates/config.py").write_text(CONFIG.lstrip())
    (tmp_path / "launch.py").write_text(textwrap.dedent(LAUNCH))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run(smoke=False):
    return experiment.run_experiment("experiments/rates", smoke, Path("launch.py"))


def ran(place):
    """Return the workdirs of the runs so far, and forget them."""
    file = place / "ran.txt"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    file.unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def readme(place):
    return (place / "experiments/rates/README.md").read_text()


def change(place, old, new):
    file = place / "experiments/rates/config.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_only_what_is_missing_runs(place):
    results = place / "experiments/rates/results.jsonl"
    change(place, '"low": "a low rate", ', "")
    change(place, '"higher": "low"', '"higher": 2')
    assert run() == 0
    assert ran(place) == ["runs/rates/high-0", "runs/rates/high-1"]
    first = results.read_text()
    change(place, 'ARMS = {"high"', 'ARMS = {"low": "a low rate", "high"')
    assert run() == 0
    assert ran(place) == ["runs/rates/low-0", "runs/rates/low-1"]
    assert results.read_text().startswith(first), "results are only appended"
    row = json.loads(results.read_text().splitlines()[-1])
    assert (row["arm"], row["seed"], row["commit"], row["device"]) == ("low", 1, "c0ffee", "abacus")
    assert row["metrics"]["quality.bits_per_byte"] == 2.0 and row["metrics"]["state_bytes"] == 100
    assert run() == 0 and ran(place) == []


def test_the_readme_is_made_and_rewritten_between_its_markers(place):
    assert run() == 0
    text = readme(place)
    for part in (
        "Is a higher learning rate better?", "high is better, for it is more.",
        "1.99950 ± 0.00071", "1.99050 ± 0.00071",
        "- **holds**: high is better", "abacus", "`c0ffee`", "jax 1", "](results.png)",
    ):  # fmt: skip
        assert " ".join(part.split()) in " ".join(text.split()), part
    assert (place / "experiments/rates/results.png").read_bytes()[:4] == b"\x89PNG"
    file = place / "experiments/rates/README.md"
    file.write_text("# Mine\n\n" + text.replace("1.99950", "1.00000") + "\nThe end.\n")
    assert run() == 0
    assert readme(place) == "# Mine\n\n" + text + "\nThe end.\n"
    file.write_text("no markers")
    with pytest.raises(UserError, match="results:begin"):
        run()
    assert file.read_text() == "no markers"


def test_a_result_of_another_configuration_is_stale(place):
    assert run() == 0
    ran(place)
    change(place, '"low": 1e-3', '"low": 2e-3')
    text = summary.section(
        folder.read("experiments/rates"), folder.read_rows(Path("experiments/rates/results.jsonl"))
    )
    assert "| low  | 0 of 2 |" in text
    assert run() == 0
    assert ran(place) == ["runs/rates/low-0", "runs/rates/low-1"]
    assert "1.99850" in readme(place) and "1.99950" not in readme(place)
    assert len((place / "experiments/rates/results.jsonl").read_text().splitlines()) == 6
    assert len(list(place.glob("runs/rates/low-0.until-*"))) == 1, "the old run is kept"


def test_a_key_that_came_later_makes_nothing_stale(place):
    assert run() == 0
    ran(place)
    change(place, "    c.name = arm\n", "    c.name = arm\n    c.train.later = 1\n")
    assert run() == 0 and ran(place) == []
    change(place, "    c.train.later = 1\n", "    c.train.batch = 3\n")
    assert run() == 0 and len(ran(place)) == 4


def test_a_hand_written_row_counts_by_its_hash(place):
    config = folder.read("experiments/rates").config("low", 0)
    rows = [
        {"arm": "low", "seed": 0, "metrics": {}, "config_sha256": configuration.sha256(config)},
        {"arm": "high", "seed": 0, "metrics": {}, "config_sha256": "another"},
    ]
    found = folder.current(rows, folder.read("experiments/rates"))
    assert list(found) == [("low", 0)]


def test_a_failing_arm_does_not_stop_the_others(place, capfd):
    (place / "fail-low-0").write_text("1")
    (place / "fail-low-1").write_text("2")
    assert run() == 1
    assert ran(place) == [f"runs/rates/{name}" for name in ("low-0", "high-0", "low-1", "high-1")]
    errors = capfd.readouterr().err
    assert "Traceback: one\n" in errors
    assert "rates: arm low, seed 0 failed with exit code 1: the reason" in errors
    assert "| low  | 0 of 2 |                not run" in readme(place)
    assert "**not run**: high is better" in readme(place)
    (place / "fail-low-0").write_text("2")
    assert run() == 2
    assert ran(place) == ["runs/rates/low-0", "runs/rates/low-1"]
    (place / "fail-low-0").unlink(), (place / "fail-low-1").unlink()
    assert run() == 0


def test_a_claim_that_fails_is_exit_3(place, capsys):
    change(place, '"lower": "high", "higher": "low"', '"lower": "low", "higher": "high"')
    assert run() == 3
    error = capsys.readouterr().err.splitlines()
    assert error == [
        "rates: claim FAILS: high is better "
        "(quality.bits_per_byte: low 1.99950 ± 0.00071 against high 1.99050 ± 0.00071)"
    ]
    assert "- **FAILS**: high is better" in readme(place)
    assert run() == 3, "it fails again without running anything"


def test_smoke_writes_elsewhere_and_checks_no_claim(place, capsys):
    change(place, '"lower": "high", "higher": "low"', '"lower": "low", "higher": "high"')
    before = sorted(place.glob("experiments/**/*.*"))
    assert run(smoke=True) == 0
    assert (place / "ran.txt").read_text() == "runs/smoke/rates/low-0 3\nruns/smoke/rates/high-0 3\n"
    assert "claims, which are not checked" in capsys.readouterr().out
    assert [path for path in sorted(place.glob("experiments/**/*.*")) if "pycache" not in str(path)] == before
    for name in ("README.md", "results.jsonl", "results.png"):
        assert (place / "runs/smoke/rates" / name).is_file()
    ran(place)
    assert run(smoke=True) == 0 and len(ran(place)) == 2, "a smoke run starts anew"


def test_a_signal_stops_the_run_under_way_and_starts_no_other(place):
    (place / "fail-low-0").write_text("wait")
    code = (
        "import sys; from pathlib import Path; from fastformer.report.experiment import run_experiment as r; "
    )
    code += "sys.exit(r('experiments/rates', False, Path('launch.py')))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    lines = []
    while "waiting" not in (line := process.stdout.readline()):
        assert line or process.poll() is None, lines
        lines.append(line)
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "saved" in rest and "rates: stopped; the same command goes on from here" in rest
    assert ran(place) == ["runs/rates/low-0"]
    assert "run 2 of 4" not in rest


def test_arms_run_side_by_side_as_jobs(place, capfd):
    """Three of them wait until all four have begun; one fails."""
    for name, text in {"low-0": "meet", "high-0": "meet", "low-1": "meet", "high-1": "1"}.items():
        (place / f"fail-{name}").write_text(text)
    settings = [("distributed.slurm", "cluster=local,timeout_min=5"), ("distributed.restarts", "0")]
    start = launchers.side_by_side("slurm", settings)
    assert experiment.run_experiment("experiments/rates", False, Path("launch.py"), start) == 1
    assert len(ran(place)) == 4
    errors = capfd.readouterr().err
    assert errors.count("launcher: job ") == 5
    assert "failed (process 0 ended with exit code 1): giving up" in errors
    assert "arm high, seed 1 failed with exit code 1: runs/rates/high-1 holds what it wrote" in errors
    rows = folder.read_rows(place / "experiments/rates/results.jsonl")
    assert {(row["arm"], row["seed"]) for row in rows} == {("low", 0), ("high", 0), ("low", 1)}


def test_a_run_that_leaves_no_result_is_a_failure(place, capfd):
    (place / "fail-high-1").write_text("0")
    assert run() == 1
    assert "high, seed 1 failed with exit code 1: it left no result" in capfd.readouterr().err


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("Question:", "Quest:", "its docstring has no line 'Question: …'"),
        ("SEEDS = (0, 1)", "SEEDS = (0, 0)", "ARMS and SEEDS must hold one entry or more, each once"),
        ("SEEDS = (0, 1)\n", "", "SEEDS is missing"),
        ("SEEDS = (0, 1)", "SEEDS = 5", "SEEDS, 5, is not allowed; it must be as (1, 2, 3)"),
        ("SEEDS = (0, 1)", "SEEDS = ([1],)", "SEEDS: [1] is not allowed; it must be a whole number"),
        ("SEEDS = (0, 1)", "SEEDS = (0, 1)\nARMS = ['low']", "ARMS, ['low'], is not allowed"),
        ("SEEDS = (0, 1)", "SEEDS = (-1,)", "SEEDS: -1 is not allowed"),
        ("SEEDS = (0, 1)", "SEEDS = (0, 1)\nARMS = None", "ARMS, None, is not allowed"),
        ("SEEDS = (0, 1)", "SEEDS = (0, 1)\nARMS = {1: 'a'}", "1 is not allowed; a name has letters"),
        ("SEEDS = (0, 1)", "SEEDS = (0, 1)\nQUALITY = 5", "QUALITY, 5, is not allowed"),
        ("def get_config", "SMOKE = [1]\ndef get_config", "SMOKE, [1], is not allowed"),
        ("def get_config", "CLAIMS = None\ndef get_config", "CLAIMS, None, is not allowed"),
        ("def get_config", "CLAIMS = (5,)\ndef get_config", "CLAIMS[0]: 5 is no claim"),
        ('"lower": "high"', '"lower": "hihg"', "CLAIMS[0].lower: 'hihg' is unknown; did you mean high?"),
        ('"low": "a low rate"', '"l/o": "a low rate"', "'l/o' is not allowed"),
        ('SMOKE = {"train.steps"', 'SMOKE = {"train.stesp"', "train.stesp: no such key; did you mean steps?"),
        ("SEEDS = (0, 1)", 'SEEDS = (0, 1)\nQUALITY = ("acuracy",)', "QUALITY: 'acuracy' is unknown"),
        ("quality.bits_per_byte", "quality.bits_per_bite", "no run has the metric 'quality.bits_per_bite'"),
    ],
)
def test_a_folder_out_of_order_says_what_is_wrong(place, old, new, words):
    change(place, old, new)
    with pytest.raises(UserError) as error:
        run(smoke=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_folder_names_the_nearest(place):
    with pytest.raises(UserError, match="no experiment in experiments/rate; did you mean experiments/rates?"):
        experiment.run_experiment("experiments/rate", False, Path("launch.py"))
    with pytest.raises(UserError, match="experiments: experiments/rates"):
        experiment.run_experiment("nowhere", True, Path("launch.py"))
