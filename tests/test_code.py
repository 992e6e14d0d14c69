"""What generated text and code are worth."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import pytest
from tiny import tiny_config

from fastformer.core import config as configuration
from fastformer.tasks.code import Code, bodies, functions, judged
from fastformer.tasks.diversity import distinct, repetition
from fastformer.train import loop

MODULE = '''
class A:
    def twice(self, x):
        """Double.

        >>> A().twice(2)
        4
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


def test_functions_are_found_in_their_modules():
    (found,) = functions([MODULE, "no python ("])
    assert found.tests and found.body == "        y = 2 * x\n        return y\n"
    before = MODULE.partition(found.body)[0]
    assert found.before == before and found.indent == 8 * " "
    (found,) = functions(["\f\n" + 30 * "y = 1\n" + MODULE])
    assert found.before == 18 * "y = 1\n" + before  # and two lines of the module's own above the function
    assert not list(functions(['def f(): "Do."; return 1\n']))  # its body is on the docstring's line


IN_CLASS = '''class A:
    def f():
        """Do.

More."""
        a = 1
        return a
'''
ALONE = 'def f():\n    """Do."""\n    a = 1\n    return a\n'


@pytest.mark.parametrize("text, indent", [(IN_CLASS, "        "), (ALONE, "    ")])
def test_completions_are_cut_and_judged(text, indent):
    (f,) = functions([text])
    own = f"{indent}a = 1\n\n{indent}return a\n\n"
    assert f.cut(own + indent[4:] + "def b():\n") == own
    assert f.cut(f"{indent}a = 1\n{indent}retu") == f"{indent}a = 1\n" and f.cut(indent[4:] + "x = 1\n") == ""
    given = [own, f"{indent}return (\n", "", f"{indent}return 2\n"]
    assert judged([f] * 4, given) == {"functions_parse": 0.5, "next_line_exact": 0.25}
    assert judged([f], [f"{indent}# Only a comment.\n"])["functions_parse"] == 0


def test_a_body_is_asked_for_behind_its_indent():
    """A line's end and the indent after it are one token's, and the docstring tells the indent."""
    asked, written = [], iter(["y = 1\n        return y\n    def g", "    y = 1\n", "def g():\n"])
    tokeniser = SimpleNamespace(
        eod=0, encode=lambda text: asked.append(text) or [1], decode=lambda ids: next(written)
    )
    found = bodies(3 * list(functions([MODULE])), lambda rows: rows, tokeniser)
    assert found == ["        y = 1\n        return y\n", "            y = 1\n", "        def g():\n"]
    assert asked[0].endswith('"""\n        ')


def test_a_code_run_is_judged(tmp_path):
    config = tiny_config(tmp_path)
    (tmp_path / "code").mkdir()
    for number in range(6):
        text = "".join(MODULE.replace("A", f"A{number}{part}") for part in range(3))
        (tmp_path / f"code/{number}.py").write_text(text)
    changes = {"task.name": "code", "task.functions": 2, "task.run_doctests": True, "task.continued": 2}
    changes |= {"data.source": f"files:{tmp_path}/code/*.py", "evaluate.every": 0, "train.steps": 4}
    for key, value in changes.items():
        configuration.set_key(config, key, value)
    loop.train(config, tmp_path / "run", jax.devices()[:1])
    quality = json.loads((tmp_path / "run/result.json").read_text())["quality"]
    wanted = {"functions_parse", "next_line_exact", "doctests_pass", "functions_tested", "distinct_2"}
    assert wanted <= set(quality) and quality["bits_per_byte"] > 0 and quality["functions_tested"] == 2


class Data:
    """Held-out texts, and a model that completes all with ``line``."""

    def __init__(self, line, *texts):
        self.heldout_texts = lambda: texts
        self.tokeniser = SimpleNamespace(eod=0, encode=lambda text: [1], decode=lambda ids: line)

    def judged(self, **settings):
        return Code(run_doctests=True, **settings).decoded(lambda rows: rows, self, 0)


def test_the_authors_bodies_would_pass():
    found = Data("y = 2 * x\n        return y\n", MODULE).judged()
    assert found == {"functions_parse": 1, "next_line_exact": 1, "doctests_pass": 1, "functions_tested": 1}
    assert Data("return x\n", MODULE).judged()["doctests_pass"] == 0


USED = '''
import functools

def doubled(f):
    return functools.wraps(f)(lambda x: 2 * f(x))

@doubled
def one(x):
    """Add one.

    >>> one(1) + TWO
    6
    """
    return x + 1

TWO = 2
'''
REPLACED = '''
def length(x):
    """Count.

    >>> length("ab")
    2
    """
    return sum(1 for _ in x)

from builtins import len as length
'''


def test_a_function_is_tested_within_its_module():
    assert Data("return x + 1\n", USED).judged()["doctests_pass"] == 1
    assert Data("return x + 2\n", USED).judged()["doctests_pass"] == 0


@pytest.mark.parametrize(
    "text",
    [
        USED.replace("6", "7"),  # the author's own body does not pass
        USED.replace("import functools", "import functools, not_there"),
        REPLACED,  # the body is not what the doctests call
        USED.replace(">>> one(1) + TWO\n    6", ">>> 1 + 1\n    2"),
    ],
)
def test_what_tells_nothing_gives_no_figure(text, capsys):
    found = Data("return x + 1\n", text).judged()
    assert found["functions_tested"] == 0 and "doctests_pass" not in found
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("doctests_pass: no figure, for of 1 held-out functions")
    assert Data("return x + 1\n", text, USED).judged()["functions_tested"] == 1
    assert Data("return x + 1\n", text, USED).judged(functions=1)["functions_tested"] == 0
