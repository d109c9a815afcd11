# SPDX-License-Identifier: Apache-2.0
"""`safe_open`: names, metadata, tensors and slices of an open file.

Tensors and arrays show the file's memory, copy-on-write, and keep it alive; closing the handle only takes
the handle away.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..catalog import ArrayInfo
from ..containers.safetensors import PACKED_BITS, dtype_name
from ..snapshot import Snapshot
from . import arguments, package
from .errors import (
    FileClosed,
    InvalidArgument,
    InvalidFile,
    InvalidIndex,
    TensorNotFound,
    UnsupportedTensor,
    both_kinds,
)
from .indexing import parse_index
from .opening import metadata_of, open_weights

if TYPE_CHECKING:
    from types import TracebackType

StrPath = str | os.PathLike[str]


class safe_open:
    """A safetensors file, or anything else that `lazymem.open` reads, opened lazily.

    filename: a path or URL: .safetensors, a folder of shards or their index, .lzm, s3://, https://.
    framework: "pt" ("torch", "pytorch") or "np" ("numpy"). The others that safetensors knows ("tf", "jax",
        "flax", "mlx", "paddle") are handed on to that package, for local .safetensors files.
    device: where torch tensors are to be; "meta" reads nothing.
    backend: "mmap", or "pread", which does not map the file: see `lazymem.safetensors.opening`.
    storage_options, cache: as for `lazymem.open`.
    newer: keywords of newer versions; `mmap` and `prefetch` are understood, others ignored.

    Reads the header. Raises as safetensors does: `FileNotFoundError`, `SafetensorError`, `TypeError`.
    """

    __slots__ = ("__weakref__", "_backend", "_device", "_framework", "_other", "_prefetch", "_snapshot")

    def __init__(
        self,
        filename: StrPath,
        framework: str,
        device: Any = "cpu",
        *,
        backend: str = "mmap",
        storage_options: Mapping[str, Any] | None = None,
        cache: StrPath | bool | None = None,
        **newer: Any,
    ) -> None:
        filename = arguments.filename_of(filename)
        self._framework = arguments.framework_of(framework)
        self._device = arguments.device_of(device)
        self._backend, self._prefetch = arguments.newer_options(
            arguments.backend_of(backend), self._framework, self._device, newer
        )
        self._other: Any = None
        snapshot = open_weights(filename, self._backend, storage_options, cache)
        self._snapshot: Snapshot | None = snapshot
        try:
            arguments.check_framework_has(self._device, self._framework)
            if self._framework not in (arguments.PYTORCH, arguments.NUMPY):
                self._other = _hand_on(filename, snapshot, framework, device)
            if self._prefetch:
                snapshot.prefetch()
        except BaseException:
            self._close()
            raise

    # ---- what is in it ----

    def _open(self) -> Snapshot:
        if self._snapshot is None:
            raise FileClosed("File is closed")
        return self._snapshot

    @property
    def snapshot(self) -> Snapshot:
        """What lies below: counters (`stats`), `prefetch`, `read`. Raises `SafetensorError` once closed."""
        return self._open()

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._open())

    def offset_keys(self) -> list[str]:
        """Names of the tensors, as they lie in the file."""
        return list(self._open())

    def metadata(self) -> dict[str, str] | None:
        """The file's own metadata, None if there is none."""
        return metadata_of(self._open())

    def _info(self, name: object) -> ArrayInfo:
        snapshot = self._open()
        key = arguments.check_str(name, "name")
        if key not in snapshot:
            raise TensorNotFound(f"File does not contain tensor {key}", url=snapshot.url, name=key)
        return snapshot.info(key)

    # ---- tensors ----

    def get_tensor(self, name: str) -> Any:
        """The tensor, shown in place: nothing is read until it is touched, or has to go to a device."""
        info = self._info(name)
        if self._other is not None:
            return self._other.get_tensor(name)
        if self._device == "meta":
            return _to_meta(info)
        return self._to_device(self._show(info))

    def get_tensors(self) -> dict[str, Any]:
        """All tensors by name, in the order of the file."""
        return {name: self.get_tensor(name) for name in self._open()}

    def get_slice(self, name: str) -> PySafeSlice:
        """The tensor as something to be indexed, so that only a part of it is read."""
        info = self._info(name)
        if self._other is not None:
            return PySafeSlice(info, self._other.get_slice(name).__getitem__)
        if self._device == "meta":
            return PySafeSlice(info, lambda index: _to_meta(info)[index])
        # Of the memory, and so after the handle was closed, too.
        return PySafeSlice(
            info, _Indexer(self._open()[name], info, self._strict(), self._show_array, self._to_device)
        )

    def get_strided_slice(self, name: str, dim: int, intervals: Sequence[tuple[int, int]]) -> Any:
        """Parts of the tensor along one dimension, put together in that order; they are copied.

        intervals: (start, stop) pairs, none of them empty. Raises `SafetensorError` if one does not fit.
        """
        info = self._info(name)
        shape = _own_shape(info)
        if not 0 <= dim < len(shape):
            raise InvalidIndex(f"dim {dim} is out of range for tensor {name} with shape {shape}")
        if not intervals:
            raise InvalidIndex(f"tensor {name}: no intervals are given")
        whole = self.get_slice(name)
        parts = []
        for start, stop in intervals:
            if not 0 <= start < stop <= shape[dim]:
                raise InvalidIndex(
                    f"interval ({start}, {stop}) does not fit dimension {dim} of shape {shape}"
                )
            parts.append(whole[(*(slice(None),) * dim, slice(start, stop))])
        return _concatenate(parts, dim, self._framework)

    def tensor_stream(self) -> Iterator[tuple[str, Any]]:
        """Names and tensors in the order of the file, while prefetch=True populates them."""
        snapshot = self._open()
        if not self._prefetch:
            raise InvalidArgument(
                f"{snapshot.url}: tensor_stream needs a file that was opened with prefetch=True"
            )
        return ((name, self.get_tensor(name)) for name in list(snapshot))

    def _strict(self) -> bool:
        """Whether safetensors itself reads the index, rather than torch."""
        return self._framework == arguments.NUMPY or self._backend == arguments.PREAD

    def _show(self, info: ArrayInfo) -> Any:
        return self._show_array(self._open()[info.name], info)

    def _show_array(self, array: Any, info: ArrayInfo) -> Any:
        if self._framework == arguments.PYTORCH:
            from ..torch.tensors import tensor_of

            with both_kinds():
                return tensor_of(array, info.metadata)
        if info.metadata.get("dtype") in PACKED_BITS:
            raise UnsupportedTensor(
                f"Dtype not understood: {_own_dtype(info)}; numpy has none for tensor {info.name}, whose "
                "packed bytes lazymem.open shows"
            )
        return array

    def _to_device(self, tensor: Any) -> Any:
        return tensor if self._device == "cpu" else tensor.to(self._device)

    # ---- lifetime ----

    def _close(self) -> None:
        snapshot, self._snapshot, self._other = self._snapshot, None, None
        if snapshot is not None:
            # Tensors that are alive keep the memory; it goes with the last of them.
            with contextlib.suppress(BufferError):
                snapshot.close()

    def __enter__(self) -> safe_open:
        return self

    def __exit__(
        self,
        _exc_type: type[BaseException] | None,
        _exc_value: BaseException | None,
        _traceback: TracebackType | None,
        /,
    ) -> None:
        self._close()


