# SPDX-License-Identifier: Apache-2.0
"""Arrays of a region as torch tensors: the same memory, nothing read, nothing copied.

Relies on two facts about torch. `torch.frombuffer` keeps the object whose buffer it shows, so a tensor
keeps the array, and the array the region. A storage is as long as that buffer: these are cut to the
tensor's own bytes, because who saves tensors (safetensors' `_is_complete`, `torch.save`) compares the two.

torch has no read-only tensors. Memory of mode "r" is refused: a write to it would be SIGSEGV.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..dtypes import EXTENSION_DTYPES
from ..errors import OptionError, UnsupportedDtype

_NO_METADATA: Final[Mapping[str, Any]] = {}

#: What numpy and torch call by one name.
_SHARED_NAMES: Final = (
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
    "float16", "float32", "float64", "complex64", "complex128",
)  # fmt: skip
#: What ml_dtypes and torch call by one name; which of them there are depends on both their versions.
_EXTENSION_NAMES: Final = (
    "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    "complex32",
)  # fmt: skip


def _make_table() -> dict[np.dtype[Any], torch.dtype]:
    pairs = [(np.dtype(name), getattr(torch, name)) for name in _SHARED_NAMES]
    pairs += [
        (EXTENSION_DTYPES[name], getattr(torch, name))
        for name in _EXTENSION_NAMES
        if name in EXTENSION_DTYPES and hasattr(torch, name)
    ]
    return dict(pairs)


_TORCH_DTYPES: Final = _make_table()
_NUMPY_DTYPES: Final = {theirs: ours for ours, theirs in _TORCH_DTYPES.items()}
#: Two numbers in a byte; torch counts the bytes, and so does the array that shows one.
_PACKED: Final = {"F4": torch.float4_e2m1fn_x2} if hasattr(torch, "float4_e2m1fn_x2") else {}


def torch_dtype(dtype: np.dtype[Any], metadata: Mapping[str, Any] = _NO_METADATA) -> torch.dtype:
    """The torch dtype of elements that numpy calls `dtype`.

    metadata: the array's own, which says what packed bytes are ({"dtype": "F4"}).
    Raises `UnsupportedDtype` where torch has none (strings, times, structures, the other byte order, 6-bit
    floats), or none in this version.
    """
    packed = _packed_name(dtype, metadata)
    found = _TORCH_DTYPES.get(dtype) if packed is None else _PACKED.get(packed)
    if found is None:
        raise UnsupportedDtype(
            f"torch {torch.__version__} has no dtype for {packed or dtype}; take the array as numpy has it, "
            "or convert it"
        )
    return found


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What numpy, with ml_dtypes, calls `dtype`. Raises `UnsupportedDtype` where neither has it."""
    found = _NUMPY_DTYPES.get(dtype)
    if found is None:
        raise UnsupportedDtype(f"numpy has no dtype for {dtype}; convert the tensor")
    return found


def _packed_name(dtype: np.dtype[Any], metadata: Mapping[str, Any]) -> str | None:
    """What packed bytes are: "F4", "F6_E2M3" or "F6_E3M2"; None for an array that is what it says."""
    name = metadata.get("dtype")
    return name if dtype == np.uint8 and isinstance(name, str) and name.startswith(("F4", "F6")) else None


def torch_shape(
    dtype: np.dtype[Any], shape: Sequence[int], metadata: Mapping[str, Any] = _NO_METADATA
) -> tuple[int, ...]:
    """The shape of the tensor that shows an array of that shape: the same, packed pairs counted as one.

    Raises `UnsupportedDtype` for pairs that do not fill a row.
    """
    if _packed_name(dtype, metadata) is None:
        return tuple(shape)
    own = metadata.get("shape")
    if not isinstance(own, (list, tuple)) or not own or own[-1] % 2:
        raise UnsupportedDtype(
            f"f4_x2 dtype requires that the last dim be divisible by 2 in torch: got {own}; take the bytes "
            "as numpy has them"
        )
    return (*own[:-1], own[-1] // 2)


def torch_steps(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> list[int]:
    """Strides in elements, as torch has them, for strides in bytes.

    Raises `OptionError` for those that go backwards or are no whole elements.
    """
    used = [0 if length == 1 else stride for length, stride in zip(shape, strides, strict=True)]
    if any(stride < 0 or stride % itemsize for stride in used):
        raise OptionError(
            f"a tensor cannot step by {tuple(strides)} bytes through elements of {itemsize}; copy the array"
        )
    return [stride // itemsize for stride in used]


def meta_tensor(
    dtype: np.dtype[Any], shape: Sequence[int], metadata: Mapping[str, Any] = _NO_METADATA
) -> torch.Tensor:
    """A tensor of the meta device in place of such an array. Raises `UnsupportedDtype`."""
    return torch.empty(torch_shape(dtype, shape, metadata), dtype=torch_dtype(dtype, metadata), device="meta")


def tensor_of(array: NDArray[Any], metadata: Mapping[str, Any] = _NO_METADATA) -> torch.Tensor:
    """The tensor that shows `array`: same memory, shape and strides, nothing read. Keeps the array alive.

    Its storage has the array's bytes and no others; of a strided array those from its first element to
    its last. metadata: the array's own, see `torch_dtype`.
    Raises `UnsupportedDtype`, and `OptionError` for memory that must not be written or steps backwards.
    """
    dtype = torch_dtype(array.dtype, metadata)
    shape = torch_shape(array.dtype, array.shape, metadata)
    if array.size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if not array.flags.writeable:
        raise OptionError(
            "a tensor cannot show read-only memory, since torch may write to it; open with mode='c'"
        )
    itemsize = array.dtype.itemsize
    steps = torch_steps(array.shape, array.strides, itemsize)
    extent = itemsize * (
        1 + sum((length - 1) * step for length, step in zip(array.shape, steps, strict=True))
    )
    flat = torch.frombuffer(np.asarray(_Extent(array, extent)), dtype=torch.uint8).view(dtype)
    if array.flags.c_contiguous:
        return flat.view(shape)
    return flat.as_strided(shape, steps)


class _Extent:
    """The bytes from an array's first element to its last; keeps the array."""

    def __init__(self, array: NDArray[Any], extent: int) -> None:
        self._array = array
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (extent,),
            "data": (array.__array_interface__["data"][0], False),
        }
