# SPDX-License-Identifier: Apache-2.0
"""The work behind `lazymem demo`: a model-sized file, its snapshot, and the times and bytes of both.

Steps of a `Demo` are called in order; each returns what is to be shown. Everything lies in one
temporary folder, which goes when the block ends, however it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .builder import BuildReport, build
from .errors import BuildError, OptionError
from .options import MIB, cpu_count
from .snapshot import Snapshot
from .snapshot import open as open_snapshot

DEFAULT_SIZE: Final = 448 * MIB
MIN_SIZE: Final = 16 * MIB
MAX_SIZE: Final = 64 * 1024 * MIB

Progress = Callable[[int, int | None], None]

_ITEMSIZE: Final = {"BF16": 2, "F32": 4}
_PIECE: Final = 1 << 20  # elements made, or bytes compared, at once
#: The tensor that gets touched first; every size of model has its layer 0.
_WANTED: Final = "model.layers.{layer}.mlp.up_proj.weight"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model. spread: standard deviation of its values; 0.0: all zeros."""

    name: str
    kind: str  # as safetensors names it
    shape: tuple[int, ...]
    spread: float

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return self.elements * _ITEMSIZE[self.kind]


@dataclass(frozen=True, slots=True)
class Made:
    """The model file. Bytes and seconds."""

    path: str
    nbytes: int
    tensors: int
    layers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Opened:
    """The snapshot, open. states: one byte a chunk, as `Snapshot.chunk_states` has them."""

    seconds: float
    backend: str
    states: bytes


@dataclass(frozen=True, slots=True)
class Touched:
    """One tensor, read by touching it: its first element, then all of it. chunks: those that hold it."""

    name: str
    nbytes: int
    first_seconds: float
    all_seconds: float
    bytes_read: int
    states: bytes


@dataclass(frozen=True, slots=True)
class Filled:
    """Everything, prefetched."""

    seconds: float
    states: bytes


