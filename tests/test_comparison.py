"""A config whose runs follow one another by one command, and the table that compares them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tiny import tiny_config

import launch
from fastformer.core import config as configuration
from fastformer.core.errors import UserError
from fastformer.train.session import Session

ROOT = Path(__file__).parent.parent

CONFIG = """
from pathlib import Path

from fastformer.core import config as configuration

ARMS, THEN = ("teacher", "taught"), {then}


def get_config(arm="teacher"):
    c = configuration.from_json(Path({given!r}).read_text()).unlock()
    c.name = "family" if arm == "teacher" else f"family_{{arm}}"
    if arm == "taught":
        c.compress.methods, c.compress.distil.teacher = ("distil", "quantise"), "runs/family"
    return c
"""


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Return a function that writes a config with some THEN; the runs are made beside it."""
    monkeypatch.chdir(tmp_path)
    given = tmp_path / "given.json"
    given.write_text(configuration.to_json(tiny_config(tmp_path)))

    def write(then=("taught",)):
        (tmp_path / "family.py").write_text(CONFIG.format(then=repr(then), given=str(given)))
        return "--config=family.py"

    return write


def test_one_command_trains_them_in_order_and_compares(family, capsys):
    flags = [family()]
    assert launch.run(flags) == 0
    out = capsys.readouterr().out
    assert out.index("family in runs/family,") < out.index("family_taught in runs/family_taught,")
    text = Path("runs/family/comparison.md").read_text()
    assert text in out and Path("runs/family/comparison.png").stat().st_size > 10_000
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name in ("family", "family_taught"):
        result = json.loads(Path(f"runs/{name}/result.json").read_text())
        assert f"{result['quality']['bits_per_byte']:.3f}" in lines[name]
        assert f"{result['bytes_on_disk'] / 1000:.3g} kB" in lines[name]
    assert launch.run(flags) == 0  # nothing is left to train
    again = capsys.readouterr().out
    assert again.count("is finished") == 2 and text in again and "step 12" in again


@pytest.mark.parametrize(
    "more", [["--workdir=elsewhere"], ["--config.train.steps=6"], ["--mode=benchmark"], "arm"]
)
def test_whoever_changes_anything_gets_one_run(family, more, monkeypatch):
    """The teacher that others name is the one of the bare command."""
    seen = []
    monkeypatch.setattr("fastformer.train.modes.train_all", seen.append)
    done = dict.fromkeys(("train", "benchmark"), lambda *given: None)
    monkeypatch.setattr("fastformer.train.modes.MODES", done)
    flags = [family()]
    assert launch.run(flags) == 0 and len(seen) == 1
    assert launch.run([f"{flags[0]}:teacher"] if more == "arm" else flags + more) == 0 and len(seen) == 1


def test_what_is_stopped_is_not_followed(family, monkeypatch, capsys):
    """A signal in the middle of the first run: it saves, and the next would have no teacher."""
    flags, advance = [family()], Session.advance

    def asked(session):
        advance(session)
        if session.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "advance", asked)
        assert launch.run(flags) == 0
    assert "stopped and saved at step 5" in capsys.readouterr().out
    assert not Path("runs/family_taught").exists() and not Path("runs/family/comparison.md").exists()
    assert launch.run(flags) == 0 and Path("runs/family/comparison.md").exists()


@pytest.mark.parametrize("then", [("nobody",), "taught", 3])
def test_followers_that_are_no_arms_are_a_mistake(family, then):
    line = r"THEN of family.py, .*, is no tuple of its arms \(teacher, taught\)"
    with pytest.raises(UserError, match=line):
        launch.run([family(then)])


def test_the_quickstarts_students_are_its_own():
    """They read the workdir that the command makes, and differ in nothing but the teacher."""
    path = str(ROOT / "configs/quickstart.py")
    teacher, students = configuration.load(path), configuration.followers(path)
    assert [student.name for student in students] == ["quickstart_alone", "quickstart_taught"]
    for student in students:
        assert student.compress.distil.teacher == f"runs/{teacher.name}"
        assert 2 * student.model.layers == teacher.model.layers
    changed = {key for key, *_ in configuration.differences(*students)}
    assert changed == {"name", "compress.methods"}
