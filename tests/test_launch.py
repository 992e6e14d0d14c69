"""The command line: what it does, and how it answers mistakes."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_texts

import launch
from fastformer.core import config as configuration
from fastformer.core import flags as command_line
from fastformer.core.signals import asking

ROOT = Path(__file__).parent.parent
BASE = "--config=configs/base.py"
TUNABLES = "GLIBC_TUNABLES"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which launch.main sets, as it does these
    before = {number: signal.getsignal(number) for number in (*asking(), signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(capsys, monkeypatch, *argv):
    """Return the exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, argv)])
    code = launch.main()
    return code, *capsys.readouterr()


def small(folder):
    """Return the flags of a run of seconds."""
    keys = {
        "data.source": f"files:{write_texts(folder / 'texts')}/*.txt",
        "data.directory": folder / "prepared", "data.length": 16, "model.layers": 1, "model.width": 16,
        "model.heads": 2, "train.steps": 4, "train.batch": 8, "optimiser.warmup_steps": 1,
        "evaluate.every": 2, "checkpoint.every": 2, "log.every": 1, "generate.tokens": 4,
    }  # fmt: skip
    return [BASE, f"--workdir={folder / 'run'}", *(f"--config.{key}={value}" for key, value in keys.items())]


@pytest.mark.parametrize("given", ["", "glibc.malloc.hugetlb=0", "glibc.malloc.tcache_count=3"])
def test_the_program_asks_for_large_pages(tmp_path, given, monkeypatch):
    """Unless the user has; what else was asked of malloc stays."""
    text = f"import os\ndef get_config():\n    raise KeyError(os.environ['{TUNABLES}'])\n"
    (tmp_path / "c.py").write_text(text)
    monkeypatch.setenv(TUNABLES, given)
    command = [sys.executable, "launch.py", f"--config={tmp_path / 'c.py'}"]
    told = subprocess.run(command, capture_output=True, text=True)
    asked = "glibc.malloc.hugetlb=1"
    want = given if "hugetlb" in given else f"{given}:{asked}".lstrip(":")
    assert told.returncode == 2 and told.stderr.endswith(f"KeyError: '{want}'\n")


