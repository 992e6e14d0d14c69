"""What generated text and code are worth; and that a model's code can do no harm."""

from __future__ import annotations

import json

import jax
import pytest
from tiny import tiny_config

from fastformer.core import config as configuration
from fastformer.tasks.code import Code, Function, cut, functions, judged
from fastformer.tasks.diversity import distinct, repetition
from fastformer.tasks.sandbox import passes
from fastformer.train import loop

MODULE = '''
class A:
    def twice(self, x):
        """Double.

        >>> 1 + 1
        2
        """
        y = 2 * x
        return y

def bare():
    return 1

def told():
    "Only told."
'''


def test_diversity():
    assert distinct(["a b a b"], 1) == 0.5 and distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "a b"], 2) == 0.5 and distinct([""], 2) == 0
    assert repetition(["a b c d e"]) == 0 and repetition(["a a a a a a"]) == pytest.approx(2 / 3)
    assert repetition(["x"]) == 0


def test_functions_are_found_without_their_indent():
    (found,) = functions([MODULE, "no python ("])
    assert found.tested and found.body == "    y = 2 * x\n    return y\n"
    assert found.prompt.startswith("def twice(self, x):\n") and found.prompt.endswith('"""\n')


def test_completions_are_cut_and_judged():
    assert cut("    a = 1\n\n    return a\n\ndef b():\n") == "    a = 1\n\n    return a\n\n"
    assert cut("    a = 1\n    retu") == "    a = 1\n" and cut("x = 1\n") == ""
    asked = Function('def f():\n    """Do."""\n', "    a = 1\n    return a\n", False)
    found = judged([asked] * 4, ["    a = 1\n    b\n", "    return (\n", "", "    return 2\nprint(\n"])
    assert found == {"functions_parse": 0.5, "next_line_exact": 0.25}
    assert judged([asked], ["    # Only a comment.\n"])["functions_parse"] == 0


def doctested(body, doc=">>> f(2)\n    4"):
    return f'def f(x):\n    """Do.\n\n    {doc}\n    """\n{body}\n'


def test_doctests_pass_or_fail():
    assert passes(doctested("    return 2 * x"))
    assert passes(doctested("    import math\n    return math.floor(x) + 2"))
    assert not passes(doctested("    return x"))
    assert not passes(doctested("    return 4", doc="no test"))
    assert not passes(doctested("    return (", ">>> f(2)\n    4"))


@pytest.mark.parametrize(
    "harm",
    [
        "open({path!r}, 'w').write('x')",
        "__import__('os').open({path!r}, 65)",
        "__import__('pathlib').Path({path!r}).touch()",
        "__import__('os').remove({victim!r})",
        "__import__('shutil').rmtree({folder!r})",
        "open({victim!r}).read()",
        "__import__('os').system('touch {path}')",
        "__import__('subprocess').run(['touch', {path!r}])",
        "__import__('os').fork()",
        "__import__('socket').socket()",
        "__import__('ctypes').CDLL(None)",
        "__import__('os').kill(1, 0)",
        "__import__('os').environ['PATH'][0]",
        "__import__('os')._exit(0)",
        "open(__import__('os').__file__ + '/../../../../../../..' + {victim!r}).read()",
    ],
)
def test_code_can_do_no_harm(harm, tmp_path):
    """It does, and then returns what passes; that it does not pass shows that it was stopped."""
    victim, path = tmp_path / "victim", tmp_path / "new"
    victim.write_text("here")
    line = harm.format(path=str(path), victim=str(victim), folder=str(tmp_path))
    assert not passes(doctested(f"    {line}\n    return 4"))
    assert not path.exists() and victim.read_text() == "here"


@pytest.mark.parametrize("waste", ["while True: pass", "[0] * 10**10", "__import__('time').sleep(100)"])
def test_code_cannot_waste(waste):
    assert not passes(doctested(f"    {waste}\n    return 4"), seconds=1)


def test_a_code_run_is_judged(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "code").mkdir()
    for number in range(6):
        (tmp_path / f"code/{number}.py").write_text(MODULE.replace("twice", f"twice{number}") * 3)
    changes = {"task.name": "code", "task.functions": 2, "task.run_doctests": True, "task.continued": 2}
    changes |= {"data.source": f"files:{tmp_path}/code/*.py", "evaluate.every": 0, "train.steps": 4}
    for key, value in changes.items():
        configuration.set_key(config, key, value)
    loop.train(config, tmp_path / "run", jax.devices()[:1])
    quality = json.loads((tmp_path / "run/result.json").read_text())["quality"]
    wanted = {"functions_parse", "next_line_exact", "doctests_pass", "functions_tested", "distinct_2"}
    assert wanted <= set(quality) and quality["bits_per_byte"] > 0 and quality["functions_tested"] == 2


def test_the_authors_bodies_would_pass():
    class Data:
        class tokeniser:
            eod = 0
            encode = staticmethod(lambda text: [1])
            decode = staticmethod(lambda ids: "    y = 2 * x\n    return y\n")

        heldout_texts = staticmethod(lambda: [MODULE])

    found = Code(run_doctests=True).decoded(lambda rows: rows, Data, 0)
    assert found == {"functions_parse": 1, "next_line_exact": 1, "doctests_pass": 1, "functions_tested": 1}
