"""Configurations: load a file, apply ``--config.a.b=value``, hand each section to its owner."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from ml_collections import ConfigDict

from fastformer.core.errors import FieldError, UserError, nearest, require
from fastformer.core.values import check_kind, check_numbers

Section = TypeVar("Section")

CONFIG = "config.json"  # the file in a workdir that holds the configuration of its run

SECTIONS = (
    "name", "seed", "task", "data", "model", "train", "optimiser", "compress", "evaluate", "checkpoint",
    "log", "mesh", "distributed", "sharding", "generate", "benchmark",
)  # fmt: skip

# Sections whose keys depend on a name chosen in them: a key that is not there yet may be added,
# and whoever owns the section rejects those that it does not know.
OPEN_SECTIONS = ("model.attention", "task")


def load_module(path: str) -> ModuleType:
    """Import the Python file at ``path``.

    Raises:
      UserError: there is no such file, or it fails on import.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [str(p) for p in file.parent.glob("*.py") if p != file] if file.parent.is_dir() else []
        here = "" if file.is_absolute() else f" (seen from {Path.cwd()})"
        raise UserError(f"--config: no file {path}{nearest(path, siblings)}{here}")
    if file.suffix != ".py":
        raise UserError(f"--config: {path} is no Python file; it must end in .py")
    spec = importlib.util.spec_from_file_location(f"_config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    with _told(f"--config: {path} cannot be imported"):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell whatever a user's file raises in one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error


def load(path_and_arg: str, overrides: Iterable[tuple[str, str]] = ()) -> ConfigDict:
    """Return the locked configuration that ``path.py`` or ``path.py:arg`` describes.

    Args:
      path_and_arg: a file with ``get_config()`` or ``get_config(arg)``.
      overrides: pairs such as ``("train.steps", "100")``, applied in order.

    Raises:
      UserError: no such file or argument, an unknown key, or a value of the wrong type.
    """
    path, _, arg = path_and_arg.partition(":")
    module = load_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config: {path} has no get_config()")
    arms = getattr(module, "ARMS", None)
    many = isinstance(arms, (tuple, list, dict))
    if arms is not None and not (many and all(isinstance(name, str) for name in arms)):
        raise UserError(f"--config: ARMS of {path}, {arms!r:.60}, is no tuple of names, as ('small', 'full')")
    if arg and arms is not None and arg not in arms:
        raise UserError(f"--config: {path} has no arm {arg!r}{nearest(arg, arms)} (arms: {', '.join(arms)})")
    with _told(f"--config: get_config of {path} has no arguments that can be read"):
        parameters = inspect.signature(module.get_config).parameters.values()
    needs_arg = any(p.default is p.empty for p in parameters)
    if len(parameters) > 1:
        raise UserError(f"--config: get_config of {path} must take one argument, the arm, or none")
    if arg and not parameters:
        raise UserError(f"--config: {path} takes no argument, got {arg!r}")
    if needs_arg and not arg:
        raise UserError(f"--config: {path} needs an arm, as in {path}:{next(iter(arms or ['ARM']))}")
    with _told(f"--config: get_config() of {path} fails"):
        config = module.get_config(arg) if arg else module.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {path} returns {config!r:.60}, not a ConfigDict")
    config = ConfigDict(config.to_dict()).lock()
    check_sections(config)
    for key, text in overrides:
        set_key(config, key, text)
    check_sections(config)
    return config


def followers(path: str) -> list[ConfigDict]:
    """Return the configurations of the arms that ``path.py`` has trained after its own, in order.

    They are those that its THEN names; a file without one has none.

    Raises:
      UserError: THEN is no tuple of the file's arms, or one of them has no good configuration.
    """
    module = load_module(path)
    then, arms = getattr(module, "THEN", ()), getattr(module, "ARMS", ())
    if not isinstance(then, (tuple, list)) or not set(then) <= set(arms):
        known = ", ".join(arms) or "it has no ARMS"
        raise UserError(f"--config: THEN of {path}, {then!r:.60}, is no tuple of its arms ({known})")
    return [load(f"{path}:{arm}") for arm in then]


def check_sections(config: ConfigDict) -> None:
    """Check that a configuration has every key of SECTIONS, and no other.

    Raises:
      UserError: it has not.
    """
    for key in config:
        if key not in SECTIONS:
            raise UserError(
                f"config.{key}: no such key{nearest(key, SECTIONS)} (keys: {', '.join(SECTIONS)})"
            )
    for key in SECTIONS:
        if key not in config:
            raise UserError(f"config.{key}: is missing; begin with base.get_config(), as configs/mlm.py does")
        kind = {"name": str, "seed": int}.get(key, ConfigDict)
        if not isinstance(config[key], kind):
            wanted = "a section" if kind is ConfigDict else f"of type {kind.__name__}"
            raise UserError(f"config.{key}: {config[key]!r} is not {wanted}")
    # The default workdir is made of it.
    good = re.fullmatch(r"\w[\w. +-]{0,99}", config.name)
    require(bool(good), "config.name", config.name, "at most 100 letters, digits, _ . + - and spaces")


def set_key(config: ConfigDict, key: str, text: Any) -> None:
    """Set ``config.<key>`` from the text of a flag (or from a value that is none).

    Raises:
      UserError: the key does not exist (with the nearest that does), or the type is wrong.
    """
    *parents, leaf = key.split(".")
    node, walked = config, "config"
    for name in parents:
        if name in node and not isinstance(node[name], ConfigDict):
            raise UserError(f"{walked}.{name}: is a key, {node[name]!r}, and has none below it")
        if name not in node:
            sections = [k for k in node if isinstance(node[k], ConfigDict)]
            raise UserError(f"{walked}.{name}: no such section{nearest(name, sections)}")
        node, walked = node[name], f"{walked}.{name}"
    if leaf not in node:
        if ".".join(parents) not in OPEN_SECTIONS:
            raise UserError(
                f"{walked}.{leaf}: no such key{nearest(leaf, node)} (keys: {', '.join(sorted(node))})"
            )
        with node.unlocked():
            node[leaf] = literal(text)
        return
    old = node[leaf]
    if isinstance(old, ConfigDict):
        raise UserError(f"{walked}.{leaf}: is a section; set one of its keys ({', '.join(sorted(old))})")
    node[leaf] = _typed(text, old, f"{walked}.{leaf}")


def literal(text: Any) -> Any:
    """Return the value that a flag's text stands for: a number, a tuple, true, false, or the text itself."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two of thousands of brackets
        return text


def _typed(text: Any, old: Any, path: str) -> Any:
    """Return ``text`` as a value of the type of ``old``; ints pass for floats, not vice versa."""
    if isinstance(old, str):
        return str(text)
    value = literal(text)
    if isinstance(old, (tuple, list)):
        if isinstance(value, (int, float)):  # one of them needs no comma
            value = (value,)
        if isinstance(value, str):
            # Brackets around it all go; those of a regular expression stay.
            inner = re.sub(r"^(?:\(([^()]*)\)|\[([^][]*,[^][]*)\])$", r"\1\2", value.strip())
            value = tuple(part.strip() for part in inner.split(",") if part.strip())
        good = isinstance(value, (tuple, list))
        value = tuple(value) if good else value
    elif isinstance(old, bool):
        good = isinstance(value, bool)
    elif isinstance(old, float):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            value = float(value) if good else value
        except OverflowError:
            value = math.inf  # which no field can be
    else:
        good = isinstance(value, int) and not isinstance(value, bool)
    if not good:
        raise UserError(f"{path}: {text!r} is not of type {type(old).__name__} (it was {old!r})")
    return value


def section(cls: type[Section], config: ConfigDict, path: str) -> Section:
    """Return ``cls(**config.<path>)``, the section's owner; an owner is a frozen dataclass.

    Raises:
      UserError: a key that the owner does not have, one that is missing, or a value that the
        owner's ``__post_init__`` refuses; the line starts with the whole path of the field.
    """
    values = config
    for name in path.split("."):
        values = values[name]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise UserError(
                f"config.{path}.{key}: no such key{nearest(key, fields)} (keys: {', '.join(fields)})"
            )
        check_kind(values[key], str(fields[key].type), f"config.{path}.{key}")
        check_numbers(values[key], f"config.{path}.{key}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"config.{path}.{name}: is missing; configs/base.py shows its default")
    try:
        return cls(**{k: _plain(v) for k, v in values.items()})
    except FieldError as error:
        raise UserError(f"config.{path}.{error.field}: {error.message}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {k: _plain(v) for k, v in value.items()}
    return _hashable(value)


def to_json(config: ConfigDict) -> str:
    """Return the configuration as JSON with sorted keys: what ``config.json`` holds."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """Return the locked configuration that ``to_json`` wrote.

    Raises:
      ValueError: it is none.
    """
    try:
        found = json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("it has too many brackets") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    try:
        config = ConfigDict(found).lock()
        check_sections(config)
    except (UserError, TypeError, AttributeError) as error:
        raise ValueError(str(error).partition(";")[0]) from error
    return config


def _no_number(name: str) -> None:
    raise ValueError(f"it has {name}, which is no number")


def sha256(config: ConfigDict) -> str:
    """Return the SHA-256 of ``to_json(config)``, in hexadecimal."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()


def differences(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """Return ``(key, old value, new value)`` of every leaf in which two configurations differ."""
    old_flat, new_flat = flatten(old), flatten(new)
    keys = sorted(set(old_flat) | set(new_flat))
    pairs = ((key, old_flat.get(key), new_flat.get(key)) for key in keys)
    return [(key, a, b) for key, a, b in pairs if a != b]


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return ``{"train.steps": 100, …}``: every leaf under its dotted key, sequences as tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
