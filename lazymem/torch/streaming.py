# SPDX-License-Identifier: Apache-2.0
"""Tensors to a device, piece by piece, so that they are never in main memory all at once.

Each piece is populated, copied into one of two staging buffers (pinned memory for CUDA, so that the copy to
the device runs while the next piece is made ready), sent on, and its chunks are given back. Written
against torch's API; without a GPU it is tested with the CPU as the device.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch

from ..catalog import ArrayInfo
from ..errors import OptionError
from ..progress import Progress
from ..snapshot import Snapshot
from .tensors import meta_tensor, torch_dtype, torch_shape, torch_steps

#: Bytes sent at once.
PIECE: Final = 16 << 20


class _Stage:
    """Two buffers that a copy to the device may still be reading from."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(2)]
        self._sent: list[Any] = [None, None]
        self._turn = 0

    def send(self, data: np.ndarray[Any, np.dtype[np.uint8]], target: torch.Tensor) -> None:
        """Copy `data` to the bytes `target` on the device; returns when `data` may go."""
        self._turn ^= 1
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        buffer = self._buffers[self._turn][: len(data)]
        buffer.numpy()[:] = data
        target.copy_(buffer, non_blocking=self._pinned)
        if self._pinned:
            self._sent[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent[self._turn].record(torch.cuda.current_stream(target.device))

    def finish(self) -> None:
        for event in self._sent:
            if event is not None:
                event.synchronize()


def stream(
    snapshot: Snapshot, device: torch.device, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """All arrays of `snapshot`, which is open in mode "r" and for this alone, as tensors of `device`.

    Names that show the same bytes in the same way become one tensor. Blocks until all are there; needs
    memory for the pieces under way. Raises `UnsupportedDtype`, `OptionError` for strides that are no whole
    elements, both before anything is read, and as `prefetch(wait=True)`.
    """
    infos = [snapshot.info(name) for name in snapshot]
    if device.type == "meta":
        return {info.name: meta_tensor(info.dtype, info.shape, info.metadata) for info in infos}
    first = {_key(info): info.name for info in reversed(infos)}
    forms = {key: _form(snapshot.info(name)) for key, name in first.items()}
    flats = {
        name: torch.empty(snapshot.info(name).nbytes, dtype=torch.uint8, device=device)
        for name in first.values()
    }
    total, done = sum(flat.nbytes for flat in flats.values()), 0
    stage = _Stage(device)
    for info, begin, data in snapshot.walk(flats, piece=PIECE):
        stage.send(data, flats[info.name][begin : begin + len(data)])
        done += len(data)
        if progress is not None:
            progress(done, total)
    stage.finish()
    made = {key: _shape(forms[key], flats[name]) for key, name in first.items()}
    return {info.name: made[_key(info)] for info in infos}


def _key(info: ArrayInfo) -> tuple[Any, ...]:
    return info.offset, info.nbytes, info.dtype, info.shape, info.order, info.strides


class _Form(NamedTuple):
    """How torch shows an array's bytes. steps: strides in elements, where they do not follow one another."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    order: str
    steps: list[int] | None


def _form(info: ArrayInfo) -> _Form:
    dtype, shape = torch_dtype(info.dtype, info.metadata), torch_shape(info.dtype, info.shape, info.metadata)
    if info.strides is None:
        return _Form(dtype, shape, info.order, None)
    try:
        steps = torch_steps(info.shape, info.strides, info.dtype.itemsize)
    except OptionError as error:
        raise OptionError(f"array {info.name!r}: {error}") from None
    return _Form(dtype, shape, info.order, steps)


def _shape(form: _Form, flat: torch.Tensor) -> torch.Tensor:
    dtype, shape, order, steps = form
    if not flat.nbytes:
        return torch.empty(shape, dtype=dtype, device=flat.device)
    numbers = flat.view(dtype)
    if steps is not None:
        return numbers.as_strided(shape, steps)
    if order == "F":
        return numbers.view(shape[::-1]).permute(*reversed(range(len(shape))))
    return numbers.view(shape)
