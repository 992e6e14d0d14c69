"""Code generation: text, and what the functions are worth that a model completes."""

from __future__ import annotations

import ast
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastformer.core.errors import require
from fastformer.tasks.sandbox import passes
from fastformer.tasks.text import Text, answers


class Function(NamedTuple):
    """A function of the held-out split: what stands before its body, the body, whether doctests call it."""

    prompt: str
    body: str
    tested: bool


@dataclass(frozen=True)
class Code(Text):
    """Held-out functions are completed from signature and docstring.

    Attributes:
      functions: completed for the fraction that parses and the exact match of the first line; 0 is none.
      run_doctests: run the doctests of completions in a process without rights (tasks/sandbox.py); only
        functions that need nothing but themselves can pass.
    """

    name: str = "code"
    functions: int = 32
    run_doctests: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.functions >= 0, "functions", self.functions, "0 (none) or more")

    def decoded(self, complete, data, limit):
        found = super().decoded(complete, data, limit)
        if not self.functions:
            return found
        every = list(functions(data.heldout_texts()))
        chosen = every[: self.functions]
        if chosen:
            found |= judged(chosen, answers(complete, data.tokeniser, [f.prompt for f in chosen]))
        tested = [f for f in every if f.tested][: self.functions] if self.run_doctests else []
        if tested:
            bodies = answers(complete, data.tokeniser, [f.prompt for f in tested])
            done = [passes(f.prompt + cut(body)) for f, body in zip(tested, bodies)]
            found |= {"doctests_pass": sum(done) / len(done), "functions_tested": float(len(done))}
        return found


def functions(texts: Sequence[str]) -> Iterator[Function]:
    """Yield the documented functions of the modules among ``texts``, methods too, without their indent."""
    for text in texts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):
                continue
        lines = text.splitlines(keepends=True)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                yield _function(node, lines)


def _function(node: ast.FunctionDef, lines: Sequence[str]) -> Function:
    first, after = node.lineno - 1, node.body[0].end_lineno
    whole = textwrap.dedent("".join(lines[first : node.end_lineno]))
    cut_at = len("".join(whole.splitlines(keepends=True)[: after - first]))
    return Function(whole[:cut_at], whole[cut_at:], ">>>" in ast.get_docstring(node))


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


def parses(text: str) -> bool:
    """Return whether Python can read ``text``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False
    return True


def judged(wanted: Sequence[Function], bodies: Sequence[str]) -> dict[str, float]:
    """Return the fractions that parse and hold a statement, and whose first line is the author's."""
    cuts = [cut(body) for body in bodies]
    good = sum(bool(body.strip()) and parses(f.prompt + body) for f, body in zip(wanted, cuts))
    first = sum(_first_line(f.body) == _first_line(body) for f, body in zip(wanted, cuts))
    return {"functions_parse": good / len(wanted), "next_line_exact": first / len(wanted)}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