def test_train_again_evaluate_generate(tmp_path, capsys, monkeypatch):
    flags, workdir = small(tmp_path), f"--workdir={tmp_path / 'run'}"
    assert run(capsys, monkeypatch, *flags)[0] == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    promised = (
        "name step quality parameters bytes_on_disk train_tokens_per_second decode_tokens_per_second "
        "state_bytes flops_per_token peak_memory_bytes wall_seconds config_sha256 versions device commit"
    )
    assert set(promised.split()) <= set(result) and result["quality"]["bits_per_byte"] > 0
    for name in ("config.json", "checkpoints", "metrics.jsonl", "report.md", "weights.safetensors"):
        assert (tmp_path / "run" / name).exists()
    assert (tmp_path / "run/weights.safetensors").stat().st_size == result["bytes_on_disk"]
    code, out, _ = run(capsys, monkeypatch, *flags)
    assert code == 0 and "is finished" in out
    code, out, _ = run(capsys, monkeypatch, "--mode=evaluate", workdir)
    assert code == 0 and json.loads(out)["bits_per_byte"] == pytest.approx(result["quality"]["bits_per_byte"])
    code, out, _ = run(
        capsys, monkeypatch, "--mode=generate", workdir, "--prompt=the model", "--prompt=a row"
    )
    assert code == 0 and "the model" in out and "a row" in out
    code, _, err = run(capsys, monkeypatch, *flags, "--config.train.steps=5")
    assert code == 2 and "config.train.steps was 4 and is 5" in err and err.count("\n") == 1
    code, _, err = run(capsys, monkeypatch, "--mode=generate", workdir, "--config.model.width=32")
    assert code == 2 and "config.model.width: the run in" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            (BASE, "--config.model.attention.nmae=local"),
            "config.model.attention.nmae: no such key; did you mean name?",
        ),
        (
            (BASE, "--config.model.attention.windw=4", "--config.model.attention.name=local"),
            "did you mean window?",
        ),
        ((BASE, "--config.trian.steps=4"), "config.trian: no such section; did you mean train?"),
        ((BASE, "--config.train.setps=4"), "config.train.setps: no such key; did you mean steps?"),
        ((BASE, "--config.train.steps=many"), "config.train.steps: 'many' is not of type int"),
        ((BASE, "--config.train.steps=-3"), "config.train.steps: -3 is not allowed; it must be 1 or more"),
        ((BASE, "--config.model.heads=7"), "config.model.heads: 7 does not divide config.model.width 256"),
        ((BASE, "--config.train=3"), "config.train: is a section"),
        ((BASE, "--config.train.steps.more=3"), "config.train.steps: is a key, 1000, and has none below it"),
        ((BASE, f"--config.train.steps={2**31}"), "config.train.steps: 2147483648 is not allowed"),
        ((BASE, "--config.train.spike=1e999"), "config.train.spike: inf is not allowed; it must be a finite"),
        ((BASE, f"--config.log.every={2**63}"), "config.log.every: 9223372036854775808 is not allowed"),
        ((BASE, "--config.train.precision=(1,)"), "config.train.precision[0]: 1 is not (policy, share)"),
        ((BASE, "--config.compress.methods=[[]]"), "config.compress.methods: ([],) is not of type"),
        ((BASE, "--config.compress.quantise.rules=(1,)"), "rules: (1,) is not of type tuple[str, ...]"),
        ((BASE, "--config.task.continued=x"), "config.task.continued: 'x' is not of type int"),
        ((BASE, f"--config.data.length={2**31}"), "config.data.length: 2147483648 is not allowed"),
        ((BASE, "--config.model.short_conv=9999"), "config.model.short_conv: 9999 is not allowed"),
        ((BASE, f"--config.evaluate.batch={2**31}"), "config.evaluate.batch: 2147483648 is not allowed"),
        ((BASE, "--config.generate.temperature=1e-9"), "config.generate.temperature: 1e-09 is not allowed"),
        ((BASE, "--config.name=../x"), "config.name: '../x' is not allowed; it must be at most 100 letters"),
        ((BASE, "--config.name="), "config.name: '' is not allowed"),
        ((BASE, "--config.model.name=a\nb"), "the task text trains no a b"),
        (
            (BASE, "--mode=benchmark", "--config.benchmark.variants=linear", "--config.model.soft_cap=9"),
            "config.benchmark.variants: linear cannot be: ",
        ),
        ((BASE, "--config.data.source=files:/nowhere/*.txt"), "/nowhere/*.txt"),
        ((BASE, "--config.data.source=nothing"), "config.data.source"),
        ((BASE, "--config.data.tokeniser=words"), "config.data.tokeniser: 'words'"),
        ((BASE, "--config.mesh.tensor=3"), "config.mesh"),
        ((BASE, "--config.optimiser.name=adam"), "did you mean adamw?"),
        ((BASE, "--wrokdir=x"), "--wrokdir: no such flag; did you mean --workdir?"),
        ((BASE, "--mode=trian"), "trian"),
        ((BASE, "train"), "train: no such flag; did you mean --mode=train?"),
        ((BASE, "--experiment="), "--experiment: is empty"),
        (("--mode=evaluate", "--workdir=" + "a" * 300), "cannot be reached"),
        ((BASE, "--config=configs/none.py"), "--config: is given twice"),
        ((BASE, "--mode=train", "--mode", "evaluate"), "--mode: is given twice"),
        ((BASE, "--prompt=x"), "--prompt: goes with --mode=generate"),
        (("--mode=generate", "--context=caf\udce9"), "--context: is not UTF-8"),
        ((BASE, "--source=x"), "--source: goes with --mode=generate"),
        ((BASE, "--config.task.name=txt"), "config.task.name: 'txt' is unknown; did you mean text?"),
        ((BASE, "--config.task.pairs=3"), "config.task.pairs: no such key"),
        ((BASE, "--config.task.name=recall"), "python_code holds no synthetic; sources that do: synthetic"),
        ((BASE, "--config.model.name=encoder"), "the task text trains no encoder"),
        ((BASE, "--smoke"), "--smoke: goes with --experiment"),
        ((BASE, "--launcher=local", "--mode=evaluate"), "--launcher: goes with --mode=train"),
        (("--experiment=experiments/mixers", "--launcher=local"), "--launcher: local goes with --config"),
        (("--experiment=experiments/mixers", "--launcher=slurm", "--config.seed=1"), "takes its"),
        (("--config=configs/bsae.py",), "no file configs/bsae.py; did you mean configs/base.py?"),
        (("--config=configs/base.py:arm",), "takes no argument"),
        (("--config=experiments/mixers/config.py",), "needs an arm"),
        (("--config=experiments/mixers/config.py:liner",), "no arm 'liner'; did you mean linear?"),
        (("--experiment=experiments/mixer",), "experiments/mixers"),
        (("--mode=generate", "--workdir=/nowhere/at/all"), "/nowhere/at/all holds no run"),
        (("--mode=evaluate",), "needs --config=FILE"),
        ((BASE, f"--config.optimiser.learning_rate=1{'0' * 310}"), "config.optimiser.learning_rate: inf"),
        ((BASE, f"--config.train.steps={'-' * 50_000}"), "is not of type int"),
        ((BASE, "--config.sharding.B=data,data"), "config.sharding.B: ('data', 'data') is not allowed"),
        (
            (BASE, "--config.distributed.coordinator=a:65536"),
            "config.distributed.coordinator: 'a:65536' is not allowed; it must be host:port",
        ),
        ((), "needs --config=FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_gets_one_line_and_exit_code_2(argv, message, tmp_path, capsys, monkeypatch):
    workdir = [f"--workdir={tmp_path / 'run'}"] if BASE in argv else []
    code, _, err = run(capsys, monkeypatch, *argv, *workdir)
    assert code == 2 and message in err
    assert err.startswith("launch.py: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('c.train.steps = "ten"', "get_config() of {path} fails: TypeError:"),
        ("raise SystemExit(3)", "get_config() of {path} fails: SystemExit: 3"),
        ("return None", "get_config() of {path} returns None, not a ConfigDict"),
        ("return c.train", "config.accumulate: no such key"),
        ("del c.train", "config.train: is missing; begin with base.get_config()"),
        ("c.name = 5", "get_config() of {path} fails: TypeError:"),
        ("c.model = 5", "get_config() of {path} fails: "),
        ("c.task = ConfigDict()", "config.task.name: None is unknown"),
        ("c.compress = ConfigDict()", "config.compress.methods: is missing"),
        ("c.sharding.B = 5", "get_config() of {path} fails: TypeError:"),
    ],
)
def test_a_mistake_in_a_file_of_the_user_gets_one_line(text, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    body = f"    c = base.get_config()\n    {text}\n    return c\n"
    head = "from configs import base\nfrom ml_collections import ConfigDict"
    path.write_text(f"{head}\n\ndef get_config():\n{body}")
    code, _, err = run(capsys, monkeypatch, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert code == 2 and message.format(path=path) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("get_config = dict", "get_config of {path} has no arguments that can be read: ValueError:"),
        ("ARMS = 5\ndef get_config(arm): pass", "ARMS of {path}, 5, is no tuple of names"),
        ("ARMS = {1: 'a'}\ndef get_config(arm): pass", "ARMS of {path}, {{1: 'a'}}, is no tuple of names"),
    ],
)
def test_a_file_without_what_it_must_have_gets_one_line(text, message, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(text)
    code, _, err = run(capsys, monkeypatch, f"--config={path}:x")
    assert code == 2 and message.format(path=path) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.train.batch=8192", "fewer than one batch of 8192 rows"),
        ("--config.train.init=nowhere", "config.train.init: nowhere: nowhere holds no config.json"),
        (
            "--config.model.positions=learned --config.generate.tokens=14 --config.generate.prompt=abc",
            "config.generate.tokens: 14 more after a prompt of",
        ),
    ],
)
def test_what_is_missing_is_told_before_compiling(flag, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastformer.train.loop.compile_all", lambda *_: pytest.fail("compiled"))
    code, _, err = run(capsys, monkeypatch, *small(tmp_path), *flag.split())
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "data.json", "tokeniser.json"])
@pytest.mark.parametrize("text", ["null", "[]", "{}", "{", '{"name": "base"}'])
def test_a_damaged_file_of_a_run_is_told(name, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastformer.train.loop.abstract_state", lambda *_: pytest.fail("began"))
    flags = small(tmp_path)
    config = configuration.load("configs/base.py", [f[9:].split("=", 1) for f in flags[2:]])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(configuration.to_json(config))
    (tmp_path / "run" / name).write_text(text)
    code, _, err = run(capsys, monkeypatch, *flags)
    assert code == 2 and name in err and "cannot be read" in err and err.count("\n") == 1


def test_a_lack_of_memory_is_told_and_another_failure_is_not_hidden(capsys, monkeypatch):
    def failing(error):
        def run(argv):
            raise error

        return run

    monkeypatch.setattr(launch.signals, "end_process", lambda: None)
    for error in (MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")):
        monkeypatch.setattr(launch, "run", failing(error))
        assert launch.main() == 2
        err = capsys.readouterr().err
        assert "out of memory; lower config.train.batch" in err and err.count("\n") == 1
    for error, word in ((OSError(28, "No space left on device"), "full"), (OSError(5, "I/O"), "mend that")):
        monkeypatch.setattr(launch, "run", failing(error))
        assert launch.main() == 1
        err = capsys.readouterr().err
        assert word in err and "goes on from the last checkpoint" in err and err.count("\n") == 1
    monkeypatch.setattr(launch, "run", failing(RuntimeError("INTERNAL")))
    with pytest.raises(RuntimeError, match="INTERNAL"):
        launch.main()


def test_a_file_that_is_no_config(tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "two.py").write_text("def get_config(a, b):\n    pass\n")
    (tmp_path / "five.py").write_text("get_config = 5\n")
    for name, message in (
        ("notes.txt", "it must end in .py"),
        ("two.py", "one argument"),
        ("five.py", "has no"),
    ):
        code, _, err = run(capsys, monkeypatch, f"--config={tmp_path / name}")
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("closed", [" >&-", " 2>&1 <&- | cat"])
def test_a_mistake_with_its_streams_closed(closed, tmp_path):
    command = f"{sys.executable} launch.py {BASE} --config.data.source=x --workdir={tmp_path / 'run'}{closed}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 2 and (done.stdout + done.stderr).count("\n") == 1


def test_a_prompt_that_no_terminal_can_show_is_printed(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8", write_through=True))
    monkeypatch.setattr(launch, "run", lambda argv: print("a\udcff") or 0)
    assert launch.main() == 0 and printed.getvalue() == b"a?\n"


def test_a_mistake_in_a_real_process_has_no_traceback():
    command = [sys.executable, "launch.py", BASE, "--config.model.attention.nmae=local"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean name" in done.stderr and "Traceback" not in done.stderr


def test_the_flags_are_these():
    flags = {flag for flag in command_line.parser()._option_string_actions if flag.startswith("--")}
    asked = {"--prompt", "--source", "--question", "--context"}
    asked |= {"--sentence", "--topology", "--weights", "--format", "--output", "--launcher"}
    assert flags == asked | {"--help", "--config", "--mode", "--workdir", "--experiment", "--smoke"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_config_builds_and_names_itself(path):
    from fastformer import models, tasks

    config = configuration.load(str(path))
    assert config.name == path.stem
    assert models.build(config, 257, config.data.length, tasks.build(config).head)


SIGNALLED = {
    "in a callback of the garbage collector": """
def train(*_):
    gc.callbacks.append(ask)
    gc.collect()
    time.sleep(60)
""",
    "beside a thread": """
def train(*_):
    threading.Thread(target=time.sleep, args=[60]).start()
    ask()
""",
    "in an import": """
class Importing:
    def find_spec(self, name, *_):
        if name == "jax":
            try:
                ask()
            except BaseException:  # as modules of C++ end where their imports fail
                os.abort()

sys.meta_path.insert(0, Importing())
""",
}


@pytest.mark.parametrize("where", SIGNALLED)
def test_a_signal_ends_the_program_wherever_it_comes(where, tmp_path):
    """Where an exception alone is swallowed, waits for what goes on, or ends in a fault."""
    start = """
import gc, os, signal, sys, threading, time
import launch
sys.argv = ["launch.py", "--config=configs/base.py", "--workdir=none"]

def ask(*_):
    gc.callbacks.clear()
    signal.raise_signal(signal.SIGTERM)
"""
    end = """
if "train" in globals():
    from fastformer.train import modes
    modes.MODES["train"] = train
sys.exit(launch.main())
"""
    command = [sys.executable, "-c", start + SIGNALLED[where] + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (0, ["stopped; the same command starts again"])


def test_a_file_of_lines_is_read_in_order(tmp_path):
    (tmp_path / "lines").write_bytes("one\n\ntwo\u2028\x0c\x85 and\r\nlast".encode())
    asked = command_line.lines_of(["@x"[1:], f"@{tmp_path / 'lines'}"])
    assert asked == ["x", "one", "", "two\u2028\x0c\x85 and", "last"]
    (tmp_path / "empty").write_text("")
    with pytest.raises(launch.UserError, match="empty: holds no line"):
        command_line.lines_of([f"@{tmp_path / 'empty'}"])
    with pytest.raises(launch.UserError, match="none: cannot be read as lines"):
        command_line.lines_of([f"@{tmp_path / 'none'}"])


def test_overrides_take_the_types_of_the_config():
    given = (
        ("optimiser.learning_rate", "1"), ("model.pattern", "local,softmax"), ("model.tied", "false"),
        ("model.attention.window", "32"), ("data.source", "123"), ("benchmark.lengths", "64"),
        ("compress.prune.matrices", "[qk]/weight,(o|v)/.*"), ("model.remat", "(full)"),
    )  # fmt: skip
    config = configuration.load("configs/base.py", given)
    assert isinstance(config.optimiser.learning_rate, float) and config.model.pattern == ("local", "softmax")
    assert config.benchmark.lengths == (64,) and config.model.remat == ("full",)
    assert config.compress.prune.matrices == ("[qk]/weight", "(o|v)/.*")
    assert config.model.tied is False and config.model.attention.window == 32 and config.data.source == "123"
