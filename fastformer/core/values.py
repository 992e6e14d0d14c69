"""What no field can be, whatever it means: a value of another type, or a number that no quantity is."""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict

from fastformer.core.errors import UserError, require

LARGEST = 2**63
TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str}


def check_kind(value: Any, kind: str, field: str) -> None:
    """Check a value of a field that is annotated ``kind``: int, float, bool, str or a tuple of one of them.

    Raises:
      UserError: it is of another type. Other annotations are not looked at.
    """
    found = re.fullmatch(r"(tuple\[)?(int|float|bool|str)(?:, \.\.\.\])?", kind)
    if not found:
        return
    many, of = bool(found[1]), found[2]
    good = isinstance(value, (tuple, list)) or not many
    for part in value if many and good else (value,):
        good = good and isinstance(part, TYPES[of]) and (isinstance(part, bool) <= (of == "bool"))
    if not good:
        raise UserError(f"{field}: {value!r} is not of type {kind}")


def check_numbers(value: Any, field: str) -> None:
    """Check that every number in a value is finite and would fit an array's integers.

    Raises:
      UserError: one is not.
    """
    if isinstance(value, ConfigDict):
        for key in value:
            check_numbers(value[key], f"{field}.{key}")
    elif isinstance(value, (tuple, list)):
        for part in value:
            check_numbers(part, field)
    elif isinstance(value, (int, float)):
        require(abs(value) < LARGEST, field, value, "a finite number, below 2^63")
