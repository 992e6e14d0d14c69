"""The file of deployable weights: safetensors, small integers packed, zeros left out where it pays."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from qwix import QArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastformer.core.errors import MALFORMED, UserError

WEIGHTS = "weights.safetensors"  # its name in a workdir
# Under this key of the file's metadata: how the arrays are written that do not stand in it as they are.
KEY = "fastformer"
# Ends the name of what says, a bit an entry, where an array is not 0 whose zeros are left out.
BITMAP = "/bitmap"


def dump(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the file that holds ``arrays``.

    int4 goes two to a byte, and float8 as bytes. An array in which leaving out the zeros makes the file
    smaller is written as a bitmap and the other entries. The rest is plain safetensors.
    """
    tensors: dict[str, np.ndarray] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        array = np.asarray(array, order="C")
        full, few = _pack(array), _pack(array[array != 0])
        bitmap = np.packbits(array.reshape(-1) != 0)
        sparse = few.nbytes + bitmap.nbytes < full.nbytes
        tensors[name] = few if sparse else full
        if sparse:
            tensors[name + BITMAP] = bitmap
        if sparse or full.dtype != array.dtype:
            described[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "sparse": sparse}
    return save(tensors, {KEY: json.dumps(described, sort_keys=True)})


def load(path: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a file that ``dump`` made, or of any plain safetensors file.

    Raises:
      UserError: the file is not there or cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            described = dict(json.loads((file.metadata() or {}).get(KEY, "{}")))
            found = {name: file.get_tensor(name) for name in file.keys()}
        arrays = {}
        for name, array in found.items():
            if not (name.endswith(BITMAP) and name.removesuffix(BITMAP) in described):
                how = described.get(name)
                arrays[name] = _restored(array, found.get(name + BITMAP), how) if how else array
        return arrays
    except (OSError, SafetensorError, *MALFORMED) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--workdir: {path} cannot be read ({reason}); restore it from a copy") from error


def _restored(array: np.ndarray, bitmap: np.ndarray | None, how: Mapping[str, Any]) -> np.ndarray:
    size, dtype = math.prod(how["shape"]), np.dtype(getattr(ml_dtypes, how["dtype"], how["dtype"]))
    if not how["sparse"]:
        return _unpack(array, dtype, size).reshape(how["shape"])
    there = np.unpackbits(bitmap, count=size).astype(bool)
    whole = np.zeros(size, dtype)
    whole[there] = _unpack(array, dtype, int(there.sum()))
    return whole.reshape(how["shape"])


def _pack(array: np.ndarray) -> np.ndarray:
    if array.dtype == ml_dtypes.int4:
        bits = array.reshape(-1).astype(np.int8).view(np.uint8) & 15
        bits = np.pad(bits, (0, bits.size % 2))
        return bits[0::2] | bits[1::2] << 4
    if array.dtype.itemsize == 1 and array.dtype.kind not in "iub":
        return array.view(np.uint8)
    return array


def _unpack(array: np.ndarray, dtype: np.dtype, size: int) -> np.ndarray:
    if dtype == ml_dtypes.int4:
        bits = np.stack([array & 15, array >> 4], axis=-1).reshape(-1)[:size].astype(np.int8)
        return np.where(bits > 7, bits - 16, bits).astype(ml_dtypes.int4)
    return array.view(dtype) if array.dtype != dtype else array


def tree(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the parameters whose leaves' paths name ``arrays``, QArrays put together.

    Raises:
      UserError: one stands below another, or scales do not divide their numbers.
    """
    root: dict[str, Any] = {}
    for path, array in sorted(arrays.items()):
        *parents, leaf = path.split("/")
        node = root
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"--workdir: its {WEIGHTS} has {path} below another array; restore it")
        node[leaf] = array
    return _joined(root)


def _joined(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if set(node) == {"qvalue", "scale"} and not any(isinstance(x, dict) for x in node.values()):
        qvalue, scale = node["qvalue"], node["scale"]
        if qvalue.ndim != scale.ndim or any(b == 0 or a % b for a, b in zip(qvalue.shape, scale.shape)):
            shapes = f"numbers {qvalue.shape} with scales {scale.shape}"
            raise UserError(f"--workdir: its {WEIGHTS} has {shapes}, which do not divide them; restore it")
        return QArray(qvalue, scale)
    return {name: _joined(value) for name, value in node.items()}


def check_fits(params: Any, abstract: Any, name: str) -> None:
    """Check that stored weights are those of a model, by their paths, shapes and kinds of numbers.

    Raises:
      UserError: they are not, or not finite; the line lists the first differences.
    """
    leaves = _leaves(params)
    found, wanted = (
        {path: tuple(leaf.shape) for path, leaf in some.items()} for some in (leaves, _leaves(abstract))
    )
    lines = [
        f"{path} is {found.get(path, 'not there')} and in the model {wanted.get(path, 'not there')}"
        for path in sorted(found.keys() | wanted.keys())
        if found.get(path) != wanted.get(path)
    ]
    for path, leaf in leaves.items():
        floats = leaf.scale if isinstance(leaf, QArray) else leaf
        if isinstance(leaf, QArray) and leaf.qvalue.dtype.itemsize > 1:
            lines.append(f"{path} is of {leaf.qvalue.dtype}, which is no number of a byte or less")
        if not jnp.issubdtype(floats.dtype, jnp.floating):
            lines.append(f"{path} is of {floats.dtype}, which is no floating point")
        elif not np.isfinite(floats.astype(np.float32)).all():
            lines.append(f"{path} has entries that are not finite")
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"--workdir: {name} does not fit the model: {'; '.join(lines[:3])}{more}")


def _leaves(params: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QArray))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
