"""The text that every Python brings along: its standard library's sources, topics and docstrings."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fastformer.core.errors import UserError
from fastformer.data.corpus import LAYOUT
from fastformer.data.splits import digest, unique

# Tests, programs rather than libraries, prose in the guise of code, and what others installed.
EXCLUDED = frozenset(
    {
        *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"),
        *("pydoc_data", "site-packages", "dist-packages", "__pycache__"),
    }
)
VERSION = ".".join(map(str, sys.version_info[:3]))
TITLE = f"{platform.python_implementation()} {VERSION}"


@cache
def module_texts() -> tuple[tuple[str, str], ...]:
    """Return ``(path below the library, source)`` of every module, newlines as ``\\n``, in path order.

    What is generated for one machine (``_sysconfigdata*``, ``config-*``) is left out, so that the
    same Python gives the same corpus everywhere.

    Raises:
      UserError: this Python came without its library's sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED and not name.startswith("config-")]
        names = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        found += [Path(folder, name) for name in names]
    texts = [(path.relative_to(root).as_posix(), _read(path)) for path in found]
    if not any(text for _, text in texts):
        raise UserError(f"config.data.source: this Python has no library sources in {root}; use files:…")
    return tuple(sorted(texts))


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # it heeds a coding cookie
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def fingerprint() -> str:
    """Return a hash of every module's path and source, and of the topics."""
    state = hashlib.sha256(f"{TITLE} {LAYOUT}".encode())
    for name, text in [*module_texts(), *((name, *texts) for name, texts in _topics())]:
        state.update(name.encode() + b"\0" + digest(text))
    return state.hexdigest()


def code() -> Iterator[tuple[str, str]]:
    """Yield ``(path, source)`` of every module of the standard library, each text once."""
    yield from unique(module_texts())


def docs() -> Iterator[tuple[str, str]]:
    """Yield the prose: every topic of ``help()``, and every module's docstrings, each docstring once."""
    seen: set[bytes] = set()
    for name, texts in [*_topics(), *_docstrings()]:
        fresh = {digest(text): text for text in texts if text.strip() and digest(text) not in seen}
        seen |= fresh.keys()
        if fresh:
            yield name, "\n\n".join(fresh.values()) + "\n"


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topics/{name}", [text.strip()]


def _docstrings() -> Iterator[tuple[str, list[str]]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, text in module_texts():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        yield name, [ast.get_docstring(node) or "" for node in nodes]
