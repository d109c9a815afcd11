# SPDX-License-Identifier: Apache-2.0
"""Arrays as tensors: same memory, same dtype, a storage of their own bytes."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import lazymem
from lazymem.errors import OptionError, UnsupportedDtype
from lazymem.torch.tensors import meta_tensor, numpy_dtype, tensor_of, torch_dtype

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def _array(dtype: torch.dtype, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    numpy = numpy_dtype(dtype)
    count = math.prod(shape)
    raw = bytearray(i % 2 if dtype == torch.bool else i % 100 for i in range(count * numpy.itemsize))
    return np.ndarray(shape, numpy, buffer=raw)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3), (1, 1, 4)], ids=str)
def test_tensor_is_the_array(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    array = _array(dtype, shape)
    tensor = tensor_of(array)
    assert tensor.dtype == dtype == torch_dtype(array.dtype)
    assert tensor.shape == shape
    assert tensor.is_contiguous()
    assert tensor.untyped_storage().nbytes() == array.nbytes
    if array.size:
        assert tensor.data_ptr() == array.__array_interface__["data"][0]
        assert bytes(tensor.untyped_storage().tolist()) == array.tobytes()
    meta = meta_tensor(array.dtype, array.shape)
    assert (meta.dtype, meta.shape, meta.is_meta) == (tensor.dtype, tensor.shape, True)


def test_order_and_strides_are_kept() -> None:
    base = np.arange(24.0).reshape(4, 6)
    for array in (base.T, np.asfortranarray(base), base[::2, 1::2], base[:, 2], base[1:2], base[3:, 5:]):
        tensor = tensor_of(array)
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() <= base.nbytes
        assert tensor.data_ptr() == array.__array_interface__["data"][0]


def test_misaligned_array_is_shown() -> None:
    array = np.ndarray((4,), np.float32, buffer=bytearray(17), offset=1)
    array[:] = [1, 2, 3, 4]
    assert tensor_of(array).sum() == 10


def test_packed_pairs_are_torchs() -> None:
    array = np.arange(8, dtype=np.uint8).reshape(2, 4)
    tensor = tensor_of(array, {"dtype": "F4", "shape": [2, 8]})
    assert tensor.dtype == torch.float4_e2m1fn_x2
    assert tensor.shape == (2, 4)
    assert tensor_of(array, {"dtype": "something else"}).dtype == torch.uint8
    for metadata in ({"dtype": "F6_E2M3", "shape": [1]}, {"dtype": "F4", "shape": [5, 3]}, {"dtype": "F4"}):
        with pytest.raises(UnsupportedDtype):
            tensor_of(array, metadata)


def test_what_torch_lacks_is_refused() -> None:
    for dtype in ("U3", "M8[s]", "V5", ">f4", [("a", "f4")]):
        with pytest.raises(UnsupportedDtype, match="no dtype"):
            tensor_of(np.zeros(3, dtype))
    with pytest.raises(UnsupportedDtype):
        numpy_dtype(torch.quint8)


def test_read_only_and_backward_memory_is_refused() -> None:
    array = np.zeros(3)
    array.flags.writeable = False
    with pytest.raises(OptionError, match="mode='c'"):
        tensor_of(array)
    with pytest.raises(OptionError, match="step"):
        tensor_of(np.zeros(3)[::-1])
    with pytest.raises(OptionError, match="step"):
        tensor_of(np.zeros(3, [("a", "f4"), ("b", "u1")])["a"])


def test_tensor_keeps_its_memory() -> None:
    class Memory(np.ndarray[Any, Any]):
        pass

    array = np.arange(1000.0).view(Memory)
    gone = weakref.ref(array)
    part = tensor_of(array)[10:20]
    del array
    gc.collect()
    assert gone() is not None
    assert part.sum() == sum(range(10, 20))
    del part
    gc.collect()
    assert gone() is None


def test_snapshot_stays_open_for_its_tensors(tmp_path: Any) -> None:
    lazymem.build({"a": np.arange(10.0)}, tmp_path / "a.lzm", codec="none")
    snapshot = lazymem.open(tmp_path / "a.lzm", mode="c")
    tensor = tensor_of(snapshot["a"])
    with pytest.raises(BufferError):
        snapshot.close()
    assert tensor[3] == 3
    del tensor
    snapshot.close()


def test_default_device_is_of_no_account() -> None:
    with torch.device("meta"):
        assert tensor_of(np.zeros(3)).device.type == "cpu"
        assert tensor_of(np.zeros((0, 3))).device.type == "cpu"
