"""What a checkpoint says about its arrays, so that each can be checked when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from fastformer.core.errors import UserError
from fastformer.core.trees import checksums, paths


def describe(tree: Any) -> dict[str, list]:
    """Return ``[shape, dtype, checksum]`` of every array, by its path."""
    sums = paths(jax.device_get(checksums(tree)))
    return {path: [list(x.shape), str(x.dtype), int(sums[path])] for path, x in paths(tree).items()}


def digest(body: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def check_fits(described: Mapping[str, Any], abstract: Any, name: str) -> None:
    """Check that a checkpoint's arrays have the names, shapes and dtypes that the model wants.

    Raises:
      UserError: they do not; the line lists the first differences.
    """
    wanted = {path: [list(x.shape), str(x.dtype)] for path, x in paths(abstract).items()}
    found = {path: entry[:2] for path, entry in described.items()}
    lines = [f"{path} is not in the model" for path in sorted(found.keys() - wanted.keys())]
    lines += [f"{path} is not in the checkpoint" for path in sorted(wanted.keys() - found.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        if found[path] != wanted[path]:
            there, here = (f"{dtype}{shape}" for shape, dtype in (found[path], wanted[path]))
            lines.append(f"{path} is {there} in the checkpoint and {here} in the model")
    if lines:
        more = f" and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError(f"--workdir: {name} does not fit the model: {'; '.join(lines[:4])}{more}")
