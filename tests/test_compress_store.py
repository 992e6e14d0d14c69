"""The file of deployable weights: what goes in comes out, in as few bytes as promised."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from qwix import QArray
from safetensors.numpy import load as read_plain
from safetensors.numpy import save

from fastformer.compress import store
from fastformer.core.errors import UserError

RNG = np.random.default_rng(0)
INT4 = RNG.integers(-8, 8, (5, 7)).astype(ml_dtypes.int4)  # an odd number of them, every value
FLOAT = RNG.normal(size=(6, 50)).astype(np.float32)
HALF_ZERO = np.where(RNG.random((6, 50)) < 0.5, 0, FLOAT)
ARRAYS = {
    "float": FLOAT,
    "int8": RNG.integers(-128, 128, (4, 3)).astype(np.int8),
    "int4": INT4,
    "fp8": FLOAT.astype(ml_dtypes.float8_e4m3fn),
    "bfloat16": FLOAT.astype(ml_dtypes.bfloat16),
    "half_zero": HALF_ZERO,
    "half_zero_int4": np.where(RNG.random((9, 9)) < 0.8, 0, 3).astype(ml_dtypes.int4),
    "all_zero": np.zeros((3, 3), np.int8),
    "scalar": np.float32(3.0),
    "empty": np.zeros((0, 4), np.float32),
}


def round_trip(tmp_path, arrays):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(store.dump(arrays))
    return store.load(path)


def test_all_comes_back_as_it_was(tmp_path):
    found = round_trip(tmp_path, ARRAYS)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        np.testing.assert_array_equal(found[name].astype(np.float32), array.astype(np.float32), name)


def test_int4_takes_half_a_byte_and_zeros_a_bit():
    tensors = read_plain(store.dump({k: v for k, v in ARRAYS.items() if k != "bfloat16"}))
    assert tensors["int4"].nbytes == (INT4.size + 1) // 2
    kept = int((HALF_ZERO != 0).sum())
    assert tensors["half_zero"].size == kept and tensors["half_zero/bitmap"].nbytes == -(-HALF_ZERO.size // 8)
    assert "float/bitmap" not in tensors and tensors["float"].dtype == np.float32


def test_stored_weights_make_a_tree(tmp_path):
    arrays = {"a/weight/qvalue": INT4, "a/weight/scale": np.ones((5, 1), np.float32), "b": FLOAT}
    found = store.tree(round_trip(tmp_path, arrays))
    assert isinstance(found["a"]["weight"], QArray) and found["a"]["weight"].qvalue.shape == INT4.shape
    store.check_fits(found, {"a": {"weight": INT4}, "b": FLOAT}, "file")
    with pytest.raises(UserError, match=r"a/weight is \(5, 7\) and in the model \(7, 5\)"):
        store.check_fits(found, {"a": {"weight": INT4.T}, "b": FLOAT}, "file")


def test_scales_that_do_not_divide_their_numbers_are_told():
    for scale in (np.ones((5,), np.float32), np.ones((3, 1), np.float32), np.ones((10, 1), np.float32)):
        with pytest.raises(UserError, match=r"numbers \(5, 7\) with scales .* restore it"):
            store.tree({"a/weight/qvalue": INT4, "a/weight/scale": scale})


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"x" + b[1:], lambda b: b""])
def test_a_damaged_file_is_told_in_one_line(tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage(store.dump(ARRAYS)))
    with pytest.raises(UserError, match="cannot be read") as error:
        store.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        store.load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["[1]", '"a"', "5", "{", '{"a/weight": [1]}', '{"b": {"dtype": "finfo"}}'])
def test_a_damaged_description_is_told_in_one_line(tmp_path, text):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({"a/weight": FLOAT, "b": FLOAT}, {store.KEY: text}))
    with pytest.raises(UserError, match="cannot be read"):
        store.load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": FLOAT, "a/b": FLOAT}, "has a/b below another array"),
        ({"a": FLOAT.astype(np.int32)}, "a is of int32, which is no floating point"),
        ({"a": FLOAT * np.nan}, "a has entries that are not finite"),
        ({"a/qvalue": FLOAT, "a/scale": FLOAT}, "a is of float32, which is no number of a byte or less"),
    ],
)
def test_arrays_that_are_no_weights_are_told(arrays, message):
    with pytest.raises(UserError, match=message):
        store.check_fits(store.tree(arrays), {"a": FLOAT}, "file")
