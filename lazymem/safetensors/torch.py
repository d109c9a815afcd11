# SPDX-License-Identifier: Apache-2.0
"""`safetensors.torch`: what reads is lazymem's, the rest the package's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..torch.modules import assign_state, complain
from ..torch.tensors import tensor_of
from . import package
from .errors import both_kinds
from .handle import StrPath, safe_open
from .memory import arrays_in

if TYPE_CHECKING:
    import torch


def load_file(
    filename: StrPath, device: Any = "cpu", *, backend: str = "mmap", **options: Any
) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, in place: private to this process, read when they are touched.

    options: further ones of `safe_open`. Raises as `safe_open`.
    """
    with safe_open(filename, "pt", device, backend=backend, **options) as file:
        return file.get_tensors()


def load(data: bytes) -> dict[str, torch.Tensor]:
    """All tensors in the bytes of a file, copied. Raises `TypeError`, `SafetensorError`."""
    with both_kinds():
        return {name: tensor_of(array, entry.metadata) for name, (array, entry) in arrays_in(data).items()}


def load_model(
    model: torch.nn.Module,
    filename: StrPath,
    strict: bool = True,
    device: Any = "cpu",
    *,
    backend: str = "mmap",
    **options: Any,
) -> tuple[set[str], list[str]]:
    """Put a file's tensors into a model's own parameters and buffers, which stay the objects they are.

    Where device, dtype and shape agree nothing is read and nothing copied; parameters on the meta device
    become real. What is tied stays tied. Elsewhere torch copies and converts.
    strict: raise `RuntimeError` if names are missing or left over; they are returned else.
    options: further ones of `safe_open`. Raises as `safe_open`, and `RuntimeError`.
    """
    state = load_file(filename, device, backend=backend, **options)
    missing, unexpected = assign_state(model, state)
    if strict and (missing or unexpected):
        complain(model, missing, unexpected)
    return missing, unexpected


def __getattr__(name: str) -> Any:
    return package.attribute("torch", name)