class Demo:
    """A context manager that owns the temporary folder and the open snapshot.

    size: about as many bytes of weights. folder: where to put the temporary folder; left out, the first
    of the usual places with room. Raises `OptionError`, and `BuildError` if there is no room.
    """

    def __init__(self, size: int = DEFAULT_SIZE, folder: str | None = None) -> None:
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise OptionError(
                f"the size is {size}; it must be from {MIN_SIZE} (16 MiB) to {MAX_SIZE} (64 GiB)"
            )
        self._tensors, self._layers = _plan(size)
        self._nbytes = sum(tensor.nbytes for tensor in self._tensors)
        # The model, its snapshot (no larger, and an index), and some room for others.
        place, self.free = _find_room(2 * self._nbytes + 64 * MIB, folder)
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="lazymem-demo-", dir=place)
        except OSError as error:
            raise BuildError(
                f"{place}: no folder can be made in it ({error.strerror}); name another with --dir"
            ) from error
        self.folder = self._folder.name
        self.model = os.path.join(self.folder, "model.safetensors")
        self.snapshot_path = os.path.join(self.folder, "model.lzm")
        self.snapshot: Snapshot | None = None

    def __enter__(self) -> Demo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The files' names go first: memory that is still mapped does not need them.
        self._folder.cleanup()
        if self.snapshot is not None and kind is None:
            self.snapshot.close()

    # ---- the steps ----

    def make_model(self, progress: Progress | None = None) -> Made:
        """Write a .safetensors file of a small transformer: normally distributed weights, zero biases."""
        started = time.monotonic()
        done = 0
        with open(self.model, "wb") as out, ThreadPoolExecutor(cpu_count()) as pool:
            out.write(_header(self._tensors))
            for piece in _pieces(self._tensors, pool):
                out.write(piece.data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, self._nbytes)
            out.flush()
            os.fsync(out.fileno())
            nbytes = out.tell()
        return Made(self.model, nbytes, len(self._tensors), self._layers, time.monotonic() - started)

    def build(self, progress: Progress | None = None) -> BuildReport:
        """The snapshot of the model file, as `lazymem build` makes it."""
        return build(self.model, self.snapshot_path, progress=progress)

    def read_file(self) -> float:
        """Seconds to read the whole model file into memory and find its tensors, as numpy would."""
        _forget(self.model)
        started = time.monotonic()
        data = np.fromfile(self.model, np.uint8)
        _tensors_in(data)
        return time.monotonic() - started

    def decompress_file(self) -> float:
        """Seconds to read, check and decompress the whole snapshot, on all processors."""
        _forget(self.snapshot_path)
        started = time.monotonic()
        with open_snapshot(self.snapshot_path, backend="eager"):
            return time.monotonic() - started

    def open(self) -> Opened:
        _forget(self.snapshot_path)
        started = time.monotonic()
        self.snapshot = open_snapshot(self.snapshot_path)
        seconds = time.monotonic() - started
        return Opened(seconds, self.snapshot.backend, self.snapshot.chunk_states())

    def touch(self) -> Touched:
        """Touch one tensor in the middle of the model: its first element, then all of them."""
        snapshot = self._opened()
        name = _WANTED.format(layer=self._layers // 2)
        tensor = snapshot[name]
        started = time.monotonic()
        tensor[0, 0].item()
        first = time.monotonic() - started
        tensor.copy()
        everything = time.monotonic() - started
        return Touched(
            name, tensor.nbytes, first, everything, snapshot.stats().bytes_read, snapshot.chunk_states()
        )

    def prefetch(self) -> Filled:
        """Populate the rest."""
        snapshot = self._opened()
        started = time.monotonic()
        snapshot.prefetch(wait=True)
        return Filled(time.monotonic() - started, snapshot.chunk_states())

    def compare(self) -> tuple[int, int]:
        """Tensors that differ in any bit from the model file, and bytes compared."""
        snapshot = self._opened()
        original = _tensors_in(np.memmap(self.model, np.uint8, "r"))
        different = 0 if original.keys() == snapshot.keys() else len(original.keys() ^ snapshot.keys())
        compared = 0
        for name in original.keys() & snapshot.keys():
            wanted, found = original[name], snapshot[name].reshape(-1).view(np.uint8)
            same = len(wanted) == len(found) and all(
                np.array_equal(wanted[at : at + _PIECE], found[at : at + _PIECE])
                for at in range(0, len(wanted), _PIECE)
            )
            different += not same
            compared += len(wanted)
        return different, compared

    def _opened(self) -> Snapshot:
        if self.snapshot is None:
            raise ValueError("open() comes first")
        return self.snapshot


# ---- the model ----


def _plan(size: int) -> tuple[list[Tensor], int]:
    """A decoder-only transformer of about `size` bytes: its tensors, and its number of layers."""
    width, words = (1024, 32_000) if size >= 256 * MIB else (256, 8_000)
    inner = 4 * width
    ends = [
        Tensor("model.embed_tokens.weight", "BF16", (words, width), 0.02),
        Tensor("model.norm.weight", "F32", (width,), 0.1),
        Tensor("lm_head.weight", "F32", (words, width), 0.02),
    ]
    one = _layer(0, width, inner)
    layers = max(1, round((size - _bytes(ends)) / _bytes(one)))
    middle = [tensor for number in range(layers) for tensor in _layer(number, width, inner)]
    return [ends[0], *middle, *ends[1:]], layers


def _layer(number: int, width: int, inner: int) -> list[Tensor]:
    start = f"model.layers.{number}."
    spread = width**-0.5
    tensors = []
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        tensors.append(Tensor(f"{start}self_attn.{name}.weight", "BF16", (width, width), spread))
        tensors.append(Tensor(f"{start}self_attn.{name}.bias", "F32", (width,), 0.0))
    for name, shape in (
        ("gate_proj", (inner, width)),
        ("up_proj", (inner, width)),
        ("down_proj", (width, inner)),
    ):
        tensors.append(Tensor(f"{start}mlp.{name}.weight", "BF16", shape, shape[1] ** -0.5))
    tensors.append(Tensor(f"{start}input_layernorm.weight", "F32", (width,), 0.1))
    return tensors


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _header(tensors: Sequence[Tensor]) -> bytes:
    """Of a .safetensors file: its length, and JSON padded so that the weights are aligned."""
    entries: dict[str, Any] = {"__metadata__": {"made_by": "lazymem demo"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.kind,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Sequence[Tensor], pool: ThreadPoolExecutor) -> Iterator[NDArray[Any]]:
    """The tensors' bytes in order, made by several threads: numpy lets the GIL go while it draws."""
    jobs = [
        (tensor, min(_PIECE, tensor.elements - at))
        for tensor in tensors
        for at in range(0, tensor.elements, _PIECE)
    ]
    batch = 2 * cpu_count()  # bounds memory
    for at in range(0, len(jobs), batch):
        some = range(at, min(at + batch, len(jobs)))
        yield from pool.map(lambda number: _draw(*jobs[number], seed=number), some)


def _draw(tensor: Tensor, elements: int, seed: int) -> NDArray[Any]:
    if tensor.spread == 0.0:
        return np.zeros(elements * _ITEMSIZE[tensor.kind], np.uint8)
    values = np.random.Generator(np.random.SFC64(seed)).standard_normal(elements, np.float32)
    values *= np.float32(tensor.spread)
    if tensor.kind == "F32":
        return values
    # bfloat16 is the upper half of a float32; adding half of the lower one rounds.
    bits = values.view(np.uint32)
    bits += np.uint32(0x8000)
    return (bits >> np.uint32(16)).astype(np.uint16)


def _tensors_in(data: NDArray[np.uint8]) -> dict[str, NDArray[np.uint8]]:
    """The bytes of each tensor of a .safetensors file that this module wrote: deliberately not by
    lazymem's reader, so that `compare` has a second opinion."""
    length = int.from_bytes(data[:8].tobytes(), "little")
    entries = json.loads(data[8 : 8 + length].tobytes())
    body = data[8 + length :]
    return {
        name: body[slice(*entry["data_offsets"])] for name, entry in entries.items() if name != "__metadata__"
    }


# ---- the disk ----


def _find_room(needed: int, folder: str | None) -> tuple[str, int]:
    """A folder with `needed` bytes free, and how many it has."""
    places = [folder] if folder is not None else [tempfile.gettempdir(), "/var/tmp", os.getcwd()]
    found = []
    for place in dict.fromkeys(places):
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            if folder is not None:
                raise BuildError(
                    f"{place}: cannot be used ({error.strerror}); name another with --dir"
                ) from error
            continue
        if free >= needed and os.access(place, os.W_OK | os.X_OK):
            return place, free
        found.append(f"{place} ({free // MIB} MiB)")
    raise BuildError(
        f"the demo needs {needed // MIB} MiB on disk for a moment, and there is not that much free in "
        f"{', '.join(found) or 'any usual place'}; name a folder with --dir, or take a smaller --size"
    )


def _forget(path: str) -> None:
    """Ask the kernel to drop the file from its page cache, so that every timing starts on disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
