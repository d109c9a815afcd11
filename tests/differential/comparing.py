# SPDX-License-Identifier: Apache-2.0
"""The same call to the installed safetensors and to lazymem's: what came out, in a form to compare."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import lazymem.safetensors
import lazymem.safetensors.numpy
import lazymem.safetensors.torch


@dataclass(frozen=True)
class Package:
    """One of the two, with names that do not change under `install`."""

    safe_open: Any
    safe_open_handle: Any
    deserialize: Any
    load_file: Any
    load: Any
    load_model: Any
    load_file_np: Any
    load_np: Any


THEIRS = Package(
    safetensors.safe_open,
    safetensors._safe_open_handle,
    safetensors.deserialize,
    safetensors.torch.load_file,
    safetensors.torch.load,
    safetensors.torch.load_model,
    safetensors.numpy.load_file,
    safetensors.numpy.load,
)
OURS = Package(
    lazymem.safetensors.safe_open,
    lazymem.safetensors.safe_open_handle,
    lazymem.safetensors.deserialize,
    lazymem.safetensors.torch.load_file,
    lazymem.safetensors.torch.load,
    lazymem.safetensors.torch.load_model,
    lazymem.safetensors.numpy.load_file,
    lazymem.safetensors.numpy.load,
)


@dataclass(frozen=True)
class Raised:
    """What a call raised."""

    kind: type[BaseException]
    message: str


def outcome(call: Callable[[], Any]) -> Any:
    """Its result in a form that `==` compares wholly, or what it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return plain(call())
        except Exception as error:
            return Raised(type(error), str(error))


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (
            "tensor",
            str(value.dtype),
            tuple(value.shape),
            str(value.device),
            value.requires_grad,
            _bytes(value),
        )
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.shape, value.flags.writeable, value.tobytes()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(item) for item in value]
    return value if isinstance(value, (str, bytes, int, type(None))) else type(value).__name__


def _bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach()
    if whole.element_size() == 1:  # torch cannot even copy pairs of 4-bit floats
        return whole.view(torch.uint8).contiguous().numpy().tobytes()
    return (
        torch.empty(whole.numel(), dtype=whole.dtype)
        .copy_(whole.reshape(-1))
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def assert_alike(theirs: Any, ours: Any, *, messages: bool = False) -> None:
    """Equal results; or an exception that theirs' `except` clause would catch."""
    if isinstance(theirs, Raised):
        assert isinstance(ours, Raised), f"theirs raised {theirs}, ours gave {ours}"
        assert issubclass(ours.kind, theirs.kind), f"theirs raised {theirs}, ours {ours}"
        if messages:
            assert ours.message == theirs.message
    else:
        assert ours == theirs


def both(call: Callable[[Package], Any], *, messages: bool = False) -> Any:
    """Make a call to either, and demand that they are alike; what came out."""
    theirs = outcome(lambda: call(THEIRS))
    assert_alike(theirs, outcome(lambda: call(OURS)), messages=messages)
    return theirs


def make_file(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; its header as it is given, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (1,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
