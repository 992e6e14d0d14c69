"""Code generation: text, and what the functions are worth that a model completes."""

from __future__ import annotations

import ast
import io
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax

from fastformer.core.errors import UserError, require
from fastformer.data import open_data
from fastformer.data.changed import InfilledText
from fastformer.data.changed import asked as before_middle
from fastformer.data.tokenisers import Tokeniser
from fastformer.tasks.sandbox import check, passes
from fastformer.tasks.task import Complete
from fastformer.tasks.text import Text, answers

HOLE = "<hole>"  # in a prompt: what is to be filled in


class Function(NamedTuple):
    """A function of the held-out split.

    Attributes:
      prompt: what stands before its body, and ``body``, both without the indent that it has in its module.
      tests: its docstring if that holds doctests, else "".
      lines, span: of its module, and where in them the body begins and ends.
    """

    prompt: str
    body: str
    tests: str = ""
    lines: Sequence[str] = ()
    span: tuple[int, int] = (0, 0)
    indent: str = ""

    def module(self, body: str) -> str:
        """Return the module with another body in the place of the function's own."""
        start, end = self.span
        return "".join([*self.lines[:start], textwrap.indent(body, self.indent), *self.lines[end:]])

    def passes(self, body: str) -> bool:
        """Return whether the function's doctests pass in its module with this body."""
        return passes(self.module(body), self.tests)


@dataclass(frozen=True)
class Code(Text):
    """Held-out functions are completed from signature and docstring, as config.generate says.

    The figures are those of greedy completion only where config.generate.temperature is 0.

    Attributes:
      functions: completed for the fraction that parses and the exact match of the first line; 0 is none.
      infill: fraction of the documents that are trained on with their middle last, so that a hole can be
        filled in (Bavarian et al. 2022, 2207.14255).
      run_doctests: run the doctests of completions, each in its module, in a process without rights
        (tasks/sandbox.py). Of the first ``functions`` that have some, those count as tested that pass with
        the author's body and not with none.
    """

    name: str = "code"
    functions: int = 32
    infill: float = 0.0
    run_doctests: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.functions >= 0, "functions", self.functions, "0 (none) or more")
        require(0 <= self.infill <= 1, "infill", self.infill, "from 0 to 1")

    def open(self, data, workdir, config):
        if self.run_doctests:
            check()
        if not self.infill:
            return super().open(data, workdir, config)
        return open_data(data, workdir, partial(InfilledText, fraction=self.infill))

    def respond(self, complete, tokeniser, asked, model, params):
        prompts = asked["prompt"]
        holes = [prompt for prompt in prompts if HOLE in prompt]
        if not holes:
            return super().respond(complete, tokeniser, asked, model, params)
        if not self.infill or len(holes) < len(prompts) or any(p.count(HOLE) > 1 for p in holes):
            raise UserError(
                f"--prompt: {HOLE} is for models trained with config.task.infill, once in each prompt"
            )
        sides = [prompt.split(HOLE) for prompt in prompts]
        return [a + text + b for (a, b), text in zip(sides, filled(complete, tokeniser, sides))]

    def decoded(self, complete, data, limit):
        found = super().decoded(complete, data, limit)
        if not self.functions:
            return found
        every = list(functions(data.heldout_texts()))
        chosen = every[: self.functions]
        if chosen:
            found |= judged(chosen, answers(complete, data.tokeniser, [f.prompt for f in chosen]))
        if chosen and self.infill:
            holes = [hole(f) for f in chosen]
            lines = filled(complete, data.tokeniser, [(a, b) for a, _, b in holes])
            same = sum(line.strip() == wanted.strip() for line, (_, wanted, _) in zip(lines, holes))
            found |= {"infilled_line_exact": same / len(chosen)}
        if self.run_doctests:
            found |= doctested([f for f in every if f.tests][: self.functions], complete, data.tokeniser)
        return found


def doctested(asked: Sequence[Function], complete: Complete, tokeniser: Tokeniser) -> dict[str, float]:
    """Return how many functions' doctests tell a right body from none, and the fraction that a model passes.

    Where there are none there is no fraction, and a line on stderr says so.
    """
    # All are completed, for the processes of a run complete together and might not count the same.
    bodies = answers(complete, tokeniser, [f.prompt for f in asked]) if asked else []
    done = [f.passes(cut(body)) for f, body in zip(asked, bodies) if f.passes(f.body) and not f.passes("")]
    if done:
        return {"doctests_pass": sum(done) / len(done), "functions_tested": float(len(done))}
    if jax.process_index() == 0:
        why = f"of {len(asked)} held-out functions with doctests none passes with its author's body only"
        print(f"doctests_pass: no figure, for {why}", file=sys.stderr, flush=True)
    return {"functions_tested": 0.0}


def filled(complete, tokeniser, sides: Sequence[Sequence[str]]) -> list[str]:
    """Return what a model puts between the two texts of each."""
    rows = [
        [tokeniser.eod, *before_middle(tokeniser.encode(before), tokeniser.encode(after), tokeniser)]
        for before, after in sides
    ]
    return [tokeniser.decode(ids) for ids in complete(rows)]


def hole(function: Function) -> tuple[str, str, str]:
    """Return what stands before the middle line of a function's body, that line, and what stands after."""
    lines = [line for line in function.body.splitlines(keepends=True) if line.strip()]
    middle = len(lines) // 2
    before = function.prompt + "".join(lines[:middle])
    return before, lines[middle], "".join(lines[middle + 1 :])


def functions(texts: Sequence[str]) -> Iterator[Function]:
    """Yield the documented functions of the modules among ``texts``, methods too, without their indent."""
    for text in texts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
        lines = list(io.StringIO(text))  # a form feed ends no line of Python's
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                yield _function(node, lines)


def _function(node: ast.FunctionDef, lines: Sequence[str]) -> Function:
    start, end = node.body[0].end_lineno, node.end_lineno
    own = lines[node.lineno - 1 : end]
    whole = list(io.StringIO(textwrap.dedent("".join(own))))
    head = start - node.lineno + 1
    indent = own[0][: len(own[0]) - len(whole[0])]
    doc = ast.get_docstring(node)
    tests = doc if ">>>" in doc else ""
    return Function("".join(whole[:head]), "".join(whole[head:]), tests, lines, (start, end), indent)


def cut(body: str) -> str:
    """Return what was generated up to the first line that belongs to the function no more.

    A last line without its end was cut off, and is left out.
    """
    kept = []
    for line in body.splitlines(keepends=True):
        if not line.endswith("\n") or (line.strip() and not line[0].isspace()):
            break
        kept.append(line)
    return "".join(kept)


def statements(text: str) -> int:
    """Return the number of statements in the function that ``text`` is; 0 where Python cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return len(ast.parse(text).body[0].body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return 0


def judged(wanted: Sequence[Function], bodies: Sequence[str]) -> dict[str, float]:
    """Return the fractions that parse and hold a statement, and whose first line is the author's."""
    cuts = [cut(body) for body in bodies]
    good = sum(statements(f.prompt + body) > statements(f.prompt) for f, body in zip(wanted, cuts))
    first = sum(_first_line(f.body) == _first_line(body) for f, body in zip(wanted, cuts))
    return {"functions_parse": good / len(wanted), "next_line_exact": first / len(wanted)}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