class safe_open_handle(safe_open):
    """`safe_open` of an open file, which must have a `fileno` and a `name`: it is opened again by that."""

    __slots__ = ()

    def __init__(self, f: Any, framework: str, device: Any = "cpu", **options: Any) -> None:
        arguments.framework_of(framework)
        f.fileno  # noqa: B018  (what has none is no file, says the AttributeError)
        super().__init__(f.name, framework, device, **options)


class PySafeSlice:
    """A tensor to be indexed. Made by `safe_open.get_slice`.

    Framework "pt" takes what torch tensors take; "np", and backend "pread", what
    `lazymem.safetensors.indexing` describes.
    """

    __slots__ = ("_index", "_info")

    def __init__(self, info: ArrayInfo, index: Callable[[Any], Any]) -> None:
        self._info = info
        self._index = index

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor, as the file has it."""
        return _own_shape(self._info)

    def get_dtype(self) -> str:
        """The dtype as the format calls it: "F32", "BF16", ..."""
        return _own_dtype(self._info)

    def __getitem__(self, index: Any) -> Any:
        return self._index(index)


class _Indexer:
    """Indexes one array; holds the memory, not the handle."""

    def __init__(
        self,
        array: Any,
        info: ArrayInfo,
        strict: bool,
        show: Callable[[Any, ArrayInfo], Any],
        to_device: Callable[[Any], Any],
    ) -> None:
        self._array, self._info, self._strict = array, info, strict
        self._show, self._to_device = show, to_device

    def __call__(self, index: Any) -> Any:
        whole = self._show(self._array, self._info)
        if not self._strict:
            return self._to_device(whole[index])
        # With an Ellipsis, so that all indexes together give an array of no dimensions and no scalar.
        return self._to_device(whole[(*parse_index(index, whole.shape), ...)])


def _own_shape(info: ArrayInfo) -> list[int]:
    if info.metadata.get("dtype") in PACKED_BITS and isinstance(info.metadata.get("shape"), list):
        return list(info.metadata["shape"])
    return list(info.shape)


def _own_dtype(info: ArrayInfo) -> str:
    found = dtype_name(info.dtype, info.shape, info.metadata)
    # A snapshot may hold what the format has no word for.
    return found[0] if found else info.dtype.name.upper()


def _to_meta(info: ArrayInfo) -> Any:
    from ..torch.tensors import meta_tensor

    with both_kinds():
        return meta_tensor(info.dtype, info.shape, info.metadata)


def _concatenate(parts: Sequence[Any], dim: int, framework: str) -> Any:
    if framework == arguments.PYTORCH:
        import torch

        return torch.cat(list(parts), dim=dim)
    import numpy as np

    return np.concatenate(parts, axis=dim)


def _hand_on(filename: StrPath, snapshot: Snapshot, framework: str, device: Any) -> Any:
    """The installed package's own handle, for frameworks that it knows and lazymem does not."""
    if snapshot.format != "safetensors" or "://" in os.fspath(filename) or os.path.isdir(filename):
        raise InvalidFile(
            f"{snapshot.url}: framework {framework!r} is for one local .safetensors file, since the "
            "safetensors package makes its tensors; use framework 'np' or 'pt', and convert",
            url=snapshot.url,
        )
    return package.original("safe_open")(filename, framework, device)
