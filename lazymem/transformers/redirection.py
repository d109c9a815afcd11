# SPDX-License-Identifier: Apache-2.0
"""What transformers finds when it opens a weights file that is not there.

transformers opens the files that it resolved by `safe_open`, a global of its `modeling_utils`. While a model
is loaded that global also knows paths of our own, behind which lie deferred tensors; every other path goes
to what was there before, so that other threads may load other models. `lazymem.exchange` replaces that, too,
when somebody has it replace safetensors' own meanwhile: here, and in what is put back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from transformers import modeling_utils

from ..exchange import lock

#: An empty safetensors file, for code that looks whether there is one.
EMPTY_FILE: Final = b'\x20\0\0\0\0\0\0\0{"__metadata__":{"format":"pt"}}'

_DTYPES: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip

_shown: dict[str, Mapping[str, torch.Tensor]] = {}
# Kept after the last load: somebody may have taken `_safe_open` for good.
_before: Any = None


@contextlib.contextmanager
def shown_as(path: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block, transformers finds `tensors` in the safetensors file `path`."""
    global _before
    names: Any = modeling_utils
    with lock:
        if not _shown:
            _before = names.safe_open
            names.safe_open = _safe_open
        _shown[os.path.realpath(path)] = tensors
    try:
        yield
    finally:
        with lock:
            del _shown[os.path.realpath(path)]
            if not _shown and names.safe_open is _safe_open:
                names.safe_open = _before


def _safe_open(filename: Any, *arguments: Any, **options: Any) -> Any:
    tensors = _shown.get(os.path.realpath(filename))
    return _before(filename, *arguments, **options) if tensors is None else _File(tensors)


class _Slice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_dtype(self) -> str:
        return _DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]


class _File:
    """What of `safetensors.safe_open` transformers uses."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def offset_keys(self) -> list[str]:
        return list(self._tensors)

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
