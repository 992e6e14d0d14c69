"""Code generation: text, and what the functions are worth that a model completes."""

from __future__ import annotations

import ast
import io
import re
import sys
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
from fastformer.data.splits import spread
from fastformer.data.tokenisers import Tokeniser
from fastformer.tasks.sandbox import check, passes
from fastformer.tasks.task import Complete
from fastformer.tasks.text import Text, answers

HOLE = "<hole>"  # in a prompt: what is to be filled in
LINE_END = r"\A[ \t]*\r?\n\s*"  # with the indent after it
ABOVE = 20  # lines of the module above a function that its prompt begins with


class Function(NamedTuple):
    """A function of the held-out split, in its module.

    Attributes:
      lines: of the module. first, start, end: of them, where the function, its body and what follows begin.
      indent: of its docstring, and so of its body.
      tests: its docstring if that holds doctests, else "".
    """

    lines: Sequence[str]
    first: int
    start: int
    end: int
    indent: str
    tests: str = ""

    @property
    def before(self) -> str:
        """What stands before the body: lines above the function, its signature and docstring."""
        return "".join(self.lines[max(self.first - ABOVE, 0) : self.start])

    @property
    def body(self) -> str:
        """The author's."""
        return "".join(self.lines[self.start : self.end])

    def cut(self, body: str) -> str:
        """Return what was generated up to the first line that belongs to the function no more.

        A last line without its end was cut off, and is left out.
        """
        own, kept = _indent(self.lines[self.first]), []
        for line in io.StringIO(body):
            if not line.endswith("\n") or (line.strip() and _indent(line) <= own):
                break
            kept.append(line)
        return "".join(kept)

    def statements(self, body: str) -> int:
        """Return the number of the function's statements with this body; 0 where Python cannot read it."""
        text = "".join(self.lines[self.first : self.start]) + body
        inner = _indent(text) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                node = ast.parse(("if True:\n" if inner else "") + text).body[0]
                return len((node.body[0] if inner else node).body)
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                return 0

    def passes(self, body: str) -> bool:
        """Return whether the function's doctests pass in its module with this body."""
        module = "".join([*self.lines[: self.start], body, *self.lines[self.end :]])
        return passes(module, self.tests)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


@dataclass(frozen=True)
class Code(Text):
    """Held-out functions are completed where they stand: after lines above them, signature and docstring.

    They are completed as config.generate says; the figures are those
    of greedy completion only where config.generate.temperature is 0.

    Attributes:
      functions: evenly spread over all, completed for the fraction that parses and the exact match of the
        first line; 0 is none.
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
        # A space before a word is its token's: the model is asked to write it.
        sides = [re.sub(rf"(?<=\w) +{HOLE}", HOLE, prompt).split(HOLE) for prompt in prompts]
        found = []
        for (before, after), text in zip(sides, filled(complete, tokeniser, sides)):
            found.append(before + (text.rstrip() if re.match(LINE_END, after) else text) + after)
        return found

    def decoded(self, complete, data, limit):
        found = super().decoded(complete, data, limit)
        if not self.functions:
            return found
        every = list(functions(data.heldout_texts()))
        chosen = spread(every, self.functions)
        if chosen:
            found |= judged(chosen, bodies(chosen, complete, data.tokeniser))
        if chosen and self.infill:
            holes = [hole(f) for f in chosen]
            lines = filled(complete, data.tokeniser, [(a, b) for a, _, b in holes])
            same = sum(line.strip() == wanted for line, (_, wanted, _) in zip(lines, holes))
            found |= {"infilled_line_exact": same / len(chosen)}
        if self.run_doctests:
            found |= doctested([f for f in every if f.tests][: self.functions], complete, data.tokeniser)
        return found


def doctested(asked: Sequence[Function], complete: Complete, tokeniser: Tokeniser) -> dict[str, float]:
    """Return how many functions' doctests tell a right body from none, and the fraction that a model passes.

    Where there are none there is no fraction, and a line on stderr says so.
    """
    # All are completed, for the processes of a run complete together and might not count the same.
    found = bodies(asked, complete, tokeniser) if asked else []
    done = [f.passes(body) for f, body in zip(asked, found) if f.passes(f.body) and not f.passes("")]
    if done:
        return {"doctests_pass": sum(done) / len(done), "functions_tested": float(len(done))}
    if jax.process_index() == 0:
        why = f"of {len(asked)} held-out functions with doctests none passes with its author's body only"
        print(f"doctests_pass: no figure, for {why}", file=sys.stderr, flush=True)
    return {"functions_tested": 0.0}


def bodies(asked: Sequence[Function], complete: Complete, tokeniser: Tokeniser) -> list[str]:
    """Return the body that a model gives each function, whose first indent it is given."""
    # Tokens hold a line's end and the next one's indent together: a prompt without the indent would be
    # another text than a model has seen.
    texts = answers(complete, tokeniser, [f.before + f.indent for f in asked])
    return [f.cut(f.indent + text) for f, text in zip(asked, texts)]


def filled(complete, tokeniser, sides: Sequence[Sequence[str]]) -> list[str]:
    """Return what a model puts between the two texts of each; a line that is whole ends with it."""
    # A line's end, and the indent after it, belong to the middle as they do in training.
    rows = [
        [tokeniser.eod, *before_middle(tokeniser.encode(before), tokeniser.encode(line), tokeniser)]
        for before, line in ((before, re.sub(LINE_END, "", after)) for before, after in sides)
    ]
    return [tokeniser.decode(ids) for ids in complete(rows)]


def hole(function: Function) -> tuple[str, str, str]:
    """Return what stands before the middle line of a body, that line alone, and what stands after it."""
    lines = [line for line in function.body.splitlines(keepends=True) if line.strip()]
    middle = len(lines) // 2
    line = lines[middle]
    before = function.before + "".join(lines[:middle]) + line[: _indent(line)]
    return before, line.strip(), "\n" + "".join(lines[middle + 1 :])


def functions(texts: Sequence[str]) -> Iterator[Function]:
    """Yield the documented functions of the modules among ``texts``, methods too."""
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
                doc, start = ast.get_docstring(node), node.body[0].end_lineno
                if node.body[1].lineno == start:
                    continue  # its body stands on the docstring's line
                line = lines[node.body[0].lineno - 1]
                tests = doc if ">>>" in doc else ""
                yield Function(lines, node.lineno - 1, start, node.end_lineno, line[: _indent(line)], tests)


def judged(wanted: Sequence[Function], found: Sequence[str]) -> dict[str, float]:
    """Return the fractions that parse and hold a statement, and whose first line is the author's."""
    good = sum(f.statements(body) > f.statements("") for f, body in zip(wanted, found))
    first = sum(_first_line(f.body) == _first_line(body) for f, body in zip(wanted, found))
    return {"functions_parse": good / len(wanted), "next_line_exact": first / len(wanted)}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
