# SPDX-License-Identifier: Apache-2.0
"""Which framework, device and backend a call names: what safetensors 0.8 accepts, and its errors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

from .errors import InvalidArgument

PYTORCH: Final = "pytorch"
NUMPY: Final = "numpy"

FRAMEWORKS: Final = {
    "pt": PYTORCH, "torch": PYTORCH, "pytorch": PYTORCH, "np": NUMPY, "numpy": NUMPY,
    "tf": "tensorflow", "tensorflow": "tensorflow", "jax": "flax", "flax": "flax", "mlx": "mlx",
    "paddle": "paddle",
}  # fmt: skip
_NUMBERED: Final = ("cuda", "musa", "npu", "xpu", "xla", "mlu", "hpu")

MMAP: Final = "mmap"
PREAD: Final = "pread"
#: What each backend's name stands for: later and earlier versions' words for reading without a mapping.
_BACKENDS: Final = {MMAP: MMAP, PREAD: PREAD, "read_file": PREAD}


def check_str(value: object, argument: str) -> str:
    if not isinstance(value, str):
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"argument {argument!r}: {kind!r} is not an instance of 'str'")
    return value


def filename_of(value: object) -> str | os.PathLike[str]:
    if isinstance(value, bytes):
        raise TypeError("argument 'filename': 'bytes' object is not an instance of 'str'")
    if not isinstance(value, (str, os.PathLike)):
        kind = type(value).__name__
        raise TypeError(f"argument 'filename': expected str, bytes or os.PathLike object, not {kind}")
    return value


def framework_of(value: object) -> str:
    """ "pytorch", "numpy", "tensorflow", "flax", "mlx" or "paddle"."""
    name = check_str(value, "framework")
    if name not in FRAMEWORKS:
        raise InvalidArgument(f"framework {name} is invalid")
    return FRAMEWORKS[name]


def device_of(value: object) -> str | int:
    """A device as torch takes it; a number is left to torch to name.

    Beside safetensors' own: "meta", and `torch.device`.
    """
    if value is None:
        return "cpu"
    if isinstance(value, int) and value >= 0:
        return int(value)
    if type(value).__module__ == "torch" and type(value).__name__ == "device":
        value = "cpu" if str(value).startswith("cpu") else str(value)
    if not isinstance(value, str):
        raise InvalidArgument(f"device {value!r} is invalid")
    if value in ("cpu", "meta", "mps"):
        return value
    kind, colon, number = value.partition(":")
    if kind not in _NUMBERED or ":" in number:
        raise InvalidArgument(f"device {value} is invalid")
    if not colon:
        return f"{kind}:0"
    if not (number.isascii() and number.isdigit()):
        found = "invalid digit found in string" if number else "cannot parse integer from empty string"
        raise ValueError(found)
    return f"{kind}:{int(number)}"


def backend_of(value: object) -> str:
    """ "mmap" or "pread"."""
    name = check_str(value, "backend")
    if name not in _BACKENDS:
        raise InvalidArgument(f'backend "{name}" is invalid (expected one of: "mmap", "pread")')
    return _BACKENDS[name]


def check_framework_has(device: str | int, framework: str) -> None:
    if device != "cpu" and framework not in (PYTORCH, "paddle"):
        raise InvalidArgument(f"Device {device} is not supported for framework {framework}")


def newer_options(
    backend: str, framework: str, device: str | int, newer: Mapping[str, Any]
) -> tuple[str, bool]:
    """The backend, and whether to prefetch, that keywords of newer versions ask for; others are ignored."""
    if newer.get("mmap") is False:
        backend = PREAD
    prefetch = bool(newer.get("prefetch", False))
    if prefetch:
        if backend != PREAD:
            raise InvalidArgument(f'prefetch=True needs backend="pread", and this is backend="{backend}"')
        if framework != PYTORCH:
            raise InvalidArgument(f'prefetch=True needs framework="pt", and this is {framework}')
        if not str(device).startswith("cuda") and not isinstance(device, int):
            raise InvalidArgument(f"prefetch=True needs a cuda device, and this is {device}")
    return backend, prefetch
